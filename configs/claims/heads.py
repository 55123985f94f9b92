"""Projection heads: deeper ones against the single matrix.

    tokjax claim heads --data ../shared/data

Recorded 2026-11-24, an Intel Xeon core (AVX-512), jax 0.10.2, seeds 0, 1
and 2. The encoder (all-MiniLM-L6-v2) is frozen and only the
head trained: 300 steps of 32 queries of pydocs' train split; 200 test queries
over 3,000 documents of at most 64 tokens. nDCG@10 at width 128:

                                  seed 0  seed 1  seed 2
    single matrix                 .5648   .5540   .5546
    two layers (ffn, skip)        .5635   .5424   .5666
    gated (glu, silu, skip)       .5781   .5640   .5669

Does not hold for the two-layer head (-.001, -.012, +.012). The gated one beats
the matrix in every seed, by .013, .010 and .012; the paper's best are gated or
two-layer heads with a skip as well. A matrix of width 384 that starts as the
identity, three times the bytes, has .5642, .5627, .5637.

On scifact, 2026-11-28, an AMD EPYC core (AVX2), seeds 0, 1 and 2: 150 steps of
32 of its 809 training claims; 300 test claims over all 5,183 documents of at
most 128 tokens. nDCG@10:

    single matrix                 .7083   .7018   .7054
    two layers                    .7734   .7653   .7605
    gated                         .7729   .7724   .7677
    matrix of width 384           .6906   .6941   .6877

Holds there, by .065, .063 and .055; the gated head beats the matrix by as much.

196 of the 300 test claims have a document that training showed as an answer to
another claim, so that part of any gain is memory of which documents answer.
"""

from tokjax.benchmarks import trained_retrieval
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three seeds on pydocs and on scifact of `data`."""
  return Claim(
    statement="A two-layer head (ffn, twice as wide, with a skip) ranks better"
    " (nDCG@10) than the single matrix of the same width.",
    runs=trained_retrieval.on_seeds(("heads",), data),
    measure=trained_retrieval.measure,
    margin=_margin,
  )


def _margin(rows):
  score = {name: row.metrics["nDCG@10"] for name, row in rows.items()}
  return score["head ffn"] - score["head linear"]
