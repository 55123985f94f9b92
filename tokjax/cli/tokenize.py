"""`tokjax tokenize`: a picture in fewer and fewer tokens, and back."""

import argparse
import functools
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks, files
from tokjax.cli import train
from tokjax.eval import batching, image_quality, rate_distortion
from tokjax.models import images
from tokjax.tokenizers.titok import TiTok
from tokjax.train import image_classification, tokenizer_run

__all__ = ["Rebuilt", "main", "panel", "rebuild", "square_tiles"]

_TILES = 64  # decoded at a time
_QUALITIES = range(100, -1, -5)  # of JPEG and WebP; of 0..100


class Rebuilt(NamedTuple):
  """A picture made of tokens.

  Attributes:
    image: uint8 [height, width, 3].
    num_tokens: of each tile.
    num_bytes: of all tokens, packed bit to bit.
    psnr: of the picture, in dB.
    codecs: PSNR of the picture by "jpeg" and "webp" in as many bytes, and
      without counting their headers ("jpeg payload"); NaN where none fits.
  """

  image: np.ndarray
  num_tokens: int
  num_bytes: int
  psnr: float
  codecs: dict[str, float]


def square_tiles(image: np.ndarray, side: int) -> np.ndarray:
  """The middle of a picture as square tiles.

  Args:
    image: [height, width, C].
    side: pixels of a tile.

  Returns:
    [rows, columns, side, side, C].

  Raises:
    ValueError: if the picture is smaller than a tile.

  Example:
    >>> square_tiles(np.zeros((5, 9, 3), np.uint8), 4).shape
    (1, 2, 4, 4, 3)
  """
  height, width, channels = image.shape
  checks.in_range(1, min(height, width), tile_side=side)
  rows, columns = height // side, width // side
  top, left = (height - rows * side) // 2, (width - columns * side) // 2
  image = image[top : top + rows * side, left : left + columns * side]
  tiles = image.reshape(rows, side, columns, side, channels)
  return tiles.swapaxes(1, 2)


def rebuild(
  image: np.ndarray,
  tokenizer: TiTok,
  state: Any,
  lengths: Sequence[int],
) -> tuple[np.ndarray, list[Rebuilt]]:
  """Writes a picture in tokens and reads it from the first of them.

  Args:
    image: uint8 [height, width, 3]; its middle is cut into tiles of the
      tokenizer's size.
    tokenizer: a TiTok or One-D-Piece.
    state: of its codebook.
    lengths: tokens of a tile.

  Returns:
    The part of the picture that was used, and what each length gives.

  Raises:
    ValueError: for a picture that is too small, or lengths out of range.
  """
  config = tokenizer.config
  for length in lengths:
    checks.in_range(1, config.num_tokens, tokens=length)
  tiles = square_tiles(image, config.image_size)
  flat = tiles.reshape(-1, *tiles.shape[2:])
  encode = functools.partial(_encode, tokenizer, state)
  indices = np.concatenate(
    list(batching.in_batches(encode, flat, batch_size=_TILES))
  )
  used = _picture(tiles)
  curves = {codec: _curve(used, codec) for codec in ("jpeg", "webp")}
  found = []
  for length in lengths:
    decode = functools.partial(_decode, tokenizer, state)
    part = indices[:, :length]
    again = np.concatenate(
      list(batching.in_batches(decode, part, batch_size=_TILES))
    )
    picture = _picture(again.reshape(tiles.shape))
    num_codes = config.quantizer.codebook.num_codes
    num_bytes = rate_distortion.token_bytes(len(flat) * length, num_codes)
    psnr = image_quality.psnr(
      jnp.float32(used[None] / 255), jnp.float32(picture[None] / 255)
    )
    codecs = {}
    for codec, coded in curves.items():
      codecs[codec] = _best(coded, "file_bytes", num_bytes)
      codecs[f"{codec} payload"] = _best(coded, "payload_bytes", num_bytes)
    found.append(Rebuilt(picture, length, num_bytes, float(psnr[0]), codecs))
  return used, found


def _curve(image, codec):
  """[(what was written, PSNR)], the highest quality first."""
  coded = [rate_distortion.code(image, codec, q) for q in _QUALITIES]
  pictures = np.stack([one.image for one in coded]).astype(np.float32) / 255
  whole = np.broadcast_to(np.float32(image / 255), pictures.shape)
  psnr = batching.in_batches(image_quality.psnr, whole, pictures, batch_size=1)
  return list(zip(coded, np.concatenate(list(psnr)), strict=True))


