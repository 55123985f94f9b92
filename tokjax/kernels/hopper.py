"""Whether the program being traced is meant for Hopper GPUs."""

import jax

__all__ = ["on_hopper"]

# GPUs whose matrix instructions the Mosaic GPU kernels are written for. Later
# generations have others.
_NAMES = ("H100", "H200", "H800", "H20", "GH200")


def on_hopper() -> bool:
  """True where the mesh of `jax.set_mesh` says that its devices are Hopper.

  Lowering for CUDA alone does not tell the generation.

  Example:
    >>> on_hopper()
    False
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = "" if device is None else device.device_kind
  return any(name in kind.upper().split() for name in _NAMES)
