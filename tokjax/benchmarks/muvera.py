"""MUVERA encoding of documents against fastembed and a NumPy loop.

    python -m tokjax.benchmarks.muvera --preset 10240 --out rows.jsonl

Documents of 80 to 200 random tokens, encoded in one process and in turns.
fastembed takes part where it is installed. `of_gemm` is the rate of the
construction's multiply-adds (R N D (k + d) per document) as a fraction of a
product of large float32 matrices that takes its turn as well.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tokjax.benchmarks import timing
from tokjax.retrieval import muvera

__all__ = ["encode_by_numpy", "main", "run"]

_GEMM_SIZE = 2048


def encode_by_numpy(
  weights: np.ndarray, config: muvera.FDEConfig, tokens: np.ndarray
) -> np.ndarray:
  """One document in plain NumPy: what a careful port without JAX looks like.

  Args:
    weights: hyperplanes of all repetitions, then projections, [D, R (k + d)].
    config: sign projections, filled, without scale or final sketch.
    tokens: the document's tokens, [N, D].

  Returns:
    The encoding, float32.
  """
  repetitions, bits = config.num_repetitions, config.num_simhash_bits
  products = tokens @ weights
  sides = (products[:, : repetitions * bits] > 0).reshape(-1, repetitions, bits)
  cells = sides @ (1 << np.arange(bits))  # [N, R]
  values = products[:, repetitions * bits :] / config.cell_dim**0.5
  values = values.reshape(len(tokens), repetitions, -1)
  codes = np.arange(config.num_cells)[:, None] >> np.arange(bits) & 1
  out = np.empty((repetitions, config.num_cells, config.cell_dim), np.float32)
  for r in range(repetitions):
    member = cells[None, :, r] == np.arange(config.num_cells)[:, None]
    counts = member.sum(axis=1)
    out[r] = member.astype(np.float32) @ values[:, r]
    out[r] /= np.maximum(counts, 1)[:, None]
    empty = np.flatnonzero(counts == 0)
    distance = (codes[empty, None] != sides[None, :, r]).sum(axis=-1)
    out[r, empty] = values[distance.argmin(axis=1), r]
  return out.reshape(-1)


def run(config: muvera.FDEConfig, *, num_documents: int, repeats: int):
  """Documents per second of every implementation that is there.

  Args:
    config: what to encode; sign projections without a final sketch.
    num_documents: documents per timed call of ours; the others get fewer.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`.
  """
  random = np.random.default_rng(0)
  lengths = random.integers(80, 200, num_documents, endpoint=True)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = random.standard_normal((offsets[-1], config.dim), dtype=np.float32)
  tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
  texts = np.split(tokens, offsets[1:-1])
  params = muvera.init(jax.random.key(0), config)
  weights = np.concatenate(
    [np.hstack(params.hyperplanes), np.hstack(params.projection)], axis=1
  )

  few = {"tokjax": num_documents, "numpy loop": max(1, num_documents // 4)}
  candidates: dict[str, Callable[[], Any]] = {
    "tokjax": lambda: muvera.encode_corpus(params, config, tokens, offsets),
    "numpy loop": lambda: [
      encode_by_numpy(weights, config, text)
      for text in texts[: few["numpy loop"]]
    ],
  }
  want = np.stack(candidates["numpy loop"]())
  got = candidates["tokjax"]()[: len(want)]
  # A token within rounding of a hyperplane may fall on either side.
  agree = np.isclose(got, want, atol=1e-4).mean()
  if agree < 0.999:
    raise RuntimeError(f"only {agree:.2%} of the encodings agree with NumPy")
  if importlib.util.find_spec("fastembed"):
    from fastembed.postprocess import Muvera

    other = Muvera(
      dim=config.dim,
      k_sim=config.num_simhash_bits,
      dim_proj=config.cell_dim,
      r_reps=config.num_repetitions,
    )
    few["fastembed"] = max(1, num_documents // 16)
    candidates["fastembed"] = lambda: [
      other.process_document(text) for text in texts[: few["fastembed"]]
    ]
  return _rows(config, candidates, few, lengths, repeats)


def _rows(config, candidates, few, lengths, repeats):
  gemm = timing.gemm_candidate(_GEMM_SIZE)
  times = timing.compare({**candidates, "gemm": gemm}, repeats=repeats)
  rate = 2 * _GEMM_SIZE**3 / times.pop("gemm")["median_s"]
  per_token = 2 * config.num_repetitions * config.dim
  per_token *= config.num_simhash_bits + config.cell_dim
  shape = {
    "Nd": len(lengths),
    "N": int(lengths.mean()),
    "D": config.dim,
    "F": config.output_dim,
  }
  ours = few["tokjax"] / times["tokjax"]["median_s"]
  rows = []
  for name, taken in times.items():
    seconds, num = taken["median_s"], few[name]
    flops = per_token * int(lengths[:num].sum())
    rows.append(
      timing.row(
        "muvera documents",
        name,
        {**shape, "Nd": num},
        "float32",
        taken,
        documents_per_s=num / seconds,
        gflops=flops / seconds / 1e9,
        gemm_gflops=rate / 1e9,
        of_gemm=flops / seconds / rate,
        ours_is_faster_by=ours / (num / seconds),
      )
    )
  return rows


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--preset", type=int, choices=sorted(muvera.PRESETS), default=10240
  )
  parser.add_argument("--dim", type=int, default=384)
  parser.add_argument("--documents", type=int, default=256)
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  config = muvera.FDEConfig(dim=options.dim, **muvera.PRESETS[options.preset])
  rows = run(config, num_documents=options.documents, repeats=options.repeats)
  columns = ["implementation", "median_s", "low_s", "high_s"]
  columns += ["documents_per_s", "gflops", "of_gemm", "ours_is_faster_by"]
  timing.print_rows(rows, columns)
  if options.out:
    timing.write_rows(rows, options.out)


if __name__ == "__main__":
  main()
