import hashlib
import json
import os
import pathlib
import subprocess
import sys

import grain
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from tokjax.data import batches, beir, training_set
from tokjax.data.training_set import TrainingSet
from tokjax.retrieval import colbert, masks, words

CONFIG = colbert.ColbertConfig(query_length=10, document_length=20)
NAMES = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]"]
NAMES += ["[MASK]", *(f"w{i}" for i in range(40))]
NUM_EXAMPLES = 22


def make_tokenizer(names=NAMES):
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, "[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    special_tokens=[(w, names.index(w)) for w in ("[CLS]", "[SEP]")],
  )
  return tokenizer


def make_train(teacher=True):
  """22 examples of 20 queries; every other one has short documents only."""
  draw = np.random.RandomState(0)

  def text(words):
    return " ".join(f"w{i}" for i in draw.randint(0, 40, words))

  positives, negatives = [], []
  for example in range(NUM_EXAMPLES):
    rows = draw.permutation(12 if example % 2 else 25)
    num_positives = draw.randint(1, 4)
    positives.append(rows[:num_positives].tolist())
    negatives.append(rows[num_positives : num_positives + 3].tolist())
  return TrainingSet(
    query_texts=[text(words) for words in draw.randint(1, 8, 20)],
    document_texts=[
      text(words)
      for words in (*draw.randint(1, 11, 12), *draw.randint(1, 31, 18))
    ],
    query_index=[*range(20), 3, 7],
    positives=positives,
    negatives=negatives,
    teacher_scores=[
      [
        100 * example + row
        for row in [*positives[example], *negatives[example]]
      ]
      for example in range(NUM_EXAMPLES)
    ]
    if teacher
    else None,
  )


def build(train=None, config=CONFIG, **kwargs):
  kwargs = {
    "batch_size": 6,
    "num_negatives": 2,
    "bucket": 8,
    "seed": 5,
  } | kwargs
  train = make_train() if train is None else train
  return batches.build(train, make_tokenizer(), config, **kwargs)


def assert_same(one, two):
  assert one.keys() == two.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(value, two[name], err_msg=name)
    assert value.dtype == two[name].dtype


def digest(stream):
  total = hashlib.sha256()
  for batch in stream:
    for name in sorted(batch):
      total.update(name.encode() + batch[name].tobytes())
  return total.hexdigest()


