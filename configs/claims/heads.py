"""Projection heads: deeper ones against the single matrix.

    tokjax claim heads --data ../shared/data

Recorded 2026-11-24, two Intel Xeon cores (AVX-512), jax 0.10.2, seeds
0 and 1; 2 was not run. The encoder (all-MiniLM-L6-v2) is frozen and only the
head trained: 300 steps of 32 queries of pydocs' train split; 200 test queries
over 3,000 documents of at most 64 tokens. nDCG@10 at width 128:

    two layers (ffn, skip)        seed 0  .5610   seed 1  .5398
    the same with silu                    .5632           .5442
    gated (glu, skips), seed 0            .5652

The single matrix of width 128 was not measured, so the statement below is not
yet decided. One of width 384 that starts as the identity has .5642, .5627.
"""

from tokjax.benchmarks import trained_retrieval
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three seeds on pydocs, which needs no `data`."""
  del data
  return Claim(
    statement="A two-layer head (ffn, twice as wide, with a skip) ranks better"
    " (nDCG@10) than the single matrix of the same width.",
    runs=trained_retrieval.on_seeds(("heads",)),
    measure=trained_retrieval.measure,
    margin=_margin,
  )


def _margin(rows):
  score = {name: row.metrics["nDCG@10"] for name, row in rows.items()}
  return score["head ffn"] - score["head linear"]
