"""Column attention in plain JAX against a float64 loop, and its properties."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.arrays import takes_numpy
from tokjax.kernels.column_attention import api, reference, xla
from tokjax.kernels.column_attention.shapes import SHAPES

column_attention = takes_numpy(api.column_attention)
PLAIN = ("reference", "xla")


def loop(q, k, mask, weight, segment_ids, causal, scale):
  """Row by row in float64; a row sees what the definition says it sees."""
  batch, heads, num_rows, _ = q.shape
  key_heads, num_keys = k.shape[1:3]
  received = np.zeros((batch, heads, num_keys))
  log_normalizer = np.full((batch, heads, num_rows), -np.inf)
  highest = np.zeros((batch, heads, num_rows))
  for b, h, i in np.ndindex(batch, heads, num_rows):
    if weight[b, h, i] == 0:
      continue
    seen = [
      j
      for j in range(num_keys)
      if mask[b, j]
      and (not causal or j <= i + num_keys - num_rows)
      and (segment_ids is None or segment_ids[b, i] == segment_ids[b, j] >= 0)
    ]
    if not seen:
      continue
    keys = k[b, h * key_heads // heads, seen].astype(np.float64)
    scores = scale * keys @ q[b, h, i].astype(np.float64)
    exponential = np.exp(scores - scores.max())
    p = exponential / exponential.sum()
    received[b, h, seen] += weight[b, h, i] * p
    log_normalizer[b, h, i] = scores.max() + np.log(exponential.sum())
    highest[b, h, i] = p.max()
  return received, log_normalizer, highest


def case(seed, batch, heads, key_heads, num_rows, num_keys, dim, segments=0):
  """Random arrays; masked keys and rows of weight zero hold NaN."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(batch, heads, num_rows, dim)).astype(np.float32)
  k = rng.normal(size=(batch, key_heads, num_keys, dim)).astype(np.float32)
  mask = rng.random((batch, num_keys)) < 0.7
  mask[0] = False  # nothing to see
  weight = rng.normal(size=(batch, heads, num_rows)).astype(np.float32)
  weight[rng.random(weight.shape) < 0.3] = 0
  q[weight == 0] = np.nan
  k = np.where(mask[:, None, :, None], k, np.nan)
  ids = None
  if segments:
    ids = rng.integers(-1, segments, (batch, num_rows)).astype(np.int32)
  return q, k, mask, weight, ids


# H, Hk, R, S, d, segments, causal
CONFIGS = {
  "plain": (2, 2, 9, 13, 8, 0, False),
  "grouped": (6, 2, 7, 11, 4, 0, False),
  "causal": (2, 1, 9, 13, 8, 0, True),
  "more rows than keys": (2, 2, 13, 6, 8, 0, True),
  "segments": (2, 2, 12, 12, 8, 3, False),
  "segments, causal": (4, 2, 12, 12, 8, 2, True),
  "one row": (3, 1, 1, 5, 8, 0, False),
  "one key": (1, 1, 4, 1, 8, 0, False),
}


@pytest.mark.parametrize("scratch", [1, 1 << 20])  # eight rows a block, or all
@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_a_loop(config, implementation, scratch, monkeypatch):
  if implementation == "reference" and scratch == 1:
    pytest.skip("the reference has no blocks")
  monkeypatch.setattr(xla, "CPU_SCRATCH_BYTES", scratch)
  api._column_attention.clear_cache()
  *sizes, segments, causal = CONFIGS[config]
  given = case(3, 60, *sizes, segments)
  got = column_attention(
    *given[:4],
    segment_ids=given[4],
    causal=causal,
    scale=0.7,
    implementation=implementation,
  )
  for ours, theirs in zip(got, loop(*given, causal, 0.7), strict=True):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("config", ["grouped", "segments, causal"])
def test_known_normalizers_give_the_same(config, implementation):
  *sizes, segments, causal = CONFIGS[config]
  q, k, mask, weight, ids = case(9, 40, *sizes, segments)
  settings = dict(segment_ids=ids, causal=causal, implementation=implementation)
  found = column_attention(q, k, mask, weight, **settings)
  other = np.where(weight != 0, np.abs(weight) + 1, 0)
  want = column_attention(q, k, mask, other, **settings)
  got = column_attention(q, k, mask, other, normalizers=found, **settings)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
  # They are what is used: half the probabilities, half of what is received.
  half = found._replace(
    log_normalizer=found.log_normalizer + np.log(2), highest=found.highest / 2
  )
  got = column_attention(q, k, mask, other, normalizers=half, **settings)
  np.testing.assert_allclose(got.received, want.received / 2, rtol=1e-5)


@pytest.mark.parametrize("implementation", PLAIN)
def test_three_keys_by_hand(implementation):
  # Exponentials 1, 2, 5 in the first row, 1, 1, 1 in the second.
  q = np.array([[[[1.0], [0.0]]]], np.float32)
  k = np.log(np.array([[[[1.0], [2.0], [5.0]]]], np.float32))
  got = column_attention(q, k, scale=1.0, implementation=implementation)
  want = (np.array([1, 2, 5]) / 8 + 1 / 3) / 2
  np.testing.assert_allclose(got.received[0, 0], want, rtol=1e-6)
  np.testing.assert_allclose(
    got.log_normalizer[0, 0], np.log([8, 3]), rtol=1e-6
  )
  np.testing.assert_allclose(got.highest[0, 0], [5 / 8, 1 / 3], rtol=1e-6)


