"""`tokjax claim`: repeats the experiment that backs a statement of ours.

A claim is a file of `configs/claims/` with `get_config(data)`; its docstring
records the last run: command, device, date and numbers.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable

from tokjax.cli import evaluate
from tokjax.eval.comparison import Measured

__all__ = ["Claim", "load", "main"]

# A checkout has them beside the package.
_FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "claims"


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement about published systems and how to test it.

  Attributes:
    statement: what should hold, one sentence.
    runs: what to measure, one after the other.
    margin: takes the rows of one run by method name; how far the statement
      holds there, in the unit of the metric: it holds when not negative.
  """

  statement: str
  runs: tuple[evaluate.EvaluateConfig, ...]
  margin: Callable[[dict[str, Measured]], float]


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
    encoded = evaluate.encode(config, progress=not options.json)
    rows = {row.name: row for row in evaluate.measure(config, encoded)}
    margin = claim.margin(rows)
    holds &= margin >= 0
    metrics = {name: row.metrics for name, row in rows.items()}
    if options.json:
      record = {"dataset": config.dataset, "margin": margin, "metrics": metrics}
      print(json.dumps(record))
    else:
      evaluate.print_table(list(rows.values()), config.dataset)
      verdict = "holds" if margin >= 0 else "does not hold"
      print(f"{verdict}, margin {margin:+.4f}")
  return 0 if holds else 1
