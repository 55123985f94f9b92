"""Nearest codes in blocks against the matrix of all distances.

    python -m tokjax.benchmarks.nearest_code --shape llamagen --out rows.jsonl

Ours, and what is usually written: the matrix of all squared distances and its
arg min in JAX ("matrix"), and `torch.cdist` with its arg min where torch is
installed. `temp_gb` is the scratch memory that XLA plans for; of torch it is
the matrix alone, which it must hold. A product of large float32 matrices takes
its turn as well: `of_gemm` is the rate of the product of all tokens with all
codes as a fraction of it. `agree` is the share of tokens for which the index
is ours; others are near ties, rounded differently.
"""

import argparse
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.benchmarks import timing
from tokjax.kernels.nearest_code import nearest_code
from tokjax.kernels.nearest_code.shapes import SHAPES, Shape
from tokjax.typing import Array, Float, Int32

__all__ = ["by_matrix", "main", "run"]

_GEMM_SIZE = 2048


def by_matrix(
  x: Float[Array, "n D"], codebook: Float[Array, "K D"]
) -> Int32[Array, " n"]:
  """The nearest code as it is usually found: all distances, their arg min.

  Args:
    x: tokens.
    codebook: one code per row.

  Returns:
    Positions in the codebook.
  """
  product = jnp.matmul(x, codebook.T, precision="highest")
  square = jnp.sum(jnp.square(x), axis=1)[:, None]
  distance = square - 2 * product + jnp.sum(jnp.square(codebook), axis=1)[None]
  return jnp.argmin(distance, axis=1).astype(jnp.int32)


def run(shape: Shape, *, repeats: int = 20):
  """Times a search, all candidates in turns.

  Args:
    shape: sizes.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`; ours first.
  """
  random = np.random.default_rng(0)
  x, codebook = (
    random.standard_normal((size, shape.dim), dtype=np.float32)
    for size in (shape.num_tokens, shape.num_codes)
  )
  arrays = jax.device_put((x, codebook))
  programs = {
    name: jax.jit(function).lower(*arrays).compile()
    for name, function in (("tokjax", nearest_code), ("matrix", by_matrix))
  }
  candidates = {
    name: lambda program=program: program(*arrays)
    for name, program in programs.items()
  }
  if _has_torch():
    candidates["torch"] = _torch_search(x, codebook)
  found = {name: np.asarray(call()) for name, call in candidates.items()}
  candidates["gemm"] = timing.gemm_candidate(_GEMM_SIZE)
  times = timing.compare(candidates, repeats=repeats)
  rate = 2 * _GEMM_SIZE**3 / times.pop("gemm")["median_s"]
  ours = times["tokjax"]["median_s"]
  memory = {
    name: program.memory_analysis().temp_size_in_bytes
    for name, program in programs.items()
  }
  matrix = 4 * shape.num_tokens * shape.num_codes
  sizes = {"N": shape.num_tokens, "K": shape.num_codes, "D": shape.dim}
  return [
    timing.row(
      "nearest_code",
      name,
      sizes,
      "float32",
      taken,
      shape_name=shape.name,
      temp_gb=memory.get(name, matrix) / 1e9,
      tokens_per_s=shape.num_tokens / taken["median_s"],
      gemm_gflops=rate / 1e9,
      of_gemm=shape.flops / taken["median_s"] / rate,
      agree=float((found[name] == found["tokjax"]).mean()),
      times_ours=taken["median_s"] / ours,
    )
    for name, taken in times.items()
  ]


def _has_torch() -> bool:
  spec = importlib.util.find_spec("torch")
  return spec is not None and spec.origin is not None  # no mere folder


def _torch_search(x, codebook):
  """The same by torch on the CPU; NumPy out, which needs no waiting for."""
  import torch

  x, codebook = torch.from_numpy(x), torch.from_numpy(codebook)

  def search():
    with torch.inference_mode():
      return torch.cdist(x, codebook).argmin(dim=1).numpy()

  return search


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--shape", choices=sorted(SHAPES), default="titok")
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  rows = run(SHAPES[options.shape], repeats=options.repeats)
  columns = ["implementation", "median_s", "low_s", "high_s", "temp_gb"]
  columns += ["tokens_per_s", "of_gemm", "agree", "times_ours"]
  timing.print_rows(rows, columns)
  if options.out:
    timing.write_rows(rows, options.out)


if __name__ == "__main__":
  main()
