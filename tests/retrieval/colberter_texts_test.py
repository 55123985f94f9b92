"""Texts to packed bags of words, and the rankings made of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import models, pre_tokenizers, processors

from tests.compiled import run
from tokjax.retrieval import colberter, colberter_texts, token_index
from tokjax.retrieval import words as whole_words
from tokjax.retrieval.colberter import ColberterConfig, ColberterHead

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "##s", "##ing", "##ed"]
PIECES += ["walk", "talk", "jump", "rest", "cat", "dog", "sun", "moon"]
HIDDEN = 2 * len(PIECES)
SIZES = {
  "hidden_dim": HIDDEN, "cls_dim": 5, "token_dim": 4,
  "query_length": 9, "document_length": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
  model = models.WordPiece(
    {piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  return tokenizer


@pytest.fixture(scope="module")
def texts():
  random = np.random.default_rng(0)
  endings = ["", "s", "ing", "ed"]
  return [
    " ".join(
      random.choice(PIECES[8:]) + random.choice(endings)
      for _ in range(random.integers(1, 9))
    )
    + random.choice(["", "."])
    for _ in range(23)
  ]


def bag_encoder(ids, attention_mask):
  """Hidden state: the token's own one-hot and the mean over what it sees."""
  own = jax.nn.one_hot(ids, len(PIECES))
  seen = jnp.where(attention_mask[..., None], own, 0)
  mean = seen.sum(1, keepdims=True) / attention_mask.sum(1)[:, None, None]
  return jnp.concatenate([own, jnp.broadcast_to(mean, own.shape)], axis=-1)


@functools.cache
def made(config, seed):
  return jax.jit(lambda: ColberterHead(config, rngs=nnx.Rngs(seed)))()


def make_head(stage=3, seed=0, **changes):
  config = ColberterConfig.stage(stage, **(SIZES | changes))
  head = jax.tree.map(lambda x: x, made(config, seed))  # to be changed
  if head.gate is not None:  # some gates shall be closed
    kernel = np.asarray(head.gate.kernel[...])
    kernel = kernel * (4 / np.abs(kernel).sum())
    head.gate.kernel[...] = jnp.asarray(kernel)
    head.gate.bias[...] = jnp.asarray(np.float32([0.1]))
  return head


def encode(texts, tokenizer, head, **settings):
  return colberter_texts.encode_documents(
    texts, tokenizer, bag_encoder, head, progress=False, **settings
  )


@functools.partial(jax.jit, static_argnums=1)
def bags_of(head, side, ids, *rest):
  return getattr(head, side)(bag_encoder(ids, rest[0]), *rest)


def one_by_one(texts, tokenizer, head, side, length):
  """(cls, vectors, word ids) of each text from its own padded arrays."""
  for text in texts:
    row = whole_words.word_ids([text], tokenizer, length=length, num_words=16)
    bags = jax.device_get(bags_of(head, side, *row[:4]))
    bags = jax.tree.map(lambda x: x[0], bags)
    keep = bags.mask & (bags.gates > 0)
    yield bags.cls, bags.words[keep], bags.word_ids[keep]


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_documents_equal_the_head_text_by_text(tokenizer, texts, stage):
  head = make_head(stage)
  got = encode(texts, tokenizer, head)
  packed = got.documents
  assert packed.offsets.dtype == np.int64 and got.word_ids.dtype == np.uint32
  assert packed.pooled.dtype == np.float32
  assert packed.offsets[-1] == len(packed.tokens) == len(got.word_ids)
  wanted = one_by_one(texts, tokenizer, head, "passages", 12)
  for i, (cls, words, word_ids) in enumerate(wanted):
    rows = slice(packed.offsets[i], packed.offsets[i + 1])
    np.testing.assert_allclose(packed.pooled[i], cls, atol=1e-5)
    np.testing.assert_allclose(packed.tokens[rows], words, atol=1e-5)
    np.testing.assert_array_equal(got.word_ids[rows], word_ids)


def test_closed_gates_leave_words_out(tokenizer, texts):
  gated = encode(texts, tokenizer, make_head(3)).documents
  whole = encode(texts, tokenizer, make_head(2)).documents
  tokens = encode(texts, tokenizer, make_head(1)).documents
  kept = [np.diff(x.offsets) for x in (gated, whole, tokens)]
  assert (kept[0] <= kept[1]).all() and (kept[1] <= kept[2] - 2).all()
  assert 0 < kept[0].sum() < kept[1].sum() < kept[2].sum() - 2 * len(texts)


def test_forms_of_a_word_are_one_row(tokenizer):
  head = make_head(2)
  got = encode(["walk walks walking cat"], tokenizer, head)
  assert len(got.word_ids) == 2
  plain = encode(
    ["walk walks walking cat"], tokenizer, make_head(2, stem=False)
  )
  assert len(plain.word_ids) == 4


