"""What a layer of spread experts sends, and how long that takes.

    work = Workload(tokens=4096, width=3584, hidden=2560, num_chosen=8, ep=8)
    sent(work)                                        # bytes of one device
    seconds(work, flops=600e12, near_rate=450e9, far_rate=50e9, domain=8)
    seconds(unfolded(work, tp=2, cp=4), ...)          # the same, not folded

A model to choose a layout by, not a forecast: no latency, no contention, even
loads. Bytes are exact for `tokjax.parallel.moe_folding` with "capacity" at
sizes that divide, but for the few of counts, losses, and of gradients of
weights, which are summed once a step.

Folding pays where experts are small: what is sent for a row does not depend on
the hidden width, and what is computed does. At 989 TFLOP/s an expert of hidden
width 2560 takes 1.8 times as long as its rows on links of 450 GB/s, and 0.2
times as long as on 50 GB/s.
"""

import dataclasses
import math
from typing import NamedTuple

from tokjax import checks

__all__ = [
  "MoeSeconds",
  "MoeSent",
  "Workload",
  "exchange_ratio",
  "seconds",
  "sent",
  "unfolded",
]


@dataclasses.dataclass(frozen=True)
class Workload:
  """A layer, by what one device has of it."""

  tokens: int  # that a device routes, T
  width: int  # of a token, D
  hidden: int  # of a whole expert, F
  num_chosen: int = 2  # experts of a token, k
  ep: int = 1  # devices that hold other experts
  etp: int = 1  # devices that share the hidden width of an expert
  # Ranks between neighbours along ep: etp if it is folded next to it, more
  # if axes of attention lie between. None: etp.
  stride: int | None = None
  room: float = 1.0  # rows that travel for an assignment: capacity or buffers
  itemsize: int = 2  # bytes of a number
  gated: bool = True  # three products, not two
  backward: bool = False  # the backward pass, instead of the forward one

  @property
  def rows(self) -> float:
    """That a device sends, and gets."""
    return self.tokens * self.num_chosen * self.room

  @property
  def flops(self) -> float:
    """Of one device; its rows and those of its etp peers, by a part each."""
    products = (3 if self.gated else 2) * (2 if self.backward else 1)
    return products * 2 * self.rows * self.width * self.hidden


class MoeSent(NamedTuple):
  """Bytes that one device sends to others in a pass.

  Attributes:
    exchange: tokens to experts and back, over ep.
    parts: rows that the devices of an expert share, over etp.
  """

  exchange: float
  parts: float


class MoeSeconds(NamedTuple):
  """How long a pass takes, one after the other.

  Attributes:
    products: of the experts.
    exchange: over ep.
    parts: over etp.
  """

  products: float
  exchange: float
  parts: float


def sent(work: Workload) -> MoeSent:
  """Bytes that each device sends.

  An all-to-all keeps 1 / ep of the rows at home; gathering sends all of them
  to each of the others. The backward pass sends as much: an all-to-all is its
  own transpose, gathers and scatters change places.

  Args:
    work: the layer.

  Returns:
    Bytes, whatever links they take.

  Raises:
    ValueError: if a size is not positive.

  Example:
    >>> sent(Workload(tokens=16, width=8, hidden=4, ep=4))
    MoeSent(exchange=768.0, parts=0.0)
    >>> sent(Workload(tokens=16, width=8, hidden=4, ep=2, etp=2))
    MoeSent(exchange=512.0, parts=1024.0)
  """
  checks.in_range(1, math.inf, ep=work.ep, etp=work.etp, stride=_stride(work))
  once = work.rows * work.width * work.itemsize
  return MoeSent(2 * once * (work.ep - 1) / work.ep, 2 * once * (work.etp - 1))


def unfolded(work: Workload, *, tp: int, cp: int = 1) -> Workload:
  """The layer on as many devices as experts are laid out like attention.

  Every expert is cut over tp, as heads are; ep is what is left of its devices,
  and is taken from dp, so that neighbours are tp x cp ranks apart.

  Args:
    work: the layer, folded.
    tp: of attention.
    cp: of attention.

  Returns:
    The same tokens of a device, sent in another way.

  Raises:
    ValueError: if tp does not divide the devices that hold all experts.

  Example:
    >>> work = Workload(tokens=16, width=8, hidden=4, ep=8)
    >>> other = unfolded(work, tp=2, cp=4)
    >>> other.ep, other.etp, other.stride
    (4, 2, 8)
  """
  checks.divisible(tp, devices_of_all_experts=work.ep * work.etp)
  ep = work.ep * work.etp // tp
  return dataclasses.replace(work, ep=ep, etp=tp, stride=tp * cp)


def seconds(
  work: Workload,
  *,
  flops: float,
  near_rate: float,
  far_rate: float,
  domain: int,
) -> MoeSeconds:
  """Time of a pass.

  Args:
    work: the layer.
    flops: products and sums a second that experts reach on a device.
    near_rate: bytes a second that a device sends inside of its domain.
    far_rate: bytes a second that it sends to others, at the same time.
    domain: consecutive ranks with fast links between any two.

  Returns:
    Seconds of each part.

  Raises:
    ValueError: if a size is not positive.

  Example:
    >>> work = Workload(tokens=4096, width=3584, hidden=2560, ep=8)
    >>> speeds = dict(flops=989e12, near_rate=450e9, far_rate=50e9, domain=8)
    >>> near = seconds(work, **speeds)
    >>> far = seconds(unfolded(work, tp=1, cp=8), **speeds)
    >>> round(near.exchange / near.products, 2)
    0.5
    >>> round(far.exchange / far.products, 2)
    4.51
  """
  checks.in_range(1, math.inf, domain=domain)
  amount = sent(work)

  def time(amount, size, stride):
    """Of something for each of the others of a group."""
    if size == 1:
      return 0.0
    inside = max(1, min(size, domain // stride))
    near = amount * (inside - 1) / (size - 1)
    return max(near / near_rate, (amount - near) / far_rate)

  return MoeSeconds(
    products=work.flops / flops,
    exchange=time(amount.exchange, work.ep, _stride(work)),
    parts=time(amount.parts, work.etp, 1),
  )


def exchange_ratio(
  hidden: int,
  *,
  flops: float,
  link_rate: float,
  itemsize: int = 2,
  gated: bool = True,
) -> float:
  """Time of a row on the links to its time in an expert, if all rows travel.

  Of bfloat16 and gated experts (2 / 3) flops / (hidden link_rate).

  Args:
    hidden: of an expert, the part that a device has.
    flops: products and sums a second.
    link_rate: bytes a second that a device sends.
    itemsize: bytes of a number.
    gated: three products, not two.

  Returns:
    Above 1 the links decide.

  Example:
    >>> round(exchange_ratio(2560, flops=989e12, link_rate=450e9), 2)
    0.57
  """
  products = 2 * (3 if gated else 2) * hidden / flops
  return 2 * itemsize / link_rate / products


def _stride(work):
  return work.etp if work.stride is None else work.stride
