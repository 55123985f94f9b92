"""Spread experts built by the GPU compiler for H100s that are not there.

Runs in a process of its own, with the `aot` extra installed:

    pytest -m compile_gpu tests/parallel/moe_folding_compile_gpu_test.py
"""

import pytest

from tests.parallel import moe_layers
from tokjax.parallel.moe_mesh import make_folded_mesh
from tokjax.parallel.moe_weights import MoeConfig

pytestmark = pytest.mark.compile_gpu


@pytest.mark.parametrize(
  ("exchange", "experts", "collective"),
  [
    ("ragged", dict(ep=2, etp=2), "ragged-all-to-all"),
    ("capacity", dict(ep=4), "all-to-all"),
  ],
)
def test_a_training_step_compiles(h100s, exchange, experts, collective):
  config = MoeConfig(8, 2, exchange=exchange, capacity_factor=1.0)
  folded = make_folded_mesh(dict(cp=2, tp=2), experts, devices=h100s)
  text = moe_layers.compiled_gradient(config, folded)
  assert f" {collective}(" in text or f" {collective}-start(" in text
