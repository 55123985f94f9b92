"""Data sheets: whose there are, and the bounds that come of them."""

import pytest

from tokjax.parallel import data_sheets


@pytest.mark.parametrize(
  "topology",
  ["v4:2x2x1", "v5e:16x16", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h100:8"],
)
def test_a_sheet_is_found_by_topology(topology):
  sheet = data_sheets.find(topology)
  assert 1e14 < sheet.flops < 3e15 and sheet.memory_bytes > 15e9
  assert sheet.link_rate < sheet.memory_rate


def test_unknown_devices_have_none():
  assert data_sheets.find("v99:2x2") is None


def test_bound_is_work_over_rate():
  sheet = data_sheets.DataSheet(10.0, 4.0, 1, 2.0)
  got = data_sheets.bound(sheet, flops=20, memory_bytes=2, link_bytes=8)
  assert got == data_sheets.Bound(arithmetic=2.0, memory=0.5, links=4.0)
