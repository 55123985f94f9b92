"""Nearest codes against float64 NumPy, and what must not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.compiled import compiled, run
from tokjax.kernels import nearest_code as package
from tokjax.kernels.nearest_code import METRICS, NearestCodes, block_sizes
from tokjax.kernels.nearest_code.shapes import SHAPES

jitted = compiled(package)
nearest_code, topk_codes = jitted.nearest_code, jitted.topk_codes

PLAIN = ("reference", "xla")


def example(seed=0, num_tokens=30, num_codes=40, dim=8):
  random = np.random.default_rng(seed)
  codebook = random.normal(size=(num_codes, dim)).astype(np.float32)
  return random.normal(size=(num_tokens, dim)).astype(np.float32), codebook


def distances(x, codebook, metric):
  """Squared distances or 1 - cosine of all pairs, float64."""
  x, codebook = np.asarray(x, np.float64), np.asarray(codebook, np.float64)
  if metric == "cosine":
    x, codebook = (
      a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
      for a in (x, codebook)
    )
    return 1 - x @ codebook.T
  return np.square(x[:, None] - codebook[None]).sum(axis=-1)


def oracle(x, codebook, metric="euclidean"):
  """The nearest code, and whether it is so by more than 1e-4."""
  away = distances(x, codebook, metric)
  first, second = np.partition(away, 1, axis=1)[:, :2].T
  return away.argmin(axis=1), second - first > 1e-4


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [8, 256])
def test_equals_float64_where_there_is_a_gap(dim, metric):
  x, codebook = example(dim, 60, 1000, dim)
  want, clear = oracle(x, codebook, metric)
  assert clear.mean() > 0.9
  for implementation in PLAIN:
    got = nearest_code(
      x, codebook, metric=metric, implementation=implementation
    )
    assert got.dtype == jnp.int32 and got.shape == (60,)
    np.testing.assert_array_equal(got[clear], want[clear])


@pytest.mark.parametrize("metric", METRICS)
def test_by_hand(metric):
  codebook = np.float32([[0, 0], [9, 9], [0, 1], [2, 0]])
  x = np.float32([[1, 4], [3, 1], [-1, -1], [0, 0]])
  # Cosine: zero has the same angle to all, and the zero code cosine 0.
  want = {"euclidean": [2, 3, 0, 0], "cosine": [2, 3, 0, 0]}[metric]
  assert nearest_code(x, codebook, metric=metric).tolist() == want


@pytest.mark.parametrize("block_size", [1, 7, 40, 100])
def test_block_size_changes_nothing(block_size):
  x, codebook = example()
  want, clear = oracle(x, codebook)
  assert clear.all()
  got = nearest_code(x, codebook, block_size=block_size)
  np.testing.assert_array_equal(got, want)
  found = topk_codes(x, codebook, 3, block_size=block_size)
  away = distances(x, codebook, "euclidean")
  np.testing.assert_array_equal(found.index, away.argsort(axis=1)[:, :3])


def test_duplicates_give_the_lowest_index():
  x, codebook = example(1, 200, 300, 16)
  order = np.random.default_rng(2).permutation(np.arange(900) % 300)
  lowest = np.array([np.flatnonzero(order == k)[0] for k in range(300)])
  whole = np.random.default_rng(3).integers(-2, 3, (50, 3))  # exact, many ties
  whole = np.float32(whole)
  away = distances(whole[:9], whole, "euclidean")
  for implementation in PLAIN:
    got = nearest_code(x, codebook[order], implementation=implementation)
    want, clear = oracle(x, codebook)
    np.testing.assert_array_equal(got[clear], lowest[want[clear]])
    got = nearest_code(whole[:9], whole, implementation=implementation)
    np.testing.assert_array_equal(got, away.argmin(axis=1))
  for block_size in (7, 100):
    found = topk_codes(whole[:9], whole, 20, block_size=block_size)
    want = away.argsort(axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(found.index, want)


def test_cosine_does_not_see_lengths():
  x, codebook = example()
  _, clear = oracle(x, codebook, "cosine")
  assert clear.all()
  want = nearest_code(x, codebook, metric="cosine")
  # Down to lengths of 1e-12, which count as zero.
  scale = np.float32(10.0) ** np.arange(-11, 19)[:, None]
  got = nearest_code(x * scale, codebook, metric="cosine")
  np.testing.assert_array_equal(got, want)


def test_masked_tokens_and_broken_codes_have_no_influence():
  x, codebook = example()
  mask = np.arange(30) % 3 > 0
  want = np.where(mask, oracle(x, codebook)[0], -1)
  x = np.where(mask[:, None], x, np.nan)
  broken = np.concatenate([codebook, codebook[:2]])
  broken[40, 3], broken[41, 0] = np.nan, np.inf
  for implementation in PLAIN:
    got = nearest_code(x, broken, mask, implementation=implementation)
    np.testing.assert_array_equal(got, want)
  found = topk_codes(x, broken, 42, mask)
  assert (
    np.isinf(found.distance[~mask]).all() and (found.index[~mask] < 0).all()
  )
  np.testing.assert_array_equal(found.index[:, 0], want)
  # The two that are broken cannot be found.
  np.testing.assert_array_equal((found.index[mask] < 0).sum(axis=1), 2)
  assert np.isinf(found.distance[:, 40:]).all()
  x[1] = np.nan
  for implementation in PLAIN:
    got = nearest_code(x, broken, mask, implementation=implementation)
    assert int(got[1]) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_topk_distances(metric):
  x, codebook = example()
  found = topk_codes(x, codebook, 3, metric=metric)
  assert isinstance(found, NearestCodes)
  want = np.sort(distances(x, codebook, metric), axis=1)[:, :3]
  np.testing.assert_allclose(found.distance, want, atol=1e-5)
  itself = topk_codes(codebook, codebook, 1, metric=metric)
  np.testing.assert_allclose(itself.distance, 0, atol=1e-5)
  assert (np.asarray(itself.distance) >= 0).all()


def test_any_leading_axes_and_sizes_of_one():
  x, codebook = example()
  want = nearest_code(x, codebook)
  got = nearest_code(x.reshape(2, 3, 5, 8), codebook, np.ones((2, 3, 5), bool))
  np.testing.assert_array_equal(got, np.reshape(want, (2, 3, 5)))
  assert nearest_code(x[4], codebook).shape == ()
  assert int(nearest_code(x[4], codebook)) == int(want[4])
  assert nearest_code(x[:1], codebook[:1]).tolist() == [0]
  assert nearest_code(x[:0], codebook).shape == (0,)
  assert topk_codes(x[:1], codebook[:1], 1).index.tolist() == [[0]]
  found = topk_codes(x[:0], codebook, 2)
  assert found.index.shape == found.distance.shape == (0, 2)


@pytest.mark.parametrize("metric", METRICS)
def test_bfloat16_is_its_float32_copy(metric):
  x, codebook = map(lambda a: a.astype(jnp.bfloat16), example())
  want = nearest_code(
    x.astype(np.float32), codebook.astype(np.float32), metric=metric
  )
  np.testing.assert_array_equal(nearest_code(x, codebook, metric=metric), want)


def test_many_blocks_of_tokens_keep_their_order():
  x, codebook = example(5, 1001, 300, 8)  # 8 blocks of 128 tokens on CPU
  want, clear = oracle(x, codebook)
  got = nearest_code(x, codebook, implementation="xla")
  np.testing.assert_array_equal(got[clear], want[clear])


def test_vmap_and_shards_of_the_batch_are_equal():
  x, codebook = example(6, 8 * 30, 40, 8)
  x = x.reshape(8, 30, 8)
  want = nearest_code(x, codebook)
  mapped = run(jax.vmap(package.nearest_code, in_axes=(0, None)), x, codebook)
  np.testing.assert_array_equal(mapped, want)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  sharded = jax.shard_map(
    package.nearest_code,
    mesh=mesh,
    in_specs=(jax.P("data"), jax.P()),
    out_specs=jax.P("data"),
  )
  np.testing.assert_array_equal(run(sharded, x, codebook), want)


def test_vmap_over_codebooks():
  x, codebook = example(7, 60, 80, 8)
  x, books = x.reshape(2, 30, 8), codebook.reshape(2, 40, 8)
  got = run(jax.vmap(package.nearest_code), x, books)
  want = [oracle(x[m], books[m])[0] for m in range(2)]
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_codes_sharded_inside_shard_map(kind):
  # Whole numbers: ties within and between devices.
  whole = np.random.default_rng(8).integers(-2, 3, (48, 3)).astype(np.float32)
  x, mask = whole[:6], np.arange(6) != 2
  want = np.where(mask, distances(x, whole, "euclidean").argmin(axis=1), -1)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)

  def search(x, codebook, mask):
    return package.sharded_nearest_code(x, codebook, mask, axis_name="model")

  tokens, codes = jax.P("data"), jax.P("model")
  search = jax.shard_map(
    search, mesh=mesh, in_specs=(tokens, codes, tokens), out_specs=tokens
  )
  with jax.set_mesh(mesh):
    arrays = (
      jax.device_put(a, spec)
      for a, spec in ((x, tokens), (whole, codes), (mask, tokens))
    )
    got = jax.jit(search)(*arrays)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  "tokens, codes",
  [
    (None, ("data", "model")),
    ("data", ("data", "model")),
    (("data", "model"), "model"),
  ],
)
def test_codes_sharded_on_an_explicit_mesh(tokens, codes):
  whole = np.random.default_rng(9).integers(-2, 3, (48, 3)).astype(np.float32)
  x = whole[:16].reshape(8, 2, 3)
  away = distances(whole[:16], whole, "euclidean")
  mesh = jax.make_mesh((2, 4), ("data", "model"))
  with jax.set_mesh(mesh):
    placed = jax.device_put(x, jax.P(tokens))
    shards = jax.device_put(whole, jax.P(codes))
    got = package.nearest_code(placed, shards)
    found = package.topk_codes(placed, shards, 9)
  assert got.sharding.spec == jax.P(tokens, None)
  np.testing.assert_array_equal(got.reshape(16), away.argmin(axis=1))
  order = away.argsort(axis=1, kind="stable")[:, :9]
  np.testing.assert_array_equal(found.index.reshape(16, 9), order)
  np.testing.assert_allclose(
    found.distance.reshape(16, 9), np.take_along_axis(away, order, 1), atol=1e-5
  )


def test_tokens_sharded_on_an_auto_mesh_stay_where_they_are():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

  def placed(shape, spec):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  x = placed((8, 512, 8), jax.P("data"))
  codebook = placed((1024, 8), jax.P())
  program = jax.jit(package.nearest_code).lower(x, codebook).compile()
  assert "all-gather" not in program.as_text()
  assert "all-reduce" not in program.as_text()


@pytest.mark.parametrize("name", ["llamagen", "ibq"])
def test_scores_of_all_codes_are_never_held(name):
  shape = SHAPES[name]
  x = jax.ShapeDtypeStruct((shape.num_tokens, shape.dim), jnp.bfloat16)
  codebook = jax.ShapeDtypeStruct((shape.num_codes, shape.dim), jnp.float32)
  program = jax.jit(package.nearest_code).lower(x, codebook).compile()
  held = program.memory_analysis().temp_size_in_bytes
  # Both operands once more, and the tokens dealt to blocks.
  operands = 4 * shape.dim * (2 * shape.num_tokens + shape.num_codes)
  assert held < operands + (8 << 20)
  assert held < 4 * shape.num_tokens * shape.num_codes / 10


def test_no_gradient_passes():
  x, codebook = example()

  def total(x, codebook):
    found = package.topk_codes(x, codebook, 2)
    index = package.nearest_code(x, codebook)
    return jnp.sum(found.distance) + jnp.sum(index.astype(jnp.float32))

  for gradient in run(jax.grad(total, (0, 1)), x, codebook):
    assert not np.any(gradient)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  x, codebook = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 3), (5, 3)))
  wide = jax.ShapeDtypeStruct((5, 2000), jnp.float32)
  mask = jax.ShapeDtypeStruct((3,), bool)

  def attempt(*arrays, **settings):
    return jax.eval_shape(
      lambda *a: package.nearest_code(*a, **settings), *arrays
    )

  for message, arrays, settings in (
    ("x_dim=3, codebook_dim=2000", (x, wide), {}),
    ("codebook must have 2 axes", (x, mask), {}),
    (r"mask must have shape \(4,\), got \(3,\)", (x, codebook, mask), {}),
    ("metric must be one of 'euclidean'", (x, codebook), dict(metric="l2")),
    ("block_size must lie in 1", (x, codebook), dict(block_size=0)),
    (
      "block_size has no meaning for implementation 'reference', got 2",
      (x, codebook),
      dict(block_size=2, implementation="reference"),
    ),
    (
      "implementation must be one of .*'pallas_gpu', got 'triton'",
      (x, codebook),
      dict(implementation="triton"),
    ),
  ):
    with pytest.raises(ValueError, match=message):
      attempt(*arrays, **settings)
  for implementation in ("pallas_tpu", "pallas_gpu"):
    message = f"{implementation}: width 2000 is more than"
    with pytest.raises(NotImplementedError, match=message):
      attempt(wide, wide, implementation=implementation)
  with pytest.raises(ValueError, match=r"k must lie in 1\.\.5, got 6"):
    jax.eval_shape(lambda *a: package.topk_codes(*a, 6), x, codebook)
  mesh = jax.make_mesh((8,), ("data",))
  with jax.set_mesh(mesh):
    x = jax.device_put(jnp.ones((8, 8)), jax.P(None, "data"))
    with pytest.raises(ValueError, match="x must not be sharded over its last"):
      package.nearest_code(x, jnp.ones((8, 8)))
    with pytest.raises(ValueError, match="codebook must be sharded over its f"):
      package.nearest_code(jnp.ones((8, 8)), x)


def test_sizes_on_chip():
  for shape in SHAPES.values():
    sizes = block_sizes.default_block_sizes(shape.num_tokens, shape.num_codes)
    assert sizes.tokens % 128 == sizes.codes % 128 == 0
    assert sizes.tokens <= 1024 and sizes.codes <= 512
    assert shape.flops == 2 * shape.num_tokens * shape.num_codes * shape.dim
  with pytest.raises(ValueError, match="codes must be a multiple of 128"):
    block_sizes.BlockSizes(128, 200)
