"""The Hopper kernel of attention under a rule, compiled for an H100 not there.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_gpu tests/kernels/sparse_attention_compile_gpu_test.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.sparse_attention import pallas_gpu, rule_attention
from tokjax.kernels.sparse_attention.shapes import SHAPES, Shape
from tokjax.ops import mask_rules

pytestmark = pytest.mark.compile_gpu

# Names of shapes, and rules that they are read under.
CASES = {
  "packed prompts": (
    SHAPES["prompt"],
    mask_rules.every(mask_rules.causal, mask_rules.same_segment),
  ),
  "scales": (SHAPES["scales"], mask_rules.level_causal),
  "window": (SHAPES["window"], mask_rules.local(512)),
  "pictures": (SHAPES["pictures"], mask_rules.neighbours(3)),
  "text alone": (SHAPES["pictures"], mask_rules.no_visual_pairs),
  # Nothing is a multiple of anything.
  "odd sizes": (Shape("odd", 301, 3, 1, dim=72), mask_rules.apart),
}


def inputs(shape, place, batch=1):
  def array(size, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((batch, *size), dtype, sharding=place)

  keys = array((shape.key_heads, shape.num_tokens, shape.dim))
  field = array((shape.num_tokens,), jnp.int32)
  given = mask_rules.Tokens(*(field for _ in mask_rules.Tokens._fields))
  return array((shape.heads, *keys.shape[2:])), keys, keys, given


def under(rule):
  def attend(q, k, v, given):
    return rule_attention(q, k, v, rule, given, implementation="pallas_gpu")

  return attend


def check_assembly(text):
  """Tensor cores, bulk copies, and nothing pushed out of the registers."""
  assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in text
  assert "cp.async.bulk.tensor" in text
  assert "ex2.approx" in text
  assert "0 bytes spill stores, 0 bytes spill loads" in text
  assert text.count("spill stores") == text.count("0 bytes spill stores")
  assert "serialized" not in text  # of products that wait for each other


@pytest.mark.parametrize("name", CASES)
def test_compiles(name, h100s, capfd):
  alone = jax.sharding.SingleDeviceSharding(h100s[0])
  shape, rule = CASES[name]
  q, k, v, given = inputs(shape, alone)
  assert pallas_gpu.unsupported(q, k, v, given, given) is None
  compiled = jax.jit(under(rule)).lower(q, k, v, given).compile()
  assert "mosaic_gpu" in compiled.as_text()
  check_assembly("".join(capfd.readouterr()))


def test_only_what_a_rule_asks_for_is_loaded(h100s, capfd):
  alone = jax.sharding.SingleDeviceSharding(h100s[0])

  def loads(rule):
    given = inputs(SHAPES["window"], alone)
    jax.jit(under(rule)).lower(*given).compile()
    return "".join(capfd.readouterr()).count("\tld.")

  one = loads(mask_rules.level_causal)
  two = loads(mask_rules.every(mask_rules.level_causal, mask_rules.causal))
  assert two == one + 18  # 2 registers of rows, 16 pairs of columns


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_compiles_inside_shard_map(kind, h100s):
  kinds = (getattr(jax.sharding.AxisType, kind),)
  mesh = jax.sharding.Mesh(np.array(h100s), ("data",), axis_types=kinds)
  place = jax.NamedSharding(mesh, jax.P("data"))
  mapped = jax.shard_map(
    under(mask_rules.level_causal),
    mesh=mesh,
    in_specs=jax.P("data"),
    out_specs=jax.P("data"),
  )
  given = inputs(SHAPES["scales"], place, batch=len(h100s))
  compiled = jax.jit(mapped).lower(*given).compile()
  assert "mosaic_gpu" in compiled.as_text()
