"""What MaxSim holds besides its inputs and results stays below the budget."""

import jax
import jax.numpy as jnp
import pytest

from tokjax.kernels.maxsim import maxsim, maxsim_packed, maxsim_pairs
from tokjax.kernels.maxsim.shapes import DIMS, SHAPES

BUDGET = 16 << 20  # one page image against another takes 9 MiB
# Small arrays the budget does not count: masks, counters, rounding up.
SLACK = 1 << 20


def temporary_bytes(function, *arrays):
  compiled = jax.jit(function).lower(*arrays).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def abstract(shape, num_documents, dtype=jnp.float32):
  sizes = (
    (shape.num_queries, shape.query_tokens, shape.dim),
    (num_documents, shape.document_tokens, shape.dim),
  )
  arrays = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]
  masks = [jax.ShapeDtypeStruct(size[:2], bool) for size in sizes]
  return (*arrays, *masks)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_forward_stays_below_the_budget(name, dtype):
  arrays = abstract(SHAPES[name], 100_000, dtype)
  held = temporary_bytes(
    lambda *a: maxsim(*a, memory_budget_bytes=BUDGET, implementation="xla"),
    *arrays,
  )
  scores = 4 * SHAPES[name].num_queries * 100_000  # results, once more
  assert held < BUDGET + SLACK + 2 * scores


def test_the_plain_product_would_not():
  arrays = abstract(SHAPES["rerank"], 1_000)
  held = temporary_bytes(
    lambda *a: maxsim(*a, implementation="reference"), *arrays
  )
  assert held > 4 * SHAPES["rerank"].flops / (2 * SHAPES["rerank"].dim)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["rerank", "batch"])
def test_backward_stays_below_the_budget(name, dtype):
  shape = SHAPES[name]
  arrays = abstract(shape, 2_000, dtype)
  budget = 32 << 20

  def loss(*arrays):
    return jnp.sum(
      maxsim(*arrays, memory_budget_bytes=budget, implementation="xla")
    )

  held = temporary_bytes(jax.grad(loss, argnums=(0, 1)), *arrays)
  index = 4 * shape.num_queries * 2_000 * shape.query_tokens
  results = 4 * shape.dim * 2_000 * shape.document_tokens
  # Index and document gradient, each held once in and once out of a loop.
  assert held < budget + SLACK + 2 * index + 2 * results


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_stays_below_the_budget(dtype):
  arrays = (
    jax.ShapeDtypeStruct((1, 32, DIMS[0]), dtype),
    jax.ShapeDtypeStruct((18_000_000, DIMS[0]), dtype),
    jax.ShapeDtypeStruct((18_000_000,), jnp.int32),
  )
  budget = 16 << 20
  held = temporary_bytes(
    lambda *a: maxsim_packed(
      *a, num_documents=100_000, memory_budget_bytes=budget
    ),
    *arrays,
  )
  maxima = 4 * 32 * 100_000
  assert held < budget + SLACK + 2 * maxima


def test_pairs_share_one_budget():
  arrays = (
    jax.ShapeDtypeStruct((64, 32, 128), jnp.float32),
    jax.ShapeDtypeStruct((64, 32, 300, 128), jnp.float32),
  )
  budget = 32 << 20
  held = temporary_bytes(
    lambda *a: maxsim_pairs(
      *a, memory_budget_bytes=budget, implementation="xla"
    ),
    *arrays,
  )
  assert held < budget + SLACK
