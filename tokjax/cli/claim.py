"""`tokjax claim`: repeats the experiment that backs a statement of ours.

A claim is a file of `configs/claims/` with `get_config(data)`; its docstring
records the last run: command, device, date and numbers.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tokjax.cli import evaluate

__all__ = ["Claim", "evaluated", "load", "main"]

# A checkout has them beside the package.
_FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "claims"


def evaluated(
  config: evaluate.EvaluateConfig, *, progress: bool = True
) -> dict[str, Any]:
  """Rows of `tokjax evaluate` by method; what most claims measure.

  Args:
    config: one run.
    progress: show progress bars.

  Returns:
    {method: `comparison.Measured`}.
  """
  encoded = evaluate.encode(config, progress=progress)
  return {row.name: row for row in evaluate.measure(config, encoded)}


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement about published systems and how to test it.

  Attributes:
    statement: what should hold, one sentence.
    runs: what to measure, one after the other.
    margin: takes the rows of one run by name; how far the statement holds
      there, in the unit of the metric: it holds when positive.
    measure: `measure(run, progress=)` gives the rows of a run; a row has
      `metrics`, and `bytes_per_document` where it is about an index.
  """

  statement: str
  runs: tuple[Any, ...]
  margin: Callable[[Mapping[str, Any]], float]
  measure: Callable[..., Mapping[str, Any]] = evaluated


def load(name: str, data: str, folder: pathlib.Path = _FOLDER) -> Claim:
  """Reads a claim.

  Args:
    name: file name in the folder, without `.py`.
    data: folder of data sets, which the claim names by their folders.
    folder: where claims are.

  Returns:
    What its `get_config(data)` gives.

  Raises:
    ValueError: if there is no such claim; lists those there are.
  """
  path = folder / f"{name}.py"
  if not path.is_file():
    known = ", ".join(sorted(p.stem for p in folder.glob("*.py"))) or "none"
    raise ValueError(f"no claim {name!r} in {folder}; there are: {known}")
  spec = importlib.util.spec_from_file_location(f"claim_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(data)


def main(argv: list[str]) -> int:
  """Runs a claim; see `tokjax claim --help`."""
  parser = argparse.ArgumentParser(
    prog="tokjax claim",
    description="Repeats the experiment behind a statement, in a checkout."
    " Exit code 0 if the statement holds in every run, 1 if not.",
  )
  parser.add_argument("name", help="a file of configs/claims, without .py")
  parser.add_argument("--data", required=True, help="folder of the data sets")
  parser.add_argument(
    "--claims", default=str(_FOLDER), help="folder of the claims"
  )
  parser.add_argument("--json", action="store_true", help="one object a run")
  options = parser.parse_args(argv)
  claim = load(options.name, options.data, pathlib.Path(options.claims))
  if not options.json:
    print(claim.statement)
  holds = True
  for config in claim.runs:
    rows = claim.measure(config, progress=not options.json)
    margin = claim.margin(rows)
    holds &= margin > 0
    metrics = {name: row.metrics for name, row in rows.items()}
    if options.json:
      record = {"dataset": config.dataset, "margin": margin, "metrics": metrics}
      if hasattr(config, "seed"):
        record["seed"] = config.seed
      print(json.dumps(record))
    else:
      _print_rows(rows, config.dataset)
      verdict = "holds" if margin > 0 else "does not hold"
      print(f"{verdict}, margin {margin:+.4f}")
  return 0 if holds else 1


def _print_rows(rows, title):
  names = list(dict.fromkeys(x for row in rows.values() for x in row.metrics))
  indexed = hasattr(next(iter(rows.values())), "bytes_per_document")
  table = Table("", *names, *["bytes/doc"] * indexed, title=title)
  for name, row in rows.items():
    numbers = [
      f"{row.metrics[metric]:.4f}" if metric in row.metrics else ""
      for metric in names
    ]
    if indexed:
      numbers.append(f"{row.bytes_per_document:,.0f}")
    table.add_row(name, *numbers)
  Console().print(table)
