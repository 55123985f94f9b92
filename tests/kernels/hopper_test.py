"""Which GPUs the Mosaic kernels are for."""

import types

import jax
import pytest

from tokjax.kernels import hopper


@pytest.mark.parametrize(
  ("kind", "want"),
  [("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100", False), (None, False)],
)
def test_the_mesh_says_what_its_devices_are(kind, want, monkeypatch):
  device = None if kind is None else types.SimpleNamespace(device_kind=kind)
  mesh = types.SimpleNamespace(abstract_device=device)
  monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
  assert hopper.on_hopper() is want
