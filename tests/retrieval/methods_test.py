"""Each method through the one door gives what its own functions give."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from tests.compiled import run
from tokjax.retrieval import (
  colbert,
  colberter,
  colberter_texts,
  crisp,
  methods,
  search,
  token_index,
  xtr,
)
from tokjax.retrieval.methods import Method

WORDS = [f"w{i}" for i in range(12)]
VOCABULARY = ["[UNK]", "[CLS]", "[SEP]", *WORDS]
MEANS = crisp.CrispConfig(query_clusters=2, document_ratio=0.5)
METHODS = {
  "colbert": Method(),
  "xtr": Method("xtr", k_prime=9),
  "crisp": Method("crisp", MEANS),
  "colberter": Method("colberter"),
}


class Model(NamedTuple):
  tokenizer: tokenizers.Tokenizer
  encoder: Any
  head: Any
  config: colbert.ColbertConfig
  method: Method


def encoder(ids, attention_mask):
  """A random vector of each word, moved by the mean over the text."""
  table = jax.random.normal(jax.random.key(3), (len(VOCABULARY), 6))
  own = jnp.where(attention_mask[..., None], table[ids], 0)
  mean = own.sum(1, keepdims=True) / attention_mask.sum(1)[:, None, None]
  return own + 0.5 * mean


@pytest.fixture(scope="module")
def tokenizer():
  model = tokenizers.models.WordLevel(
    {name: i for i, name in enumerate(VOCABULARY)}, "[UNK]"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
  )
  return tokenizer


@pytest.fixture(scope="module")
def texts():
  random = np.random.default_rng(0)
  return [
    " ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(21)
  ]


@pytest.fixture(scope="module")
def questions():
  random = np.random.default_rng(1)
  return [
    " ".join(random.choice(WORDS, random.integers(1, 6))) for _ in range(7)
  ]


@functools.cache
def made(config):
  return jax.jit(lambda: colberter.ColberterHead(config, rngs=nnx.Rngs(0)))()


def make(tokenizer, name, **changes):
  head = None
  if name == "colberter":
    config = colberter.ColberterConfig(
      hidden_dim=6, cls_dim=5, token_dim=4, **changes
    )
    head = made(config)
  config = colbert.ColbertConfig.zero_shot(16)
  return Model(tokenizer, encoder, head, config, METHODS[name])


def built(documents, vectors="pooled"):
  stored = token_index.store_vectors(documents.pooled)
  return token_index.build(
    documents.tokens, documents.offsets, candidates={vectors: stored},
    word_ids=documents.word_ids,
  )  # fmt: skip


def direct(name, tokenizer, texts, questions, k):
  """Documents, and the ranking, by the functions of each method."""
  model = make(tokenizer, name)
  parts = (tokenizer, encoder, model.head)
  if name == "colberter":
    documents = colberter_texts.encode_documents(
      texts, *parts, progress=False
    ).documents
    queries = colberter_texts.encode_queries(questions, *parts).queries
    return documents, run(
      colberter_texts.search_fused,
      built(documents, "cls"),
      *queries[:3],
      model.head.fusion[...],
      k=k,
      num_candidates=9,
    )
  documents = colbert.encode_documents(
    texts, *parts, model.config, progress=False
  )
  queries = colbert.encode_queries(questions, *parts, model.config)
  tokens, mask = queries[:2]
  if name == "crisp":
    means, offsets = crisp.cluster_packed(
      documents.tokens, documents.offsets, MEANS
    )
    documents = documents._replace(tokens=means, offsets=offsets)
    tokens, mask, *_ = run(crisp.cluster_queries, tokens, mask, MEANS)
  find = xtr.search if name == "xtr" else search.search
  settings = {"k_prime": 9} if name == "xtr" else {}
  return documents, run(find, built(documents), tokens, mask, k=k, **settings)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_its_functions_give(tokenizer, texts, questions, name):
  k = 8
  want_documents, want = direct(name, tokenizer, texts, questions, k)
  model = make(tokenizer, name)
  documents = methods.encode_documents(texts, model, progress=False)
  np.testing.assert_array_equal(documents.offsets, want_documents.offsets)
  np.testing.assert_allclose(documents.tokens, want_documents.tokens, atol=1e-6)
  np.testing.assert_array_equal(documents.pooled, want_documents.pooled)
  index = built(documents, model.method.vectors)
  queries = methods.encode_queries(questions, model)
  assert queries.tokens.shape[:2] == queries.mask.shape
  for batch_size in (3, 16):  # three batches, the last not full; one
    got = methods.search(
      index, queries, model, k=k, num_candidates=9, batch_size=batch_size
    )
    np.testing.assert_array_equal(got.index, want.index)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-5)


def test_rankings_of_the_methods_differ(tokenizer, texts, questions):
  found = {
    name: np.asarray(direct(name, tokenizer, texts, questions, 8)[1].index)
    for name in METHODS
  }
  for name in ("xtr", "crisp", "colberter"):
    assert (found[name] != found["colbert"]).any()


def test_colberter_over_all_documents_scores_each(tokenizer, texts, questions):
  model = make(tokenizer, "colberter")
  documents = methods.encode_documents(texts, model, progress=False)
  queries = methods.encode_queries(questions, model)
  got = methods.search(
    built(documents, "cls"), queries, model, mode="exact", k=len(texts)
  )
  weight = float(run(jax.nn.sigmoid, model.head.fusion[...]))
  got = jax.device_get(got)
  for i, query in enumerate(queries.tokens):
    for place, score in zip(got.index[i], got.scores[i], strict=True):
      first, last = documents.offsets[place : place + 2]
      similarity = query[queries.mask[i]] @ documents.tokens[first:last].T
      cls = queries.pooled[i] @ documents.pooled[place]
      want = weight * cls + (1 - weight) * similarity.max(axis=1).sum()
      np.testing.assert_allclose(score, want, atol=1e-4)


@pytest.mark.parametrize("name", ["colbert", "xtr"])
def test_candidates_over_everything_equal_exact_maxsim(
  tokenizer, texts, questions, name
):
  model = make(tokenizer, name)
  index = built(methods.encode_documents(texts, model, progress=False))
  queries = methods.encode_queries(questions, model)
  want = methods.search(index, queries, model, mode="exact", k=5)
  got = methods.search(
    index, queries, model, mode="pooled", k=5, num_candidates=len(texts)
  )
  np.testing.assert_array_equal(got.index, want.index)


def test_candidates_come_from_the_vectors_of_queries(tokenizer, texts):
  model = make(tokenizer, "crisp")
  documents = methods.encode_documents(texts, model, progress=False)
  queries = methods.encode_queries(texts[:4], model)
  got = methods.search(
    built(documents), queries, model, mode="pooled", k=1, num_candidates=1
  )
  want = np.argmax(queries.pooled @ documents.pooled.T, axis=1)
  np.testing.assert_array_equal(got.index[:, 0], want)


def test_reducing_equals_encoding_by_the_method(tokenizer, texts):
  whole = methods.encode_documents(
    texts, make(tokenizer, "colbert"), progress=False
  )
  want = methods.encode_documents(
    texts, make(tokenizer, "crisp"), progress=False
  )
  got = methods.reduce_documents(whole, METHODS["crisp"])
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  assert len(got.tokens) < len(whole.tokens)
  assert methods.reduce_documents(whole, METHODS["xtr"]) is whole


@pytest.mark.parametrize(
  ("name", "mode", "message"),
  [
    ("colbert", "xtr", "mode must be one of 'exact', 'pooled', got 'xtr'"),
    ("xtr", "fde", "mode must be one of 'xtr', 'exact', 'pooled', got 'fde'"),
    ("colberter", "pooled", "mode must be one of 'cls', 'exact', got 'pooled'"),
  ],
)
def test_modes_of_other_methods_are_named(
  tokenizer, texts, name, mode, message
):
  model = make(tokenizer, name)
  documents = methods.encode_documents(texts[:3], model, progress=False)
  index = built(documents, model.method.vectors)
  queries = methods.encode_queries(texts[:1], model)
  with pytest.raises(ValueError, match=message):
    methods.search(index, queries, model, mode=mode, k=1)


def equal_words(tokenizer, texts, questions):
  """A model that compares equal words only, and what it makes of texts."""
  model = make(tokenizer, "colberter", exact_match=True, compressed_dim=1)
  documents = methods.encode_documents(texts, model, progress=False)
  return model, documents, methods.encode_queries(questions, model)


@pytest.mark.parametrize("mode", [None, "cls", "exact"])
def test_equal_words_are_searched_as_the_model_scores_them(
  tokenizer, texts, questions, mode
):
  texts = [*texts, ""]  # and a document without words
  model, documents, queries = equal_words(tokenizer, texts, questions)
  assert documents.tokens.shape[1] == 1
  assert documents.word_ids.shape == documents.tokens.shape[:1]
  assert queries.word_ids.shape == queries.mask.shape
  chosen = colberter_texts.select_documents(
    colberter_texts.EncodedDocuments(documents, documents.word_ids),
    np.arange(len(texts))[None],
  )
  cls, words, mask, ids = (x[0] for x in chosen)
  tokens, query_mask, pooled, query_ids = queries
  want = run(
    colberter.score, pooled, tokens, query_mask, cls, words, mask,
    model.head.fusion[...], query_ids, ids,
  )  # fmt: skip
  number = len(texts) if mode == "exact" else 9
  first = np.argsort(-np.asarray(want.cls_scores), axis=1)[:, :number]
  scores = np.take_along_axis(np.asarray(want.scores), first, axis=1)
  index = built(documents, "cls")
  for batch_size in (3, 16):
    got = methods.search(
      index, queries, model, mode=mode, k=9, num_candidates=9,
      batch_size=batch_size,
    )  # fmt: skip
    np.testing.assert_allclose(
      got.scores, -np.sort(-scores, axis=1)[:, :9], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
      np.take_along_axis(np.asarray(want.scores), got.index, axis=1),
      got.scores, rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_words_of_one_side_only_are_named(tokenizer, texts, questions):
  model, documents, queries = equal_words(tokenizer, texts, questions)
  index = built(documents, "cls")
  plain = built(documents._replace(word_ids=None), "cls")
  with pytest.raises(ValueError, match="query_word_ids must be None for an"):
    methods.search(plain, queries, model, k=1)
  queries = queries._replace(word_ids=None)
  with pytest.raises(ValueError, match="query_word_ids must be given for an"):
    methods.search(index, queries, model, k=1)


@pytest.mark.parametrize("name", METHODS)
def test_words_are_named_for_exact_match_only(tokenizer, texts, name):
  model = make(tokenizer, name)
  assert methods.encode_documents(texts, model, progress=False).word_ids is None
  assert methods.encode_queries(texts, model).word_ids is None


def test_heads_and_methods_that_do_not_belong_together(tokenizer, texts):
  words = make(tokenizer, "colberter")._replace(method=Method("xtr"))
  tokens = make(tokenizer, "colbert")._replace(method=Method("colberter"))
  for model in (words, tokens):
    with pytest.raises(ValueError, match="must be 'colberter' for a ColBERTer"):
      methods.encode_documents(texts, model, progress=False)
    with pytest.raises(ValueError, match="must be 'colberter' for a ColBERTer"):
      methods.encode_queries(texts, model)
    with pytest.raises(ValueError, match="must be 'colberter' for a ColBERTer"):
      methods.check_head(model.head, model.method)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    pytest.param(
      ("plaid",),
      "method must be one of 'colbert', 'xtr', 'crisp'",
      marks=pytest.mark.unchecked,
    ),
    (("crisp",), "crisp must be given for method 'crisp'"),
    (
      ("xtr", MEANS),
      "crisp must be given for method 'crisp', and for no other",
    ),
    (("xtr", None, 0), "k_prime must lie in 1..2147483648, got 0"),
  ],
)
def test_methods_check_themselves(arguments, message):
  with pytest.raises(ValueError, match=message):
    Method(*arguments)
