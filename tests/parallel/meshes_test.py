"""Meshes that fit the devices, and batches cut over them."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tokjax.parallel import meshes


@pytest.mark.parametrize(
  ("sizes", "num_devices", "want"),
  [
    ({}, 8, (8, 1, 1)),
    ({}, 1, (1, 1, 1)),
    ({"fsdp": 4}, 8, (2, 4, 1)),
    ({"data": 1, "fsdp": -1, "tensor": 2}, 8, (1, 4, 2)),
    ({"data": 3, "fsdp": 2, "tensor": 1}, 6, (3, 2, 1)),
  ],
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_mesh_fits_the_devices(sizes, num_devices, want, kind):
  devices = jax.devices()[:num_devices]
  mesh = meshes.make_mesh(**sizes, devices=devices, axis_types=kind)
  assert mesh.axis_names == meshes.AXES == ("data", "fsdp", "tensor")
  assert mesh.devices.shape == want
  assert set(mesh.devices.flat) == set(devices)
  assert mesh.axis_types == (kind,) * 3


def test_last_axes_get_neighbours():
  devices = jax.devices()
  mesh = meshes.lay_out({"far": 2, "near": 4}, devices, AxisType.Explicit)
  assert mesh.axis_names == ("far", "near")
  assert mesh.devices.tolist() == [devices[:4], devices[4:]]
  assert mesh.axis_types == (AxisType.Explicit,) * 2


def test_all_devices_by_default():
  assert meshes.make_mesh().size == jax.device_count() == 8


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"fsdp": 3}, r"data=-1, fsdp=3, tensor=1 needs a multiple of 3 .* got 8"),
    ({"data": 2, "tensor": 2}, r"data=2, fsdp=1, tensor=2 needs 4 .* got 8"),
    ({"data": 16}, r"needs 16 devices, got 8"),
    ({"fsdp": -1}, r"one mesh size may be -1, got data=-1, fsdp=-1"),
    ({"tensor": 0}, r"must be positive or -1, got .*tensor=0"),
  ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
  with pytest.raises(ValueError, match=message):
    meshes.make_mesh(**sizes)


@pytest.mark.parametrize(
  ("sizes", "rows_per_device"),
  [({"fsdp": 4}, 1), ({"fsdp": 2, "tensor": 2}, 2), ({"tensor": 8}, 8)],
)
def test_rows_are_cut_over_data_and_fsdp_in_order(sizes, rows_per_device):
  mesh = meshes.make_mesh(**sizes)
  batch = {"ids": np.arange(24).reshape(8, 3), "weight": np.ones(8)}
  got = meshes.shard_batch(batch, mesh)
  np.testing.assert_array_equal(got["ids"], batch["ids"])
  assert got["weight"].dtype == np.float32
  for shard in got["ids"].addressable_shards:
    assert shard.data.shape == (rows_per_device, 3)
    np.testing.assert_array_equal(shard.data, batch["ids"][shard.index])
  axes = [a for a in meshes.BATCH_AXES if mesh.shape[a] > 1]
  assert got["ids"].sharding.spec == (jax.P(tuple(axes)) if axes else jax.P())


@pytest.mark.parametrize(
  ("array", "shape"), [(np.ones((6, 2)), r"\(6, 2\)"), (np.ones(()), r"\(\)")]
)
def test_rows_that_do_not_divide_are_named(array, shape):
  mesh = meshes.make_mesh(fsdp=2)
  with pytest.raises(ValueError, match=f"'text/ids'.*multiple of 8.*{shape}"):
    meshes.shard_batch({"text": {"ids": array}}, mesh)
