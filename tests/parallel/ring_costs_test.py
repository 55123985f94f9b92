"""The cost model against compiled programs and numbers worked by hand."""

import dataclasses
import functools

import pytest

from tests.parallel import dense_attention
from tokjax.parallel import ring_costs
from tokjax.parallel.ring_attention import ring_attention
from tokjax.parallel.ring_costs import Sent, Workload
from tokjax.parallel.token_ring import token_ring

RINGS = {
  "ring_kv": functools.partial(ring_attention, rotate="kv"),
  "ring_both": functools.partial(ring_attention, rotate="both"),
  "token_ring": token_ring,
}
# Transfers decide: arithmetic takes no time.
LINKS = dict(flops=1e30, link_rate=1.0)


@pytest.mark.parametrize("strategy", RINGS)
def test_bytes_are_those_of_the_compiled_program(strategy):
  mesh = dense_attention.ring_mesh(seq=4)
  passes = dense_attention.sent(RINGS[strategy], mesh)
  for backward, found in zip((False, True), passes, strict=True):
    work = Workload(48, 4, 2, 1, 4, itemsize=4, batch=2, backward=backward)
    ahead, back = ring_costs.sent(work, strategy)
    assert sum(amount for _, amount in found) == ahead + back
    if strategy != "token_ring":  # whose third return is as far as a turn
      assert sum(amount for hop, amount in found if hop == 1) == ahead


def test_bytes_by_hand():
  work = Workload(64, 4, 8, 4, 16)  # 16 rows a device, 512 bytes of a head
  head = 16 * 16 * 2
  lse = 16 * 8 * 4
  assert ring_costs.sent(work, "ring_kv") == Sent(3 * 8 * head, 0)
  assert ring_costs.sent(work, "ring_both") == Sent(3 * 4 * head, 3 * 4 * head)
  assert ring_costs.sent(work, "token_ring") == Sent(
    3 * (8 * head + lse), 3 * 8 * head
  )
  assert sum(ring_costs.sent(work, "all_gather")) == 3 * 8 * head
  # (2 H + 2 K) (S / P) d (P - 1) / P
  assert sum(ring_costs.sent(work, "ulysses")) == 24 * head * 3 / 4
  few = dataclasses.replace(work, num_key_heads=1)  # all devices need it
  assert sum(ring_costs.sent(few, "ulysses")) == (16 + 8) * head * 3 / 4


def test_backward_bytes_by_hand():
  work = Workload(64, 4, 8, 4, 16, backward=True)
  head = 16 * 16 * 2
  lse = 16 * 8 * 4
  # Keys and values 3 times, their float32 gradients 4 times.
  assert ring_costs.sent(work, "ring_kv") == Sent((3 * 8 + 4 * 16) * head, 0)
  assert ring_costs.sent(work, "token_ring") == Sent(
    3 * 8 * head, 3 * 2 * (8 * head + lse)
  )
  assert sum(ring_costs.sent(work, "all_gather")) == 3 * (8 + 16) * head


def test_one_device_sends_nothing():
  for backward in (False, True):
    work = Workload(64, 1, 8, 4, 16, backward=backward)
    for strategy in ring_costs.STRATEGIES:
      assert ring_costs.sent(work, strategy) == Sent(0, 0)
      time = ring_costs.seconds(work, strategy, flops=2.0, link_rate=1.0)
      assert time == work.flops / 2


def test_flops_of_a_device():
  work = Workload(64, 4, 8, 4, 16, batch=3)
  full = 4 * 3 * 8 * 16 * 64 * 64 / 4
  assert work.flops == full / 2
  assert dataclasses.replace(work, causal=False).flops == full
  assert dataclasses.replace(work, backward=True).flops == 2.5 * full / 2


@pytest.mark.parametrize(
  ("key_heads", "rival", "backward", "queries_travel"),
  [
    (8, "ring_kv", False, True),  # H < 2 K
    (4, "ring_kv", False, False),
    (1, "ring_kv", False, False),
    (8, "ring_both", False, False),  # a tie but for lse and the last return
    (4, "ring_kv", True, True),  # H < 3 K
    (2, "ring_kv", True, False),
    (8, "ring_both", True, True),  # 2 H < 3 K
    (4, "ring_both", True, False),
  ],
)
def test_who_should_travel(key_heads, rival, backward, queries_travel):
  work = Workload(16384, 16, 8, key_heads, 128, backward=backward)
  chosen = ring_costs.cheapest(
    work, strategies=(rival, "token_ring"), topology="mesh", **LINKS
  )
  assert chosen == ("token_ring" if queries_travel else rival)


def test_rows_a_device_needs_to_hide_the_transfers():
  """2 F / W = 3066.7 for a ring of keys, F / W = 1533.3 for queries."""
  speeds = dict(flops=690e12, link_rate=450e9, topology="mesh")

  def wait(rows, strategy, **shape):
    work = Workload(8 * rows, 8, 32, 32, 128, **shape)
    spent = ring_costs.seconds(work, strategy, **speeds)
    return spent - work.flops / 690e12

  assert wait(3067, "ring_kv") == pytest.approx(0, abs=1e-12)
  assert wait(3066, "ring_kv") > 1e-9
  assert wait(1534, "ring_both") == pytest.approx(0, abs=1e-12)
  # lse is 1 / 64 of a result; nothing hides the last.
  last = 1600 * 32 * (128 * 2 + 4) / 450e9
  assert wait(1600, "token_ring") == pytest.approx(last, rel=1e-6)
  assert wait(1550, "token_ring") > 1550 / 1600 * last + 1e-9


def test_token_ring_on_other_links():
  work = Workload(64, 4, 8, 8, 16)
  turn, home = 8 * 512, 8 * 512 + 512

  def time(topology):
    return ring_costs.seconds(work, "token_ring", topology=topology, **LINKS)

  # Steps: a turn; a turn; both; a return from 2 links away; one from 3, which
  # is 1 the other way.
  assert time("mesh") == 2 * turn + home + home + home
  assert time("ring") == 2 * turn + home + 2 * home + home
  assert time("switch") == 2 * turn + (turn + home) + home + home


def test_cheapest_of_all():
  many = Workload(2**17, 8, 32, 32, 128)
  assert ring_costs.cheapest(many, **LINKS) == "ulysses"
  odd = dataclasses.replace(many, num_heads=30, num_key_heads=30)
  assert ring_costs.seconds(odd, "ulysses", **LINKS) == float("inf")
  assert ring_costs.cheapest(odd, **LINKS) in ("all_gather", "ring_both")
  # Arithmetic decides: what hides its transfers wins.
  slow = ring_costs.cheapest(many, flops=1e12, link_rate=1e12)
  assert slow in ("ring_kv", "ring_both")


@pytest.mark.unchecked
def test_errors_name_the_argument():
  work = Workload(64, 4, 6, 6, 16)
  with pytest.raises(ValueError, match="strategy"):
    ring_costs.sent(work, "pigeon")
  with pytest.raises(ValueError, match="strategy"):
    ring_costs.seconds(work, "pigeon", **LINKS)
  with pytest.raises(ValueError, match="topology"):
    ring_costs.seconds(work, "ring_kv", topology="star", **LINKS)
  with pytest.raises(ValueError, match="num_heads must be a multiple of 4"):
    ring_costs.sent(work, "ulysses")
