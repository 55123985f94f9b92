"""The benchmark of the loss compares equal things, at a size for tests."""

from tokjax.benchmarks import losses
from tokjax.kernels.maxsim.shapes import Shape


def test_rows_name_time_and_memory(tmp_path):
  shape = Shape("small", 32, 32, 16, 128, 16)
  ours, plain = losses.run(shape, repeats=2)
  assert (ours["implementation"], plain["implementation"]) == (
    "tokjax", "einsum",
  )  # fmt: skip
  assert ours["times_ours"] == 1 and plain["times_ours"] > 0
  # All similarities, float32, are there at once in one of them.
  assert plain["temp_gb"] >= 4e-9 * 32 * 32 * 16 * 128 > ours["temp_gb"]
  products = 3 * 2 * (32 * 16) * (32 * 128) * 16
  assert abs(ours["gflops"] * ours["median_s"] * 1e9 - products) < 1
