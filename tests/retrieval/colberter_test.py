"""Pooling to words, gates, the head and its stages, and the loss."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from flax import nnx

from tests.compiled import compiled, run
from tokjax.kernels.maxsim import maxsim
from tokjax.retrieval import colberter
from tokjax.retrieval.colberter import Bags, ColberterConfig, ColberterHead

colberter = compiled(colberter, leave=("warm_start",))
pool_words = colberter.pool_words
stopword_gate = colberter.stopword_gate
gate_sparsity = colberter.gate_sparsity
BIG = 2**32 - 1
SIZES = {"hidden_dim": 6, "cls_dim": 5, "token_dim": 4}


def tokens(seed=0, batch=3, num_tokens=7, width=4):
  """Vectors, word ids up to 2**32 - 1, and unique words; NaN where id is 0."""
  random = np.random.default_rng(seed)
  x = random.standard_normal((batch, num_tokens, width), dtype=np.float32)
  ids = random.choice([0, 1, 5, 2**31 + 5, BIG], (batch, num_tokens))
  ids = ids.astype(np.uint32)
  x[ids == 0] = np.nan
  unique = np.zeros((batch, 6), np.uint32)
  for i, row in enumerate(ids):
    words = random.permutation(np.unique(row[row > 0]))
    unique[i, : len(words)] = words
  return x, ids, unique


def test_pooling_worked_example():
  x = np.float32([[[1, 0], [3, 2], [0, 2], [5, 5]]])
  ids = np.uint32([[7, 9, 7, 0]])
  vectors, mask = pool_words(x, ids, np.uint32([[9, 7, 0]]))
  assert vectors.tolist() == [[[3, 2], [0.5, 1], [0, 0]]]
  assert mask.tolist() == [[True, True, False]]


def test_pooling_equals_a_loop_with_nan_outside_of_words():
  x, ids, unique = tokens()
  vectors, mask = pool_words(x, ids, unique)
  for i, k in np.ndindex(unique.shape):
    members = [x[i, n] for n in range(7) if unique[i, k] and
               ids[i, n] == unique[i, k]]  # fmt: skip
    want = np.mean(members, axis=0) if members else np.zeros(4)
    np.testing.assert_allclose(vectors[i, k], want, rtol=1e-6, atol=1e-6)
    assert bool(mask[i, k]) == bool(members)


def test_pooling_ignores_words_without_a_slot_and_slots_without_a_token():
  x = np.float32([[[1], [2], [4]]])
  ids = np.uint32([[1, 2, 1]])
  vectors, mask = pool_words(x, ids, np.uint32([[2, 3]]))
  assert vectors.tolist() == [[[2], [0]]] and mask.tolist() == [[True, False]]


def test_order_and_repeats_of_tokens_do_not_matter():
  x, ids, unique = tokens(1)
  x = np.nan_to_num(x)
  want = pool_words(x, ids, unique)[0]
  order = np.random.default_rng(0).permutation(7)
  got = pool_words(x[:, order], ids[:, order], unique)[0]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  # A word of one token, said twice with the same vector, stays as it is.
  x, ids = np.float32([[[1], [2]]]), np.uint32([[3, 4]])
  twice = pool_words(np.float32([[[1], [2], [1]]]), np.uint32([[3, 4, 3]]), ids)
  np.testing.assert_array_equal(twice[0], pool_words(x, ids, ids)[0])


def test_gradient_of_a_token_is_shared_by_its_word():
  x, ids, unique = tokens(2)
  weights = np.random.default_rng(3).standard_normal((3, 6, 4))

  def total(x):
    return jnp.sum(pool_words(x, ids, unique)[0] * weights)

  got = np.asarray(jax.jit(jax.grad(total))(x))
  for i, n in np.ndindex(ids.shape):
    want = np.zeros(4)
    if ids[i, n]:
      slot = np.flatnonzero(unique[i] == ids[i, n])[0]
      want = weights[i, slot] / np.sum(ids[i] == ids[i, n])
    np.testing.assert_allclose(got[i, n], want, rtol=1e-5, atol=1e-6)
  jax.test_util.check_grads(
    jax.jit(lambda x: pool_words(x, ids, unique)[0]),
    (np.nan_to_num(x),),
    order=1,
    modes=["rev"],
  )


def test_bfloat16_means_are_summed_in_float32():
  x = np.full((1, 300, 1), 1.0, jnp.bfloat16)
  x[0, 0] = 257.0  # rounds to 256; a bfloat16 sum would stop growing there
  ids = np.ones((1, 300), np.uint32)
  vectors, _ = pool_words(x, ids, np.uint32([[1]]))
  assert vectors.dtype == jnp.bfloat16
  assert vectors.item() == jnp.bfloat16((256 + 299) / 300)


def test_gate_equals_its_formula_and_closes():
  vectors = np.float32([[[1, 2], [-3, 0], [np.nan, 1]]])
  mask = np.array([[True, True, False]])
  weight, bias = np.float32([1, 0.5]), np.array(1, np.float32)
  scaled, gates = stopword_gate(vectors, weight, bias, mask)
  np.testing.assert_allclose(gates, [[3, 0, 0]])
  np.testing.assert_allclose(scaled, [[[3, 6], [0, 0], [0, 0]]])
  assert gates.dtype == jnp.float32

  def total(vectors, weight, bias):
    return stopword_gate(vectors, weight, bias, mask)[0].sum()

  gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
  got = jax.device_get(gradient(vectors, weight, bias))
  # d/dv of (w.v + b) (v0 + v1) = w (v0 + v1) + (w.v + b)
  np.testing.assert_allclose(got[0][0], [[6, 4.5], [0, 0], [0, 0]])
  np.testing.assert_allclose(got[1], [3, 6])  # v (v0 + v1)
  np.testing.assert_allclose(got[2], 3)


def test_gate_keeps_the_dtype_and_can_do_without_a_mask():
  vectors = np.ones((2, 3, 4), jnp.bfloat16)
  weight, bias = np.ones(4, np.float32), np.ones((), np.float32)
  scaled, gates = stopword_gate(vectors, weight, bias)
  assert scaled.dtype == jnp.bfloat16 and gates.dtype == jnp.float32
  np.testing.assert_array_equal(gates, 5)


def test_sparsity_is_the_mean_over_all_words_of_the_batch():
  gates = np.float32([[1, 2, np.nan], [6, np.nan, np.nan]])
  mask = np.isfinite(gates)
  assert float(gate_sparsity(gates, mask)) == 3
  assert float(gate_sparsity(gates, np.zeros_like(mask))) == 0
  got = jax.jit(jax.grad(lambda g: gate_sparsity(g, mask)))(gates)
  np.testing.assert_allclose(got, mask / 3, rtol=1e-6)


def passage(gate):
  """A text of two words: product -1 with the query, and the gate's times 5."""
  return Bags(
    cls=np.zeros((1, 1), np.float32),
    words=np.float32([[[-1.0], [5.0 * gate]]]),
    mask=np.ones((1, 2), bool),
    word_ids=np.uint32([[1, 2]]),
    gates=np.float32([[1.0, gate]]),
  )


