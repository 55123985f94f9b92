"""MoE Parallel Folding: experts on the devices of attention, not beside them.

    tokjax claim moe_folding --data ../shared/data

Recorded 2026-11-28, two busy AMD EPYC cores, jax 0.10.2; nothing is random. A
model, not a measurement of time: H100 at 989 TFLOP/s, 450 GB/s inside nodes of
eight, 50 GB/s between them, no overlap, even loads, bfloat16, forward. Folded,
8 devices in a row hold all experts, whole; unfolded, 8 devices do, but every
expert is cut over tp, and the parts are tp cp ranks apart. MB (1e6 bytes) that
a device sends, and ms of a layer, of which products, exchange, parts:

    tp 2, cp 1, S 4,096     folded                    unfolded
    Mixtral 8x22B            88  2.70 (2.50 .20 0)     176   2.89 (2.50 .17 .22)
    8x22B-G8T8              352  2.03 (1.25 .78 0)     705   2.82 (1.25 .67 .90)
    Qwen2-57B-A14B          206  1.37 ( .91 .46 0)     411   1.83 ( .91 .39 .52)

    tp 2, cp 4, S 32,768
    Mixtral 8x22B           176  5.39 (5.00 .39 0)     352   8.5 (5.00 3.0 .45)
    8x22B-G8T8              705  4.07 (2.50 1.6 0)    1409  16.4 (2.50 12. 1.8)
    Qwen2-57B-A14B          411  2.74 (1.82 .91 0)     822   9.9 (1.82 7.0 1.0)

    tp 4, cp 8, S 131,072
    Mixtral 8x22B           176  5.39 (5.00 .39 0)     705   8.4 (5.00 2.0 1.3)
    8x22B-G8T8              705  4.07 (2.50 1.6 0)    2819  15.9 (2.50 8.1 5.4)
    Qwen2-57B-A14B          411  2.74 (1.82 .91 0)    1644   9.7 (1.82 4.7 3.1)

Holds in all nine: half or a quarter of the bytes, 7 to 36 % less time for
Mixtral's wide experts and 25 to 75 % for narrow ones. Least where all unfolded
parts fit in a node as well, most where they do not. Backward, which computes
twice as much for the same bytes, 4 to 23 % and 17 to 65 %.

Bytes counted in the compiled programs of a small layer on 8 devices, 896
folded and 1,792 (tp 2) or 3,584 (tp 4) not, are those of the model.
"""

from tokjax.benchmarks import moe_layouts
from tokjax.benchmarks.moe_layouts import FoldingRun
from tokjax.cli.claim import Claim

# Width, hidden width, experts and how many of them a token asks.
_MODELS = {
  "Mixtral 8x22B": (6144, 16384, 8, 2),
  "Mixtral 8x22B-G8T8": (6144, 2048, 64, 8),
  "Qwen2-57B-A14B": (3584, 2560, 64, 8),
}


def get_config(data: str) -> Claim:
  """The claim for short and for long sequences; `data` is not used."""
  del data
  layouts = (
    dict(ep=8, tp=2, cp=1, length=4096),
    dict(ep=8, tp=2, cp=4, length=32_768),
    dict(ep=8, tp=4, cp=8, length=131_072),
  )
  return Claim(
    statement="Folded over the devices of attention, whole experts send fewer "
    "bytes and their layer takes less time on nodes of eight H100 than with "
    "experts cut over tp and spread over dp, on as many devices.",
    runs=tuple(
      FoldingRun(f"{name}, tp {layout['tp']}, cp {layout['cp']}", *model,
                 **layout)
      for name, model in _MODELS.items()
      for layout in layouts
    ),
    measure=moe_layouts.claimed,
    margin=moe_layouts.lead,
  )  # fmt: skip