def test_the_general_branch_equals_the_one_for_cpu(monkeypatch):
  # What other platforms run: all heads at once, in blocks of eight rows.
  monkeypatch.setattr(xla, "SCRATCH_BYTES", 1)

  def general(*arrays, cpu, default):
    del cpu
    return default(*arrays)

  q, k, mask, weight, ids = case(5, 6, 4, 2, 21, 21, 8, 2)
  row_ids, key_ids = api._ids(
    *map(jnp.asarray, (q, k, mask, weight)), jnp.asarray(ids)
  )
  arrays = (jnp.asarray(q), jnp.asarray(k), row_ids, key_ids)
  settings = dict(scale=0.5, causal=True)
  want = xla.column_attention_forward(*arrays, jnp.asarray(weight), **settings)
  monkeypatch.setattr(jax.lax, "platform_dependent", general)
  got = xla.column_attention_forward(*arrays, jnp.asarray(weight), **settings)
  live = weight != 0
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
  for ours, theirs in zip(got[1:], want[1:], strict=True):
    np.testing.assert_allclose(
      np.asarray(ours)[live], np.asarray(theirs)[live], rtol=1e-5, atol=1e-6
    )


def test_large_scores_do_not_overflow():
  q = np.full((1, 1, 3, 4), 100.0, np.float32)
  k = np.full((1, 1, 5, 4), 100.0, np.float32)
  for implementation in PLAIN:
    got = column_attention(q, k, scale=1.0, implementation=implementation)
    np.testing.assert_allclose(got.received, np.full((1, 1, 5), 0.2), rtol=1e-5)
    np.testing.assert_allclose(got.log_normalizer, 4e4 + np.log(5), rtol=1e-6)


def test_defaults_are_the_mean_and_the_usual_scale():
  q, k, *_ = case(1, 3, 2, 2, 10, 12, 16)
  q, k = np.nan_to_num(q), np.nan_to_num(k)
  weight = np.full((3, 10), 1 / 10, np.float32)
  got = column_attention(q, k)
  want = column_attention(q, k, row_weight=weight, scale=0.25)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  np.testing.assert_allclose(got.received.sum(-1), np.ones((3, 2)), rtol=1e-5)


def test_what_all_keys_share_changes_nothing():
  q, k, *_ = case(2, 3, 2, 2, 10, 12, 16)
  q, k = np.nan_to_num(q), np.nan_to_num(k)
  shift = np.random.default_rng(0).normal(size=16).astype(np.float32)
  got, want = column_attention(q, k + shift), column_attention(q, k)
  np.testing.assert_allclose(got.received, want.received, atol=1e-5)
  np.testing.assert_allclose(got.highest, want.highest, atol=1e-5)


def test_segments_equal_calls_of_their_own():
  q, k, *_ = case(4, 2, 2, 2, 12, 12, 8)
  q, k = np.nan_to_num(q), np.nan_to_num(k)
  ids = np.repeat(np.arange(3, dtype=np.int32), 4)[None].repeat(2, 0)
  weight = np.full((2, 12), 0.25, np.float32)
  got = column_attention(q, k, row_weight=weight, segment_ids=ids)
  for i in range(3):
    part = slice(4 * i, 4 * i + 4)
    want = column_attention(q[:, :, part], k[:, :, part])
    np.testing.assert_allclose(
      got.received[:, :, part], want.received, rtol=1e-5
    )


def test_causal_rows_are_the_last_of_the_sequence():
  q, k, *_ = case(6, 2, 2, 2, 12, 12, 8)
  q, k = np.nan_to_num(q), np.nan_to_num(k)
  weight = np.zeros((2, 12), np.float32)
  weight[:, 9:] = 1 / 3
  got = column_attention(q[:, :, 9:], k, causal=True)
  want = column_attention(q, k, row_weight=weight, causal=True)
  np.testing.assert_allclose(got.received, want.received, rtol=1e-5)
  np.testing.assert_allclose(
    got.log_normalizer, want.log_normalizer[:, :, 9:], rtol=1e-5
  )


@pytest.mark.parametrize("implementation", PLAIN)
def test_bfloat16_products_are_exact(implementation):
  q, k, *_ = case(7, 4, 2, 2, 40, 48, 32)
  low = [jnp.asarray(np.nan_to_num(x), jnp.bfloat16) for x in (q, k)]
  high = [x.astype(jnp.float32) for x in low]
  got = api.column_attention(*low, implementation=implementation)
  want = api.column_attention(*high, implementation="reference")
  for ours, theirs in zip(got, want, strict=True):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_no_gradient_passes():
  q, k, mask, weight, _ = map(
    lambda x: None if x is None else jnp.asarray(np.nan_to_num(x)),
    case(8, 2, 2, 2, 5, 7, 8),
  )

  def total(q, k, weight):
    return jnp.sum(api.column_attention(q, k, mask, weight).received)

  for gradient in jax.grad(total, argnums=(0, 1, 2))(q, k, weight):
    np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


