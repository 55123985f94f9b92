"""MaxSim against the libraries people use for it, on this machine.

    python -m tokjax.benchmarks.maxsim --shape rerank --out rows.jsonl

Compares our "xla" version with maxsim-cpu, PyLate and a torch einsum where
those are installed, in one process and in turns; `--ragged` scores documents
of 64 to 300 tokens without padding. A product of large float32 matrices takes
its turn as well: `of_gemm` is each rate as a fraction of it.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tokjax.benchmarks import timing
from tokjax.kernels.maxsim import maxsim, maxsim_packed
from tokjax.kernels.maxsim.shapes import SHAPES, Shape

__all__ = ["main", "run_equal", "run_ragged"]

_GEMM_SIZE = 2048
_SHORTEST = 64


def _sets(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
  random = np.random.default_rng(0)

  def unit(*size):
    x = random.standard_normal(size, dtype=np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x

  queries = unit(shape.num_queries, shape.query_tokens, shape.dim)
  documents = unit(shape.num_documents, shape.document_tokens, shape.dim)
  return queries, documents


def run_equal(shape: Shape, *, repeats: int, dtype: str = "float32"):
  """Documents of one length, no masks.

  Args:
    shape: sizes; the other libraries join where there is one query.
    repeats: timed calls of each.
    dtype: "float32" or "bfloat16"; the other libraries join for float32.

  Returns:
    Rows, see `timing.row`.
  """
  queries, documents = _sets(shape)
  arrays = jax.device_put((queries.astype(dtype), documents.astype(dtype)))
  candidates: dict[str, Callable[[], Any]] = {
    "tokjax": lambda: maxsim(*arrays),
  }
  if shape.num_queries == 1 and dtype == "float32":
    candidates |= _others(queries, documents)
  _agree(candidates, shape)
  return _rows("maxsim", candidates, shape, shape.flops, repeats, dtype)


def run_ragged(shape: Shape, *, repeats: int):
  """Documents of 64 to `shape.document_tokens` tokens, uniformly.

  Args:
    shape: sizes, one query.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`.
  """
  queries, documents = _sets(shape)
  lengths = np.random.default_rng(1).integers(
    _SHORTEST, shape.document_tokens, shape.num_documents, endpoint=True
  )
  valid = np.arange(shape.document_tokens)[None, :] < lengths[:, None]
  ids = np.repeat(np.arange(shape.num_documents, dtype=np.int32), lengths)
  query, tokens, ids = jax.device_put((queries, documents[valid], ids))
  padded, mask = jax.device_put((documents, valid))
  candidates: dict[str, Callable[[], Any]] = {
    "tokjax packed": lambda: maxsim_packed(
      query, tokens, ids, num_documents=shape.num_documents
    ),
    "tokjax padded": lambda: maxsim(query, padded, None, mask),
  }
  if _installed("maxsim_cpu"):
    import maxsim_cpu

    each = [documents[i, :n] for i, n in enumerate(lengths)]
    candidates["maxsim-cpu"] = lambda: maxsim_cpu.maxsim_scores_variable(
      queries[0], each
    )
  _agree(candidates, shape)
  flops = 2 * shape.query_tokens * shape.dim * int(lengths.sum())
  name = "maxsim ragged"
  return _rows(name, candidates, shape, flops, repeats, "float32")


def _others(queries, documents) -> dict[str, Callable[[], Any]]:
  """The libraries that are installed, as functions for `timing.compare`."""
  found: dict[str, Callable[[], Any]] = {}
  if _installed("maxsim_cpu"):
    import maxsim_cpu

    found["maxsim-cpu"] = lambda: maxsim_cpu.maxsim_scores(
      queries[0], documents
    )
  if _installed("torch"):
    import torch

    query, document = torch.from_numpy(queries), torch.from_numpy(documents)

    def einsum():
      similarity = torch.einsum("qd,bnd->bqn", query[0], document)
      return similarity.amax(-1).sum(-1)

    found["torch einsum"] = einsum
    if _installed("pylate"):
      from pylate.scores import colbert_scores

      found["pylate"] = lambda: colbert_scores(query, document)
  return found


def _installed(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


def _agree(candidates, shape):
  """Fails unless all candidates return the same scores."""
  want = None
  for name, function in candidates.items():
    scores = np.asarray(function(), np.float32)
    scores = scores.reshape(shape.num_queries, shape.num_documents)
    want = scores if want is None else want
    np.testing.assert_allclose(scores, want, atol=1e-3, err_msg=name)


def _rows(operation, candidates, shape, flops, repeats, dtype):
  gemm = timing.gemm_candidate(_GEMM_SIZE)
  times = timing.compare({**candidates, "gemm": gemm}, repeats=repeats)
  rate = 2 * _GEMM_SIZE**3 / times.pop("gemm")["median_s"]
  pairs = shape.num_queries * shape.num_documents
  ours = next(iter(times.values()))["median_s"]
  sizes = {
    "Nq": shape.num_queries,
    "Nd": shape.num_documents,
    "Q": shape.query_tokens,
    "N": shape.document_tokens,
    "D": shape.dim,
  }
  return [
    timing.row(
      operation,
      name,
      sizes,
      dtype,
      taken,
      shape_name=shape.name,
      scores_per_s=pairs / taken["median_s"],
      gflops=flops / taken["median_s"] / 1e9,
      gemm_gflops=rate / 1e9,
      of_gemm=flops / taken["median_s"] / rate,
      times_ours=taken["median_s"] / ours,
    )
    for name, taken in times.items()
  ]


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--shape", choices=sorted(SHAPES), default="rerank")
  parser.add_argument("--ragged", action="store_true")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  shape = SHAPES[options.shape]
  if options.ragged:
    rows = run_ragged(shape, repeats=options.repeats)
  else:
    rows = run_equal(shape, repeats=options.repeats, dtype=options.dtype)
  columns = ["operation", "shape_name", "implementation", "median_s", "low_s"]
  columns += ["high_s", "scores_per_s", "gflops", "of_gemm", "times_ours"]
  timing.print_rows(rows, columns)
  if options.out:
    timing.write_rows(rows, options.out)


if __name__ == "__main__":
  main()