def token_score(query_word, bags):
  cls, mask = np.zeros((1, 1), np.float32), np.ones((1, 1), bool)
  word, fusion = np.full((1, 1, 1), query_word, "f"), np.zeros((), "f")
  found = colberter.score(cls, word, mask, *bags[:3], fusion)
  return found.token_scores.item()


def test_a_closed_gate_is_not_the_absence_of_the_word():
  closed = passage(0.0)
  removed = colberter.drop_stopwords(closed)
  assert removed.mask.tolist() == [[True, False]]
  assert removed.word_ids.tolist() == [[1, 0]]
  # Where the word that is left gives something positive, they agree...
  assert token_score(-2.0, closed) == token_score(-2.0, removed) == 2
  # ...and where it gives something negative, the zero vector still offers 0.
  assert token_score(2.0, closed) == 0
  assert token_score(2.0, removed) == -2


def test_an_open_gate_keeps_its_word():
  kept = colberter.drop_stopwords(passage(0.5))
  jax.tree.map(np.testing.assert_array_equal, kept, passage(0.5))


def hidden_states(seed=0, batch=2, num_tokens=6, num_words=3):
  """Hidden states, masks and words: CLS first, one sub-word per word."""
  random = np.random.default_rng(seed)
  hidden = random.standard_normal((batch, num_tokens, 6), dtype=np.float32)
  mask = np.zeros((batch, num_tokens), bool)
  mask[:, : num_words + 2] = True
  words = np.zeros((batch, num_tokens), np.uint32)
  words[:, 1 : num_words + 1] = 10 + np.arange(num_words)
  unique = np.zeros((batch, num_words + 2), np.uint32)
  unique[:, :num_words] = 10 + np.arange(num_words)
  hidden[~mask] = np.nan
  return hidden, mask, words, unique


