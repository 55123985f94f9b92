"""Bytes of rings in programs of eight devices, at a small shape."""

import dataclasses
import functools

import pytest

from tokjax.benchmarks import compiled_bytes, rings
from tokjax.benchmarks.rings import RingRun
from tokjax.benchmarks.trained_vit import Row
from tokjax.cli import claim


def test_texts_of_programs():
  text = (
    "a = f32[2,3]{1,0} collective-permute(b), source_target_pairs="
    "{{0,1},{1,2},{2,0}}\n"
    "c = bf16[9] collective-permute(d), source_target_pairs={{0,1}}\n"
    "e = f32[] collective-permute(f), source_target_pairs={{0,1},{1,0}}\n"
    "g = (f32[4]{0}, f32[4]{0}) all-to-all(h, i), replica_groups={}\n"
    "j = f32[2,2]{1,0} reduce-scatter(k)\n"
  )
  assert compiled_bytes.sends(text) == [(1, 24), (1, 4)]
  assert compiled_bytes.results(text) == {
    "all-to-all": 32, "all-gather": 0, "reduce-scatter": 16,
  }  # fmt: skip
  with pytest.raises(ValueError, match="must send alike"):
    compiled_bytes.sends(text.replace("{1,2}", "{1,1}"))


def test_devices():
  assert len(compiled_bytes.cpu_devices(3)) == 3
  with pytest.raises(ValueError, match="needs 99 CPU devices, got 8"):
    compiled_bytes.cpu_devices(99)


def test_claim_of_a_small_shape():
  found = claim.load("token_ring", "nowhere")
  assert [x.backward for x in found.runs] == [False] * 4 + [True] * 4
  tiny = dataclasses.replace(
    found.runs[0], num_heads=2, num_key_heads=2, width=4, length=16,
    num_devices=4,
  )  # fmt: skip
  rows = found.measure(tiny, progress=False)
  assert list(rows) == list(rings.RINGS)
  head = 4 * 4 * 2  # bytes of a head of a device's rows
  lse = 4 * 2 * 4
  want = {"ring_kv": 3 * 4 * head, "token_ring": 3 * (2 * head + lse)}
  for name, amount in want.items():
    assert rows[name].metrics["busier"] == pytest.approx(amount / 1e6)
    assert rows[name].metrics["counted"] == rows[name].metrics["as modelled"]
  assert [rows[x].metrics["sends"] for x in ("ring_kv", "token_ring")] == [6, 9]
  margin = 1 - want["token_ring"] / want["ring_kv"]
  assert found.margin(rows) == pytest.approx(margin)


def test_backward_is_counted_by_itself():
  run = RingRun(2, 1, 4, 16, num_devices=2, backward=True)
  found = rings.counted(run, "token_ring")
  rows, scalars = 8 * 4 * 2 * 4, 8 * 2 * 4  # queries of a device; lse
  assert sorted(found) == sorted(
    [(1, rows)] * 3 + [(1, scalars)] * 2  # q, d_out, home; lse, delta
  )


def test_lead_is_nothing_where_the_count_is_another():
  row = Row({"busier": 1.0, "counted": 1.0, "as modelled": 1.0})
  rows = {"token_ring": row, "ring_kv": row}
  lead = functools.partial(rings.lead, rivals=("ring_kv",))
  assert lead(rows) == 0
  off = Row(row.metrics | {"counted": 2.0})
  assert lead(rows | {"ring_kv": off}) == -float("inf")
