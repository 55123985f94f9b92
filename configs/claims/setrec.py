"""SETRec: an item as a set of vectors, answered in one pass.

    tokjax claim setrec --data ../shared/data

Not measured yet: neither holds nor fails.
"""

import functools

from tokjax.benchmarks import set_identifiers
from tokjax.benchmarks.set_identifiers import SetRun
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim on calls of functions, with text, and on purchases, without."""
  return Claim(
    statement="An item as a set of one collaborative and several semantic "
    "vectors is found more often among the first ten than one of one kind "
    "only, and than a sequence of codes emitted one after the other.",
    runs=(
      SetRun("pyapi"),
      SetRun(f"{data}/rec-amazon-beauty", cold_ratio=0.0, num_users=5000),
    ),
    measure=set_identifiers.claimed,
    margin=functools.partial(
      set_identifiers.lead, metrics=("R@10 all", "nDCG@10 all")
    ),
  )
