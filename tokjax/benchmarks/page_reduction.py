"""Pages of print, cut into sub-images: how much of the ink is kept.

For the claim of correlation-guided compression, whose document models are not
here. Pages are the two of scikit-image and one drawn here, with the description
of the package; a page becomes sub-images of 16 x 16 patches. The share of ink
on kept patches is what a reader of the page could still read.
"""

import functools
import importlib.metadata
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from tokjax.benchmarks import reduction_methods, trained_vit
from tokjax.reduction import controls, correlation_guided, types
from tokjax.train import image_classification

__all__ = ["ink", "measure", "pages", "sub_images"]

_SIDE = 16  # patches of a sub-image


def pages() -> dict[str, np.ndarray]:
  """Pages of print.

  Returns:
    uint8 [height, width] by name: "page" and "text" are photographs of
    scikit-image, "drawn" is made here.
  """
  import skimage.data

  return {
    "page": skimage.data.page(),
    "text": skimage.data.text(),
    "drawn": _drawn_page(),
  }


def _drawn_page():
  """The description of this package in two columns under a title."""
  text = importlib.metadata.metadata("tokjax").get_payload() or "tokjax"
  words = " ".join(text.split()).encode("ascii", "replace").decode()
  image = PIL.Image.new("L", (512, 384), 255)
  draw, font = PIL.ImageDraw.Draw(image), PIL.ImageFont.load_default(10)
  draw.text((40, 20), "Sets of tokens", font=PIL.ImageFont.load_default(22))
  for column in range(2):
    for line in range(18):
      start = (column * 18 + line) * 34
      spot = (40 + column * 230, 80 + line * 14)
      draw.text(spot, words[start : start + 34], font=font)
  return np.asarray(image)


def sub_images(page: np.ndarray, side: int) -> np.ndarray:
  """A page as squares, white where the last ones reach over its edge.

  Args:
    page: uint8 [height, width].
    side: pixels.

  Returns:
    uint8 [n, side, side, 3], row by row.
  """
  height, width = (-(-x // side) * side for x in page.shape)
  room = [(0, height - page.shape[0]), (0, width - page.shape[1])]
  whole = np.pad(page, room, constant_values=255)
  squares = whole.reshape(height // side, side, width // side, side)
  squares = squares.swapaxes(1, 2).reshape(-1, side, side)
  return np.repeat(squares[..., None], 3, axis=-1)


def ink(squares: np.ndarray, patch_size: int) -> np.ndarray:
  """Ink of every patch: how much darker its pixels are than the paper.

  Args:
    squares: uint8 [n, side, side, 3].
    patch_size: pixels a side.

  Returns:
    float64 [n, N], which sums to 1. Paper is what half of the pixels around
    are, and differences under 24 are none.
  """
  gray = squares[..., 0].astype(np.float64)
  paper = np.median(gray, axis=(1, 2), keepdims=True)
  dark = np.where(paper - gray > 24, paper - gray, 0)
  n, side, _ = dark.shape
  cells = dark.reshape(n, side // patch_size, patch_size, -1, patch_size)
  amount = cells.sum(axis=(2, 4)).reshape(n, -1)
  return amount / amount.sum()


@jax.jit
def _by_content(signals: reduction_methods.Signals) -> types.Reduced:
  """The method, with room for every token."""
  return correlation_guided.correlation_guided(
    signals.features,
    jnp.mean(signals.low.keys[:, :, 1:], axis=1),
    reduction_methods.class_attention(signals.low),
    reduction_methods.class_attention(signals.deep),
    num_keep=signals.features.shape[1],
  )


@functools.partial(jax.jit, static_argnames="num_keep")
def _others(
  signals: reduction_methods.Signals, key: jax.Array, num_keep: int
) -> Mapping[str, types.Reduced]:
  """Ways that keep as many tokens of every sub-image."""
  x = signals.features
  deep = reduction_methods.class_attention(signals.deep)
  low = reduction_methods.class_attention(signals.low)
  return {
    "random": controls.random_keep(key, x, num_keep=num_keep),
    "uniform": controls.uniform_keep(x, num_keep=num_keep),
    "deep attention": types.highest(x, deep, num_keep=num_keep),
    "low attention": types.highest(x, low, num_keep=num_keep),
  }


def measure(
  run: trained_vit.VitRun, *, progress: bool = True
) -> dict[str, trained_vit.Row]:
  """Ink that each way keeps; what the claim measures.

  Args:
    run: the encoder.
    progress: not used.

  Returns:
    For each page "PAGE: correlation", which decides by itself how many tokens
    it keeps of which sub-image, and "PAGE: WAY" of the same number in all, the
    same for each sub-image. `ink` is the share on kept patches, `kept` that of
    the tokens.
  """
  del progress
  model, read = trained_vit.load(run), jax.jit(reduction_methods.read)
  result = {}
  for name, page in pages().items():
    squares = sub_images(page, _SIDE * model.config.patch_size)
    signals = read(model, image_classification.pixels(squares))
    amount = ink(squares, model.config.patch_size)
    chosen = _by_content(signals)
    budget = max(1, round(float(np.asarray(chosen.mask).sum(axis=1).mean())))
    others = _others(signals, jax.random.key(run.seed), budget)
    for way, reduced in {"correlation": chosen, **others}.items():
      mask = np.asarray(reduced.mask)
      held = np.take_along_axis(amount, np.asarray(reduced.index), axis=1)
      result[f"{name}: {way}"] = trained_vit.Row(
        {
          "ink": float(held[mask].sum()),
          "kept": float(mask.sum() / amount.size),
        }
      )
  return result
