"""Quality against cost: bytes of `tokjax bench trained_retrieval`, and others.

One picture on a transparent ground, in colours that can be read on white and
on black: a point for each candidate, the mean over seeds with a line from the
lowest to the highest, and the front of those that nothing else beats.
"""

import collections
import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import figure as figures
from matplotlib.backends import backend_agg

from tokjax import files

__all__ = ["Point", "front", "plot", "read"]

# Half-way between black and white in luminance.
_INK, _LINE, _MARK = "#7f8792", "#7f879255", "#3b82f6"
# Where a label may stand beside its point, in points, the nearest first.
_PLACES = [
  (side * 7, lift)
  for lift in sorted(range(-96, 97, 12), key=abs)
  for side in (1, -1)
]


class Point(NamedTuple):
  """One candidate, such as a way to search.

  Attributes:
    name: of the row.
    size: what it costs, such as bytes of a document's vectors; mean over seeds.
    low: lowest value of the metric over seeds.
    mean: mean value.
    high: highest value.
  """

  name: str
  size: float
  low: float
  mean: float
  high: float


def read(path: str | os.PathLike, *, metric: str = "nDCG@10") -> list[Point]:
  """The rows of a file, one point a name.

  Args:
    path: JSON lines that `trained_retrieval` wrote with `--out`.
    metric: one of its metrics.

  Returns:
    Points by name, in the order of the file.

  Raises:
    ValueError: if there is no row, or rows were measured with different
      settings; seeds and variants may differ.
  """
  rows = [json.loads(x) for x in pathlib.Path(path).read_text().splitlines()]
  if not rows:
    raise ValueError(f"{path} holds no row")
  found, first = collections.defaultdict(list), rows[0]["config"]
  for row in rows:
    for name in sorted(row["config"].keys() | first.keys()):
      here, there = row["config"].get(name), first.get(name)
      if here != there and name not in ("seed", "variants"):
        raise ValueError(
          f"{path}: rows must be of one setting, got {name}={there!r} and "
          f"{here!r}"
        )
    found[row["name"]].append((row["bytes_per_document"], row["metrics"]))
  points = []
  for name, measured in found.items():
    values = [metrics[metric] for _, metrics in measured]
    size = float(np.mean([size for size, _ in measured]))
    mean = float(np.mean(values))
    points.append(Point(name, size, min(values), mean, max(values)))
  return points


def front(points: Sequence[Point]) -> list[Point]:
  """The points that no smaller or equally small one reaches.

  Args:
    points: in any order.

  Returns:
    Those of highest mean, by rising size.

  Example:
    >>> points = [Point("a", 9, .5, .5, .5), Point("b", 9, .6, .6, .6),
    ...           Point("c", 4, .3, .3, .3), Point("d", 5, .2, .2, .2)]
    >>> [point.name for point in front(points)]
    ['c', 'b']
  """
  best, kept = float("-inf"), []
  for point in sorted(points, key=lambda p: (p.size, -p.mean)):
    if point.mean > best:
      kept.append(point)
      best = point.mean
  return kept


def plot(
  points: Sequence[Point],
  path: str | os.PathLike,
  *,
  metric: str = "nDCG@10",
  size: str = "bytes of a document's vectors",
) -> None:
  """Draws the points and writes the picture.

  Args:
    points: from `read`, at least one.
    path: file to write; its end says the format, `.svg` or `.png`.
    metric: what the upright axis is called.
    size: what the other axis, a logarithmic one, is called.

  Raises:
    ValueError: for another format.
  """
  path = pathlib.Path(path)
  if path.suffix not in (".svg", ".png"):
    raise ValueError(f"path must end in .svg or .png, got {path.name!r}")
  style = {
      "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK,
      "ytick.color": _INK, "axes.edgecolor": _INK, "svg.fonttype": "none",
      "font.family": "sans-serif", "font.size": 9,
  }  # fmt: skip
  best = front(points)
  with matplotlib.rc_context(style):
    figure = figures.Figure(figsize=(10, 6))
    canvas = backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.08)
    axes.set_xlabel(f"{size} (log scale)")
    axes.set_ylabel(metric)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.step(
      [p.size for p in best], [p.mean for p in best], where="post",
      color=_MARK, linewidth=1, alpha=0.6,
    )  # fmt: skip
    for point in points:
      color = _MARK if point in best else _INK
      axes.plot([point.size] * 2, [point.low, point.high], color=color)
      axes.plot(point.size, point.mean, "o", color=color, markersize=5)
    figure.tight_layout()
    _label(axes, canvas.get_renderer(), points, best)
    with files.replacing(path) as aside:
      figure.savefig(
        aside, format=path.suffix[1:], transparent=True, dpi=150,
        bbox_inches="tight",
      )  # fmt: skip


def _label(axes, renderer, points, best):
  """Names each point where no other name or point is, or else beside it."""
  scale = axes.figure.dpi / 72  # pixels of a point
  marks = {p: axes.transData.transform((p.size, p.mean)) for p in points}
  taken = []
  for point in [*best, *(p for p in points if p not in best)]:
    raised = 7 if point in best else 0  # above the line of the front
    label = axes.annotate(
      point.name,
      (point.size, point.mean),
      xytext=_PLACES[0],
      textcoords="offset points",
      va="center",
      color=_INK,
    )
    for across, lift in (*_PLACES, _PLACES[0]):
      label.set_position((across, lift + raised))
      label.set_horizontalalignment("left" if across > 0 else "right")
      box = label.get_window_extent(renderer)
      free = not any(box.overlaps(other) for other in taken)
      if free and not any(box.contains(*other) for other in marks.values()):
        break
    taken.append(box)
    if lift:
      end = marks[point] + scale * np.array([across, lift + raised])
      line = axes.transData.inverted().transform([marks[point], end])
      axes.plot(*line.T, color=_LINE, linewidth=0.8)
