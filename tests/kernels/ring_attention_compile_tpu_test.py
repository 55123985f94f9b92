"""Ring attention in one kernel, built by the real TPU compiler, without a TPU.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_tpu tests/kernels/ring_attention_compile_tpu_test.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.ring_attention.shapes import SHAPES
from tokjax.parallel import topologies
from tokjax.parallel.ring_attention import ring_attention

pytestmark = pytest.mark.compile_tpu


def compiled(tpus, name, dtype, mesh_shape=(4,), gradient=False, **settings):
  """Of whole queries, keys and values, cut over the last axis of the mesh."""
  shape = SHAPES[name]
  *examples, size = mesh_shape
  mesh = jax.sharding.Mesh(
    np.array(tpus[: np.prod(mesh_shape)]).reshape(mesh_shape),
    ("data", "seq")[-len(mesh_shape) :],
    axis_types=(jax.sharding.AxisType.Auto,) * len(mesh_shape),
  )
  rows = jax.P("data" if examples else None, None, "seq")
  place = jax.NamedSharding(mesh, rows)
  given = [
    jax.ShapeDtypeStruct(
      (*(examples or (1,)), heads, size * shape.num_rows, shape.dim),
      dtype,
      sharding=place,
    )
    for heads in (shape.heads, shape.key_heads, shape.key_heads)
  ]
  ring = functools.partial(
    ring_attention,
    axis_name="seq",
    implementation="pallas_tpu",
    **dict(causal=True) | settings,
  )
  over = jax.shard_map(ring, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)

  def total(*arrays):
    return jnp.sum(over(*arrays).astype(jnp.float32))

  function = jax.grad(total, (0, 1, 2)) if gradient else over
  report = topologies.compile_for(jax.jit(function), given, devices=tpus)
  assert report.kernels.get("ring_attention") == 1
  return report, given


def nbytes(x, num_devices):
  return x.size * x.dtype.itemsize // num_devices


def test_sends_by_itself(tpus):
  report, (queries, keys, values) = compiled(tpus, "llama", jnp.bfloat16)
  # The compiler has nothing to send.
  assert not report.collectives
  # Two slots, results in float32, and lse.
  slots = 2 * sum(nbytes(x, 4) for x in (keys, values))
  assert report.temp_bytes < slots + 2 * nbytes(queries, 4) + (4 << 20)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("dtype", "settings"),
  [
    (jnp.float32, dict(rotate="both")),
    (jnp.bfloat16, dict(rotate="both", layout="contiguous")),
    (jnp.bfloat16, dict(causal=False)),
    (jnp.bfloat16, dict(mesh_shape=(1,))),
    (jnp.bfloat16, dict(mesh_shape=(2, 2))),
  ],
  ids=str,
)
def test_every_program_compiles(tpus, dtype, settings):
  compiled(tpus, "vit", dtype, **settings)


@pytest.mark.slow
def test_the_backward_pass_sends_as_ever(tpus):
  report, _ = compiled(tpus, "vit", jnp.bfloat16, gradient=True)
  assert report.collectives
