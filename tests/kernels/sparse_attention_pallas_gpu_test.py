"""The Hopper kernel of attention under a rule in the Mosaic GPU interpreter.

The tests marked `gpu` run the same cases on the device.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.mask_rules_test import RULES, some_tokens
from tokjax.kernels.sparse_attention import (
  pallas_gpu,
  reference,
  rule_attention,
)
from tokjax.ops import mask_rules


def later(reader, read):
  """Nobody reads oneself or what came before; the last one reads nothing."""
  return read.position > reader.position


def far_later(reader, read):
  """Whole blocks of queries read nothing."""
  return read.position - reader.position > 130


class Case(typing.NamedTuple):
  rule: mask_rules.Rule
  heads: int = 1
  key_heads: int = 1
  num_rows: int = 130
  num_keys: int = 150
  dim: int = 16
  value_dim: int = 16
  batch: int = 1
  batched_fields: bool = False


CASES = {name: Case(rule) for name, rule in RULES.items()} | {
  "grouped": Case(
    RULES["local"], heads=4, key_heads=2, num_rows=9, num_keys=40
  ),
  # Each example has its own lists.
  "examples": Case(RULES["segment"], num_rows=9, batch=2, batched_fields=True),
  # Five tiles of keys, more than are in flight, some of them whole.
  "many tiles": Case(RULES["level"], num_rows=20, num_keys=640, dim=32),
  # d and e are padded to 80 and 32.
  "odd widths": Case(RULES["causal"], dim=72, value_dim=24),
  "nothing read": Case(later, num_rows=150),
  "empty lists": Case(far_later, num_rows=260, num_keys=260),
}
FAST = "apart", "near", "grouped", "examples", "many tiles", "empty lists"


def inputs(case):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (
    (case.batch, case.heads, case.num_rows, case.dim),
    (case.batch, case.key_heads, case.num_keys, case.dim),
    (case.batch, case.key_heads, case.num_keys, case.value_dim),
  )
  q, k, v = (
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, shapes, strict=True)
  )
  batch = (case.batch,) if case.batched_fields else ()
  readers = some_tokens(case.num_rows, 1, batch)
  read = some_tokens(case.num_keys, 2, batch)
  return q, k, v, readers, read


def check(name, interpret=False):
  case = CASES[name]
  q, k, v, readers, read = inputs(case)
  want = jax.jit(reference.rule_attention_forward, static_argnums=3)(
    q, k, v, case.rule, readers, read
  )
  if name == "empty lists":  # which nobody has the first keys on
    k, v = (x.at[:, :, :128].set(jnp.nan) for x in (k, v))
  run = functools.partial(
    pallas_gpu.rule_attention_forward, interpret=interpret
  )
  got = jax.jit(run, static_argnums=3)(q, k, v, case.rule, readers, read)
  out, lse, highest = map(np.asarray, want)
  # Before they are normalised and not after it weights are rounded to bfloat16.
  np.testing.assert_allclose(got[0], out, atol=1e-2)
  np.testing.assert_allclose(got[1], lse, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got[2], highest, rtol=1e-5, atol=1e-5)
  nothing = lse == -np.inf
  assert nothing.any() or name not in ("nothing read", "empty lists")
  np.testing.assert_array_equal(np.asarray(got[0])[nothing], 0)


@pytest.mark.parametrize("name", FAST)
def test_is_the_reference(name, interpreter):
  check(name, interpreter)


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in CASES if x not in FAST])
def test_every_case_is_the_reference(name, interpreter):
  check(name, interpreter)


def test_refuses_what_it_cannot_take():
  def refuse(match, dtype=jnp.bfloat16, **sizes):
    q, k, v, readers, read = inputs(Case(RULES["causal"], **sizes))
    given = *(x.astype(dtype) for x in (q, k, v)), RULES["causal"]
    with pytest.raises(NotImplementedError, match=match):
      rule_attention(*given, readers, read, implementation="pallas_gpu")

  refuse("pallas_gpu: dtype must be bfloat16, got float32", jnp.float32)
  refuse("d must be at most 128, got 144", dim=144)
  refuse("e must be at most 128, got 144", value_dim=144)
  refuse("no axis may be empty", num_rows=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_device_is_the_reference(name):
  check(name)
