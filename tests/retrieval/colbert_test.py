import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from tokjax.retrieval import colbert

WORDS = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]"]
WORDS += ["[MASK]", "!", ".", "a", "b", "c", "d"]
PAD, Q, D, UNK, CLS, SEP, MASK, BANG, STOP, A, B, C, D_ = range(13)
CONFIG = colbert.ColbertConfig(query_length=6, document_length=7)


@pytest.fixture(scope="module")
def tokenizer():
  model = tokenizers.models.WordLevel(
    {word: i for i, word in enumerate(WORDS)}, "[UNK]"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
  )
  return tokenizer


def bag_encoder(ids, attention_mask):
  """Hidden state: the token's own one-hot and the mean over what it sees."""
  own = jax.nn.one_hot(ids, len(WORDS))
  seen = jnp.where(attention_mask[..., None], own, 0)
  mean = seen.sum(1, keepdims=True) / attention_mask.sum(1)[:, None, None]
  return jnp.concatenate([own, jnp.broadcast_to(mean, own.shape)], axis=-1)


def words_of(tokens):
  return np.argmax(tokens[..., : len(WORDS)], axis=-1).tolist()


def documents(texts, tokenizer, config=CONFIG, head=None, **kwargs):
  return colbert.encode_documents(
    texts, tokenizer, bag_encoder, head, config, progress=False, **kwargs
  )


def queries(texts, tokenizer, config=CONFIG, **kwargs):
  return colbert.encode_queries(
    texts, tokenizer, bag_encoder, None, config, **kwargs
  )


def test_marker_follows_cls_and_sep_survives_cutting(tokenizer):
  rows = colbert.tokenize(
    ["a b", "a b c d a b", ""], tokenizer, length=6, marker="[unused1]"
  )
  assert [row.tolist() for row in rows] == [
    [CLS, D, A, B, SEP],
    [CLS, D, A, B, C, SEP],
    [CLS, D, SEP],
  ]
  assert rows[0].dtype == np.int32


def test_tokenize_without_marker_equals_the_tokenizer(tokenizer):
  texts = ["a b c", "d zzz"]
  rows = colbert.tokenize(texts, tokenizer, length=99)
  assert [row.tolist() for row in rows] == [
    tokenizer.encode(text).ids for text in texts
  ]


def test_documents_are_packed_in_order_without_punctuation(tokenizer):
  texts = ["a . b", "!", "a b c d a b c d", "zzz"]
  got = documents(texts, tokenizer)
  want = [
    [CLS, D, A, B, SEP],
    [CLS, D, SEP],
    [CLS, D, A, B, C, D_, SEP],
    [CLS, D, UNK, SEP],
  ]
  np.testing.assert_array_equal(
    got.offsets, np.cumsum([0] + [len(row) for row in want])
  )
  assert got.offsets.dtype == np.int64
  assert words_of(got.tokens) == sum(want, [])
  np.testing.assert_allclose(np.linalg.norm(got.tokens, axis=1), 1, rtol=1e-6)


def test_punctuation_is_read_although_not_scored(tokenizer):
  one, two = documents(["a .", "a"], tokenizer), documents(["a"], tokenizer)
  row = one.tokens[one.offsets[0] : one.offsets[1]]
  assert row[0, len(WORDS) + STOP] > 0
  assert two.tokens[0, len(WORDS) + STOP] == 0


@pytest.mark.parametrize("settings", [
  {"bucket": 1, "batch_tokens": 1},
  {"bucket": 64, "batch_tokens": 10_000},
  {"devices": jax.local_devices()[:1]},
  {"devices": jax.local_devices()[:3], "batch_tokens": 8},
])  # fmt: skip
def test_batching_and_devices_do_not_change_the_result(tokenizer, settings):
  rng = np.random.default_rng(0)
  texts = [
    " ".join(rng.choice(["a", "b", "c", ".", "!"], n))
    for n in rng.integers(0, 9, 23)
  ]
  want, got = (
    documents(texts, tokenizer),
    documents(texts, tokenizer, **settings),
  )
  np.testing.assert_array_equal(got.offsets, want.offsets)
  np.testing.assert_allclose(got.tokens, want.tokens, atol=1e-6)
  np.testing.assert_allclose(got.pooled, want.pooled, atol=1e-6)


def test_pooled_is_the_unit_mean_of_what_was_read(tokenizer):
  got = documents(["a a ."], tokenizer)
  counts = np.zeros(len(WORDS))
  for word in (CLS, D, A, A, STOP, SEP):
    counts[word] += 1 / 6
  want = np.concatenate([counts, counts])
  np.testing.assert_allclose(
    got.pooled[0], want / np.linalg.norm(want), rtol=1e-6
  )


def test_queries_are_padded_with_scored_masks(tokenizer):
  got = queries(["a .", "a b c d a"], tokenizer)
  assert got.tokens.shape[:2] == got.mask.shape == (2, 6)
  assert got.mask.all()
  assert words_of(got.tokens) == [
    [CLS, Q, A, STOP, SEP, MASK],
    [CLS, Q, A, B, C, SEP],
  ]


