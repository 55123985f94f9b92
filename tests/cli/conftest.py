"""A tiny checkpoint and corpus, for commands run from end to end."""

import json
import pathlib
import shutil

import pytest
import tokenizers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WORDS = "wing lift drag heat wire gas flow wave plate sound speed light".split()


@pytest.fixture
def model(tmp_path) -> str:
  return write_model(tmp_path / "model")


@pytest.fixture
def beir(tmp_path) -> str:
  return write_beir(tmp_path / "beir")


def write_model(folder: pathlib.Path) -> str:
  """A random BERT with a vocabulary of a dozen words; returns the folder."""
  shutil.copytree(GOLDEN / "bert_tiny", folder)
  names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {name: i for i, name in enumerate(names)}, "[UNK]"
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  return str(folder)


def write_beir(folder: pathlib.Path) -> str:
  """A data set whose queries are words of their document, in BEIR layout."""
  (folder / "qrels").mkdir(parents=True)
  documents, queries, judgements = [], [], ["query-id\tcorpus-id\tscore"]
  for i, word in enumerate(WORDS):
    text = f"{word} {WORDS[i - 1]} {word}"
    documents.append({"_id": f"d{i}", "title": "", "text": text})
    queries.append({"_id": f"q{i}", "text": word})
    judgements.append(f"q{i}\td{i}\t1")
  for name, rows in (("corpus", documents), ("queries", queries)):
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / f"{name}.jsonl").write_text(lines + "\n")
  (folder / "qrels" / "test.tsv").write_text("\n".join(judgements) + "\n")
  return str(folder)