@functools.cache
def made(config, seed=0):
  return jax.jit(lambda: ColberterHead(config, rngs=nnx.Rngs(seed)))()


def make_head(stage=3, seed=0, **changes):
  config = ColberterConfig.stage(stage, **SIZES, **changes)
  return jax.tree.map(lambda x: x, made(config, seed))  # to be changed


def queries_of(head, *inputs):
  return jax.device_get(run(ColberterHead.queries, head, *inputs))


def passages_of(head, *inputs):
  return jax.device_get(run(ColberterHead.passages, head, *inputs))


def affine(layer, x):
  return np.asarray(x) @ np.asarray(layer.kernel) + np.asarray(layer.bias)


def test_distinct_words_and_open_gates_give_maxsim_of_the_tokens():
  head = make_head()
  head.gate.kernel[...] = np.zeros((4, 1), np.float32)  # the bias of 1 is all
  inputs = hidden_states(0), hidden_states(1)
  query, document = queries_of(head, *inputs[0]), passages_of(head, *inputs[1])
  np.testing.assert_array_equal(document.gates, document.mask)
  got = colberter.score(*query[:3], *document[:3], head.fusion[...])
  got = jax.device_get(got)
  raw = [affine(head.tokens, hidden[:, 1:4]) for hidden, *_ in inputs]
  np.testing.assert_allclose(got.token_scores, run(maxsim, *raw), rtol=1e-5)
  cls = [affine(head.cls, hidden[:, 0]) for hidden, *_ in inputs]
  np.testing.assert_allclose(got.cls_scores, cls[0] @ cls[1].T, rtol=1e-5)
  mean = (got.cls_scores + got.token_scores) / 2  # fusion starts at 0
  np.testing.assert_allclose(got.scores, mean, rtol=1e-5)


