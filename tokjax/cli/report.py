"""One self-contained HTML page: what was measured, and answers to look at.

No script, no font, no picture from elsewhere: it opens from a mail or a USB
stick, in light and dark, on a phone and on a wide screen.
"""

import dataclasses
import html
import io
import os
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

from tokjax import files  # noqa: E402

__all__ = ["Answer", "Method", "Report", "Span", "write_report"]


@dataclasses.dataclass(frozen=True)
class Method:
  """One row of the table: a way to search and what it reached.

  Attributes:
    name: as shown.
    metrics: metric name to value in 0..1, the same names in every row.
    bytes_per_document: what its index stores for one document.
    ms_per_query: milliseconds for one query inside a batch.
    note: what the row means, one line.
  """

  name: str
  metrics: dict[str, float]
  bytes_per_document: float
  ms_per_query: float
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Span:
  """A piece of a document's text.

  Attributes:
    text: the piece.
    weight: similarity to the query token it matched best, 0 for no match.
    match: that query token, empty for no match.
  """

  text: str
  weight: float = 0.0
  match: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
  """A question with its best documents, each cut into spans.

  Attributes:
    query: the question.
    documents: (id, score, spans) of each result, best first.
  """

  query: str
  documents: list[tuple[str, float, list[Span]]]


@dataclasses.dataclass(frozen=True)
class Report:
  """What the page shows.

  Attributes:
    title: heading of the page.
    facts: label to value: corpus, model, device, date, versions.
    methods: the rows of the table and the points of the plot.
    answers: questions to read, with the matched words marked.
  """

  title: str
  facts: dict[str, str]
  methods: list[Method]
  answers: list[Answer]


_STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --ink: #1d1f24;
  --quiet: #5c6370; --line: #dcdfe4; --mark: 37 99 195; --best: #1b5fb8; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171c;
  --ink: #e6e8ec; --quiet: #9aa3b2; --line: #333944; --mark: 96 156 245;
  --best: #8ab8ff; } .light { display: none; } }
