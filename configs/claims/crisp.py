"""CRISP: clustering inside training beats clustering afterwards.

    tokjax claim crisp --data ../shared/data

Recorded 2026-11-24, an Intel Xeon core (AVX-512), jax 0.10.2, seeds 0, 1
and 2. The encoder (all-MiniLM-L6-v2) is frozen and only the
head trained: 300 steps of 32 queries of pydocs' train split; 200 test queries
over 3,000 documents of at most 64 tokens. nDCG@10 (R@100), trained
with clustering / clustered afterwards / the first tokens, as many:

    C4x8   seed 0  .4458 (.853)  .4394 (.900)  .2993 (.823)
           seed 1  .4431 (.849)  .4439 (.906)  .3012 (.833)
           seed 2  .4327 (.864)  .4425 (.896)  .2908 (.832)
    C8x32  seed 0  .5308 (.905)  .5146 (.901)  .4856 (.908)
           seed 1  .5362 (.918)  .5200 (.920)  .4791 (.913)
           seed 2  .5375 (.918)  .5091 (.918)  .4766 (.908)

Holds at C8x32, by .016, .016 and .028; does not hold at C4x8, where training
gains nothing (+.006, -.001, -.010) and loses recall. Unpruned ColBERT has
.5642, .5627, .5637: halving the 62 tokens a document has costs .03 here. The
paper trains the whole encoder, on longer documents, and reports no loss at
C8x32.

On scifact, 2026-11-28, an AMD EPYC core (AVX2), seeds 0, 1 and 2: 150 steps of
32 of its 809 training claims; 300 test claims over all 5,183 documents of at
most 128 tokens. nDCG@10 (R@100) as above:

    C4x8   seed 0  .5092 (.875)  .5377 (.940)  .3443 (.792)
           seed 1  .5205 (.870)  .5339 (.941)  .3485 (.797)
           seed 2  .5190 (.885)  .5351 (.931)  .3438 (.796)
    C8x32  seed 0  .6420 (.900)  .6211 (.928)  .5192 (.884)
           seed 1  .6549 (.902)  .6274 (.932)  .5191 (.884)
           seed 2  .6492 (.910)  .6144 (.925)  .5224 (.880)

As on pydocs: holds at C8x32, by .021, .027 and .035, and not at C4x8 (-.029,
-.013, -.016).

196 of the 300 test claims have a document that training showed as an answer to
another claim, so that part of any gain is memory of which documents answer.
"""

from tokjax.benchmarks import trained_retrieval
from tokjax.cli.claim import Claim

_PRESETS = ("C4x8", "C8x32")


def get_config(data: str) -> Claim:
  """The claim over three seeds on pydocs and on scifact of `data`."""
  return Claim(
    statement="At every size the model trained with clustering ranks better"
    " (nDCG@10) than the ColBERT-trained one clustered afterwards.",
    runs=trained_retrieval.on_seeds(("colbert", "crisp"), data),
    measure=trained_retrieval.measure,
    margin=_margin,
  )


def _margin(rows):
  score = {name: row.metrics["nDCG@10"] for name, row in rows.items()}
  return min(score[f"crisp {p}"] - score[f"post-hoc {p}"] for p in _PRESETS)
