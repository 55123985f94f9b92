"""What attention over a sequence on many devices sends, and how long it takes.

    work = Workload(131072, 8, num_heads=32, num_key_heads=8, width=128)
    sent(work, "ring_kv")                             # bytes on each direction
    cheapest(work, flops=690e12, link_rate=450e9)     # a strategy's name

A model to choose by, not a forecast: steps take as long as their arithmetic or
their transfers, whichever is longer, with no latency and no contention. What is
sent is exact for `tokjax.parallel.ring_attention` and
`tokjax.parallel.token_ring` without segment ids, which add 4 bytes a token.

Which ring: by the bytes of the busier direction of its links, forward, queries
should travel if H < 2 K where keys go one way, and never win where keys go both
ways (H = K is a tie). Grouped queries, H = 4 K or 8 K, are no case for them.
Backward the gradients of keys travel in float32, so that with bfloat16 the
limits are H < 3 K and 2 H < 3 K. This holds where every two devices have a link
of their own ("mesh"); results that go home directly crowd a ring of links, and
on a switch the two directions share a port ("ring", "switch" below).
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

from tokjax import checks

__all__ = ["STRATEGIES", "Sent", "Workload", "cheapest", "seconds", "sent"]

# Ways to share the work: gather all keys everywhere; keys in a ring, one way or
# half of them each way; queries in a ring; heads instead of rows (Ulysses).
STRATEGIES = ("all_gather", "ring_kv", "ring_both", "token_ring", "ulysses")
_TOPOLOGIES = ("ring", "mesh", "switch")
_BACKWARD = 2.5  # products of the backward pass, to 1 of the forward pass


@dataclasses.dataclass(frozen=True)
class Workload:
  """The attention to be done, by all devices together."""

  length: int  # tokens of the whole sequence
  num_devices: int  # that share the sequence
  num_heads: int  # of queries, H
  num_key_heads: int  # of keys and values, K
  width: int  # of a head, d
  itemsize: int = 2  # bytes of a number of queries, keys, values and results
  batch: int = 1  # sequences
  causal: bool = True  # balanced by zigzag order
  backward: bool = False  # the backward pass, instead of the forward one

  @property
  def flops(self) -> float:
    """Of one device."""
    full = 4 * self.batch * self.num_heads * self.width * self.length**2
    passes = _BACKWARD if self.backward else 1
    return passes * full / (2 if self.causal else 1) / self.num_devices


class Sent(NamedTuple):
  """Bytes that one device sends in a pass.

  Attributes:
    ahead: towards the next device: of a ring, or the half that goes that way.
    back: towards the one before.
  """

  ahead: float
  back: float


class _Step(NamedTuple):
  """Arithmetic, and the transfers that may run beside it.

  `sends` are pairs of a distance, negative towards earlier devices, and bytes.
  """

  flops: float
  sends: list[tuple[int, float]]


def sent(work: Workload, strategy: str) -> Sent:
  """Bytes that each device sends, by direction.

  Args:
    work: what is to be done.
    strategy: one of `STRATEGIES`.

  Returns:
    Over the whole pass. Gathered and exchanged heads go half each way.

  Raises:
    ValueError: if the strategy is unknown or cannot share these heads.

  Example:
    >>> work = Workload(1024, 4, num_heads=8, num_key_heads=8, width=64)
    >>> sent(work, "ring_kv")
    Sent(ahead=1572864.0, back=0.0)
    >>> sent(work, "token_ring")  # log-sum-exp comes home too
    Sent(ahead=811008.0, back=786432.0)
  """
  steps = _steps(work, strategy, "ring")
  sends = [send for step in steps for send in step.sends]
  return Sent(
    sum((amount for distance, amount in sends if distance > 0), 0.0),
    sum((amount for distance, amount in sends if distance < 0), 0.0),
  )


def seconds(
  work: Workload,
  strategy: str,
  *,
  flops: float,
  link_rate: float,
  topology: Literal["ring", "mesh", "switch"] = "ring",
) -> float:
  """Time of a pass, if all that can overlap does.

  Args:
    work: what is to be done.
    strategy: one of `STRATEGIES`.
    flops: products and sums a second that attention reaches on a device.
    link_rate: bytes a second in one direction of one link.
    topology: "ring", links to both neighbours, and what goes farther passes
      all between on the shorter way; "mesh", a link to each other device;
      "switch", one link, into a switch, for all that a device sends.

  Returns:
    Seconds; infinity where the strategy cannot share these heads.

  Raises:
    ValueError: if the strategy or the topology is unknown.

  Example:
    >>> work = Workload(2**17, 8, num_heads=32, num_key_heads=32, width=128)
    >>> speeds = dict(flops=690e12, link_rate=50e9)
    >>> round(seconds(work, "ring_kv", **speeds), 4)
    0.0408
    >>> round(seconds(work, "ring_both", **speeds), 4)
    0.0255
  """
  checks.one_of(STRATEGIES, strategy=strategy)
  checks.one_of(_TOPOLOGIES, topology=topology)
  if strategy == "ulysses" and work.num_heads % work.num_devices:
    return math.inf
  return sum(
    max(
      step.flops / flops,
      _busiest(step.sends, work.num_devices, topology) / link_rate,
    )
    for step in _steps(work, strategy, topology)
  )


def cheapest(
  work: Workload,
  *,
  flops: float,
  link_rate: float,
  topology: Literal["ring", "mesh", "switch"] = "ring",
  strategies: tuple[str, ...] = STRATEGIES,
) -> str:
  """The strategy that takes the least time; of equals the first.

  Arguments and errors are those of `seconds`. Memory is not weighed: leave
  "all_gather" out of `strategies` where the keys of all do not fit.

  Example:
    >>> work = Workload(2**17, 8, num_heads=32, num_key_heads=4, width=128)
    >>> rings = ("ring_kv", "ring_both", "token_ring")
    >>> cheapest(work, flops=690e12, link_rate=9e9, strategies=rings)
    'ring_both'
  """

  def time(strategy):
    return seconds(
      work, strategy, flops=flops, link_rate=link_rate, topology=topology
    )

  return min(strategies, key=time)


def _steps(work, strategy, topology):
  """The pass as steps, each of which waits for the one before."""
  checks.one_of(STRATEGIES, strategy=strategy)
  return {
    "all_gather": _all_gather,
    "ring_kv": functools.partial(_ring, ways=(1,)),
    "ring_both": functools.partial(_ring, ways=(1, -1)),
    "token_ring": _token_ring,
    "ulysses": _ulysses,
  }[strategy](work, topology)


def _ring(work, topology, *, ways):
  del topology  # the same in all
  size = work.num_devices
  rows = 2 * _head_numbers(work) * work.num_key_heads  # keys and values
  step_flops = work.flops / size

  def ring(amount):
    return [(way, amount / len(ways)) for way in ways]

  steps = []
  for step in range(size):
    sends = ring(rows * work.itemsize) if step < size - 1 else []
    # The sums of the step before follow while this one is computed.
    sends += ring(rows * 4) if work.backward and step > 0 else []
    steps.append(_Step(step_flops, sends))
  if work.backward and size > 1:
    steps.append(_Step(0, ring(rows * 4)))  # the sums, home
  return steps


def _token_ring(work, topology):
  del topology
  size = work.num_devices
  rows = _head_numbers(work) * work.num_heads * work.itemsize
  scalars = 4 * _head_numbers(work) * work.num_heads / work.width
  # Backward the cotangent, lse and delta travel as well.
  there = 2 * (rows + scalars) if work.backward else rows
  home = rows if work.backward else rows + scalars
  steps = []
  for step in range(size):
    sends = [(-1, there)] if step < size - 1 else []
    sends += [(step - 1, home)] if step > 1 else []
    steps.append(_Step(work.flops / size, sends))
  if size > 1:
    steps.append(_Step(0, [(size - 1, home)]))
  return steps


def _all_gather(work, topology):
  rows = 2 * _head_numbers(work) * work.num_key_heads
  gather = _Step(0, _to_all(work, rows * work.itemsize, topology))
  if not work.backward:
    return [gather, _Step(work.flops, [])]
  scatter = _Step(0, _to_all(work, rows * 4, topology))
  return [gather, _Step(work.flops, []), scatter]


def _to_all(work, amount, topology):
  """The same from each to all: along a ring it is passed on, half each way."""
  others = work.num_devices - 1
  if topology == "ring":
    return [(1, amount * others / 2), (-1, amount * others / 2)]
  return _each(work.num_devices, amount)


def _ulysses(work, topology):
  del topology
  size = work.num_devices
  checks.divisible(size, num_heads=work.num_heads)
  numbers = _head_numbers(work) * work.itemsize  # of one head, to one device
  queries = numbers * work.num_heads / size
  # A key head that several devices need is sent to each.
  keys = numbers * math.ceil(work.num_key_heads / size)
  there, home = _each(size, queries + 2 * keys), _each(size, queries)
  if not work.backward:
    return [_Step(0, there), _Step(work.flops, []), _Step(0, home)]
  # Queries, keys and values are kept as exchanged: cotangents of the result
  # there, those of the three home.
  return [_Step(0, home), _Step(work.flops, []), _Step(0, there)]


def _each(size, amount):
  """Something of its own to each other device, on the shorter way."""
  sends = []
  for distance in range(1, size):
    ahead = distance * 2 < size
    half = distance * 2 == size  # as far either way: half of it each
    if ahead or half:
      sends.append((distance, amount / 2 if half else amount))
    if not ahead:
      sends.append((distance - size, amount / 2 if half else amount))
  return sends


def _busiest(sends, size, topology):
  """Bytes on the busiest direction of a link, if all devices send alike."""
  if topology == "switch":
    return sum(amount for _, amount in sends)
  if topology == "mesh":
    to = {}
    for distance, amount in sends:
      to[distance % size] = to.get(distance % size, 0) + amount
    return max(to.values(), default=0)
  ahead = back = 0
  for distance, amount in sends:
    short = distance % size
    if size - short < short or (size - short == short and distance < 0):
      back += (size - short) * amount  # passes as many links
    else:
      ahead += short * amount
  return max(ahead, back)


def _head_numbers(work):
  """Numbers of one head of all rows of a device."""
  return work.batch * work.length / work.num_devices * work.width
