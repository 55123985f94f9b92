"""The page is self-contained, escaped, and says what it was given."""

import dataclasses
import html.parser
import re

import pytest

from tokjax.cli import report


def example() -> report.Report:
  metrics = {"nDCG@10": 0.5, "R@100": 0.75}
  spans = [report.Span("a wing <b>"), report.Span("lift", 0.8, "lifting")]
  return report.Report(
    title="Search & rescue",
    facts={"corpus": "three <documents>"},
    methods=[
      report.Method("BM25", metrics, 10.0, 0.1, note="words"),
      report.Method("MaxSim", {**metrics, "nDCG@10": 0.625}, 12_345.0, 2.0),
    ],
    answers=[report.Answer("what lifts?", [("d1", 1.25, spans)])],
  )


class Balance(html.parser.HTMLParser):
  """Fails on a closing tag that does not match the last opened one."""

  def __init__(self):
    super().__init__()
    self.open = []

  def handle_starttag(self, tag, attrs):
    if tag not in ("meta", "br", "link", "path", "use"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in ("meta", "br", "link", "path", "use"):
      assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained(tmp_path):
  path = report.write_report(tmp_path / "new" / "report.html", example())
  page = path.read_text(encoding="utf-8")
  balance = Balance()
  balance.feed(page)
  assert balance.open == []
  assert not re.search(r"<(script|link|img|iframe)|url\(\s*['\"]?http", page)
  assert page.count("<svg") == 2  # light and dark


def test_values_are_shown_and_escaped(tmp_path):
  page = report.write_report(tmp_path / "r.html", example()).read_text()
  assert "three &lt;documents&gt;" in page and "Search &amp; rescue" in page
  assert 'class="best">0.6250' in page and "12.3 kB" in page
  assert '<mark style="--w:0.80" title="lifting 0.80">lift</mark>' in page


def test_no_methods_is_an_error_and_leaves_no_file(tmp_path):
  empty = dataclasses.replace(example(), methods=[])
  with pytest.raises(ValueError, match="at least one method"):
    report.write_report(tmp_path / "r.html", empty)
  assert list(tmp_path.iterdir()) == []


def test_report_replaces_the_old_page_only_when_complete(tmp_path):
  path = tmp_path / "r.html"
  path.write_text("old")
  report.write_report(path, example())
  assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
  assert path.read_text().startswith("<!doctype html>")