def largest_array(implementation, num_tokens, **settings):
  """Values of the largest array in the compiled program."""
  x = jax.ShapeDtypeStruct((1, 4, num_tokens, 64), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, num_tokens), bool)
  program = jax.jit(
    lambda q, k, mask: api.column_attention(
      q, k, mask, implementation=implementation, **settings
    )
  )
  text = program.lower(x, x, mask).compile().as_text()
  sizes = re.findall(r"\w+\[([\d,]+)\]", text)
  return max(np.prod([int(n) for n in size.split(",")]) for size in sizes)


@pytest.mark.parametrize("causal", [False, True])
def test_no_attention_matrix_is_held(causal):
  # A block has half as many values as the matrix of one head, at 16,384 tokens
  # one in 512; the inputs have a quarter.
  assert largest_array("xla", 1024, causal=causal) <= 1024 * 1024 // 2
  assert largest_array("reference", 1024, causal=causal) >= 4 * 1024 * 1024


def test_memory_grows_with_tokens_not_with_their_square():
  def held(num_tokens):
    x = jax.ShapeDtypeStruct((1, 16, num_tokens, 64), jnp.bfloat16)
    program = jax.jit(lambda q, k: api.column_attention(q, k)).lower(x, x)
    return program.compile().memory_analysis().temp_size_in_bytes

  num_tokens = SHAPES["video"].num_tokens
  # A matrix of one head would take 1 GiB. The CPU compiler widens queries and
  # keys, 64 MiB each, and the results are copied once, in and out of loops.
  assert held(num_tokens) < 224 << 20
  assert held(num_tokens) < 10 * held(num_tokens // 8)


def test_the_tpu_kernel_is_chosen_when_lowering_for_tpu():
  x = jax.ShapeDtypeStruct((1, 2, 576, 64), jnp.bfloat16)
  traced = jax.jit(lambda q, k: api.column_attention(q, k)).trace(x, x)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("column_attention_rows") >= 1
  assert text.count("column_attention_columns") >= 1
  assert "tpu_custom_call" not in traced.lower().as_text()


def test_named_kernel_says_why_it_cannot():
  x = jnp.zeros((1, 2, 8, 16), jnp.float16)
  for name in ("pallas_tpu", "pallas_gpu"):
    with pytest.raises(NotImplementedError, match=f"{name}: .*float16"):
      api.column_attention(x, x, implementation=name)


def test_visible_keys_of_ids():
  ids = jnp.array([[0, 1]])
  seen = reference.visible_keys(2, 2, ids, ids, causal=False)
  np.testing.assert_array_equal(seen, [[[True, False], [False, True]]])
  assert reference.visible_keys(2, 2, None, None, causal=False) is None


def test_shapes_count_one_product():
  assert SHAPES["image"].flops == 2 * 16 * 576 * 576 * 64
  decoder = SHAPES["decoder"]
  assert decoder.heads % decoder.key_heads == 0


@pytest.mark.unchecked
@pytest.mark.parametrize(
  "change, message",
  [
    (dict(q=(1, 2, 4)), "q must have 4 axes"),
    (dict(k=(2, 2, 5, 8)), "q_batch=1, k_batch=2"),
    (dict(k=(1, 2, 5, 9)), "q_dim=8, k_dim=9"),
    (dict(k=(1, 3, 5, 8)), "query_heads must be a multiple of 3, got 4"),
    (dict(k=(1, 2, 0, 8)), "keys must lie in 1"),
    (dict(mask=(1, 4)), "k_keys=5, mask_keys=4"),
    (dict(mask=(5,)), "mask must have 2 axes"),
    (dict(segment_ids=(1, 5)), "q_rows=4, k_keys=5, segment_tokens=5"),
    (dict(row_weight=(1, 5)), r"shape \(1, 4\) or \(1, 4, 4\), got \(1, 5\)"),
    (dict(implementation="cuda"), "implementation must be one of None"),
  ],
)
def test_errors_name_the_argument(change, message):
  shapes = dict(q=(1, 4, 4, 8), k=(1, 2, 5, 8)) | change
  arrays = {
    name: jnp.zeros(shape, bool if name == "mask" else jnp.float32)
    if isinstance(shape, tuple)
    else shape
    for name, shape in shapes.items()
  }
  with pytest.raises(ValueError, match=message):
    api.column_attention(**arrays)


@pytest.mark.unchecked
def test_normalizers_must_be_of_the_rows():
  x = jnp.zeros((1, 2, 4, 8))
  found = api.column_attention(x[:, :, 1:], x)
  with pytest.raises(ValueError, match=r"of \(1, 2, 4\) rows, got \(1, 2, 3\)"):
    api.column_attention(x, x, normalizers=found)


@pytest.mark.unchecked
def test_dtypes_must_agree():
  x = jnp.zeros((1, 2, 4, 8))
  with pytest.raises(ValueError, match="one dtype, got float32 and bfloat16"):
    api.column_attention(x, x.astype(jnp.bfloat16))
