"""Value and gradient of ColBERT's in-batch loss against one plain einsum.

    python -m tokjax.benchmarks.losses --out rows.jsonl

Token vectors in, the cross-entropy of every query against the documents of the
batch and its gradients out, for the training batch of
`tokjax.kernels.maxsim.shapes`: ours by `maxsim`, whose gradient needs no
similarities, and the similarities of all tokens at once. `temp_gb` is the
scratch memory that the compiler plans for. A product of large float32 matrices
takes its turn as well: `of_gemm` is the rate of three products of all tokens,
one forward and two backward, as a fraction of it. The gradient of a maximum is
sparse, so that ours needs fewer and may exceed 1.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.benchmarks import timing
from tokjax.kernels.maxsim import maxsim
from tokjax.kernels.maxsim.shapes import SHAPES, Shape
from tokjax.retrieval import losses
from tokjax.typing import Array, Float

__all__ = ["einsum_scores", "main", "run"]

_GEMM_SIZE = 2048


def einsum_scores(
  queries: Float[Array, "Nq Q D"], documents: Float[Array, "Nd N D"]
) -> Float[Array, "Nq Nd"]:
  """MaxSim as it is usually written: all similarities, their maxima, sums.

  Args:
    queries: query tokens.
    documents: document tokens.

  Returns:
    The scores.
  """
  similarity = jnp.einsum(
    "aqd,bnd->abqn", queries, documents, precision="highest"
  )
  return jnp.sum(jnp.max(similarity, axis=3), axis=2)


def run(shape: Shape, *, repeats: int):
  """Times a loss with its gradients, of both sides, both ways.

  Args:
    shape: sizes; as many documents as queries, or a multiple.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`.
  """
  random = np.random.default_rng(0)

  def unit(*size):
    x = random.standard_normal(size, dtype=np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  arrays = jax.device_put(
    (
      unit(shape.num_queries, shape.query_tokens, shape.dim),
      unit(shape.num_documents, shape.document_tokens, shape.dim),
    )
  )

  def loss(score, queries, documents):
    return losses.in_batch_cross_entropy(score(queries, documents))

  steps = {
    name: jax.jit(
      jax.value_and_grad(functools.partial(loss, score), argnums=(0, 1))
    )
    .lower(*arrays)
    .compile()
    for name, score in (("tokjax", maxsim), ("einsum", einsum_scores))
  }
  _agree(*(step(*arrays) for step in steps.values()))
  candidates = {
    name: functools.partial(step, *arrays) for name, step in steps.items()
  }
  candidates["gemm"] = timing.gemm_candidate(_GEMM_SIZE)
  times = timing.compare(candidates, repeats=repeats)
  rate = 2 * _GEMM_SIZE**3 / times.pop("gemm")["median_s"]
  ours = times["tokjax"]["median_s"]
  sizes = {
    "B": shape.num_queries,
    "Nd": shape.num_documents,
    "Q": shape.query_tokens,
    "N": shape.document_tokens,
    "D": shape.dim,
  }
  return [
    timing.row(
      "in-batch loss and gradients",
      name,
      sizes,
      "float32",
      taken,
      shape_name=shape.name,
      temp_gb=steps[name].memory_analysis().temp_size_in_bytes / 1e9,
      gflops=3 * shape.flops / taken["median_s"] / 1e9,
      gemm_gflops=rate / 1e9,
      of_gemm=3 * shape.flops / taken["median_s"] / rate,
      times_ours=taken["median_s"] / ours,
    )
    for name, taken in times.items()
  ]


def _agree(ours, plain):
  """Fails unless both give the same loss and gradients."""
  for got, want in zip(
    jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True
  ):
    scale = max(1e-6, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, atol=1e-4 * scale)


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--shape", choices=sorted(SHAPES), default="batch")
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  rows = run(SHAPES[options.shape], repeats=options.repeats)
  columns = ["implementation", "median_s", "low_s", "high_s", "temp_gb"]
  columns += ["gflops", "of_gemm", "times_ours"]
  timing.print_rows(rows, columns)
  if options.out:
    timing.write_rows(rows, options.out)


if __name__ == "__main__":
  main()
