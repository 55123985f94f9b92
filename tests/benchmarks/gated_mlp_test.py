"""What is timed beside the sparse gated MLP, and what of it is active."""

import jax
import numpy as np
import pytest

from tests.compiled import run
from tokjax.benchmarks import gated_mlp
from tokjax.sparse import cats


def test_dense_mlp_is_the_sparse_one_with_all_units():
  keys = jax.random.split(jax.random.key(0), 4)
  x, w_gate, w_up, w_down = (
    jax.random.normal(key, shape)
    for key, shape in zip(
      keys, ((3, 8), (8, 12), (12, 8), (12, 8)), strict=True
    )
  )
  got = run(gated_mlp.dense_mlp, x, w_gate, w_up.T, w_down)
  want = run(cats.gated_mlp, x, w_gate, w_up, w_down, 0.0).output
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_rows_tell_the_units_that_are_read():
  rows = gated_mlp.run(
    dim=16, num_units=40, kept=(1.0, 0.25), implementation="xla", repeats=1
  )
  found = {row["implementation"]: row for row in rows}
  assert list(found) == ["dense", "kept 1.0", "kept 0.25"]
  assert [row["active"] for row in rows] == pytest.approx([1, 1, 0.25])
  quarter = found["kept 0.25"]
  assert quarter["gb_per_s"] * quarter["median_s"] == pytest.approx(
    1.5 * 4 * 16 * 40 / 1e9
  )
  assert found["dense"]["of_dense"] == pytest.approx(1)