def test_the_gate_comes_before_the_last_layer_and_not_to_queries():
  head = make_head(4, compressed_dim=2)
  inputs = hidden_states(3)
  tokens = affine(head.tokens, inputs[0][:, 1:4])
  gates = np.maximum(affine(head.gate, tokens), 0)
  assert 0 < (gates > 0).sum()
  passages, queries = passages_of(head, *inputs), queries_of(head, *inputs)
  want = affine(head.compress, gates * tokens)
  np.testing.assert_allclose(passages.words[:, :3], want, rtol=1e-5, atol=1e-6)
  want = affine(head.compress, tokens)
  np.testing.assert_allclose(queries.words[:, :3], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(passages.gates[:, :3], gates[..., 0], rtol=1e-5)
  np.testing.assert_array_equal(queries.gates, queries.mask)
  np.testing.assert_array_equal(passages.words[:, 3:], 0)
  np.testing.assert_array_equal(passages.word_ids, inputs[3])
  np.testing.assert_array_equal(passages.cls, queries.cls)


def test_without_words_every_token_counts_special_ones_too():
  head = make_head(1)
  hidden, mask, words, _ = hidden_states()
  bags = passages_of(head, hidden, mask, words)
  want = np.where(mask[..., None], affine(head.tokens, hidden), 0)
  np.testing.assert_allclose(bags.words, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(bags.mask, mask)
  np.testing.assert_array_equal(bags.word_ids, words)
  np.testing.assert_array_equal(bags.gates, mask)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_padding_has_no_influence_and_no_gradient(stage):
  head = make_head(stage)
  hidden, mask, *words = hidden_states()
  clean = np.where(mask[..., None], hidden, np.float32(7))
  got, want = (passages_of(head, h, mask, *words) for h in (hidden, clean))
  jax.tree.map(np.testing.assert_array_equal, got, want)

  def total(head, hidden):
    bags = head.passages(hidden, mask, *words)
    return jnp.sum(bags.cls) + jnp.sum(jnp.sin(bags.words))

  for_head, for_hidden = jax.jit(jax.grad(total, argnums=(0, 1)))(head, hidden)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(for_head))
  for_hidden = np.asarray(for_hidden)
  np.testing.assert_array_equal(for_hidden[~mask], 0)
  assert np.abs(for_hidden[mask]).min(axis=1).max() > 0


def test_nothing_is_normalised():
  head = make_head(2)
  for layer in (head.cls, head.tokens):
    layer.bias[...] = np.zeros(layer.bias.shape, np.float32)
  hidden, *rest = hidden_states()
  one, two = (queries_of(head, x, *rest) for x in (hidden, 2 * hidden))
  np.testing.assert_allclose(two.words, 2 * one.words, rtol=1e-5)
  np.testing.assert_allclose(two.cls, 2 * one.cls, rtol=1e-5)


def test_gates_start_open_and_fusion_in_the_middle():
  head = make_head()
  assert head.gate.bias[...].tolist() == [1.0]
  assert head.fusion[...].item() == 0
  assert all(
    layer.bias is not None for layer in (head.cls, head.tokens, head.gate)
  )


@pytest.mark.parametrize(
  "stage, aggregate, gates, compressed, exact, cls, sparsity",
  [
    (1, False, False, None, False, 0.5, 0.0),
    (2, True, False, None, False, 0.1, 0.0),
    (3, True, True, None, False, 0.1, 0.75),
    (4, True, True, 1, True, 0.1, 0.75),
  ],
)
def test_stages(stage, aggregate, gates, compressed, exact, cls, sparsity):
  got = ColberterConfig.stage(stage)
  assert got == ColberterConfig(
    cls_dim=128, token_dim=32, aggregate=aggregate, gates=gates,
    compressed_dim=compressed, exact_match=exact, cls_weight=cls,
    sparsity_weight=sparsity, query_length=30, document_length=200,
  )  # fmt: skip
  head = make_head(stage)
  assert (head.gate is not None, head.compress is not None) == (
    gates, compressed is not None
  )  # fmt: skip


def test_sixteen_numbers_need_no_exact_match():
  assert not ColberterConfig.stage(4, compressed_dim=16).exact_match
  assert ColberterConfig.stage(4, compressed_dim=8).exact_match
  assert ColberterConfig.stage(
    4, compressed_dim=16, exact_match=True
  ).exact_match


def test_warm_start_copies_what_both_have():
  old = make_head(2, seed=0)
  old.fusion[...] = np.float32(0.7)
  config = ColberterConfig.stage(4, **SIZES)
  new = colberter.warm_start(old, config, rngs=nnx.Rngs(1))
  fresh = made(config, 1)
  for name, source in (("cls", old), ("tokens", old), ("fusion", old),
                       ("gate", fresh), ("compress", fresh)):  # fmt: skip
    for x, y in zip(
      jax.tree.leaves(getattr(new, name)),
      jax.tree.leaves(getattr(source, name)),
      strict=True,
    ):
      np.testing.assert_array_equal(x, y)
  assert new.config == config
  # A copy: the old head stays as it is.
  new.cls.bias[...] = np.ones(5, np.float32)
  assert (np.asarray(old.cls.bias[...]) == 0).all()
  back = colberter.warm_start(new, old.config, rngs=nnx.Rngs(2))
  assert back.gate is None and back.compress is None
  np.testing.assert_array_equal(back.cls.bias[...], 1)


def make_scores(scores, cls_scores):
  scores, cls_scores = np.float32(scores), np.float32(cls_scores)
  return colberter.Scores(scores, cls_scores, scores)


def test_loss_worked_example():
  gates = np.float32([[[1, 3], [5, 9]], [[2, 9], [1, 3]]])
  mask = np.array([[[1, 1], [1, 0]], [[1, 0], [1, 1]]], bool)
  got = colberter.loss(
    make_scores([[3, 1], [0, 4]], [[1, 1], [1, 0]]),
    np.float32([[1, 0], [2, 0]]),
    gates,
    mask,
    fused_weight=2.0,
    cls_weight=10.0,
    sparsity_weight=100.0,
  )
  assert float(got.fused) == ((2 - 1) ** 2 + (-4 - 2) ** 2) / 2
  assert float(got.cls) == ((0 - 1) ** 2 + (1 - 2) ** 2) / 2
  assert float(got.sparsity) == (1 + 3 + 2) / 3 + (5 + 1 + 3) / 3
  assert float(got.total) == 2 * 18.5 + 10 * 1 + 100 * 5


def test_loss_leaves_out_passages_without_words_of_the_token_scores():
  mask = np.array([[[True], [True], [False]]])
  gates = mask.astype(np.float32)
  teacher = np.zeros((1, 3), np.float32)
  got = colberter.loss(
    make_scores([[1, 0, -2000]], [[1, 0, 3]]), teacher, gates, mask
  )
  assert float(got.fused) == 1 and float(got.cls) == (1 + 4) / 2


def test_training_lowers_the_loss_and_closes_gates():
  head = make_head(3)
  query = hidden_states(0, batch=4)
  lists = hidden_states(1, batch=8)
  teacher = np.tile(np.float32([[2.0, 0.0]]), (4, 1))
  optimizer = optax.adam(0.03)

  def loss_fn(head):
    queries, passages = head.queries(*query), head.passages(*lists)
    passages = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), passages)
    scores = colberter.score_pairs(
      *queries[:3], *passages[:3], head.fusion[...]
    )
    return colberter.loss(
      scores, teacher, passages.gates, passages.mask, cls_weight=0.1,
      sparsity_weight=0.75,
    )  # fmt: skip

  @jax.jit
  def step(head, state):
    gradient, parts = jax.grad(
      lambda h: (lambda x: (x.total, x))(loss_fn(h)), has_aux=True
    )(head)
    updates, state = optimizer.update(gradient, state, head)
    return optax.apply_updates(head, updates), state, parts

  state = jax.jit(optimizer.init)(head)
  history = []
  for _ in range(60):
    head, state, parts = step(head, state)
    history.append(parts)
  assert history[-1].total < 0.2 * history[0].total
  assert history[-1].sparsity < 0.5 * history[0].sparsity


