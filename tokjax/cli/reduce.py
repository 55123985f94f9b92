"""`tokjax reduce`: what token reduction leaves of a picture."""

import argparse
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import files
from tokjax.benchmarks import reduction, reduction_methods
from tokjax.models import images, vit_weights
from tokjax.reduction import pictures
from tokjax.reduction.types import Reduced

__all__ = ["main", "panel", "reduce_image"]

_CELL = 14  # pixels of a token in the picture that is written


def reduce_image(
  image: np.ndarray,
  methods: Sequence[str],
  *,
  num_keep: int,
  side: int = 24,
  model: str | None = None,
) -> tuple[np.ndarray, dict[str, tuple[Reduced, dict[str, float]]]]:
  """Reduces the tokens of one picture by several methods.

  Args:
    image: uint8 [height, width, 3]; its centre square is used.
    methods: names of `reduction_methods.METHODS`.
    num_keep: tokens to keep.
    side: tokens along a side.
    model: folder of a ViT with a class token; None for statistics of pixels.

  Returns:
    The square as it is shown, and for each method what it left and how good
    that is (`benchmarks.reduction.quality`).

  Raises:
    ValueError: for a model or number that does not fit.
  """
  encoder = vit_weights.load(model) if model else None
  patch = encoder.config.patch_size if encoder else _CELL

  def square(pixels):
    return images.Preparation(
      size=pixels, crop=pixels, mean=(0.5,) * 3, std=(0.5,) * 3
    )

  pixels = jnp.asarray(images.prepare([image], square(patch * side)))
  if encoder is None:
    signals = reduction_methods.statistics(pixels, patch)
  else:
    signals = jax.jit(reduction_methods.read)(encoder, pixels)
  shown = images.prepare([image], square(_CELL * side))[0]
  shown = np.clip(np.round((shown + 1) * 127.5), 0, 255).astype(np.uint8)
  found = {}
  for name in methods:

    def reduce(signals, method=reduction_methods.METHODS[name]):
      return method(signals, num_keep, (side, side))

    reduced = jax.jit(reduce)(signals)
    numbers = reduction.quality(signals, reduced)
    found[name] = reduced, {k: float(v[0]) for k, v in numbers.items()}
  return shown, found


def panel(
  image: np.ndarray,
  found: dict[str, tuple[Reduced, dict[str, float]]],
  grid: tuple[int, int],
) -> bytes:
  """The picture beside what each method left of it.

  Args:
    image: what `reduce_image` returned.
    found: likewise.
    grid: rows and columns of the tokens.

  Returns:
    A PNG.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = min(4, 1 + len(found))
  rows = -(-(1 + len(found)) // columns)
  figure = Figure(figsize=(3.2 * columns, 3.5 * rows), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
  for axis in axes:
    axis.set_axis_off()
  axes[0].imshow(image)
  axes[0].set_title(f"{grid[0] * grid[1]} tokens")
  for axis, (name, (reduced, numbers)) in zip(
    axes[1:], found.items(), strict=False
  ):
    axis.imshow(pictures.overlay(image, reduced, grid))
    axis.set_title(
      f"{name}: {numbers['kept']:.0f}, coverage {numbers['coverage']:.2f}"
    )
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=110)
  return buffer.getvalue()


def main(argv: list[str]) -> int:
  """Runs the command; see `tokjax reduce --help`."""
  known = reduction_methods.METHODS
  parser = argparse.ArgumentParser(
    prog="tokjax reduce",
    description="Reduces the tokens of a picture and writes what is left:"
    " kept patches bright, dropped ones dark, fused ones in one colour.",
  )
  parser.add_argument("photo", help="picture file; its centre square is used")
  parser.add_argument(
    "--method",
    nargs="+",
    default=["divprune"],
    metavar="NAME",
    help="one or several of: all, " + ", ".join(known),
  )
  parser.add_argument("--keep", type=int, default=64, help="tokens to keep")
  parser.add_argument("--side", type=int, default=24, help="tokens a side")
  parser.add_argument(
    "--model",
    help="folder of a ViT with a class token (CLIP, DINOv2, or one trained by"
    " configs/vit_cifar10.py); without it tokens are means and spreads of"
    " colours, which no network has seen",
  )
  parser.add_argument("--out", default="reduced.png", help="PNG to write")
  parser.add_argument("--json", action="store_true", help="print JSON")
  options = parser.parse_args(argv)
  names = list(known) if options.method == ["all"] else options.method
  for name in names:
    if name not in known:
      raise ValueError(f"no method {name!r}; there are: {', '.join(known)}")
  shown, found = reduce_image(
    images.read(options.photo),
    names,
    num_keep=options.keep,
    side=options.side,
    model=options.model,
  )
  picture = panel(shown, found, (options.side, options.side))
  out = pathlib.Path(options.out)
  with files.replacing(out) as aside:
    aside.write_bytes(picture)
  source = options.model or "statistics of pixels, no network"
  numbers = {name: values for name, (_, values) in found.items()}
  if options.json:
    told: dict[str, Any] = {"features": source, "out": str(out)}
    print(json.dumps({**told, "methods": numbers}))
    return 0
  print(f"{options.side**2} tokens of {source}")
  for name, values in numbers.items():
    print(
      f"  {name:<15} {values['kept']:.0f} kept, coverage"
      f" {values['coverage']:.3f}, smallest distance {values['distance']:.3f},"
      f" attention {values['attention']:.2f}"
    )
  print(f"{out} written")
  return 0