def test_queries_keep_every_word(tokenizer, texts):
  head = make_head(3)
  got = colberter_texts.encode_queries(texts, tokenizer, bag_encoder, head)
  wanted = one_by_one(texts, tokenizer, head, "queries", 9)
  counts = got.queries.mask.sum(axis=1)
  assert got.queries.mask.shape[1] == counts.max()
  for i, (cls, words, word_ids) in enumerate(wanted):
    assert got.queries.mask[i, : counts[i]].all() and len(words) == counts[i]
    tokens = got.queries.tokens[i]
    np.testing.assert_allclose(tokens[: counts[i]], words, atol=1e-5)
    np.testing.assert_array_equal(tokens[counts[i] :], 0)
    np.testing.assert_array_equal(got.word_ids[i, : counts[i]], word_ids)
    np.testing.assert_array_equal(got.word_ids[i, counts[i] :], 0)
    np.testing.assert_allclose(got.queries.pooled[i], cls, atol=1e-5)


@pytest.mark.parametrize("settings", [
  {"bucket": 1, "batch_tokens": 1},
  {"bucket": 64, "batch_tokens": 10_000},
  {"devices": jax.local_devices()[:3], "batch_tokens": 8},
])  # fmt: skip
def test_batching_and_devices_do_not_change_the_result(
  tokenizer, texts, settings
):
  head = make_head(3)
  want, got = (
    encode(texts, tokenizer, head),
    encode(texts, tokenizer, head, **settings),
  )
  np.testing.assert_array_equal(got.documents.offsets, want.documents.offsets)
  np.testing.assert_array_equal(got.word_ids, want.word_ids)
  for name in ("tokens", "pooled"):
    np.testing.assert_allclose(
      getattr(got.documents, name), getattr(want.documents, name), atol=1e-5
    )


def test_dtype_casts_weights_and_word_vectors(tokenizer, texts):
  head = make_head(2)
  low = encode(texts, tokenizer, head, dtype=jnp.bfloat16).documents
  high = encode(texts, tokenizer, head).documents
  assert low.tokens.dtype == jnp.bfloat16 and low.pooled.dtype == np.float32
  np.testing.assert_allclose(
    low.tokens.astype(np.float32), high.tokens, atol=0.03
  )
  np.testing.assert_allclose(low.pooled, high.pooled, atol=0.03)


def test_texts_without_words_and_no_texts(tokenizer):
  head = make_head(3)
  got = encode(["", "cat"], tokenizer, make_head(2))
  assert got.documents.offsets.tolist() == [0, 0, 1]
  nothing = encode([], tokenizer, head)
  assert nothing.documents.tokens.shape == (0, 4)
  assert nothing.documents.offsets.tolist() == [0]
  queries = colberter_texts.encode_queries([], tokenizer, bag_encoder, head)
  assert queries.queries.tokens.shape == (0, 1, 4)


def corpus(tokenizer, texts, stage, **changes):
  """Head, encoded queries and documents, and an index of the documents."""
  head = make_head(stage, **changes)
  head.fusion[...] = jnp.float32(0.4)
  documents = encode(texts, tokenizer, head)
  queries = colberter_texts.encode_queries(
    texts[:5], tokenizer, bag_encoder, head
  )
  packed = documents.documents
  index = token_index.build(
    packed.tokens, packed.offsets, page_size=4,
    candidates={"cls": token_index.store_vectors(packed.pooled)},
  )  # fmt: skip
  return head, queries, documents, index


def all_scores(head, queries, documents):
  """scores[Nq, Nd] of every query against every document, without an index."""
  num_documents = len(documents.documents.offsets) - 1
  every = np.arange(num_documents)[None]
  chosen = colberter_texts.select_documents(documents, every)
  cls, words, mask, ids = (x[0] for x in chosen)
  encoded, query_ids = queries
  found = run(
    colberter.score, encoded.pooled, encoded.tokens, encoded.mask, cls, words,
    mask, head.fusion[...],
    *((query_ids, ids) if head.config.exact_match else ()),
  )  # fmt: skip
  return jax.device_get(found)


