"""What a device can do at best, and how long a program takes at least.

Numbers of the makers' data sheets, which no program reaches: good for bounds,
not for forecasts.
"""

from typing import NamedTuple

__all__ = ["FLOAT32_PASSES", "Bound", "DataSheet", "bound", "find"]

# Passes of the matrix unit that a float32 product takes at full precision:
# six of bfloat16 on TPU; three of tf32, each half as fast, on H100.
FLOAT32_PASSES = 6


class DataSheet(NamedTuple):
  """One jax device. A chip of v7x, or of v4 as it is compiled for, is two.

  Attributes:
    flops: bfloat16 products and sums of the matrix unit, in a second.
    memory_rate: bytes a second between the device and its memory.
    memory_bytes: device memory that a program may use. On TPU what the
      compiler grants, a little less than what the chip has. On H100 all there
      is: jax takes 75% of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
    link_rate: bytes a second that come in from the other devices of a slice
      or host, over all links; half of what is called bidirectional.
  """

  flops: float
  memory_rate: float
  memory_bytes: int
  link_rate: float


class Bound(NamedTuple):
  """Lower bounds of the time of a program, in seconds.

  Attributes:
    arithmetic: products and sums, at the peak of the matrix unit.
    memory: compulsory traffic of the device memory.
    links: what must come in from other devices.
  """

  arithmetic: float
  memory: float
  links: float


_GIB = 1 << 30
_SHEETS = {
  "v4": DataSheet(275e12 / 2, 1228e9 / 2, int(15.25 * _GIB), 300e9 / 2),
  "v5e": DataSheet(197e12, 819e9, int(15.75 * _GIB), 200e9),
  "v5p": DataSheet(459e12, 2765e9, int(95.74 * _GIB), 600e9),
  "v6e": DataSheet(918e12, 1640e9, int(31.25 * _GIB), 400e9),
  "tpu7x": DataSheet(2307e12 / 2, 7380e9 / 2, int(94.75 * _GIB), 600e9 / 2),
  "h100": DataSheet(989e12, 3352e9, 84_942_979_072, 450e9),
}


def find(topology: str) -> DataSheet | None:
  """The data sheet of the devices of a topology.

  Args:
    topology: a name that `topologies.devices_of` takes.

  Returns:
    None for devices that are not known here.

  Example:
    >>> find("v5e:16x16").memory_rate
    819000000000.0
  """
  return _SHEETS.get(topology.split(":")[0])


def bound(
  sheet: DataSheet,
  *,
  flops: int | float,
  memory_bytes: int | float = 0,
  link_bytes: int | float = 0,
) -> Bound:
  """The time that the work of one device takes at least.

  The three may overlap, so the whole takes at least as long as the longest.

  Args:
    sheet: the device.
    flops: bfloat16 products and sums; a float32 product at full precision
      counts `FLOAT32_PASSES` times.
    memory_bytes: read from and written to the device memory.
    link_bytes: received from other devices.

  Returns:
    Seconds.

  Example:
    >>> print(max(bound(find("v5e:2x2"), flops=197e9, memory_bytes=819e6)))
    0.001
  """
  return Bound(
    arithmetic=flops / sheet.flops,
    memory=memory_bytes / sheet.memory_rate,
    links=link_bytes / sheet.link_rate,
  )
