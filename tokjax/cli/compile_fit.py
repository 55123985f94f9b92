"""Compiles one program for devices that are not there, and says if it fits.

Memory is the compiler's account of one device. The time is a lower bound from
the data sheet, `parallel.data_sheets`, and no forecast.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from tokjax.parallel import data_sheets, topologies

__all__ = ["HEADER", "compile_row", "line"]

HEADER = (
  f"{'topology':<13} {'program':<20} {'devices':>7} {'compile':>8}"
  f" {'arguments':>9} {'results':>8} {'in place':>8} {'temporary':>9}"
  f" {'together':>8} {'memory':>7} {'at least, estimated':>24}"
  "  kernels and collectives\n"
  f"{'':<50}{'s':>1} {'GB':>9} {'GB':>8} {'GB':>8} {'GB':>9} {'GB':>8}"
  f" {'GB':>7}"
)


def compile_row(
  function: Callable[..., Any],
  args: Sequence[Any],
  *,
  topology: str,
  devices: Sequence[Any],
  bound: data_sheets.Bound | None,
  unit: str,
  **facts: Any,
) -> dict[str, Any]:
  """Compiles, and makes one row for `line` or JSON.

  Args:
    function: as in `topologies.compile_for`.
    args: the same.
    topology: name of the devices.
    devices: from `topologies.devices_of`.
    bound: lower bound of the time of one `unit`; None if it is not known.
    unit: what the bound is for, "step" or "query".
    **facts: what else the row shall say; `program` is its name.

  Returns:
    The facts and `state`: "compiled", "does not fit: ..." or "refused: ...".
    If compiled, also all of a `CompileReport` but the text, `total_bytes`,
    `memory_bytes` of the device and `bound_ms`.
  """
  row: dict[str, Any] = {
    "topology": topology,
    "devices": len(devices),
    **facts,
    "unit": unit,
    "bound_ms": bound and {k: 1e3 * s for k, s in bound._asdict().items()},
  }
  try:
    report = topologies.compile_for(function, args, devices=devices)
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    said = str(error).splitlines()[0][:300]
    full = "RESOURCE_EXHAUSTED" in said
    return {**row, "state": f"{'does not fit' if full else 'refused'}: {said}"}
  measured = report._asdict()
  del measured["text"]
  row |= {**measured, "total_bytes": report.total_bytes}
  sheet = data_sheets.find(topology)
  row["memory_bytes"] = sheet and sheet.memory_bytes
  if sheet and report.total_bytes > sheet.memory_bytes:
    needs, has = report.total_bytes / 1e9, sheet.memory_bytes / 1e9
    return {**row, "state": f"does not fit: {needs:.2f} of {has:.2f} GB"}
  return {**row, "state": "compiled"}


def line(row: dict[str, Any]) -> str:
  """A row as a line under `HEADER`.

  Args:
    row: from `compile_row`.
  """
  start = f"{row['topology']:<13} {row['program']:<20} {row['devices']:>7}"
  if row["state"] != "compiled":
    return f"{start} {row['state']}"

  def giga(name):
    return "-" if row[name] is None else f"{row[name] / 1e9:.2f}"

  bound = "-"
  if row["bound_ms"]:
    what, longest = max(row["bound_ms"].items(), key=lambda item: item[1])
    bound = f"{longest:.3g} ms/{row['unit']} ({what})"
  counts = {**row["kernels"], **row["collectives"]}
  return (
    f"{start} {row['seconds']:>8.1f} {giga('argument_bytes'):>9}"
    f" {giga('output_bytes'):>8} {giga('alias_bytes'):>8}"
    f" {giga('temp_bytes'):>9} {giga('total_bytes'):>8}"
    f" {giga('memory_bytes'):>7} {bound:>24}  "
    + " ".join(f"{name} x{count}" for name, count in counts.items())
  )
