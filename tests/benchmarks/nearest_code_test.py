"""The benchmark of the search compares equal things, at a size for tests."""

from tokjax.benchmarks import nearest_code
from tokjax.kernels.nearest_code.shapes import Shape


def test_rows_name_time_and_memory():
  shape = Shape("small", 1024, 2048, 8)
  ours, matrix = nearest_code.run(shape, repeats=2)[:2]
  assert (ours["implementation"], matrix["implementation"]) == (
    "tokjax", "matrix",
  )  # fmt: skip
  assert ours["times_ours"] == ours["agree"] == 1
  assert matrix["agree"] > 0.999
  # All distances, float32, are there at once in one of them.
  assert matrix["temp_gb"] >= 4e-9 * 1024 * 2048 > ours["temp_gb"]
  products = 2 * 1024 * 2048 * 8
  rate = ours["of_gemm"] * ours["gemm_gflops"] * ours["median_s"] * 1e9
  assert abs(rate - products) < 1
