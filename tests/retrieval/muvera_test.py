import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.compiled import compiled
from tokjax.ops import quantize
from tokjax.retrieval import muvera

quantize = compiled(quantize)
ball_carve = compiled(muvera).ball_carve

IDENTITY = muvera.FDEConfig(
  dim=6, num_simhash_bits=2, num_repetitions=3, projection_dim=None
)
SIGN = dataclasses.replace(IDENTITY, num_simhash_bits=3, projection_dim=4)
CONFIGS = {
  "identity": IDENTITY,
  "sign": SIGN,
  "sketch": dataclasses.replace(SIGN, inner="sketch"),
  "scaled": dataclasses.replace(SIGN, scale=True),
  "no_fill": dataclasses.replace(SIGN, fill_empty=False),
  "no_bits": dataclasses.replace(SIGN, num_simhash_bits=0),
  "final": dataclasses.replace(SIGN, final_dim=20),
  # Wide enough that the repetitions take several steps.
  "steps": dataclasses.replace(
    SIGN, num_repetitions=4, num_simhash_bits=9, final_dim=50
  ),
}


@functools.cache
def parameters(config, seed=0):
  return jax.jit(muvera.init, static_argnums=1)(jax.random.key(seed), config)


def example(seed=0, batch=5, num_tokens=9, dim=6):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(batch, num_tokens, dim)).astype(np.float32)
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  mask = rng.random((batch, num_tokens)) < 0.7
  mask[:, 2] = True
  return x, mask


def chamfer(queries, documents):
  return sum(max(float(q @ p) for p in documents) for q in queries)


def oracle(params, config, tokens, *, document):
  """The definition, one repetition, cell and token at a time."""
  planes = np.asarray(params.hyperplanes)
  out = []
  for r in range(config.num_repetitions):
    bits = [tuple(int(p @ h > 0) for h in planes[r].T) for p in tokens]
    projected = list(tokens)
    if params.projection is not None:
      scale = config.cell_dim**0.5 if config.inner == "sign" else 1
      projected = [p @ np.asarray(params.projection[r]) / scale for p in tokens]
    for cell in range(config.num_cells):
      code = tuple(cell >> t & 1 for t in range(config.num_simhash_bits))
      members = [y for y, b in zip(projected, bits, strict=True) if b == code]
      value = np.sum(members, axis=0) if members else np.zeros(config.cell_dim)
      if document and members:
        value = value / len(members)
      elif document and config.fill_empty and len(tokens):
        distance = [sum(a != c for a, c in zip(b, code)) for b in bits]  # noqa: B905
        value = projected[distance.index(min(distance))]
      out.append(value)
  full = np.concatenate(out)
  if config.scale:
    full = full / config.num_repetitions**0.5
  if config.final_dim is None:
    return full
  short = np.zeros(config.final_dim)
  index, sign = np.asarray(params.final.index), np.asarray(params.final.sign)
  for i in range(len(full)):
    short[index[i]] += sign[i] * full[i]
  return short


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("document", [False, True], ids=["query", "document"])
def test_equals_the_definition(name, document):
  config = CONFIGS[name]
  params = parameters(config, 1)
  x, mask = example()
  mask[2] = False  # one text without tokens
  encode = muvera.encode_documents if document else muvera.encode_queries
  got = np.asarray(encode(params, config, x, mask))
  assert got.shape == (5, config.output_dim) and got.dtype == np.float32
  for i in range(5):
    want = oracle(params, config, x[i][mask[i]], document=document)
    np.testing.assert_allclose(got[i], want, atol=1e-5)
  assert not np.any(got[2])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_padded(name):
  config = CONFIGS[name]
  params = parameters(config, 1)
  x, mask = example()
  mask[3] = False
  want = muvera.encode_documents(params, config, x, mask)
  ids = np.where(mask, np.arange(5)[:, None], 5).reshape(-1)
  tokens = np.where(mask[..., None], x, np.nan).reshape(-1, 6)
  got = muvera.encode_packed(params, config, tokens, ids, num_documents=5)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("step_tokens", [1, 11, 1000])