def test_arrays_say_what_the_texts_and_judgements_say():
  train, tokenizer = make_train(), make_tokenizer()
  queries = colbert.tokenize(
    train.query_texts, tokenizer, length=10, marker="[unused0]"
  )
  documents = colbert.tokenize(
    train.document_texts, tokenizer, length=20, marker="[unused1]"
  )
  answers = {query: set() for query in train.query_index}
  for query, rows in zip(train.query_index, train.positives, strict=True):
    answers[query] |= set(rows)
  found_false_negatives = 0
  for batch in build(train, num_epochs=3):
    width = batch["document_ids"].shape[2]
    chosen = batch["document_index"]
    assert batch["query_ids"].shape == (6, 10)
    assert batch["document_ids"].shape == (6, 3, width)
    assert batch["false_negative"].shape == (6, 18)
    longest = max(len(documents[row]) for row in chosen.ravel())
    assert width == {8: 8, 16: 16, 24: 20}[-(-longest // 8) * 8]
    for i, query in enumerate(batch["query_index"]):
      num = len(queries[query])
      assert batch["query_ids"][i].tolist() == (
        queries[query].tolist() + [0] * (10 - num)
      )
      assert batch["query_mask"][i].tolist() == [True] * num + [False] * (
        10 - num
      )
      example = round((batch["teacher"][i, 0] - chosen[i, 0]) / 100)
      assert train.query_index[example] == query
      assert (
        batch["teacher"][i].tolist() == (100 * example + chosen[i]).tolist()
      )
      assert chosen[i, 0] in train.positives[example]
      assert set(chosen[i, 1:]) < set(train.negatives[example])
      for column, row in enumerate(chosen[i]):
        num = len(documents[row])
        assert batch["document_ids"][i, column].tolist() == (
          documents[row].tolist() + [0] * (width - num)
        )
        assert batch["document_mask"][i, column].sum() == num
        assert batch["document_mask"][i, column, :num].all()
      for column, row in enumerate(chosen.ravel()):
        wrong = column != 3 * i and row in answers[query]
        assert batch["false_negative"][i, column] == wrong
        found_false_negatives += wrong
  assert found_false_negatives > 0


def test_dtypes_and_what_is_optional():
  batch = build()[0]
  assert {name: str(value.dtype) for name, value in batch.items()} == {
    "query_ids": "int32",
    "query_mask": "bool",
    "document_ids": "int32",
    "document_mask": "bool",
    "query_index": "int32",
    "document_index": "int32",
    "false_negative": "bool",
    "teacher": "float32",
  }
  assert "teacher" not in build(make_train(teacher=False))[0]
  assert build(num_negatives=0)[0]["document_ids"].shape[:2] == (6, 1)


def test_few_shapes_and_every_epoch_other_batches():
  dataset = build(num_epochs=20)
  assert len(dataset) == 20 * (NUM_EXAMPLES // 6)
  shapes = {batch["document_ids"].shape for batch in dataset}
  assert shapes == {(6, 3, 16), (6, 3, 20)}
  epochs = [digest(dataset[3 * e + i] for i in range(3)) for e in range(20)]
  assert len(set(epochs)) == 20
  assert digest(build(num_epochs=20)) == digest(dataset)
  assert digest(build(num_epochs=20, seed=6)) != digest(dataset)


def test_queries_without_expansion_are_padded_to_the_longest():
  config = colbert.ColbertConfig.zero_shot(length=20)
  train = make_train()
  assert max(len(text.split()) for text in train.query_texts) == 7
  # [CLS], 7 words, [SEP], rounded up to a multiple of 8, then to one of 15.
  assert build(train, config)[0]["query_ids"].shape == (6, 16)
  assert build(train, config, bucket=15)[0]["query_ids"].shape == (6, 15)


def test_query_arrays_are_those_that_expand_queries_takes():
  batch = build()[0]
  expanded = masks.expand_queries(
    jnp.asarray(batch["query_ids"]),
    jnp.asarray(batch["query_mask"]),
    mask_id=NAMES.index("[MASK]"),
    length=CONFIG.query_length,
  )
  padding = np.asarray(expanded.ids) == NAMES.index("[MASK]")
  np.testing.assert_array_equal(padding, ~batch["query_mask"])


@pytest.mark.parametrize("threads", [0, 3])
def test_state_resumes_at_the_exact_batch(threads):
  """Also across the border of an epoch, with batches read ahead."""
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
  iterator = iter(build(num_epochs=4).to_iter_dataset(options))
  for _ in range(5):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  rest = list(iterator)
  assert len(rest) == 7
  again = iter(build(num_epochs=4).to_iter_dataset(options))
  again.set_state(state)
  for one, two in zip(rest, again, strict=True):
    assert_same(one, two)


def test_another_process_makes_the_same_batches():
  program = (
    "import batches_test as t, grain; "
    "iterator = iter(t.build()); iterator.set_state({'next_index': 4}); "
    "print(t.digest(next(iterator) for _ in range(4)))"
  )
  folder = pathlib.Path(__file__).parent
  root = folder.parents[1]
  done = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {"PYTHONPATH": f"{folder}:{root}", "PYTHONHASHSEED": "17"},
  )
  dataset = build()
  assert done.stdout.strip() == digest(dataset[4 + i] for i in range(4))


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_hold_the_rows_of_one_batch(process_count):
  whole = build(num_epochs=2)
  shares = [
    build(num_epochs=2, process_index=i, process_count=process_count)
    for i in range(process_count)
  ]
  for step in range(len(whole)):
    parts = [share[step] for share in shares]
    assert len(parts[0]["query_ids"]) == 6 // process_count
    joined = {
      name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }
    assert_same(joined, whole[step])


def number_of_word(texts, tokenizer, *, length, marker):
  """1000 plus the token id; 0 for special tokens."""
  rows = colbert.tokenize(texts, tokenizer, length=length, marker=marker)
  return [np.where(row < 7, 0, row + 1000).astype(np.uint32) for row in rows]


def test_words_follow_their_tokens():
  batch = build(words=number_of_word)[1]
  for name in ("query", "document"):
    ids, numbers = batch[f"{name}_ids"], batch[f"{name}_words"]
    assert numbers.dtype == np.uint32
    np.testing.assert_array_equal(numbers, np.where(ids < 7, 0, ids + 1000))
    assert (numbers > 0).any()
  with pytest.raises(ValueError, match="one number for every token"):
    build(words=lambda texts, tokenizer, **_: [np.ones(3)] * len(texts))


def whole_words(texts, tokenizer, *, length, marker):
  assert marker is None
  rows = words.tokenize_words(texts, tokenizer, length=length)
  return [np.concatenate([[0], row.words])[row.slot] for row in rows]


def test_whole_words_are_the_same_in_queries_and_documents():
  config = colbert.ColbertConfig.zero_shot(length=20)
  of_token = {}
  for batch in build(config=config, words=whole_words, num_epochs=1):
    for name in ("query", "document"):
      ids, numbers = batch[f"{name}_ids"], batch[f"{name}_words"]
      assert (numbers[ids < 7] == 0).all() and (numbers[ids >= 7] > 0).all()
      for token, number in zip(ids.ravel(), numbers.ravel(), strict=True):
        assert of_token.setdefault(token, number) == number
  assert len(set(of_token.values())) == len(NAMES) - 7 + 1


@pytest.mark.unchecked
@pytest.mark.parametrize(
  "kwargs,message",
  [
    ({"batch_size": 23}, r"batch_size must lie in 1\.\.22, got 23"),
    ({"num_negatives": 4}, "num_negatives=4 .* but 22 examples have fewer"),
    ({"seed": -1}, r"seed must lie in 0\.\."),
    ({"bucket": 21}, r"bucket must lie in 1\.\.20"),
    ({"num_epochs": 0}, "num_epochs must lie in 1"),
    ({"process_count": 4}, "batch_size must be a multiple of 4, got 6"),
    ({"process_count": 2, "process_index": 2}, r"process_index .* 0\.\.1"),
    ({"config": colbert.ColbertConfig(query_marker="?")}, "marker '\\?'"),
  ],
)
def test_errors(kwargs, message):
  with pytest.raises(ValueError, match=message):
    build(**kwargs)


def test_scifact_train(shared_data):
  judged = beir.load(shared_data / "scifact", "train")
  train = training_set.from_retrieval_set(judged)
  known = sorted({w for text in judged.document_texts for w in text.split()})
  dataset = batches.build(
    train,
    make_tokenizer([*NAMES, *known]),
    colbert.ColbertConfig(),
    batch_size=32,
    num_epochs=1,
    seed=0,
  )
  assert len(dataset) == 25
  seen = []
  for batch in dataset:
    seen += batch["query_index"].tolist()
    assert batch["document_ids"].shape[2] in (*range(32, 180, 32), 180)
    for i, query in enumerate(batch["query_index"]):
      judgements = judged.qrels[judged.query_ids[query]]
      ids = [judged.document_ids[row] for row in batch["document_index"][:, 0]]
      assert ids[i] in judgements
      assert batch["false_negative"][i].tolist() == [
        column != i and key in judgements for column, key in enumerate(ids)
      ]
  assert len(set(seen)) == len(seen) == 25 * 32
