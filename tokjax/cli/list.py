"""`tokjax list`: the published systems, and which of them exist here."""

import argparse
import csv
import dataclasses
import json
import pathlib

__all__ = ["System", "main", "markdown_table", "systems"]

_PACKAGE = pathlib.Path(__file__).parents[1]
_TABLE = pathlib.Path(__file__).with_name("catalogue.tsv")


@dataclasses.dataclass(frozen=True)
class System:
  """One published system.

  Attributes:
    name: what people call it.
    area: package of tokjax it belongs to.
    file: where it stands, or will stand, below `tokjax/`.
    year: of the first public version.
    paper: title.
    missing: what of an available system is not there yet; empty for nothing.
  """

  name: str
  area: str
  file: str
  year: int
  paper: str
  missing: str = ""

  @property
  def state(self) -> str:
    """ "planned", "available", or "available, without ..."."""
    if not (_PACKAGE / self.file).is_file():
      return "planned"
    return "available" + (f", without {self.missing}" if self.missing else "")


def systems() -> list[System]:
  """The catalogue of published systems, by area.

  Example:
    >>> len(systems())
    58
  """
  with _TABLE.open(newline="", encoding="utf-8") as table:
    rows = csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [System(**{**row, "year": int(row["year"])}) for row in rows]


def markdown_table(rows: list[System]) -> str:
  """The table of the README: one line a system, available ones first."""
  lines = ["| system | file | state | paper |", "|---|---|---|---|"]
  for row in sorted(rows, key=lambda row: row.state == "planned"):
    file = f"`tokjax/{row.file}`"
    lines.append(
      f"| {row.name} | {file} | {row.state} | {row.paper} ({row.year}) |"
    )
  return "\n".join(lines)


def main(argv: list[str]) -> int:
  """Prints the catalogue; see `tokjax list --help`."""
  parser = argparse.ArgumentParser(
    prog="tokjax list", description="The published systems and their state."
  )
  everything = systems()
  areas = sorted({row.area for row in everything})
  parser.add_argument("--area", choices=areas, help="only this area")
  parser.add_argument("--state", choices=["available", "planned"])
  form = parser.add_mutually_exclusive_group()
  form.add_argument("--json", action="store_true", help="one object a line")
  form.add_argument(
    "--markdown", action="store_true", help="the table of the README"
  )
  options = parser.parse_args(argv)
  rows = [
    row
    for row in everything
    if options.area in (None, row.area)
    and (options.state is None or row.state.startswith(options.state))
  ]
  if options.json:
    for row in rows:
      print(json.dumps({**dataclasses.asdict(row), "state": row.state}))
  elif options.markdown:
    print(markdown_table(rows))
  else:
    for row in rows:
      print(f"{row.name:<30} {row.area:<11} {row.year}  {row.state}")
  return 0
