"""Side-by-side timing: candidates take turns and meet the same noise."""

import datetime
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

__all__ = [
  "compare",
  "gemm_candidate",
  "gemm_rate",
  "print_rows",
  "row",
  "write_rows",
]

_PACKAGES = (
  "tokjax",
  "jax",
  "jaxlib",
  "numpy",
  "torch",
  "pylate",
  "maxsim-cpu",
)


def compare(
  candidates: Mapping[str, Callable[[], Any]], *, repeats: int = 20
) -> dict[str, dict[str, float]]:
  """Times functions in turns within one process.

  Each is called once to compile and once more to warm up; then, `repeats`
  times, all of them run once, one after the other. A disturbance of the
  machine thus falls on all candidates alike.

  Args:
    candidates: functions without arguments, by name. JAX results are waited
      for.
    repeats: timed calls of each.

  Returns:
    Per name `first_s` (first call, with compilation), `median_s`, and the
    spread as `low_s` and `high_s` (10th and 90th percentile).

  Example:
    >>> times = compare({"nothing": lambda: None}, repeats=3)
    >>> sorted(times["nothing"])
    ['first_s', 'high_s', 'low_s', 'median_s']
  """
  first = {}
  for name, function in candidates.items():
    first[name] = _seconds(function)
    _seconds(function)
  taken = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, function in candidates.items():
      taken[name].append(_seconds(function))
  return {
    name: {
      "first_s": first[name],
      "median_s": float(np.median(times)),
      "low_s": float(np.percentile(times, 10)),
      "high_s": float(np.percentile(times, 90)),
    }
    for name, times in taken.items()
  }


def _seconds(function: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def gemm_rate(*, size: int = 2048, repeats: int = 10) -> float:
  """float32 matrix-product rate of this machine, in FLOPs per second.

  Args:
    size: side of the square matrices.
    repeats: timed products; the median counts.

  Returns:
    FLOPs per second of the default device, float32 accuracy.
  """
  product = gemm_candidate(size)
  times = compare({"gemm": product}, repeats=repeats)
  return 2 * size**3 / times["gemm"]["median_s"]


def gemm_candidate(size: int = 2048) -> Callable[[], Any]:
  """A function for `compare` that multiplies two float32 matrices.

  Args:
    size: side of the square matrices; one call is 2 * size**3 FLOPs.

  Returns:
    The function.
  """
  matrix = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
  return lambda: product(matrix)


def row(
  operation: str,
  implementation: str,
  shape: Mapping[str, int],
  dtype: str,
  times: Mapping[str, float],
  **more: Any,
) -> dict[str, Any]:
  """One line of a benchmark, with what it takes to repeat it.

  Args:
    operation: what was computed.
    implementation: who computed it.
    shape: named sizes.
    dtype: element type of the inputs.
    times: as returned by `compare`.
    **more: further numbers, such as rates.

  Returns:
    A dictionary of JSON values.
  """
  return {
    "operation": operation,
    "implementation": implementation,
    "shape": dict(shape),
    "dtype": dtype,
    **times,
    **more,
    "device_kind": jax.devices()[0].device_kind,
    "versions": _versions(),
    "date": datetime.date.today().isoformat(),
  }


def _versions() -> dict[str, str]:
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # not part of this comparison
  return found


def write_rows(rows: list[dict[str, Any]], path: str | pathlib.Path) -> None:
  """Appends rows to a file, one JSON object per line.

  Args:
    rows: as made by `row`.
    path: file to append to.
  """
  with open(path, "a", encoding="utf-8") as file:
    for line in rows:
      file.write(json.dumps(line) + "\n")


def print_rows(rows: list[dict[str, Any]], columns: list[str]) -> None:
  """Prints a table of rows.

  Args:
    rows: as made by `row`.
    columns: keys to show; floats are shown with three digits.
  """
  table = Table(*columns)
  for line in rows:
    table.add_row(*(_text(line.get(column, "")) for column in columns))
  Console(width=120).print(table)


def _text(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
  return str(value)
