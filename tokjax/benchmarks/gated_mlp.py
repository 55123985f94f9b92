"""A gated MLP that skips rows, beside the dense one.

    tokjax bench gated_mlp --tokens 1 4
    tokjax bench gated_mlp --dtype bfloat16 --implementation pallas_gpu

The whole layer, gate and both products, with random weights; "dense" is three
matrix products. The threshold leaves a share of the gates of a token; of more
tokens more units are read, which `active` says. A decode step waits for the
weights: `gb_per_s` is the rate at which those that have to be read are, by the
share of the units that some token keeps, and `of_copy` the same as a fraction
of a copy of the weights, which takes its turn too.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp

from tokjax.benchmarks import timing
from tokjax.kernels.gated_mlp.shapes import SHAPES
from tokjax.sparse import cats
from tokjax.typing import Array, Float, Implementation

__all__ = ["dense_mlp", "main", "run"]


def dense_mlp(
  x: Float[Array, "n D"],
  w_gate: Float[Array, "D F"],
  w_up: Float[Array, "D F"],
  w_down: Float[Array, "F D"],
) -> Float[Array, "n D"]:
  """The layer with all of its units, both first weights as is usual."""
  up = jnp.matmul(x, w_up, preferred_element_type=jnp.float32)
  hidden = cats.silu_gate(x, w_gate) * up.astype(x.dtype)
  out = jnp.matmul(hidden, w_down, preferred_element_type=jnp.float32)
  return out.astype(x.dtype)


def run(
  *,
  dim: int,
  num_units: int,
  num_tokens: int = 1,
  kept: Sequence[float] = (1.0, 0.5, 0.3, 0.1),
  dtype: str = "float32",
  implementation: Implementation | None = None,
  repeats: int = 15,
):
  """Times the layers in turns.

  Args:
    dim: D, width of a token.
    num_units: F.
    num_tokens: n.
    kept: shares of the gates of a token that stay.
    dtype: of tokens and weights.
    implementation: of the rows that are read, see `gated_rows`.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`.
  """
  keys = jax.random.split(jax.random.key(0), 4)

  def normal(key, *shape):
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5

  x = normal(keys[0], num_tokens, dim) * dim**0.5
  w_gate = normal(keys[1], dim, num_units)
  w_up, w_down = (normal(key, num_units, dim) for key in keys[2:])
  w_usual = jnp.array(w_up.T)  # as the dense layer has it
  gate = jnp.abs(cats.silu_gate(x, w_gate)).astype(jnp.float32)
  layer = jax.jit(
    functools.partial(cats.gated_mlp, implementation=implementation)
  )
  candidates = {
    "dense": functools.partial(jax.jit(dense_mlp), x, w_gate, w_usual, w_down),
  }
  active = {}
  for share in kept:
    threshold = jnp.quantile(gate, 1 - share) if share < 1 else 0.0
    sparse = functools.partial(layer, x, w_gate, w_up, w_down, threshold)
    candidates[f"kept {share}"] = sparse
    active[f"kept {share}"] = int(sparse().active_units) / num_units
  times = timing.compare(candidates, repeats=repeats)
  num_bytes = w_up.nbytes
  rate_of_dense = 3 * num_bytes / times["dense"]["median_s"]
  shape = {"n": num_tokens, "D": dim, "F": num_units}
  rows = []
  for name, taken in times.items():
    seconds = taken["median_s"]
    share = active.get(name, 1.0)
    rate = (1 + 2 * share) * num_bytes / seconds
    rows.append(
      timing.row(
        "gated MLP",
        name,
        shape,
        dtype,
        taken,
        active=share,
        speedup=times["dense"]["median_s"] / seconds,
        gb_per_s=rate / 1e9,
        n=num_tokens,
        of_dense=rate / rate_of_dense,
        rows_by=implementation or "default",
      )
    )
  return rows


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--shape", choices=SHAPES, default="mistral_7b")
  parser.add_argument("--tokens", type=int, nargs="+", default=[1])
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--implementation", choices=get_args(Implementation))
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  shape = SHAPES[options.shape]
  found = []
  for num_tokens in options.tokens:
    found += run(
      dim=shape.dim,
      num_units=shape.num_units,
      num_tokens=num_tokens,
      dtype=options.dtype,
      implementation=options.implementation,
      repeats=options.repeats,
    )
  columns = ["n", "implementation", "active", "median_s", "low_s", "high_s"]
  columns += ["speedup", "gb_per_s", "of_dense"]
  timing.print_rows(found, columns)
  if options.out:
    timing.write_rows(found, options.out)


if __name__ == "__main__":
  main()
