"""Ring attention in one TPU kernel, on simulated devices that race."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from tests.parallel import dense_attention
from tokjax.kernels.ring_attention import pallas_tpu
from tokjax.kernels.ring_attention.shapes import SHAPES
from tokjax.ops import attention
from tokjax.parallel import ring_attention as public
from tokjax.parallel import zigzag

SIMULATED = jax.sharding.AbstractDevice("TPU v6e", num_cores=1, platform="tpu")


def over_devices(local, arrays, *, layout, **axes):
  """A function of local rows, of arrays in the order of the sequence."""
  mesh = dense_attention.ring_mesh(**axes)
  rows = jax.P("data" if "data" in axes else None, None, "seq")
  if layout == "zigzag":
    arrays = [zigzag.to_zigzag(x, axes["seq"], axis=2) for x in arrays]
  arrays = jax.device_put(arrays, jax.NamedSharding(mesh, rows))
  over = jax.shard_map(local, in_specs=(rows,) * len(arrays), out_specs=rows)
  described = mesh.abstract_mesh.update(abstract_device=SIMULATED)
  with jax.sharding.use_abstract_mesh(described):
    found = jax.device_get(jax.jit(over)(*arrays))
  if layout == "zigzag":
    back = functools.partial(zigzag.from_zigzag, num_devices=axes["seq"])
    found = jax.tree.map(lambda x: back(x, axis=2), found)
  return found


def lse(inputs, *, causal):
  """float64 logarithms of sums of exponentials of whole rows of logits."""
  q, k = (np.asarray(x, np.float64) for x in inputs[:2])
  k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
  logits = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
  if causal:
    logits = np.where(np.tri(q.shape[2], dtype=bool), logits, -np.inf)
  return np.log(np.sum(np.exp(logits), axis=-1))


class Setting(NamedTuple):
  """A mesh, and what its devices do."""

  axes: dict[str, int]
  causal: bool
  layout: str
  rotate: str
  batch: int
  heads: int
  key_heads: int
  length: int  # with tiles of 8
  copies: str  # when they happen


# The last two rings are long enough to wait for slots.
CASES = {
  "alone": Setting(dict(seq=1), True, "zigzag", "kv", 1, 1, 1, 32, "on_wait"),
  "two rings": Setting(
    dict(seq=2, data=2), True, "contiguous", "kv", 2, 2, 2, 32, "eager"
  ),
  "both ways": Setting(
    dict(seq=3), True, "zigzag", "both", 1, 1, 1, 96, "eager"
  ),
  "zigzag": Setting(dict(seq=4), True, "zigzag", "kv", 1, 2, 1, 64, "on_wait"),
  "all keys": Setting(
    dict(seq=4), False, "contiguous", "kv", 1, 1, 1, 32, "eager"
  ),
}
SLOW = {
  "eight": Setting(
    dict(seq=8), True, "zigzag", "both", 1, 2, 1, 256, "on_wait"
  ),
  "eight in order": Setting(
    dict(seq=8), True, "contiguous", "both", 1, 2, 2, 128, "eager"
  ),
  "eight, all keys": Setting(
    dict(seq=8), False, "zigzag", "kv", 1, 2, 1, 64, "on_wait"
  ),
  "rings beside": Setting(
    dict(data=2, seq=4), True, "zigzag", "both", 2, 1, 1, 128, "on_wait"
  ),
}


@pytest.mark.parametrize(
  "setting",
  [
    *(pytest.param(case, id=name) for name, case in CASES.items()),
    *(
      pytest.param(case, id=name, marks=pytest.mark.slow)
      for name, case in SLOW.items()
    ),
  ],
)
def test_equals_attention_over_the_whole(setting):
  inputs = dense_attention.example(
    length=setting.length, key_heads=setting.key_heads, segments=False
  )
  q, *keys, d_out = (x[: setting.batch] for x in inputs[:4])
  inputs = dense_attention.Inputs(q[:, : setting.heads], *keys, d_out, None)
  kernel = functools.partial(
    pallas_tpu.ring_attention_forward,
    axis_name="seq",
    causal=setting.causal,
    layout=setting.layout,
    rotate=setting.rotate,
    tile=8,
    interpret=pltpu.InterpretParams(
      detect_races=True, dma_execution_mode=setting.copies
    ),
  )
  got = over_devices(kernel, inputs[:3], layout=setting.layout, **setting.axes)
  out, *_ = dense_attention.dense(inputs, causal=setting.causal)
  want = attention.AttentionState(out, lse(inputs, causal=setting.causal))
  assert not interpret_pallas_call.races.races_found
  for g, w in zip(got, want, strict=True):
    assert g.dtype == np.float32
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.fixture
def simulated(monkeypatch):
  """The kernel of the public function on simulated devices."""
  kernel = functools.partial(
    pallas_tpu.ring_attention_forward,
    interpret=pltpu.InterpretParams(detect_races=True),
  )
  monkeypatch.setattr(pallas_tpu, "ring_attention_forward", kernel)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_the_public_function_and_its_gradients(simulated, dtype):
  inputs = dense_attention.example(length=512, segments=False)
  low = [np.asarray(x[:1], dtype) for x in inputs[:4]]
  inputs = dense_attention.Inputs(*low, None)

  def local(queries, keys, values, d_out):
    ring = functools.partial(
      public.ring_attention,
      axis_name="seq",
      causal=True,
      implementation="pallas_tpu",
    )
    out, back = jax.vjp(ring, queries, keys, values)
    return out, *back(d_out)

  got = over_devices(local, low, layout="zigzag", seq=2)
  assert not interpret_pallas_call.races.races_found
  want = dense_attention.dense(inputs, causal=True)
  allowed = dense_attention.dense_as_given(inputs)
  for g, r, w in zip(got, allowed, want, strict=True):
    assert g.dtype == dtype
    error, limit = (np.abs(np.asarray(x, float) - w).max() for x in (g, r))
    assert error <= (2 * limit if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_takes_the_real_shapes(name):
  shape = SHAPES[name]
  for dtype in (jnp.float32, jnp.bfloat16):
    q, k = (
      jax.ShapeDtypeStruct((1, heads, shape.num_rows, shape.dim), dtype)
      for heads in (shape.heads, shape.key_heads)
    )
    for rotate in ("kv", "both"):
      reason = pallas_tpu.unsupported(
        q, k, k, causal=True, layout="zigzag", rotate=rotate
      )
      assert reason is None


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("rows", "dim", "dtype", "settings", "message"),
  [
    (256, 64, jnp.float16, {}, r"dtypes \['float16'\] are not all float32"),
    (256, 512, jnp.float32, {}, "width 512 is above 256"),
    (0, 64, jnp.float32, {}, "an axis is empty"),
    (128, 64, jnp.float32, {}, "128 rows are not a multiple of 128 for each"),
    (256, 64, jnp.float32, dict(rotate="both"), "for each of 4 parts"),
    (256, 64, jnp.float32, dict(segment_ids=True), "segment_ids are not"),
  ],
)
def test_what_it_cannot_take_is_said(rows, dim, dtype, settings, message):
  x = jax.ShapeDtypeStruct((1, 1, 2, rows, dim), dtype)
  ids = [jax.ShapeDtypeStruct((1, 1, rows), jnp.int32)]
  ids = ids if settings.pop("segment_ids", False) else []

  def local(x, *ids):
    segment_ids = ids[0] if ids else None
    return public.ring_attention(
      x,
      x,
      x,
      axis_name="seq",
      causal=True,
      segment_ids=segment_ids,
      implementation="pallas_tpu",
      **settings,
    )

  with pytest.raises(NotImplementedError, match=f"pallas_tpu: .*{message}"):
    jax.eval_shape(jax.vmap(local, axis_name="seq"), x, *ids)


def test_a_tile_must_divide_the_rows_of_a_part():
  x = jax.ShapeDtypeStruct((1, 1, 2, 24, 4), jnp.float32)
  call = functools.partial(
    pallas_tpu.ring_attention_forward,
    axis_name="seq",
    causal=True,
    layout="zigzag",
    tile=8,
  )
  with pytest.raises(ValueError, match="rows_of_a_part .* 8, got 12"):
    jax.eval_shape(jax.vmap(call, axis_name="seq"), x, x, x)
