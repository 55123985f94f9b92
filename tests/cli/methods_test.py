"""Models of every method: encoded, indexed and searched by the commands."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.cli.commands_test import run
from tokjax.cli import encode, index, search
from tokjax.data import corpus
from tokjax.eval import comparison
from tokjax.models import checkpoints, saving
from tokjax.retrieval import (
  codecs,
  colbert,
  colberter,
  colberter_texts,
  crisp,
  index_files,
  methods,
  token_index,
  xtr,
)
from tokjax.retrieval import search as maxsim_search

MEANS = crisp.CrispConfig(query_clusters=2, document_clusters=3)
METHODS = {
  "colbert": methods.Method(),
  "xtr": methods.Method("xtr", k_prime=11),
  "crisp": methods.Method("crisp", MEANS),
  "colberter": methods.Method("colberter"),
}
QUERY = "wing light sound"


@pytest.fixture
def trained(model, tmp_path):
  """Saves the tiny model as one that was trained by a method."""

  def save(name, **changes):
    checkpoint = checkpoints.load(model)
    head = None
    if name == "colberter":
      config = colberter.ColberterConfig(
        hidden_dim=16, cls_dim=5, token_dim=4, query_length=16,
        document_length=16, **changes,
      )  # fmt: skip
      head = colberter.ColberterHead(config, rngs=nnx.Rngs(0))
    folder = tmp_path / f"{name}_model"
    saving.save(
      folder, dataclasses.replace(checkpoint, head=head, method=METHODS[name])
    )
    return folder

  return save


def directly(folder, beir, method):
  """Ids of all documents, best first, by the functions of each method."""
  checkpoint = checkpoints.load(str(folder))
  texts = corpus.load(beir)
  parts = checkpoint.tokenizer, checkpoint.encoder, checkpoint.head
  k = len(texts.ids)
  if method.name == "colberter":
    documents, ids = colberter_texts.encode_documents(
      texts.texts, *parts, progress=False
    )
    queries, query_ids = colberter_texts.encode_queries([QUERY], *parts)
    exact = checkpoint.head.config.exact_match
    made = token_index.build(
      documents.tokens, documents.offsets, word_ids=ids if exact else None,
      candidates={
        "cls": token_index.store_vectors(documents.pooled, name="float16")
      },
    )  # fmt: skip
    found = colberter_texts.search_fused(
      made,
      *map(jnp.asarray, queries[:3]),
      checkpoint.head.fusion[...],
      jnp.asarray(query_ids) if exact else None,
      k=k,
    )
    return [texts.ids[i] for i in found.index[0]]
  documents = colbert.encode_documents(
    texts.texts, *parts, checkpoint.config, progress=False
  )
  queries = colbert.encode_queries([QUERY], *parts, checkpoint.config)
  tokens, mask = map(jnp.asarray, queries[:2])
  rows, offsets = documents.tokens, documents.offsets
  if method.name == "crisp":
    rows, offsets = crisp.cluster_packed(rows, offsets, method.crisp)
    tokens, mask, *_ = crisp.cluster_queries(tokens, mask, method.crisp)
  made = token_index.build(rows, offsets)
  if method.name == "xtr":
    found = xtr.search(made, tokens, mask, k=k, k_prime=method.k_prime)
  else:
    found = maxsim_search.search(made, tokens, mask, k=k)
  return [texts.ids[i] for i in np.asarray(found.index[0]) if i >= 0]


def searched(capsys, folder, *words):
  code, out, err = run(
    capsys, "search", folder, QUERY, "-k", 12, "--json", *words
  )
  assert code == 0, err
  return [hit["id"] for hit in json.loads(out)["hits"]]


def build(capsys, corpus_path, folder, *words):
  code, out, err = run(
    capsys, "index", corpus_path, folder, "--codec", "float32", "--json", *words
  )
  assert code == 0, err
  return json.loads(out)


@pytest.mark.parametrize("name", METHODS)
def test_a_trained_model_is_searched_by_its_method(
  trained, beir, tmp_path, capsys, name
):
  folder, place = trained(name), tmp_path / "index"
  fde = ("--fde", 1280) if name in ("colbert", "crisp") else ()
  counts = build(capsys, beir, place, "--model", folder, *fde)
  assert counts["method"] == name and counts["bytes_per_document"] > 0
  config = index.read_config(index_files.open_index(place))
  assert config.method == METHODS[name] and bool(config.fde) == bool(fde)
  assert searched(capsys, place) == directly(folder, beir, METHODS[name])
  code, out, _ = run(capsys, "search", place, "wing", "-k", 1)
  assert code == 0 and "1." in out


@pytest.mark.parametrize(
  ("words", "method"),
  [
    (("--method", "xtr", "--k-prime", 7), methods.Method("xtr", k_prime=7)),
    (("--method", "xtr"), methods.Method("xtr")),
    (
      ("--method", "crisp", "--crisp", "C4x8"),
      methods.Method("crisp", crisp.CrispConfig(**crisp.PRESETS["C4x8"])),
    ),
    (
      ("--method", "crisp", "--crisp", "C50"),
      methods.Method("crisp", crisp.CrispConfig(**crisp.PRESETS["C50"])),
    ),
    (("--method", "colbert"), methods.Method()),
  ],
)
def test_any_model_is_indexed_by_a_method(
  model, beir, tmp_path, capsys, words, method
):
  place = tmp_path / "index"
  build(capsys, beir, place, "--model", model, "--fde", 0, *words)
  assert index.read_config(index_files.open_index(place)).method == method
  assert searched(capsys, place) == directly(model, beir, method)


def test_means_are_fewer_bytes(trained, beir, tmp_path, capsys):
  folder = trained("crisp")
  small = build(capsys, beir, tmp_path / "a", "--model", folder, "--fde", 0)
  large = build(
    capsys, beir, tmp_path / "b", "--model", folder, "--fde", 0,
    "--method", "colbert",
  )  # fmt: skip
  # Documents of five tokens, specials included; three means of width 16.
  less = large["bytes_per_document"] - small["bytes_per_document"]
  assert less > 0.5 * (5 - 3) * 16 * 4


@pytest.mark.parametrize("name", ["crisp", "colberter"])
def test_encoded_files_keep_the_method(trained, beir, tmp_path, capsys, name):
  folder, file = trained(name), tmp_path / "encoded.safetensors"
  assert run(capsys, "encode", beir, file, "--model", folder)[0] == 0
  assert encode.read(file).method == METHODS[name]
  place = tmp_path / "index"
  build(capsys, file, place, *(() if name == "colberter" else ("--fde", 0)))
  assert index.read_config(index_files.open_index(place)).method.name == name
  want = directly(folder, beir, METHODS[name])
  assert searched(capsys, place)[:3] == want[:3]  # float16 in between
  code, _, err = run(
    capsys, "index", file, tmp_path / "other", "--method", "xtr"
  )
  assert code == 2 and f"was encoded by '{name}'" in err


def test_encoded_tokens_are_clustered_afterwards(model, beir, tmp_path, capsys):
  file = tmp_path / "encoded.safetensors"
  assert run(capsys, "encode", beir, file, "--model", model)[0] == 0
  words = ("--method", "crisp", "--crisp", "C4x8", "--fde", 0)
  build(capsys, file, tmp_path / "a", *words)
  build(capsys, beir, tmp_path / "b", "--model", model, *words)
  a, b = (index_files.open_index(tmp_path / name).load() for name in ("a", "b"))
  np.testing.assert_array_equal(a.offsets, b.offsets)
  np.testing.assert_allclose(
    a.payload["values"], b.payload["values"], atol=2e-3
  )


def test_added_documents_are_encoded_as_the_index_is(
  model, beir, tmp_path, capsys
):
  place, more = tmp_path / "index", tmp_path / "more.jsonl"
  words = ("--model", model, "--method", "crisp", "--crisp", "C4x8")
  build(capsys, beir, place, "--fde", 0, *words)
  more.write_text(json.dumps({"id": "new", "text": "wing " * 15}) + "\n")
  build(capsys, more, place, "--model", model, "--add")
  stored = index_files.open_index(place).load()
  assert stored.ids[-1] == "new" and np.diff(stored.offsets)[-1] <= 8
  code, _, err = run(
    capsys, "index", more, place, "--model", model, "--add", "--method", "xtr"
  )
  assert code == 2 and "was made by Method(name='crisp'" in err
  encoded = encode.encode_corpus(more, model, progress=False)
  with pytest.raises(ValueError, match="was made by .*crisp.*, got .*colbert"):
    index.write(
      place, ["x"], [""], encoded.documents, encoded.sha256,
      index.IndexConfig(model=model), add=True,
    )  # fmt: skip


def test_an_index_that_names_no_method_is_colbert(
  model, beir, tmp_path, capsys
):
  encoded = encode.encode_corpus(beir, model, progress=False)
  codec = codecs.train("float32", None, encoded.documents.tokens)
  place = tmp_path / "index"
  index_files.create(
    place,
    codec,
    metadata={
      "format": "tokjax index 1", "sha256": encoded.sha256, "model": model,
      "codec": "float32", "fde": 0, "fill_empty": False, "seed": 0,
    },
  )  # fmt: skip
  index_files.add(
    place,
    encoded.ids,
    codecs.encode_corpus(codec, encoded.documents.tokens),
    encoded.documents.offsets,
    vectors={"pooled": encoded.documents.pooled.astype(np.float16)},
    texts=encoded.texts,
  )
  assert searched(capsys, place) == directly(model, beir, methods.Method())
  build(capsys, _one(tmp_path), place, "--model", model, "--add")
  assert len(searched(capsys, place)) == 12


def _one(folder: pathlib.Path) -> pathlib.Path:
  path = folder / "one.jsonl"
  path.write_text('{"id": "new", "text": "sound"}\n')
  return path


def test_words_are_marked_by_tokens_where_there_are_some(
  trained, beir, tmp_path, capsys
):
  for name, count in (("crisp", 1), ("xtr", 1), ("colberter", 0)):
    place = tmp_path / name
    build(capsys, beir, place, "--model", trained(name))
    searcher = search.open_searcher(str(place))
    assert len(searcher.matches("wing", "drag wing")) == count


@pytest.mark.parametrize(
  ("words", "text"),
  [
    (("--method", "crisp"), "--method crisp needs --crisp, one of C4x8"),
    (("--crisp", "C25"), "--crisp needs --method crisp"),
    (("--method", "crisp", "--crisp", "C25", "--k-prime", 3),
     "--k-prime needs --method xtr"),
    (("--method", "xtr", "--k-prime", 0), "k_prime must lie in 1.."),
  ],
)  # fmt: skip
def test_options_that_do_not_go_together(
  model, beir, tmp_path, capsys, words, text
):
  code, _, err = run(
    capsys, "index", beir, tmp_path / "i", "--model", model, *words
  )
  assert code == 2 and text in err


def test_what_words_cannot_do_is_one_clear_line(
  trained, beir, tmp_path, capsys
):
  folder = trained("colberter")
  for words, text in (
    (("index", beir, tmp_path / "i", "--method", "xtr"), "must be 'colberter'"),
    (("index", beir, tmp_path / "j", "--fde", 1280), "fde must be 0"),
    (("evaluate", beir, "--methods", "maxsim"), "one of 'bm25', 'dense', 'col"),
    (("evaluate", beir, "--document-length", 9), "document_length must be"),
  ):
    code, _, err = run(capsys, *words, "--model", folder)
    assert code == 2 and text in err and err.count("\n") == 1
  place = tmp_path / "k"
  build(capsys, beir, place, "--model", folder)
  code, _, err = run(capsys, "search", place, "wing", "--mode", "fde")
  assert code == 2 and "mode must be one of 'cls', 'exact'" in err


UNI = {"exact_match": True, "compressed_dim": 1}


def test_one_number_a_word_is_indexed_and_searched(
  trained, beir, tmp_path, capsys
):
  folder, place = trained("colberter", **UNI), tmp_path / "index"
  build(capsys, beir, place, "--model", folder)
  stored = index_files.open_index(place)
  read = stored.load()
  assert read.payload["values"].shape == (len(read.word_ids), 1)
  assert stored.manifest["format_version"] == 2
  want = directly(folder, beir, METHODS["colberter"])
  assert searched(capsys, place) == want
  assert searched(capsys, place, "--mode", "exact") == want
  # By way of a file: what is kept there is what is compared.
  file, second = tmp_path / "encoded.safetensors", tmp_path / "second"
  assert run(capsys, "encode", beir, file, "--model", folder)[0] == 0
  build(capsys, file, second)
  np.testing.assert_array_equal(
    index_files.open_index(second).load().word_ids, read.word_ids
  )
  # Added and deleted documents keep index and words together.
  build(capsys, _one(tmp_path), place, "--model", folder, "--add")
  index_files.delete(place, [want[0]])
  index_files.compact(place)
  found = searched(capsys, place)
  assert [name for name in found if name != "new"] == want[1:]
  assert "new" in found


def test_bytes_of_words_to_match_are_counted(trained, beir, tmp_path, capsys):
  """The same vectors with and without ids: four bytes a word, and metadata."""
  sizes = {}
  for exact_match in (False, True):
    folder = trained("colberter", **UNI | {"exact_match": exact_match})
    place = tmp_path / str(exact_match)
    build(capsys, beir, place, "--model", folder)
    sizes[exact_match] = index_files.open_index(place).num_bytes
  words = len(index_files.open_index(place).load().word_ids)
  assert 4 * words <= sizes[True] - sizes[False] <= 4 * words + 1024
  # Weights are the same, so that only the words tell the indexes apart.
  code, _, err = run(
    capsys, "search", tmp_path / "False", "wing", "--model", folder
  )
  assert code == 2 and "query_word_ids must be None for an index" in err


@pytest.mark.parametrize("exact_match", [False, True])
def test_words_are_evaluated(trained, beir, capsys, exact_match):
  folder = trained("colberter", **UNI | {"exact_match": exact_match})
  code, out, err = run(capsys, "evaluate", beir, "--model", folder, "--json")
  assert code == 0, err
  rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
  assert list(rows) == list(comparison.WORD_METHODS)
  # 12 documents, all of them candidates.
  both, ranked = rows["colberter"], rows["dense+colberter"]
  assert ranked["metrics"] == both["metrics"]
  assert ranked["exact_overlap"] == 1.0 and rows["bm25"]["exact_overlap"] < 1
  # Pages of 16 rows: a float16 and, with exact match, an id for each.
  assert both["bytes_per_document"] > 16 * (6 if exact_match else 2)
