"""Top-k over a corpus of vectors: in blocks, and over all scores at once.

python -m tokjax.benchmarks.selection --out rows.jsonl
"""

import argparse

import jax
import jax.numpy as jnp

from tokjax.benchmarks import timing
from tokjax.ops.selection import streaming_top_k

__all__ = ["main", "run"]


def run(
  *,
  num_queries: int = 32,
  num_documents: int = 200_000,
  dim: int = 128,
  k: int = 100,
  repeats: int = 20,
):
  """Times `streaming_top_k` beside one product and `jax.lax.top_k`.

  Args:
    num_queries: queries searched at once.
    num_documents: vectors in the corpus.
    dim: width of a vector.
    k: vectors to find per query.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`.
  """
  keys = jax.random.split(jax.random.key(0), 2)
  queries = jax.random.normal(keys[0], (num_queries, dim))
  corpus = jax.random.normal(keys[1], (num_documents, dim))

  @jax.jit
  def at_once(queries, corpus):
    scores = jnp.matmul(queries, corpus.T, precision="highest")
    return jax.lax.top_k(scores, k)

  candidates = {"at once": lambda: at_once(queries, corpus)}
  for block_size in (1_024, 4_096, 16_384, 65_536):
    candidates[f"block_size={block_size}"] = lambda block_size=block_size: (
      streaming_top_k(queries, corpus, k, block_size=block_size)
    )
  sizes = {"Nq": num_queries, "Nd": num_documents, "D": dim, "k": k}
  times = timing.compare(candidates, repeats=repeats)
  return [
    timing.row(
      "streaming_top_k",
      name,
      sizes,
      "float32",
      taken,
      queries_per_s=num_queries / taken["median_s"],
    )
    for name, taken in times.items()
  ]


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  found = run(repeats=options.repeats)
  columns = ["operation", "implementation", "median_s", "low_s", "high_s"]
  timing.print_rows(found, [*columns, "queries_per_s"])
  if options.out:
    timing.write_rows(found, options.out)


if __name__ == "__main__":
  main()
