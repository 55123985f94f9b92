"""Layouts of experts: counts of small programs, and the margin."""

import pytest

from tokjax.benchmarks import moe_layouts
from tokjax.benchmarks.trained_vit import Row
from tokjax.cli import claim
from tokjax.parallel.moe_costs import MoeSent


def test_claim_of_one_model():
  found = claim.load("moe_folding", "nowhere")
  assert len(found.runs) == 9
  run = found.runs[1]
  assert run.dataset == "Mixtral 8x22B, tp 2, cp 4"
  assert moe_layouts.counted(run, {"ep": 8}) == MoeSent(896, 0)
  rows = found.measure(run, progress=False)
  assert list(rows) == ["folded", "unfolded"]
  once = 32_768 // 8 * 2 * 6144 * 2 / 1e6  # of the rows of a device
  folded, apart = (row.metrics for row in rows.values())
  assert folded["MB"] == pytest.approx(2 * once * 7 / 8)
  assert apart["MB"] == pytest.approx(2 * once * 3 / 4 + 2 * once)
  assert folded["counted"] == folded["as modelled"] == 896
  assert apart["counted"] == apart["as modelled"] == 1792
  # A node holds the folded ones; the others meet through slow links only.
  assert folded["exchange"] == pytest.approx(2 * once * 7 / 8 / 450)
  assert apart["exchange"] == pytest.approx(2 * once * 3 / 4 / 50)
  assert folded["products"] == apart["products"]
  assert found.margin(rows) == pytest.approx(
    min(1 - folded[x] / apart[x] for x in ("MB", "ms"))
  )


def test_lead_is_nothing_where_the_count_is_another():
  row = Row({"MB": 1.0, "ms": 1.0, "counted": 1, "as modelled": 1})
  assert moe_layouts.lead({"folded": row, "unfolded": row}) == 0
  off = Row(row.metrics | {"counted": 2})
  assert moe_layouts.lead({"folded": row, "unfolded": off}) == -float("inf")