def test_corpus_equals_padded(step_tokens):
  params = parameters(SIGN, 1)
  x, mask = example()
  mask[3] = False
  want = muvera.encode_documents(params, SIGN, x, mask)
  tokens = x[mask]
  offsets = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
  got = muvera.encode_corpus(
    params, SIGN, tokens, offsets, step_tokens=step_tokens
  )
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_corpus_of_no_tokens():
  params = parameters(SIGN, 1)
  empty = np.zeros((0, 6), np.float32)
  got = muvera.encode_corpus(params, SIGN, empty, np.array([0, 0, 0]))
  np.testing.assert_array_equal(got, np.zeros((2, SIGN.output_dim)))


WORKED = muvera.FDEConfig(
  dim=2, num_simhash_bits=2, num_repetitions=1, projection_dim=None
)


@pytest.mark.parametrize(
  "fill, want", [(True, 1.78), (False, 0.98)], ids=["fill", "no_fill"]
)
def test_worked_example(fill, want):
  config = dataclasses.replace(WORKED, fill_empty=fill)
  params = muvera.FDEParams(np.eye(2, dtype="f")[None], None, None)  # e1 and e2
  document = np.float32([[[0.8, 0.6], [0.6, 0.8], [-0.8, -0.6]]])
  query = np.float32([[[1.0, 0.0], [0.6, 0.8]]])
  d = muvera.encode_documents(params, config, document, np.ones((1, 3), bool))
  q = muvera.encode_queries(params, config, query, np.ones((1, 2), bool))
  np.testing.assert_allclose(np.sum(np.multiply(q, d)), want, atol=1e-6)


def similarity(config, seed, query, document):
  params = parameters(config, seed)
  ones = np.ones((1, len(query)), bool), np.ones((1, len(document)), bool)
  q = muvera.encode_queries(params, config, query[None], ones[0])
  d = muvera.encode_documents(params, config, document[None], ones[1])
  return float(np.sum(np.multiply(q, d)))


