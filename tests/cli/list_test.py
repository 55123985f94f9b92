"""The catalogue as people see it."""

import json

from tokjax.cli import list as catalogue


def test_area_filter(capsys):
  assert catalogue.main(["--area", "retrieval", "--json"]) == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert {row["area"] for row in rows} == {"retrieval"}
  assert {"ColBERT", "MUVERA", "XTR"} <= {row["name"] for row in rows}


def test_states_split_the_catalogue(capsys):
  counts = []
  for state in ("available", "planned"):
    catalogue.main(["--state", state, "--json"])
    counts.append(len(capsys.readouterr().out.splitlines()))
  assert sum(counts) == 58 and min(counts) > 0


def test_planned_system_has_no_file():
  row = catalogue.System("X", "ops", "ops/no_such_file.py", 2020, "A title")
  assert row.state == "planned"


def test_partial_system_says_what_is_missing():
  row = catalogue.System("X", "ops", "__init__.py", 2020, "T", "training")
  assert row.state == "available, without training"


def test_markdown_has_one_line_a_system():
  lines = catalogue.markdown_table(catalogue.systems()).splitlines()
  assert len(lines) == 58 + 2 and all(line.count("|") == 5 for line in lines)