@pytest.mark.parametrize("attend", [False, True])
def test_attention_to_the_masks_is_an_option(tokenizer, attend):
  config = dataclasses.replace(CONFIG, attend_to_expansion=attend)
  got = queries(["a"], tokenizer, config)
  assert (got.tokens[0, 0, len(WORDS) + MASK] > 0) == attend


def test_zero_shot_scores_every_token_as_it_is(tokenizer):
  config = colbert.ColbertConfig.zero_shot(8)
  got = queries(["a .", "b"], tokenizer, config)
  assert got.mask.tolist() == [[True] * 4, [True] * 3 + [False]]
  assert words_of(got.tokens)[0] == [CLS, A, STOP, SEP]
  assert (got.tokens[1, 3] == 0).all()
  assert words_of(documents(["a ."], tokenizer, config).tokens) == [
    CLS, A, STOP, SEP
  ]  # fmt: skip


def test_specials_can_be_left_out(tokenizer):
  config = dataclasses.replace(
    CONFIG, score_specials=False, expand_queries=False
  )
  assert words_of(documents(["a b ."], tokenizer, config).tokens) == [A, B]
  got = queries(["a b ."], tokenizer, config)
  assert words_of(got.tokens[got.mask]) == [A, B, STOP]


def test_document_without_scored_tokens_is_empty(tokenizer):
  config = dataclasses.replace(CONFIG, score_specials=False)
  got = documents(["a", "!", "b"], tokenizer, config)
  assert got.offsets.tolist() == [0, 1, 1, 2]


def test_no_texts(tokenizer):
  got = documents([], tokenizer)
  assert got.offsets.tolist() == [0] and got.tokens.shape == (0, 26)
  assert queries([], tokenizer).tokens.shape == (0, 6, 26)


def test_dtype_casts_weights_and_tokens(tokenizer):
  head = jax.random.normal(jax.random.key(0), (26, 3))
  low = documents(["a b"], tokenizer, head=head, dtype=jnp.bfloat16)
  high = documents(["a b"], tokenizer, head=head)
  assert high.tokens.dtype == np.float32 and high.tokens.shape[1] == 3
  assert low.pooled.dtype == np.float32
  np.testing.assert_allclose(
    low.tokens.astype(np.float32), high.tokens, atol=0.02
  )


def test_head_equals_a_loop_and_keeps_gradients_off_the_mask():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(2, 3, 4)).astype(np.float32)
  matrix = rng.normal(size=(4, 2)).astype(np.float32)
  mask = np.array([[True, False, True], [False] * 3])
  poisoned = np.where(mask[..., None], hidden, np.nan)
  got = colbert.encode_head(*map(jnp.asarray, (matrix, poisoned, mask)))
  for i, j in np.ndindex(2, 3):
    y = hidden[i, j] @ matrix
    want = y / np.linalg.norm(y) if mask[i, j] else np.zeros(2)
    np.testing.assert_allclose(got[i, j], want, rtol=1e-5)

  def total(matrix, hidden):
    weights = jnp.arange(12.0).reshape(2, 3, 2)
    out = colbert.encode_head(matrix, hidden, jnp.asarray(mask))
    return jnp.sum(out * weights)

  for_matrix, for_hidden = jax.grad(total, (0, 1))(
    jnp.asarray(matrix), jnp.asarray(poisoned)
  )
  assert np.isfinite(for_matrix).all() and np.abs(for_matrix).max() > 0
  assert (for_hidden[~mask] == 0).all() and (for_hidden[mask] != 0).any()


def test_head_may_be_a_function_and_normalising_is_an_option():
  hidden = jnp.array([[[3.0, 4.0]]])
  mask = jnp.array([[True]])
  twice = colbert.encode_head(lambda x: 2 * x, hidden, mask, normalize=False)
  np.testing.assert_array_equal(twice, [[[6.0, 8.0]]])
  plain = colbert.encode_head(None, hidden, mask)
  np.testing.assert_allclose(plain, [[[0.6, 0.8]]], rtol=1e-6)


@pytest.mark.unchecked
def test_errors_name_the_argument(tokenizer):
  with pytest.raises(ValueError, match="marker '.x.' is not in the vocabulary"):
    documents(
      ["a"], tokenizer, dataclasses.replace(CONFIG, document_marker="[x]")
    )
  with pytest.raises(ValueError, match="mask_token '.y.' is not in the vocab"):
    queries(["a"], tokenizer, dataclasses.replace(CONFIG, mask_token="[y]"))
  with pytest.raises(ValueError, match="length must exceed the 3 special"):
    documents(["a"], tokenizer, dataclasses.replace(CONFIG, document_length=3))
  with pytest.raises(ValueError, match="hidden_width=4, head_rows=5"):
    colbert.encode_head(
      jnp.zeros((5, 2)), jnp.zeros((1, 3, 4)), jnp.ones((1, 3), bool)
    )
  padding = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  padding.enable_padding()
  with pytest.raises(ValueError, match="must not truncate or pad"):
    documents(["a"], padding)
