"""TokenRing: fewer bytes on a link if keys are not shared, else more.

    tokjax claim token_ring --data ../shared/data

Recorded 2026-11-28, two busy AMD EPYC cores, jax 0.10.2; nothing is random.
Causal attention of one sequence over 8 devices, numbers of two bytes. MB (1e6
bytes) of a device in a pass: on the busier direction of its links, and what the
pass waits for where arithmetic takes no time, with a link between every two
devices (mesh), to both neighbours (ring), and one port into a switch; for
ring attention one way / both ways / TokenRing:

    forward                busier        mesh          ring          switch
    H 32 K 32, S 24,000    344/172/175   344/172/224   344/172/473   344/344/347
    H 16 K  8, S 16,384     59/ 29/ 60    59/ 29/ 76    59/ 29/161    59/ 59/118
    H 32 K  8, S 16,384     59/ 29/119    59/ 29/153    59/ 29/323    59/ 59/237
    H 64 K  8, S 16,384     59/ 29/239    59/ 29/306    59/ 29/646    59/ 59/473

    backward
    H 32 K 32, S 24,000   1130/565/349 1130/565/399 1130/565/569 1130/1130/521
    H 16 K  8, S 16,384    193/ 96/119  193/ 96/136  193/ 96/194 193/ 193/178
    H 32 K  8, S 16,384    193/ 96/239  193/ 96/272  193/ 96/388 193/ 193/356
    H 64 K  8, S 16,384    193/ 96/477  193/ 96/544  193/ 96/777 193/ 193/712

Does not hold. Against a ring of one way TokenRing saves 49 % of the busier
direction forward and 69 % backward where every head has keys of its own, as
published; with two heads to a key it sends 2 % more forward and 38 % less
backward; with four 103 % and 24 % more, with eight 306 % and 147 %. A ring that
sends half of the keys each way is never behind it forward, and backward only
where keys are not shared. On links to neighbours only it is behind both
forward, always. All take 8 steps; TokenRing sends 21 times forward (7 turns, 7
results, 7 log-sum-exps), the last with nothing to hide it, a ring 14.

Bytes counted in the compiled programs, in float32 and at these shapes, are
those of the model in all 24 cases.
"""

import functools

from tokjax.benchmarks import rings
from tokjax.benchmarks.rings import RingRun
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim for shapes of models, forward and backward; `data` is unused."""
  del data
  shapes = (
    (32, 32, 128, 24_000),  # the published measurement, on more devices
    (16, 8, 128, 16_384),
    (32, 8, 128, 16_384),
    (64, 8, 128, 16_384),
  )
  return Claim(
    statement="The busier direction of the links of a device carries fewer "
    "bytes in TokenRing than in ring attention, which sends keys one way, "
    "whether several heads of queries share a head of keys or not.",
    runs=tuple(
      RingRun(*shape, backward=backward)
      for backward in (False, True)
      for shape in shapes
    ),
    measure=rings.claimed,
    margin=functools.partial(rings.lead, rivals=("ring_kv",)),
  )
