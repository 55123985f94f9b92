"""The comparison of BiFormer: equal FLOPs, and a network that learns."""

import numpy as np
import pytest

from tokjax.benchmarks import biformer
from tokjax.models import biformer_shapes
from tokjax.models.biformer import BiFormerConfig

TINY = BiFormerConfig(
  widths=(8,),
  depths=(1,),
  attention=("routing",),
  num_regions=(2,),
  top_k=(2,),
  head_dim=4,
  position_size=0,
  lepe_size=1,
  num_outputs=10,
)


def test_networks_cost_the_same():
  routing, window, full = (
    biformer_shapes.flops(biformer.network(name), 32)
    for name in biformer.NETWORKS
  )
  assert 0.99 * routing < window < 1.01 * routing
  assert routing < full < 1.1 * routing  # what is to be beaten has no less
  with pytest.raises(ValueError, match="name must be one of 'routing'"):
    biformer.network("global")


def test_a_tiny_network_learns_colours(tmp_path):
  """Ten flat colours with noise, one a class."""
  random = np.random.default_rng(0)
  colours = np.array([*np.ndindex(2, 2, 2), (0.5, 0.5, 0.5), (0, 0.5, 1)])
  arrays = {}
  for name, count in (("train", 160), ("test", 40)):
    labels = np.arange(count) % 10
    noise = random.normal(0, 10, (count, 32, 32, 3))
    x = 40 + 170 * colours[labels][:, None, None] + noise
    x = np.clip(x, 0, 255).astype(np.uint8)
    arrays |= {f"{name}_x": x, f"{name}_y": labels}
  np.savez(tmp_path / "cifar10.npz", **arrays)
  run = biformer.BiFormerRun(
    str(tmp_path), num_steps=60, batch_size=32, learning_rate=1e-2
  )
  trained = biformer.train(run, TINY, progress=False)
  assert trained.metrics["accuracy"] > 0.6
