"""Compiling programs for accelerators that are not attached.

The TPU compiler (libtpu) and the GPU compiler (the CUDA plugin with ptxas)
run on any Linux x86-64 machine. Given a description of the hardware they
build the very program a device would run, so that a kernel or a sharded step
can be shown to compile, and its memory be read, without owning a chip.

Both read settings from the environment when they start: set what
`environment` returns before jax is imported. `tokjax compile` does so.
"""

import collections
import importlib.util
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from tokjax.checks import one_of

__all__ = [
  "CompileReport",
  "compile_for",
  "devices_of",
  "environment",
  "h100_topology",
  "tpu_topology",
]

_TPU_ENVIRONMENT = {
  # Without a chip jax must not try to start one.
  "JAX_PLATFORMS": "cpu",
  # Three settings that keep libtpu from asking a metadata server where it
  # runs. The topology that is compiled for is the one asked for.
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  # Two compiles at once share no chip, so they need no lock.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# A program found in a cache would be compiled by nobody.
_NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "0"}

_INSTALL = 'pip install -e ".[aot]"'

# XLA's description of an H100 SXM with 80 GB, as its own tools print it.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
)

# Custom calls in form only: buffers, annotations, starts of copies.
_NO_KERNELS = (
  "AllocateBuffer",
  "AssumeGatherIndicesInBound",
  "AsyncCollectiveDone",
  "AsyncCollectiveStart",
  "ConcatBitcast",
  "GatherScatterIndicesBitpacked",
  "PrepareAsyncCallDone",
  "PrepareAsyncCallStart",
)


class CompileReport(NamedTuple):
  """What a compiler said about one program, per device.

  Attributes:
    seconds: wall time of tracing, lowering and compiling.
    argument_bytes: device memory of the arguments.
    output_bytes: device memory of the results.
    alias_bytes: of these, what takes the place of arguments given away
      (`donate_argnums`).
    temp_bytes: device memory in between, copies to other layouts included.
    on_chip_bytes: most vector memory a kernel uses; None where the compiler
      does not say.
    flops: as XLA counts them, a kernel what it declares and the body of a
      loop once; None where the compiler does not say.
    bytes_accessed: likewise.
    kernels: names of the custom calls, with how often each occurs.
    collectives: communication operations, with how often each occurs in the
      program; one in a loop runs more often.
    text: the optimised program.
  """

  seconds: float
  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  temp_bytes: int
  on_chip_bytes: int | None
  flops: float | None
  bytes_accessed: float | None
  kernels: Mapping[str, int]
  collectives: Mapping[str, int]
  text: str

  @property
  def total_bytes(self) -> int:
    """Device memory of everything together."""
    results = self.output_bytes - self.alias_bytes
    return self.argument_bytes + results + self.temp_bytes


def environment(platform: str) -> dict[str, str]:
  """Environment variables to set before jax is imported.

  Args:
    platform: "tpu" or "cuda", the compiler that is going to be used.

  Returns:
    Names and values. An XLA_FLAGS already set is kept and added to.

  Raises:
    ValueError: if the platform is another.
    FileNotFoundError: for "cuda", if there is no ptxas.

  Example:
    >>> environment("tpu")["JAX_PLATFORMS"]
    'cpu'
  """
  one_of(("tpu", "cuda"), platform=platform)
  if platform == "tpu":
    return _TPU_ENVIRONMENT | _NO_CACHE
  flags = (
    os.environ.get("XLA_FLAGS", ""),
    f"--xla_gpu_cuda_data_dir={_cuda_root()}",
    "--xla_gpu_autotune_level=0",  # there is nothing to time on
  )
  return {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no driver to check
    "XLA_FLAGS": " ".join(flags).strip(),
  } | _NO_CACHE


