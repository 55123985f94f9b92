"""Token reduction on photographs: what each method keeps, and what it costs.

    python -m tokjax.benchmarks.reduction photographs --model runs/vit/model

`photographs` is a folder of images, `--model` a ViT with a class token that
`tokjax.models.vit_weights` reads; without one the tokens are statistics of
pixels (`reduction_methods.statistics`), and attention means little. Each image
becomes `--side` x `--side` patches, or with `--crops` an overview and four
quarters of that many each, one after the other.

For each method and number of kept tokens, averaged over the images:

- `distance`: the smallest cosine distance between two kept tokens;
- `coverage`: the mean over all tokens of the highest cosine to a kept one;
- `attention`: share of the class token's attention on kept positions;
- `median_s`: the selection alone, jitted, for one image, beside the encoder;
- `saved_tflops`: of the prefill of a 7B language model, computed, for 64 words;
- `temp_bytes`: scratch memory of the compiled selection.

Fused tokens count where they stand, with what they became. `--plot` draws
coverage against the time of the selection at the smallest number of tokens.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.benchmarks import pareto, reduction_methods, timing, trained_vit
from tokjax.models import images, vit_weights
from tokjax.ops import attention_scores, budgets, similarity
from tokjax.reduction.types import Reduced

__all__ = ["claimed", "main", "measure", "points", "quality", "run"]

# A 7B language model (Vicuna) and a short question.
_LAYERS, _WIDTH, _MLP_WIDTH, _NUM_WORDS = 32, 4096, 11_008, 64


def quality(
  signals: reduction_methods.Signals, reduced: Reduced
) -> dict[str, jax.Array]:
  """How well kept tokens spread, cover the others, and hold attention.

  Args:
    signals: of the images.
    reduced: what a method made of them.

  Returns:
    float32 [B] each: `distance`, `coverage`, `attention`, and `kept` (tokens).
  """
  mask = reduced.mask
  every = similarity.safe_normalize(signals.features.astype(jnp.float32))
  kept = similarity.safe_normalize(reduced.tokens.astype(jnp.float32))
  among = jnp.matmul(kept, kept.swapaxes(1, 2), precision="highest")
  pair = mask[:, :, None] & mask[:, None]
  pair &= ~jnp.eye(mask.shape[1], dtype=bool)[None]
  across = jnp.matmul(every, kept.swapaxes(1, 2), precision="highest")
  across = jnp.where(mask[:, None], across, -1)
  row = attention_scores.row_attention(
    signals.deep.queries[:, :, :1], signals.deep.keys
  )
  row = jnp.mean(row[:, :, 0, 1:], axis=1)
  row = row / jnp.sum(row, axis=1, keepdims=True)
  held = jnp.take_along_axis(row, reduced.index, axis=1)
  return {
    "distance": 1 - jnp.max(jnp.where(pair, among, -1), axis=(1, 2)),
    "coverage": jnp.mean(jnp.max(across, axis=2), axis=1),
    "attention": jnp.sum(jnp.where(mask, held, 0), axis=1),
    "kept": jnp.sum(mask, axis=1).astype(jnp.float32),
  }


def measure(
  signals: reduction_methods.Signals,
  grid: tuple[int, int],
  keep: Sequence[int],
  *,
  methods: Sequence[str] = tuple(reduction_methods.METHODS),
  repeats: int = 10,
) -> list[dict[str, Any]]:
  """Measures methods on the signals of some images.

  Args:
    signals: of all images.
    grid: rows and columns of the tokens.
    keep: numbers of tokens to keep.
    methods: names of `reduction_methods.METHODS`.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`.
  """
  num_images, num_tokens, width = signals.features.shape
  first = jax.tree.map(lambda x: x[:1], signals)
  rows = []
  for num_keep in keep:
    chosen = {
      name: jax.jit(
        functools.partial(
          reduction_methods.METHODS[name], num_keep=num_keep, grid=grid
        )
      )
      for name in methods
    }
    found = {name: _means(signals, reduce) for name, reduce in chosen.items()}
    programs = {
      name: reduce.lower(first).compile() for name, reduce in chosen.items()
    }
    times = timing.compare(
      {name: functools.partial(p, first) for name, p in programs.items()},
      repeats=repeats,
    )
    for name in methods:
      scratch = programs[name].memory_analysis().temp_size_in_bytes
      rows.append(
        timing.row(
          "token reduction",
          name,
          {"N": num_tokens, "K": num_keep, "D": width, "images": num_images},
          str(signals.features.dtype),
          times[name],
          **found[name],
          saved_tflops=_saved(num_tokens, num_keep) / 1e12,
          temp_bytes=scratch,
        )
      )
  return rows


def _means(signals, reduce):
  """Means of `quality` over the images, one image at a time."""

  def one(signals):
    signals = jax.tree.map(lambda x: x[None], signals)
    return quality(signals, reduce(signals))

  found = jax.jit(lambda signals: jax.lax.map(one, signals))(signals)
  return {name: float(jnp.mean(values)) for name, values in found.items()}


def _saved(num_tokens, num_keep):
  def flops(count):
    return budgets.prefill_flops(
      ((0, count + _NUM_WORDS),),
      _LAYERS,
      width=_WIDTH,
      ffn_width=_MLP_WIDTH,
    )

  return flops(num_tokens) - flops(num_keep)


def run(
  folder: str,
  *,
  model: str | None = None,
  side: int = 24,
  crops: bool = False,
  keep: Sequence[int] | None = None,
  num_images: int = 8,
  methods: Sequence[str] = tuple(reduction_methods.METHODS),
  repeats: int = 10,
) -> list[dict[str, Any]]:
  """Reads photographs, encodes them and measures all methods.

  Args:
    folder: of images; the first in the order of their names are taken.
    model: folder of a ViT; None for statistics of pixels.
    side: patches along a side.
    crops: an overview and four quarters instead of one view.
    keep: None for 192, 128, 64, 32 of 576 tokens, or 640, 320, 160 of 2,880,
      in proportion to the tokens there are.
    num_images: photographs.
    methods: names of `reduction_methods.METHODS`.
    repeats: timed calls of each.

  Returns:
    Rows of the methods, and one of the encoder.

  Raises:
    ValueError: if the folder holds no image.
  """
  paths = images.in_folder(folder)[:num_images]
  encoder = vit_weights.load(model) if model else None
  patch = encoder.config.patch_size if encoder else 14
  preparation = images.Preparation(
    size=patch * side * (2 if crops else 1),
    crop=patch * side * (2 if crops else 1),
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
  )
  pixels = images.prepare([images.read(path) for path in paths], preparation)
  views = _views(pixels) if crops else pixels[:, None]
  num_views = views.shape[1]
  views = jnp.asarray(views.reshape(-1, *views.shape[2:]))

  def read(views):
    if encoder is None:
      return reduction_methods.statistics(views, patch)
    return reduction_methods.read(encoder, views)

  read = jax.jit(read)
  one = views[:num_views]
  times = timing.compare({"encoder": lambda: read(one)}, repeats=repeats)
  signals = [
    _joined(read(views[i : i + num_views]), num_views)
    for i in range(0, len(views), num_views)
  ]
  signals = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *signals)
  num_tokens = signals.features.shape[1]
  if keep is None:
    shares = (640, 320, 160) if crops else (192, 128, 64, 32)
    whole = 2880 if crops else 576
    keep = [max(2, round(k * num_tokens / whole)) for k in shares]
  grid = (side * num_views, side)  # views one below the other
  rows = measure(signals, grid, keep, methods=methods, repeats=repeats)
  shape = {"N": num_tokens, "D": signals.features.shape[2], "images": 1}
  return [
    timing.row("encoder", "encoder", shape, "float32", times["encoder"]),
    *rows,
  ]


def claimed(
  config: trained_vit.VitRun,
  *,
  keep: Sequence[int] = (192, 128, 64, 32),
  methods: Sequence[str] = tuple(reduction_methods.METHODS),
  progress: bool = True,
) -> dict[str, trained_vit.Row]:
  """What is left of photographs under one trained encoder; for claims.

  Args:
    config: the encoder; `pictures` is the folder of photographs.
    keep: numbers of tokens to keep, of 24 x 24.
    methods: names of `reduction_methods.METHODS`.
    progress: not used.

  Returns:
    Rows "METHOD K" with `distance`, `coverage` and `attention`.
  """
  del progress
  model = trained_vit.folder(config)
  rows = run(
    config.pictures, model=model, keep=keep, methods=methods, repeats=1
  )[1:]
  names = ("distance", "coverage", "attention")
  return {
    f"{row['implementation']} {row['shape']['K']}": trained_vit.Row(
      {name: row[name] for name in names}
    )
    for row in rows
  }


def _views(pixels):
  """[B, 2 s, 2 s, C] to an overview and four quarters [B, 5, s, s, C]."""
  batch, size, _, channels = pixels.shape
  half = size // 2
  quarters = pixels.reshape(batch, 2, half, 2, half, channels)
  overview = quarters.reshape(batch, half, 2, half, 2, channels)
  quarters = quarters.swapaxes(2, 3).reshape(batch, 4, half, half, channels)
  return np.concatenate([overview.mean(axis=(2, 4))[:, None], quarters], axis=1)


def _joined(signals, num_views):
  """Patches of the views of one image as one row; the first class token."""
  if num_views == 1:
    return signals

  def patches(x):  # [views, P, D] -> [1, views P, D]
    return x.reshape(1, -1, x.shape[-1])

  def attention(x):  # [views, H, 1 + P, d] -> [1, H, 1 + views P, d]
    rows = x[:, :, 1:].swapaxes(0, 1)
    rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    return jnp.concatenate([x[0, :, :1], rows], axis=1)[None]

  layers = [
    reduction_methods.Attention(*map(attention, layer))
    for layer in (signals.low, signals.middle, signals.deep)
  ]
  return reduction_methods.Signals(
    patches(signals.features), *layers, question=signals.question[:1]
  )


def points(rows: Sequence[dict[str, Any]]) -> list[pareto.Point]:
  """Coverage against milliseconds of the selection, for `pareto.plot`.

  Args:
    rows: of `run`; those with the fewest tokens count.

  Returns:
    One point a method.
  """
  rows = [row for row in rows if "coverage" in row]
  least = min(row["shape"]["K"] for row in rows)
  return [
    pareto.Point(
      row["implementation"], row["median_s"] * 1e3, *[row["coverage"]] * 3
    )
    for row in rows
    if row["shape"]["K"] == least
  ]


def main(argv: list[str] | None = None) -> None:
  """Measures and prints the table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("photographs", help="folder of images")
  parser.add_argument("--model", help="folder of a ViT with a class token")
  parser.add_argument("--side", type=int, default=24, help="patches a side")
  parser.add_argument("--crops", action="store_true")
  parser.add_argument("--keep", type=int, nargs="*")
  parser.add_argument("--images", type=int, default=8)
  parser.add_argument("--methods", nargs="*", choices=reduction_methods.METHODS)
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--out", help="file to append JSON lines to")
  parser.add_argument("--plot", help="picture to write, .svg or .png")
  options = parser.parse_args(argv)
  rows = run(
    options.photographs,
    model=options.model,
    side=options.side,
    crops=options.crops,
    keep=options.keep,
    num_images=options.images,
    methods=options.methods or tuple(reduction_methods.METHODS),
    repeats=options.repeats,
  )
  for line in rows:
    line["K"] = line["shape"].get("K", "")
  columns = ["implementation", "K", "kept", "distance", "coverage"]
  columns += ["attention", "median_s", "saved_tflops", "temp_bytes"]
  timing.print_rows(rows, columns)
  if options.out:
    timing.write_rows(rows, options.out)
  if options.plot:
    pareto.plot(
      points(rows),
      options.plot,
      metric="coverage",
      size="milliseconds of the selection, one image",
    )


if __name__ == "__main__":
  main()
