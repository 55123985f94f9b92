"""The Mosaic GPU interpreter, which runs Hopper kernels on CPU."""

import jax
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu import primitives as mosaic_primitives
from jax._src.pallas.mosaic_gpu.interpret import (
  gpu_callbacks,
  interpret_pallas_call,
  jaxpr_interpret,
  params,
  shared_memory,
)
from jax._src.state import indexing
from jax._src.state import primitives as state_primitives
from jax._src.state import types as state_types


def _kept(transforms):
  """Only the indexing: the interpreter stores arrays in their logical shape."""
  return tuple(t for t in transforms if isinstance(t, indexing.NDIndexer))


def _wgmma(**given):
  """The interpreter's product, for operands that are turned or in registers."""
  shared = gpu_callbacks._get_shared_memory()
  device, thread = int(given["device_id"]), int(given["thread_id"])
  caller = shared.get_global_thread_id(device, thread)
  info = gpu_callbacks.interpret_utils.GPULoggingInfo(
    device_id=device,
    grid_point_coords=tuple(int(x) for x in given["grid_point_coords"]),
    thread_id=thread,
    source_info=given["source_info"],
  )

  def place(name):
    key = gpu_callbacks.HostAllocationKey.from_array(
      given[f"{name}_allocation_key_as_array"]
    )
    transforms = jax.tree.map(int, _kept(given[f"{name}_transforms"]))
    return key, gpu_callbacks.interpret_utils.to_range(transforms)

  def read(name):
    held = np.asarray(given[f"{name}_allocation_key_as_array"])
    if held.ndim == 2:  # registers
      return held.astype(np.float32)
    value, _, _ = shared.get_buffer_content(
      *place(name), caller, logging_info=info
    )
    assert value is not None, f"{name} is read out of bounds"
    turned = any(
      isinstance(t, state_types.TransposeTransform)
      for t in given[f"{name}_transforms"]
    )
    value = np.asarray(value, np.float32)
    return value.T if turned else value

  product = read("acc") + read("a") @ read("b")
  shared.store_buffer_content(*place("acc"), product, caller, logging_info=info)
  return given["token"]


def _as_get(eqn):
  """`plgpu.load` is a read that may be slow; the interpreter knows reads."""
  if eqn.primitive is not mosaic_primitives.load_p:
    return eqn
  return eqn.replace(
    primitive=state_primitives.get_p, params={"tree": eqn.params["tree"]}
  )


@pytest.fixture
def interpreter(monkeypatch):
  """Settings of the interpreter, taught the things it lacks here."""
  mlir.register_lowering(
    mosaic_core.layout_cast_p, lambda ctx, x, *, new_layout: [x]
  )
  monkeypatch.setattr(gpu_callbacks, "_remove_noop_transforms", _kept)
  monkeypatch.setattr(gpu_callbacks, "wgmma", _wgmma)
  store = shared_memory.GPUSharedMemory.store_buffer_content

  def store_inside(self, key, place, value, caller, **rest):
    """Leaves out what lies past the end of the array, as the device does."""
    _, (shape, _), _ = self.get_buffer_content(key, place, caller)
    clipped = [
      slice(part.start, min(part.stop, size))
      if isinstance(part, slice)
      else part
      for part, size in zip(place, shape, strict=False)
    ]
    inside = [
      slice(part.stop - part.start)
      for part in clipped
      if isinstance(part, slice)
    ]
    return store(
      self, key, tuple(clipped), value[tuple(inside)], caller, **rest
    )

  monkeypatch.setattr(
    shared_memory.GPUSharedMemory, "store_buffer_content", store_inside
  )
  interpret = jaxpr_interpret.JaxprInterpreter.interpret

  def interpret_loads(self, jaxpr, token, *args):
    jaxpr = jaxpr.replace(eqns=[_as_get(eqn) for eqn in jaxpr.eqns])
    return interpret(self, jaxpr, token, *args)

  monkeypatch.setattr(
    jaxpr_interpret.JaxprInterpreter, "interpret", interpret_loads
  )
  interpret_pallas_call.reset_gpu_interpret_mode_state()
  # Rows past the end of a document read as NaN here, as zero on the device.
  return params.InterpretGPUParams(
    uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
  )
