"""CATP: image tokens that agree with the words, from examples that matter.

    tokjax claim catp --data ../shared/data

Recorded 2026-11-28, two AMD EPYC cores (AVX2), jax 0.10.2, encoders of seeds 0,
1 and 2. 250 prompts of four example scenes and a question (see `global_com`),
encoders of `configs/vit_cifar10.py`; the mean patch of a class stands in for
its name. Share of the tokens that stage 1 keeps which are the object's (a
quarter by chance), then share of those that stage 2 keeps of the examples which
belong to examples of the question's class (half by chance), at 64, 32 and 16,
one number a seed:

               64               32               16
    catp       .547/.485/.518   .463/.413/.447   .388/.362/.363
    divprune   .618/.582/.596   .687/.641/.658   .698/.654/.672
    attention  .286/.260/.242   .447/.356/.314   .675/.489/.421
    random     .251/.250/.249   .251/.247/.251   .249/.253/.252

                       64               32               16
    catp context       .631/.589/.615   .566/.545/.574   .539/.528/.530
    attention context  .500/.506/.509   .497/.512/.506   .496/.510/.500
    random context     .501/.503/.498   .500/.504/.504   .500/.498/.494

Does not hold. Blurred surroundings are all alike, so spreading out (DivPrune)
finds the object without any words; the words beat chance, and attention at 64
and 32 but not at 16. Stage 2 alone holds: examples that show the question's
class keep more of the tokens than by attention, which does no better than
chance.
"""

from tokjax.benchmarks import prompt_reduction, trained_vit
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three encoders; the first run trains them, in "runs"."""
  return Claim(
    statement="At 64, 32 and 16 of 256 tokens, more of what stage 1 keeps is "
    "the object's than with DivPrune or by attention, and more of "
    "what stage 2 keeps of the examples is related to the question "
    "than by attention.",
    runs=trained_vit.on_seeds(f"{data}/images-cifar10", f"{data}/images-kodak"),
    measure=prompt_reduction.measure,
    margin=_margin,
  )


def _margin(rows):
  keep = (64, 32, 16)
  others = ("divprune", "attention")
  return min(
    trained_vit.lead(rows, "catp", others, keep=keep, metric="object"),
    trained_vit.lead(
      rows, "catp context", ("attention context",), keep=keep, metric="related"
    ),
  )