def _best(coded, counted, num_bytes):
  fitting = (x for one, x in coded if getattr(one, counted) <= num_bytes)
  return float(next(fitting, math.nan))


@jax.jit
def _encode(tokenizer, state, tiles):
  pixels = image_classification.pixels(tiles)
  return tokenizer.encode(pixels, state).indices


@jax.jit
def _decode(tokenizer, state, indices):
  pixels = jnp.clip(tokenizer.decode(indices, state), -1, 1)
  return jnp.round((pixels + 1) * 127.5).astype(jnp.uint8)


def _picture(tiles):
  """[rows, columns, side, side, C] -> [height, width, C]."""
  rows, columns, side = tiles.shape[:3]
  return tiles.swapaxes(1, 2).reshape(rows * side, columns * side, -1)


def panel(used: np.ndarray, found: Sequence[Rebuilt]) -> bytes:
  """The picture beside what each number of tokens makes of it.

  Args:
    used: what `rebuild` returned.
    found: likewise.

  Returns:
    A PNG.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = min(4, 1 + len(found))
  rows = -(-(1 + len(found)) // columns)
  figure = Figure(figsize=(3.4 * columns, 3.7 * rows), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
  for axis in axes:
    axis.set_axis_off()
  axes[0].imshow(used)
  axes[0].set_title(f"{used.size:,} bytes of pixels")
  for axis, one in zip(axes[1:], found, strict=False):
    axis.imshow(one.image)
    axis.set_title(
      f"{one.num_tokens} tokens a tile\n{one.num_bytes:,} bytes, "
      f"{one.psnr:.1f} dB"
    )
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=110)
  return buffer.getvalue()


def main(argv: list[str]) -> int:
  """Runs the command; see `tokjax tokenize --help`."""
  parser = argparse.ArgumentParser(
    prog="tokjax tokenize",
    description="Writes a picture in tokens, reads it from the first of them,"
    " and puts the results side by side with their bytes and PSNR. The picture"
    " is cut into tiles of the tokenizer's size.",
  )
  parser.add_argument("picture", help="picture file")
  parser.add_argument(
    "--config", required=True, help="file of configs/ it was trained with"
  )
  parser.add_argument(
    "--model", required=True, help="folder of the run, of `tokjax train --out`"
  )
  parser.add_argument(
    "--tokens", help="tokens of a tile, such as 4,16,64; default all"
  )
  parser.add_argument("--out", default="tokens.png", help="PNG to write")
  parser.add_argument("--json", action="store_true", help="print JSON")
  options = parser.parse_args(argv)
  run = train.settings(options.config, [])
  if not isinstance(run, tokenizer_run.TokenizerRun):
    raise ValueError(f"{options.config} is no config of a tokenizer")
  tokenizer, state = tokenizer_run.load(options.model, run)
  if not isinstance(tokenizer, TiTok):
    raise ValueError(
      "config must be of a TiTok or One-D-Piece, whose first tokens are a "
      f"picture, got {type(tokenizer).__name__}"
    )
  lengths = _lengths(options.tokens, tokenizer.config.num_tokens)
  used, found = rebuild(images.read(options.picture), tokenizer, state, lengths)
  picture = panel(used, found)
  out = pathlib.Path(options.out)
  with files.replacing(out) as aside:
    aside.write_bytes(picture)
  if options.json:
    rows = [
      {key: x for key, x in one._asdict().items() if key != "image"}
      for one in found
    ]
    print(json.dumps({"out": str(out), "rows": rows}))
    return 0
  height, width, _ = used.shape
  side = tokenizer.config.image_size
  tiles = height // side * (width // side)
  print(f"{width} x {height} pixels, {tiles} tiles")
  for one in found:
    others = ", ".join(
      f"{name} {'does not fit' if math.isnan(psnr) else f'{psnr:.2f}'}"
      for name, psnr in one.codecs.items()
    )
    print(
      f"  {one.num_tokens:>4} tokens a tile, {one.num_bytes:>7,} bytes: "
      f"{one.psnr:.2f} dB ({others})"
    )
  print(f"{out} written")
  return 0


def _lengths(text, most):
  if text is None:
    return [most]
  try:
    return [int(part) for part in text.split(",")]
  except ValueError:
    raise ValueError(
      f"tokens must be numbers with commas between, got {text!r}"
    ) from None