@pytest.mark.parametrize("num_candidates", [4, 9, 100])
def test_search_takes_candidates_by_cls_and_ranks_by_both(
  tokenizer, texts, num_candidates
):
  head, queries, documents, index = corpus(tokenizer, texts, 3)
  scores = all_scores(head, queries, documents)
  encoded = queries.queries
  got = run(
    colberter_texts.search_fused, index, encoded.tokens, encoded.mask,
    encoded.pooled, head.fusion[...], k=3, num_candidates=num_candidates,
  )  # fmt: skip
  got = jax.device_get(got)
  for i in range(len(encoded.tokens)):
    first = np.argsort(-scores.cls_scores[i])[:num_candidates]
    order = np.argsort(-scores.scores[i][first], kind="stable")
    best = first[order[:3]]
    np.testing.assert_allclose(
      got.scores[i], scores.scores[i][best], rtol=1e-4, atol=1e-4
    )
    assert len(set(got.index[i].tolist())) == 3
    np.testing.assert_allclose(
      scores.scores[i][got.index[i]], got.scores[i], rtol=1e-4, atol=1e-4
    )
  assert num_candidates > 4 or len(first) < len(texts)


def test_deleted_documents_are_never_returned(tokenizer, texts):
  head, queries, _, index = corpus(tokenizer, texts, 2)
  live = np.zeros(len(texts), bool)
  live[[3, 11]] = True
  index = dataclasses.replace(index, live=jnp.asarray(live))
  encoded = queries.queries
  got = run(
    colberter_texts.search_fused, index, encoded.tokens, encoded.mask,
    encoded.pooled, head.fusion[...], k=4,
  )  # fmt: skip
  got = jax.device_get(got)
  for row, scores in zip(got.index.tolist(), got.scores, strict=True):
    assert sorted(row[:2]) == [3, 11] and row[2:] == [-1, -1]
    assert np.isfinite(scores[:2]).all() and (scores[2:] == -np.inf).all()


def test_selected_documents_are_scored_with_exact_match(tokenizer, texts):
  head, queries, documents, _ = corpus(tokenizer, texts, 4)
  assert head.config.exact_match and documents.documents.tokens.shape[1] == 1
  scores = all_scores(head, queries, documents)
  random = np.random.default_rng(1)
  positions = random.integers(0, len(texts), (5, 6))
  chosen = colberter_texts.select_documents(documents, positions)
  encoded = queries.queries
  cls, words, mask, ids = chosen
  got = run(
    colberter.score_pairs, encoded.pooled, encoded.tokens, encoded.mask, cls,
    words, mask, head.fusion[...], queries.word_ids, ids,
  )  # fmt: skip
  got = jax.device_get(got)
  want = np.take_along_axis(scores.scores, positions, axis=1)
  np.testing.assert_allclose(got.scores, want, rtol=1e-5, atol=1e-5)
  assert (got.token_scores == 0).any() and (got.token_scores > 0).any()


def test_queries_and_documents_name_words_alike(tokenizer, texts):
  head = make_head(2)
  documents = encode(texts, tokenizer, head)
  queries = colberter_texts.encode_queries(texts, tokenizer, bag_encoder, head)
  offsets = documents.documents.offsets
  for i, row in enumerate(queries.word_ids):  # cut earlier than documents
    words = set(row[queries.queries.mask[i]].tolist())
    assert words <= {*documents.word_ids[offsets[i] : offsets[i + 1]].tolist()}


def test_position_minus_one_selects_nothing(tokenizer, texts):
  documents = encode(texts, tokenizer, make_head(2))
  got = colberter_texts.select_documents(
    documents, np.array([[-1, 2], [4, -1]])
  )
  assert got.mask[0, 0].sum() == got.mask[1, 1].sum() == 0
  assert (got.cls[0, 0] == 0).all() and (got.words[~got.mask] == 0).all()
  offsets = documents.documents.offsets
  rows = slice(offsets[2], offsets[3])
  np.testing.assert_array_equal(
    got.words[0, 1][got.mask[0, 1]], documents.documents.tokens[rows]
  )
  np.testing.assert_array_equal(
    got.word_ids[0, 1][got.mask[0, 1]], documents.word_ids[rows]
  )
  assert got.mask.shape[2] == max(np.diff(offsets)[[2, 4]])


@pytest.mark.unchecked
def test_errors_name_the_argument(tokenizer, texts):
  head, queries, documents, index = corpus(tokenizer, texts, 2)
  encoded = queries.queries
  arrays = (index, encoded.tokens, encoded.mask, encoded.pooled, jnp.zeros(()))
  with pytest.raises(ValueError, match="mode must be one of 'cls', got 'mean'"):
    colberter_texts.search_fused(*arrays, mode="mean")
  with pytest.raises(ValueError, match="num_candidates must lie in 5..23"):
    colberter_texts.search_fused(*arrays, k=5, num_candidates=4)
  with pytest.raises(
    ValueError, match="positions must lie in -1..22, got 0..23"
  ):
    colberter_texts.select_documents(documents, np.array([[0, 23]]))
  with pytest.raises(ValueError, match="length must exceed the 2 special"):
    encode(texts, tokenizer, make_head(2, document_length=2))