def tpu_topology(name: str) -> Sequence[Any]:
  """Devices of a TPU slice, good for compiling only.

  Args:
    name: generation and shape, such as "v5e:2x2", "v6e:2x2", "v5p:2x2x1" or
      "tpu7x:2x2x1"; larger ones such as "v5e:16x16" too.

  Returns:
    The devices, for a mesh or a `SingleDeviceSharding`. A chip of v7x shows
    as two.

  Raises:
    ModuleNotFoundError: if libtpu is not installed.
    ValueError: if libtpu does not know the name.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError(
      f"compiling for TPU needs libtpu, which is not installed: {_INSTALL}"
    )
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=name)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"libtpu has no topology {name!r}: {error}") from error
  return found.devices


def h100_topology(num_devices: int = 1) -> Sequence[Any]:
  """H100 (SXM, 80 GB) of one host, good for compiling only.

  Args:
    num_devices: how many.

  Returns:
    The devices.

  Raises:
    ModuleNotFoundError: if the CUDA plugin is not installed.
  """
  if importlib.util.find_spec("jax_cuda13_plugin") is None:
    raise ModuleNotFoundError(
      "compiling for H100 needs jax-cuda13-plugin and jax-cuda13-pjrt, which"
      f" are not installed: {_INSTALL}"
    )
  return topologies.get_topology_desc(
    platform="cuda",
    topology_name="",
    target_config=_H100,
    topology=f"1x1x{num_devices}",  # slices, hosts, devices of a host
  ).devices


def devices_of(name: str) -> Sequence[Any]:
  """Devices of a topology by its name, TPU or H100.

  Args:
    name: "h100", "h100:8" for eight of one host, or as in `tpu_topology`.

  Returns:
    The devices.

  Raises:
    ModuleNotFoundError: if the compiler is not installed.
    ValueError: if the name is not known.
  """
  kind, _, count = name.partition(":")
  if kind != "h100":
    return tpu_topology(name)
  if count and not (count.isdecimal() and int(count)):
    raise ValueError(f"topology must be 'h100' or 'h100:8', got {name!r}")
  return h100_topology(int(count or 1))


def compile_for(
  function: Callable[..., Any],
  args: Sequence[Any],
  *,
  devices: Sequence[Any],
) -> CompileReport:
  """Compiles a function for devices that are not there, and reads the result.

  Args:
    function: what to compile. It is wrapped in `jax.jit` if it is not yet.
    args: its arguments as `jax.ShapeDtypeStruct` (or pytrees of them). Those
      without a sharding are placed on the first device.
    devices: from `tpu_topology` or `h100_topology`.

  Returns:
    The compiler's account.

  Raises:
    jax.errors.JaxRuntimeError: with the compiler's words, if it refuses.
  """
  alone = jax.sharding.SingleDeviceSharding(devices[0])

  def place(x):
    if x.sharding is not None:
      return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone)

  start = time.perf_counter()
  jitted = function if hasattr(function, "lower") else jax.jit(function)
  compiled = jitted.lower(*jax.tree.map(place, args)).compile()
  seconds = time.perf_counter() - start

  text = compiled.as_text()
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis() or {}
  return CompileReport(
    seconds=seconds,
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    on_chip_bytes=_on_chip_bytes(text),
    flops=cost.get("flops"),
    bytes_accessed=cost.get("bytes accessed"),
    kernels=_kernels(text),
    collectives=_collectives(text),
    text=text,
  )


def _kernels(text):
  found = collections.Counter()
  for line in text.splitlines():
    call = re.search(
      r'%([\w\-]+?)(?:\.\d+)* = .*custom_call_target="(\w+)"', line
    )
    if call:
      name, target = call.groups()
      # On TPU the instruction bears the kernel's name; elsewhere the target
      # says most.
      found[name if target == "tpu_custom_call" else target] += 1
  return {name: n for name, n in found.items() if name not in _NO_KERNELS}


def _collectives(text):
  # An asynchronous operation is a pair, "-start" and "-done": count the first.
  pattern = re.compile(
    rf"(%\S+) = (\S.*?) ({'|'.join(_COLLECTIVES)})(?:-start)?\("
  )
  found = set()
  for line in text.splitlines():
    operation = pattern.search(line)
    if operation:
      name, result, kind = operation.groups()
      channel = re.search(r"channel_id=\d+", line)
      origin = re.search(r"metadata=\{.*?\}", line)
      # One that runs beside other work is written once for each part of that
      # work, always with the same result, channel and origin.
      origin = origin.group() if origin else name
      found.add((kind, result, channel and channel.group(), origin))
  return dict(sorted(collections.Counter(kind for kind, *_ in found).items()))


def _on_chip_bytes(text):
  sizes = []
  for line in text.splitlines():
    if 'custom_call_target="tpu_custom_call"' in line:
      used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line)
      if used:
        sizes += map(int, re.findall(r'"size":"(\d+)"', used.group(1)))
  return max(sizes, default=None)


def _cuda_root():
  """Folder of a CUDA compiler: bin/ptxas, and libdevice where there is one."""
  roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
  on_path = shutil.which("ptxas")
  if on_path:
    roots.append(pathlib.Path(on_path).resolve().parents[1])
  package = importlib.util.find_spec("nvidia")  # PyPI: nvidia-cuda-nvcc
  for folder in package.submodule_search_locations or () if package else ():
    roots += sorted(pathlib.Path(folder).iterdir())
  roots.append("/usr/local/cuda")  # where the installer puts it
  found = [pathlib.Path(root) for root in roots if root]
  found = [root for root in found if (root / "bin" / "ptxas").exists()]
  if not found:
    raise FileNotFoundError(
      "compiling for H100 needs ptxas: install the CUDA 13 compiler and put"
      " it on PATH (or set CUDA_HOME), or pip install nvidia-cuda-nvcc"
    )
  # bin/ptxas alone may be a wrapper on PATH; a whole toolkit is better.
  whole = [root for root in found if (root / "nvvm" / "libdevice").exists()]
  return (whole or found)[0]
