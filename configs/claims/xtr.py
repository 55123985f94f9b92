"""XTR: training for token retrieval makes retrieved tokens enough.

    tokjax claim xtr --data ../shared/data

Recorded 2026-11-24, an Intel Xeon core (AVX-512), jax 0.10.2, seeds 0, 1
and 2. The encoder (all-MiniLM-L6-v2) is frozen and only the
head trained: 300 steps of 32 queries of pydocs' train split; 200 test queries
over 3,000 documents of at most 64 tokens. nDCG@10 (R@100) by MaxSim / by
the 10 / by the 100 best tokens of each query token:

    ColBERT-trained  seed 0  .5642 (.940)  .5367 (.843)  .5708 (.909)
                     seed 1  .5627 (.946)  .5382 (.839)  .5721 (.909)
                     seed 2  .5637 (.940)  .5368 (.855)  .5750 (.909)
    XTR-trained      seed 0  .5427 (.922)  .5267 (.846)  .5594 (.913)
                     seed 1  .5409 (.917)  .5271 (.833)  .5528 (.913)
                     seed 2  .5400 (.922)  .5263 (.843)  .5555 (.913)

Does not hold. From 10 tokens the XTR-trained model loses half as much of its
own nDCG@10 (.016, .014, .014 against .028, .025, .027), as the paper says. But
it starts lower, stays .010 below, and finds more in one seed of three only
(R@100 +.003, -.006, -.011). From 100 of the corpus' 185,000 tokens neither
loses anything: the collapse that the paper reports needs a corpus in which the
retrieved tokens are a far smaller share.

On scifact, 2026-11-28, an AMD EPYC core (AVX2), seeds 0, 1 and 2: 150 steps of
32 of its 809 training claims; 300 test claims over all 5,183 documents of at
most 128 tokens. nDCG@10 (R@100) as above:

    ColBERT-trained  seed 0  .6906 (.963)  .6459 (.931)  .6816 (.939)
                     seed 1  .6941 (.963)  .6502 (.931)  .6861 (.939)
                     seed 2  .6877 (.963)  .6493 (.931)  .6823 (.935)
    XTR-trained      seed 0  .6737 (.956)  .6508 (.929)  .6772 (.939)
                     seed 1  .6792 (.959)  .6527 (.936)  .6811 (.939)
                     seed 2  .6765 (.956)  .6497 (.934)  .6838 (.935)

The XTR-trained model loses half as much here (.023, .026, .027 against .045,
.044, .038) and does overtake in nDCG@10, by .005, .002 and .0004; in R@100 by
-.002, +.004 and +.003. The claim asks for both, so it holds in seeds 1 and 2
and not in seed 0.

196 of the 300 test claims have a document that training showed as an answer to
another claim, so that part of any gain is memory of which documents answer.
"""

from tokjax.benchmarks import trained_retrieval
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three seeds on pydocs and on scifact of `data`."""
  return Claim(
    statement="Scored from the 10 best tokens of each query token, the"
    " XTR-trained model finds"
    " more (R@100) than the ColBERT-trained one, and loses less of its own"
    " MaxSim nDCG@10.",
    runs=trained_retrieval.on_seeds(("colbert", "xtr"), data),
    measure=trained_retrieval.measure,
    margin=_margin,
  )


def _margin(rows):
  recall = {name: row.metrics["R@100"] for name, row in rows.items()}
  score = {name: row.metrics["nDCG@10"] for name, row in rows.items()}
  lost = {
    name: score[name] - score[f"{name} by 10 tokens"]
    for name in ("colbert", "xtr")
  }
  return min(
    recall["xtr by 10 tokens"] - recall["colbert by 10 tokens"],
    lost["colbert"] - lost["xtr"],
  )