@pytest.mark.unchecked
def test_errors_name_the_argument():
  x, ids, unique = tokens()
  with pytest.raises(TypeError, match="word_of_token must be uint32, got int"):
    pool_words(x, ids.astype(np.int32), unique)
  with pytest.raises(ValueError, match="x_tokens=7, word_of_token=6"):
    pool_words(x, ids[:, :6], unique)
  with pytest.raises(ValueError, match="vectors_width=4, weight_width=3"):
    stopword_gate(x, np.ones(3), np.ones(()))
  with pytest.raises(ValueError, match="mask must have the shape of gates"):
    gate_sparsity(np.ones((2, 3)), np.ones((2, 2), bool))
  with pytest.raises(ValueError, match="exact_match needs aggregate=True"):
    make_head(1, exact_match=True)
  with pytest.raises(ValueError, match="number must be one of 1, 2, 3, 4"):
    ColberterConfig.stage(0)
  hidden, mask, words, unique = hidden_states()
  with pytest.raises(ValueError, match="unique_words must be given"):
    make_head().queries(hidden, mask, words)
  with pytest.raises(ValueError, match="hidden_tokens=6, attention_mask=5"):
    make_head().queries(hidden, mask[:, :5], words, unique)
  wider = ColberterConfig.stage(3, **(SIZES | {"token_dim": 9}))
  with pytest.raises(ValueError, match="tokens of the new head must have"):
    colberter.warm_start(make_head(), wider, rngs=nnx.Rngs(0))
