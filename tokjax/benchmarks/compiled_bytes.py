"""What a program for several devices sends, read from its compiled text.

    devices = cpu_devices(8)                      # before anything else in jax
    text = jax.jit(f).lower(...).compile().as_text()
    sends(text)                # [(7, 12288), (7, 12288), ...]: hops and bytes
    results(text)              # {"all-to-all": 24576, ...}

Nothing is run, so that shapes may be larger than this machine. Only float32 is
counted: the compiler for CPU widens other floats before it sends them.
"""

import contextlib
import math
import re

import jax

__all__ = ["cpu_devices", "results", "sends"]

_GROUPED = ("all-to-all", "all-gather", "reduce-scatter")


def cpu_devices(count: int) -> list[jax.Device]:
  """That many CPU devices, made if nothing of jax has run yet.

  Args:
    count: how many.

  Returns:
    The first so many.

  Raises:
    ValueError: if there are fewer, and it is too late to make more.

  Example:
    >>> [device.platform for device in cpu_devices(1)]
    ['cpu']
  """
  if jax.config.jax_num_cpu_devices < count:
    with contextlib.suppress(RuntimeError):  # devices are there already
      jax.config.update("jax_num_cpu_devices", count)
  found = jax.devices("cpu")
  if len(found) < count:
    raise ValueError(
      f"needs {count} CPU devices, got {len(found)}; set JAX_NUM_CPU_DEVICES"
    )
  return found[:count]


def sends(text: str) -> list[tuple[int, int]]:
  """The collective-permutes of a program in which all devices send alike.

  Args:
    text: of the compiled program.

  Returns:
    How many devices ahead and how many bytes a device sends, of each.

  Raises:
    ValueError: if devices send over different distances.

  Example:
    >>> sends("%x = f32[2,3]{1,0} collective-permute(%y), channel_id=1, "
    ...       "source_target_pairs={{0,3},{1,0},{2,1},{3,2}}")
    [(3, 24)]
  """
  found = []
  pattern = r"f32\[([\d,]*)\]\S* collective-permute\(.*?pairs=\{(.*?)\}\}"
  for shape, pairs in re.findall(pattern, text):
    pairs = re.findall(r"(\d+),(\d+)", pairs)
    distances = {(int(to) - int(of)) % len(pairs) for of, to in pairs}
    if len(distances) != 1:
      raise ValueError(f"devices must send alike, got distances {distances}")
    found.append((distances.pop(), _bytes(shape)))
  return found


def results(text: str) -> dict[str, int]:
  """Bytes of the results of collectives among groups of devices.

  Args:
    text: of the compiled program.

  Returns:
    By name: "all-to-all", "all-gather" and "reduce-scatter".

  Example:
    >>> text = "%x = (f32[2]{0}, f32[2]{0}) all-to-all(%y, %z), channel_id=1"
    >>> results(text)
    {'all-to-all': 16, 'all-gather': 0, 'reduce-scatter': 0}
  """
  found = dict.fromkeys(_GROUPED, 0)
  pattern = rf"= (.*?) ({'|'.join(_GROUPED)})\("
  for shapes, name in re.findall(pattern, text):
    found[name] += sum(map(_bytes, re.findall(r"f32\[([\d,]*)\]", shapes)))
  return found


def _bytes(shape):
  return 4 * math.prod(int(n) for n in shape.split(",") if n)