@pytest.mark.parametrize("seed", range(4))
def test_one_document_token_gives_chamfer(seed):
  x, _ = example(seed)
  got = similarity(IDENTITY, seed, x[0], x[1, :1])
  np.testing.assert_allclose(got / 3, chamfer(x[0], x[1, :1]), atol=1e-5)
  same = np.repeat(x[1, :1], 5, axis=0)
  got = similarity(IDENTITY, seed, x[0], same)
  np.testing.assert_allclose(got / 3, chamfer(x[0], same), atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_never_above_chamfer_with_identity_projection(seed):
  x, _ = example(seed)
  config = dataclasses.replace(IDENTITY, scale=True)
  got = similarity(config, seed, x[0], x[1])
  assert got <= chamfer(x[0], x[1]) + 1e-5


def test_without_bits_it_is_sum_dot_mean():
  x, _ = example()
  config = dataclasses.replace(IDENTITY, num_simhash_bits=0, scale=True)
  got = similarity(config, 0, x[0], x[1])
  np.testing.assert_allclose(got, x[0].sum(0) @ x[1].mean(0), rtol=1e-5)


def test_copies_of_a_repetition_multiply_the_value():
  one = dataclasses.replace(SIGN, num_repetitions=1)
  params = parameters(one)
  many = jax.tree.map(lambda leaf: np.repeat(leaf, 3, axis=0), params)
  x, mask = example()

  def value(params, config):
    q = muvera.encode_queries(params, config, x, mask)
    d = muvera.encode_documents(params, config, x, mask)
    return np.asarray(q) @ np.asarray(d).T

  np.testing.assert_allclose(
    value(many, SIGN), 3 * value(params, one), rtol=1e-5, atol=1e-5
  )


def test_queries_add_up_and_scale():
  params = parameters(SIGN)
  x, mask = example()
  other = ~mask
  whole = muvera.encode_queries(params, SIGN, x, mask | other)
  parts = [
    np.asarray(muvera.encode_queries(params, SIGN, x, m)) for m in (mask, other)
  ]
  np.testing.assert_allclose(whole, parts[0] + parts[1], atol=1e-6)
  triple = muvera.encode_queries(params, SIGN, 3 * x, mask)
  np.testing.assert_allclose(triple, 3 * parts[0], atol=1e-5)


def test_documents_ignore_order_of_members_and_duplicates():
  config = dataclasses.replace(SIGN, fill_empty=False)
  params = parameters(config)
  x, mask = example()
  want = muvera.encode_documents(params, config, x, mask)
  order = np.random.default_rng(0).permutation(x.shape[1])
  got = muvera.encode_documents(params, config, x[:, order], mask[:, order])
  np.testing.assert_allclose(got, want, atol=1e-6)
  for c in (config, SIGN):  # fill by the lowest token is kept by appending
    want = muvera.encode_documents(params, c, x, mask)
    twice = np.concatenate([x, x], 1), np.concatenate([mask, mask], 1)
    got = muvera.encode_documents(params, c, *twice)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", ["identity", "sign", "final"])
def test_padding_has_no_influence(name):
  config = CONFIGS[name]
  params = parameters(config)
  x, mask = example()
  poisoned = np.where(mask[..., None], x, np.nan)
  for encode in (muvera.encode_queries, muvera.encode_documents):
    want = encode(params, config, x, mask)
    np.testing.assert_array_equal(encode(params, config, poisoned, mask), want)
    longer = np.pad(poisoned, [(0, 0), (0, 4), (0, 0)], constant_values=9)
    more = np.pad(mask, [(0, 0), (0, 4)])
    np.testing.assert_allclose(
      encode(params, config, longer, more), want, atol=1e-6
    )


def test_matmul_and_scatter_pools_agree():
  x, mask = example()
  params = parameters(SIGN)

  @jax.jit
  def pools(params, x, mask):
    cells, values = muvera._cells_and_values(
      SIGN, params.hyperplanes, params.projection, x
    )
    owner = jnp.where(mask, 0, 1)
    return (
      muvera._pool_by_matmul(cells, values, mask, SIGN),
      muvera._pool_by_scatter(cells, values, owner, 1, SIGN),
    )

  got, want = pools(params, x[0], mask[0])
  np.testing.assert_allclose(got.sums, want.sums, atol=1e-6)
  np.testing.assert_array_equal(got.counts, want.counts)
  np.testing.assert_array_equal(got.first, want.first)


def test_bfloat16_uses_the_same_hyperplanes():
  params = parameters(SIGN)
  x, mask = example()
  low = x.astype(jnp.bfloat16)
  got = muvera.encode_documents(params, SIGN, low, mask)
  want = muvera.encode_documents(params, SIGN, low.astype(np.float32), mask)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_parts_of_the_randomness_are_independent():
  config = dataclasses.replace(SIGN, dim=64, projection_dim=3)
  params = parameters(config)
  signs = np.sign(params.hyperplanes).ravel()
  agree = np.mean(signs == np.asarray(params.projection).ravel())
  assert 0.4 < agree < 0.6  # one seed for both would make them equal


def test_gradients_flow_through_valid_tokens_only():
  x, mask = example()
  # Coordinates away from axis-aligned hyperplanes: no token changes its cell
  # under a small step, where the encoding jumps.
  x = np.sign(x) * (0.3 + np.abs(x))
  params = parameters(SIGN)
  planes = np.stack([np.eye(6, dtype="f")[:, r : r + 3] for r in range(3)])
  params = params._replace(hyperplanes=planes)
  for encode in (muvera.encode_queries, muvera.encode_documents):

    @jax.jit
    def total(x, encode=encode):
      return jnp.sum(jnp.sin(encode(params, SIGN, x, mask)))

    check_grads(total, (x,), order=1, modes=["rev"], eps=1e-3, rtol=1e-2)
    poisoned = np.where(mask[..., None], x, np.nan)
    gradient = np.asarray(jax.jit(jax.grad(total))(poisoned))
    assert not gradient[~mask].any()
    assert np.abs(gradient[mask]).min() > 0


def test_shard_map_equals_single_device():
  params = parameters(CONFIGS["final"])
  x, mask = example(batch=8)
  config = CONFIGS["final"]
  want = muvera.encode_documents(params, config, x, mask)
  mesh = jax.make_mesh((8,), ("data",))
  body = jax.shard_map(
    lambda p, x, m: muvera.encode_documents(p, config, x, m),
    mesh=mesh,
    in_specs=(jax.P(), jax.P("data"), jax.P("data")),
    out_specs=jax.P("data"),
  )
  x, mask = jax.device_put((x, mask), jax.NamedSharding(mesh, jax.P("data")))
  np.testing.assert_allclose(jax.jit(body)(params, x, mask), want, atol=1e-6)


def test_ball_carving_worked_example():
  q = np.float32([[[1.0, 0.0], [0.96, 0.28], [0.0, 1.0], [0.28, 0.96]]])
  balls = ball_carve(q, np.ones((1, 4), bool), threshold=0.7)
  want = [[1.96, 0.28], [0.28, 1.96], [0, 0], [0, 0]]
  np.testing.assert_allclose(balls.tokens[0], want, atol=1e-6)
  np.testing.assert_array_equal(balls.mask[0], [True, True, False, False])


@pytest.mark.parametrize("seed", range(4))
def test_ball_carving_equals_a_loop(seed):
  x, mask = example(seed, num_tokens=12, dim=3)
  poisoned = np.where(mask[..., None], x, np.nan)
  balls = jax.device_get(ball_carve(poisoned, mask, threshold=0.5))
  for tokens, valid, got, kept in zip(x, mask, *balls, strict=True):
    left = [i for i in range(12) if valid[i]]
    want = []
    while left:
      ball = [
        i for i in left if i == left[0] or tokens[left[0]] @ tokens[i] >= 0.5
      ]
      want.append(np.sum([tokens[i] for i in ball], axis=0))
      left = [i for i in left if i not in ball]
    assert int(kept.sum()) == len(want)
    np.testing.assert_allclose(got[: len(want)], want, atol=1e-5)
    assert not np.any(got[len(want) :])


def synthetic(num_documents=500, num_queries=100, dim=128):
  """Documents of 40-120 noisy words, queries of 32 noisy tokens of one."""
  rng = np.random.default_rng(0)

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  words = unit(rng.normal(size=(300, dim)))
  zipf = 1 / np.arange(1, 301)
  lengths = rng.integers(40, 121, num_documents)
  drawn = rng.choice(300, lengths.sum(), p=zipf / zipf.sum())
  noise = rng.normal(size=(len(drawn), dim)) / dim**0.5
  tokens = unit(words[drawn] + 0.6 * noise).astype(np.float32)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  gold = rng.choice(num_documents, num_queries, replace=False)
  picks = np.stack(
    [offsets[g] + rng.choice(lengths[g], 32, replace=False) for g in gold]
  )
  noise = rng.normal(size=(*picks.shape, dim)) / dim**0.5
  queries = unit(tokens[picks] + 0.6 * noise).astype(np.float32)
  return tokens, offsets, queries, gold


def recall(scores, gold, k):
  best = np.argsort(-scores, axis=1)[:, :k]
  return np.mean((best == gold[:, None]).any(axis=1))


def test_synthetic_recall():
  tokens, offsets, queries, gold = synthetic()
  mask = np.ones(queries.shape[:2], bool)

  def encoded(config):
    params = parameters(config)
    documents = muvera.encode_corpus(params, config, tokens, offsets)
    return muvera.encode_queries(params, config, queries, mask), documents

  config = muvera.FDEConfig(dim=128, **muvera.PRESETS[2560])
  q, d = encoded(config)
  assert recall(np.asarray(q) @ np.asarray(d).T, gold, 10) == 1
  book = quantize.pq_train(
    jax.random.key(1), np.asarray(d), group_size=8, num_iterations=4
  )
  codes = quantize.pq_encode(book, np.asarray(d))
  assert (
    recall(np.asarray(quantize.pq_scores(book, codes, q)), gold, 10) >= 0.97
  )


@pytest.mark.slow
def test_synthetic_recall_of_final_sketches():
  tokens, offsets, queries, gold = synthetic()
  mask = np.ones(queries.shape[:2], bool)
  for final_dim, first, tenth in ((2560, 0.75, 0.95), (5120, 0.9, 0.98)):
    config = muvera.FDEConfig(
      dim=128,
      num_simhash_bits=6,
      num_repetitions=40,
      projection_dim=128,
      final_dim=final_dim,
    )
    params = parameters(config)
    documents = muvera.encode_corpus(params, config, tokens, offsets)
    scores = muvera.encode_queries(params, config, queries, mask) @ documents.T
    assert recall(np.asarray(scores), gold, 1) >= first
    assert recall(np.asarray(scores), gold, 10) >= tenth


def test_presets_have_their_width():
  for width, fields in muvera.PRESETS.items():
    assert muvera.FDEConfig(dim=8, **fields).output_dim == width


@pytest.mark.unchecked
@pytest.mark.parametrize(
  "field, value, message",
  [
    ("num_simhash_bits", 11, "num_simhash_bits must lie in 0..10, got 11"),
    ("num_repetitions", 0, "num_repetitions must lie in 1"),
    ("projection_dim", 0, "projection_dim must lie in 1"),
    ("final_dim", 97, "final_dim must lie in 1..96, got 97"),
    ("inner", "dense", "inner must be one of 'sign', 'sketch'"),
    ("dim", 0, "dim must lie in 1"),
  ],
)
def test_config_errors(field, value, message):
  config = dataclasses.replace(SIGN, **{field: value})
  with pytest.raises(ValueError, match=message):
    muvera.init(jax.random.key(0), config)


@pytest.mark.unchecked
def test_argument_errors():
  params = parameters(SIGN)
  x, mask = example()
  with pytest.raises(ValueError, match="x_tokens=9, mask_tokens=8"):
    muvera.encode_documents(params, SIGN, x, mask[:, :-1])
  with pytest.raises(ValueError, match="x_width=5, config_dim=6"):
    muvera.encode_queries(params, SIGN, x[..., :5], mask)
  with pytest.raises(ValueError, match="params must come from init"):
    muvera.encode_queries(params, CONFIGS["no_bits"], x, mask)
  with pytest.raises(ValueError, match="final_dim is 20"):
    muvera.encode_queries(params, CONFIGS["final"], x, mask)
  with pytest.raises(ValueError, match="offsets must ascend from 0 to 9"):
    muvera.encode_corpus(params, SIGN, x[0], np.array([0, 8]))
  with pytest.raises(ValueError, match="queries_tokens=9, mask_tokens=8"):
    muvera.ball_carve(x, mask[:, :-1])


def test_sketched_inner_projection_has_one_entry_per_coordinate():
  params = parameters(CONFIGS["sketch"])
  entries = np.abs(params.projection)
  np.testing.assert_array_equal(entries.sum(axis=-1), np.ones((3, 6)))


def test_corpus_compiles_one_program():
  params = parameters(SIGN, 1)
  tokens = np.ones((60, 6), np.float32)
  offsets = np.array([0, 5, 7, 20, 33, 34, 50, 60])
  jax.clear_caches()  # a full cache drops what it counts
  before = muvera.encode_packed._cache_size()
  muvera.encode_corpus(params, SIGN, tokens, offsets, step_tokens=21)
  assert muvera.encode_packed._cache_size() == before + 1
