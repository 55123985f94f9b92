"""The quantizer zoo: plain codebooks collapse, and what keeps them alive.

tokjax claim quantizers --data ../shared/data
"""

import functools

from tokjax.benchmarks import quantizers
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over three seeds."""
  return Claim(
    statement="With as many bits and steps, a table learned by gradient alone"
    " uses the fewest of its codes; resets, SimVQ and narrow codes of length"
    " one use 90 % of them at least, quantizers without tables more than the"
    " table, and each residual stage lowers the error.",
    runs=quantizers.on_seeds(f"{data}/images-cifar10"),
    measure=quantizers.measure,
    margin=functools.partial(quantizers.margin, data=("points", "patches")),
  )