@media (prefers-color-scheme: light) { .dark { display: none; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p, figcaption { max-width: 44rem; color: var(--quiet); margin: .3rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem;
  font-size: .9rem; margin: 1rem 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small { display: block; color: var(--quiet); white-space: normal;
  min-width: 13rem; }
.best { color: var(--best); font-weight: 700; }
figure { margin: 1rem 0; }
svg { width: 100%; min-width: 34rem; height: auto; }
article { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0;
  padding: .9rem 1.1rem; }
article h3 { margin: 0 0 .6rem; font-size: 1.02rem; }
.hit { margin: .7rem 0 0; padding-top: .6rem;
  border-top: 1px solid var(--line); font-size: .92rem;
  overflow-wrap: anywhere; }
.hit b { font-weight: 600; } .hit i { color: var(--quiet);
  font-style: normal; float: right; margin-left: 1rem; }
mark { color: inherit; border-radius: 3px; padding: 0 .08em;
  background: rgb(var(--mark) / calc(var(--w) * .55)); }
"""


def _plot(methods: list[Method], metric: str, dark: bool) -> str:
  """Quality over cost, one labelled point a method, as an SVG element."""
  ink, line = ("#c9ced8", "#3b424f") if dark else ("#434957", "#d5d9e0")
  color = "#6aa5ff" if dark else "#2563c3"
  style = {
      "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink,
      "ytick.color": ink, "axes.edgecolor": line, "svg.fonttype": "none",
      "font.family": "sans-serif", "font.size": 10,
  }  # fmt: skip
  with plt.rc_context(style):
    figure, axes = plt.subplots(figsize=(7.4, 3.4))
    ms = [max(m.ms_per_query, 1e-3) for m in methods]
    quality = [m.metrics[metric] for m in methods]
    axes.scatter(ms, quality, s=60, color=color, zorder=3)
    for method, x, y, lift in zip(
      methods, ms, quality, _lifts(ms, quality), strict=True
    ):
      axes.annotate(
        method.name, (x, y), xytext=(0, 9 + 13 * lift), ha="center",
        textcoords="offset points",
      )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.18, y=0.3)
    axes.set_xlabel("milliseconds per query (log scale)")
    axes.set_ylabel(metric)
    axes.grid(color=line, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", transparent=True)
    plt.close(figure)
  svg = buffer.getvalue()
  return svg[svg.index("<svg") :]


def _lifts(ms: list[float], quality: list[float]) -> list[int]:
  """How many lines to lift each label so that near points do not collide."""
  height = (max(quality) - min(quality)) or 1.0
  lifts: dict[int, int] = {}
  for i in sorted(range(len(ms)), key=ms.__getitem__):
    taken = {
      lifts[j]
      for j in lifts
      if ms[i] < 10 * ms[j] and abs(quality[i] - quality[j]) < 0.2 * height
    }
    lifts[i] = next(n for n in range(len(ms)) if n not in taken)
  return [lifts[i] for i in range(len(ms))]


def _bytes(count: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000 or unit == "GB":
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1000
  raise AssertionError("unreachable")


def _table(methods: list[Method]) -> str:
  metrics = list(methods[0].metrics)
  best = {name: max(m.metrics[name] for m in methods) for name in metrics}
  head = "".join(
    f"<th>{html.escape(name)}</th>"
    for name in ["method", *metrics, "bytes/document", "ms/query"]
  )
  rows = []
  for method in methods:
    cells = [
      f'<td class="{"best" if value == best[name] else ""}">{value:.4f}</td>'
      for name, value in method.metrics.items()
    ]
    note = f"<small>{html.escape(method.note)}</small>" if method.note else ""
    rows.append(
      f"<tr><td>{html.escape(method.name)}{note}</td>{''.join(cells)}"
      f"<td>{_bytes(method.bytes_per_document)}</td>"
      f"<td>{method.ms_per_query:.3g}</td></tr>"
    )
  return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _answer(answer: Answer) -> str:
  hits = []
  for rank, (name, score, spans) in enumerate(answer.documents, 1):
    text = "".join(
      f'<mark style="--w:{span.weight:.2f}" title="'
      f'{html.escape(span.match)} {span.weight:.2f}">'
      f"{html.escape(span.text)}</mark>"
      if span.match
      else html.escape(span.text)
      for span in spans
    )
    hits.append(
      f'<div class="hit"><i>{score:.2f}</i><b>{rank}. {html.escape(name)}'
      f"</b><br>{text}</div>"
    )
  question = html.escape(answer.query)
  return f"<article><h3>{question}</h3>{''.join(hits)}</article>"


def write_report(path: str | os.PathLike, report: Report) -> pathlib.Path:
  """Writes the page, aside first and then renamed.

  Args:
    path: the `.html` file to write; its folder is made.
    report: what to show; at least one method.

  Returns:
    The path written.

  Raises:
    ValueError: if there is no method to show.
  """
  if not report.methods:
    raise ValueError("report.methods must hold at least one method, got none")
  metric = next(iter(report.methods[0].metrics))
  facts = "".join(
    f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>"
    for k, v in report.facts.items()
  )
  plots = "".join(
    f'<div class="{name}">{_plot(report.methods, metric, name == "dark")}</div>'
    for name in ("light", "dark")
  )
  answers = "".join(map(_answer, report.answers))
  page = (
    "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    f"<title>{html.escape(report.title)}</title><style>{_STYLE}</style>"
    f"</head><body><main><h1>{html.escape(report.title)}</h1><dl>{facts}</dl>"
    "<h2>Quality and cost</h2>"
    f"<div class='scroll'>{_table(report.methods)}</div>"
    f"<figure><div class='scroll'>{plots}</div>"
    "<figcaption>Up is better, left is cheaper.</figcaption></figure>"
    "<h2>Questions</h2><p>A marked word is the one that a word of the "
    "question matched best; the stronger the mark, the higher the cosine. "
    f"Hover to see which.</p>{answers}</main></body></html>"
  )
  path = pathlib.Path(path)
  with files.replacing(path) as aside:
    aside.write_text(page, encoding="utf-8")
  return path
