"""The Hopper kernels of column attention in the Mosaic GPU interpreter.

The tests marked `gpu` run the same cases on the device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import column_attention_test
from tokjax.kernels.column_attention import (
  api,
  block_sizes,
  pallas_gpu,
  reference,
)

# H, Hk, R, S, d, segments, causal
CASES = {
  # Five tiles of keys, more than are in flight; the last one partly padding.
  "many tiles": (1, 1, 20, 520, 16, 0, False),
  "grouped": (2, 1, 150, 270, 32, 0, False),
  # Two blocks, of which the first skips a tile.
  "causal": (1, 1, 150, 150, 16, 0, True),
  "causal, many tiles": (1, 1, 700, 700, 32, 0, True),
  "causal, more rows": (1, 1, 300, 70, 16, 0, True),
  "windows": (2, 2, 140, 140, 64, 2, False),
  # d is padded to 80.
  "odd width": (1, 1, 20, 30, 72, 0, False),
}


def check(name, interpret=False, known=False):
  *sizes, segments, causal = CASES[name]
  # Example 0 has no valid key; the others take long enough alone.
  q, k, mask, weight, ids = (
    x if x is None else x[1:]
    for x in column_attention_test.case(0, 2, *sizes, segments)
  )
  q, k = jnp.asarray(q, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16)
  weight = jnp.asarray(weight)
  if ids is not None:
    ids = jnp.asarray(ids)
  row_ids, key_ids = api._ids(q, k, jnp.asarray(mask), weight, ids)
  given = (q, k, row_ids, key_ids, weight)
  settings = dict(scale=0.3, causal=causal)
  got = pallas_gpu.column_attention_forward(
    *given, **settings, interpret=interpret
  )
  want = reference.column_attention_forward(*given, **settings)
  compare(got, want, np.asarray(weight) != 0)
  if known:
    top = jnp.where(want[2] > 0, want[1] + jnp.log(want[2]), 0)
    got = pallas_gpu.column_attention_forward(
      *given, (top, want[2]), **settings, interpret=interpret
    )
    compare(got, want, np.asarray(weight) != 0)


def compare(got, want, live):
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
  for ours, theirs in zip(got[1:], want[1:], strict=True):
    np.testing.assert_allclose(
      np.asarray(ours)[live], np.asarray(theirs)[live], rtol=1e-5, atol=1e-5
    )


def check_unmasked(interpret=False):
  keys = jax.random.split(jax.random.key(0))
  q = jax.random.normal(keys[0], (1, 2, 128, 32), jnp.bfloat16)
  k = jax.random.normal(keys[1], (1, 1, 128, 32), jnp.bfloat16)
  weight = jnp.full(q.shape[:3], 1 / 128)
  given, settings = (q, k, None, None, weight), dict(scale=0.25, causal=False)
  got = pallas_gpu.column_attention_forward(
    *given, **settings, interpret=interpret
  )
  want = reference.column_attention_forward(*given, **settings)
  compare(got, want, np.ones(q.shape[:3], bool))


@pytest.mark.parametrize("name", ["many tiles", "causal"])
def test_is_the_reference(name, interpreter):
  check(name, interpreter)


def test_known_normalizers_give_the_same(interpreter):
  check("odd width", interpreter, known=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_the_reference(name, interpreter):
  check(name, interpreter)


def test_without_ids_or_padding(interpreter):
  check_unmasked(interpreter)


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_shared_memory_suffices(dim):
  stages = block_sizes.gpu_stages(dim, 128, 128)
  assert stages >= 2  # copies overlap products
  assert 2 * dim * (128 + stages * 128) + 4096 <= 227 * 1024


def test_unsupported_names_the_reason():
  def reason(shape, dtype):
    x = jax.ShapeDtypeStruct(shape, dtype)
    return pallas_gpu.unsupported(x, x)

  assert reason((1, 2, 8, 64), jnp.bfloat16) is None
  assert "got float32" in reason((1, 2, 8, 64), jnp.float32)
  assert "at most 256, got 512" in reason((1, 2, 8, 512), jnp.bfloat16)
  assert "empty" in reason((1, 2, 0, 64), jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_device_is_the_reference(name):
  check(name)


@pytest.mark.gpu
def test_device_without_ids_or_padding():
  check_unmasked()
