"""Attention under a rule built by the real TPU compiler, without a TPU.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_tpu tests/kernels/sparse_attention_compile_tpu_test.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.sparse_attention import rule_attention
from tokjax.kernels.sparse_attention.shapes import SHAPES
from tokjax.ops import mask_rules
from tokjax.parallel import topologies

pytestmark = pytest.mark.compile_tpu


def arrays(name, dtype, batch=1, place=None):
  """Queries, keys, values and the fields of the tokens."""
  shape = SHAPES[name]
  rest = shape.num_tokens, shape.dim
  sizes = (batch, shape.heads, *rest), *[(batch, shape.key_heads, *rest)] * 2
  field = jax.ShapeDtypeStruct((shape.num_tokens,), jnp.int32)
  tokens = mask_rules.Tokens(*[field] * len(mask_rules.Tokens._fields))
  return *(
    jax.ShapeDtypeStruct(size, dtype, sharding=place) for size in sizes
  ), tokens


def packed(reader, read):
  return mask_rules.causal(reader, read) & mask_rules.same_segment(reader, read)


def text_or_before(reader, read):
  """A rule that asks each side alone, and has numbers of its own."""
  text = (read.kind == mask_rules.TEXT) | (reader.group + 1 < 3)
  return text & ~(reader.level - read.level < 2)


slow = pytest.mark.slow


@pytest.mark.parametrize(
  "name, rule, dtype",
  [
    ("prompt", packed, jnp.bfloat16),
    ("scales", mask_rules.level_causal, jnp.float32),
    ("pictures", mask_rules.neighbours(3), jnp.bfloat16),
    ("window", text_or_before, jnp.bfloat16),
    pytest.param("prompt", packed, jnp.float32, marks=slow),
    pytest.param("scales", mask_rules.apart, jnp.bfloat16, marks=slow),
    pytest.param("pictures", mask_rules.no_visual_pairs, "float32", marks=slow),
    pytest.param("window", mask_rules.local(64), jnp.float32, marks=slow),
  ],
)
def test_public_function_takes_the_kernel(name, rule, dtype, tpus):
  def attend(q, k, v, tokens):
    return rule_attention(q, k, v, rule, tokens)

  report = topologies.compile_for(attend, arrays(name, dtype), devices=tpus)
  assert report.kernels == {"rule_attention": 1}
  # A bit for each pair of a prompt would be 128 MiB. There are lists, fields
  # and, on v7x, copies of heads of 64, padded to 128 lanes.
  assert report.temp_bytes < 24 << 20
  assert report.on_chip_bytes < 32 << 20


def test_different_tokens_under_vmap(tpus):
  def attend(q, k, v, level):
    tokens = mask_rules.tokens(level.shape[0], level=level)
    rule = mask_rules.level_causal
    return rule_attention(q, k, v, rule, tokens)

  *given, tokens = arrays("scales", jnp.bfloat16)
  given = [
    jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in (*given, tokens.level)
  ]
  report = topologies.compile_for(jax.vmap(attend), given, devices=tpus)
  # A loop over the examples, whose body has no name.
  assert list(report.kernels.values()) == [1]


def test_sharded_over_batch_and_heads(tpus):
  mesh = jax.sharding.Mesh(
    np.array(tpus[:4]).reshape(2, 2),
    ("data", "heads"),
    axis_types=(jax.sharding.AxisType.Explicit,) * 2,
  )
  place = jax.NamedSharding(mesh, jax.P("data", "heads"))
  *given, tokens = arrays("scales", jnp.bfloat16, 2, place)
  level = jax.ShapeDtypeStruct(
    (2, *tokens.level.shape),
    jnp.int32,
    sharding=jax.NamedSharding(mesh, jax.P("data")),
  )

  def attend(q, k, v, level):
    tokens = mask_rules.tokens(level.shape[1], level=level)
    rule = mask_rules.level_causal
    return rule_attention(q, k, v, rule, tokens)

  with jax.set_mesh(mesh):
    report = topologies.compile_for(attend, (*given, level), devices=tpus)
  assert report.kernels == {"rule_attention": 1}
  assert not report.collectives
