"""Every reduction by name, on what one vision encoder gives.

`read` takes it from a ViT, `statistics` from the pixels alone, where no
weights are at hand. The table is for the commands and benchmarks here; in code
call the methods themselves.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.models import vit
from tokjax.models.reducing import Taps
from tokjax.ops import attention_scores
from tokjax.ops import patches as image_patches
from tokjax.reduction import (
  aim,
  catp,
  center_clip,
  controls,
  correlation_guided,
  divprune,
  fastv,
  hiprune,
  mmtok,
  prumerge,
  todre,
  token_transforming,
  types,
  visiondrop,
  visionzip,
  vtc_cls,
)
from tokjax.typing import Array, Float

__all__ = [
  "CONTROLS",
  "METHODS",
  "Attention",
  "Signals",
  "class_attention",
  "read",
  "statistics",
]


class Attention(NamedTuple):
  """Queries and keys of one layer; row 0 is the class token.

  Attributes:
    queries: before scaling.
    keys: likewise.
  """

  queries: Float[Array, "B H S d"]
  keys: Float[Array, "B H S d"]


class Signals(NamedTuple):
  """What the methods read of the encoder of one image.

  Attributes:
    features: patches as the last layer that is read leaves them (the second
      last of the encoder, by default), in raster order.
    low: attention of a layer a twelfth up.
    middle: of the layer a third up, where objects show.
    deep: of the last layer that is read.
    question: one row in place of the words of a question, which an encoder of
      images alone does not have: the class token.
  """

  features: Float[Array, "B N D"]
  low: Attention
  middle: Attention
  deep: Attention
  question: Float[Array, "B 1 D"]


def read(
  model: vit.Vit,
  images: Float[Array, "B height width C"],
  layer: int | None = None,
) -> Signals:
  """Signals of a ViT with a class token and no other special one.

  Args:
    model: at least two layers.
    images: normalised, whole patches.
    layer: the last one that is read, from 0; None for the second last.

  Returns:
    The signals; layers of CLIP L/14 are 2, 8 and 22 of 0..23.

  Raises:
    ValueError: for another model.
  """
  config = model.config
  if config.num_special != 1 or not config.class_token:
    raise ValueError(
      "model must have a class token and no other beside its patches, got "
      f"{config.num_special} special tokens"
    )
  layer = config.num_layers - 2 if layer is None else layer
  checks.in_range(0, config.num_layers - 1, layer=layer)
  chosen = ((layer + 2) // 12, (layer + 2) // 3, layer)
  taps = Taps(queries=chosen, keys=chosen, hidden=(layer,))
  found = model.encode(images, taps=taps).taps
  attention = [Attention(found[i].queries, found[i].keys) for i in chosen]
  hidden = found[layer].hidden
  return Signals(hidden[:, 1:], *attention, question=hidden[:, :1])


def statistics(
  images: Float[Array, "B height width C"], patch_size: int
) -> Signals:
  """Signals of no network: means and spreads of colours of every patch.

  Of each patch the colour means, deviations, and mean absolute differences
  along rows and columns, standardised over the image. The mean patch stands
  in for the class token; "attention" is the softmax of inner products, alike
  in all layers. A picture can be cut by it; that it shows what matters is not
  claimed.

  Args:
    images: values of any scale.
    patch_size: pixels a side.

  Returns:
    Features of width 4 C.
  """
  channels = images.shape[-1]
  patches = image_patches.patchify(images, patch_size)
  x = patches.reshape(*patches.shape[:2], patch_size, patch_size, channels)
  means, spreads = jnp.mean(x, axis=(2, 3)), jnp.std(x, axis=(2, 3))
  rows = jnp.mean(jnp.abs(jnp.diff(x, axis=2)), axis=(2, 3))
  columns = jnp.mean(jnp.abs(jnp.diff(x, axis=3)), axis=(2, 3))
  x = jnp.concatenate([means, spreads, rows, columns], axis=-1)
  center = jnp.mean(x, axis=1, keepdims=True)
  x = (x - center) / (jnp.std(x, axis=1, keepdims=True) + 1e-6)
  question = jnp.mean(jnp.abs(x), axis=1, keepdims=True)
  heads = jnp.concatenate([question, x], axis=1)[:, None]
  attention = Attention(heads, heads)
  return Signals(x, attention, attention, attention, question)


def class_attention(attention: Attention) -> Float[Array, "B N"]:
  """Attention of the class token to the patches, averaged over heads.

  Args:
    attention: of one layer.

  Returns:
    float32; with what the class token pays to itself it sums to 1.
  """
  return jnp.mean(_class_row(attention), axis=1)


def _class_row(attention: Attention):
  """Attention of the class token to the patches, [B, H, N]."""
  queries = attention.queries[:, :, :1]
  return attention_scores.row_attention(queries, attention.keys)[:, :, 0, 1:]


def _mean_key(attention: Attention):
  return jnp.mean(attention.keys[:, :, 1:].astype(jnp.float32), axis=1)


def _flat_key(x):
  """Heads side by side, as PruMerge reads them: [B, H, N, d] to [B, N, H d]."""
  return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _random(signals, num_keep, grid):
  key = jax.random.key(0)
  return controls.random_keep(key, signals.features, num_keep=num_keep)


def _uniform(signals, num_keep, grid):
  return controls.uniform_keep(signals.features, num_keep=num_keep)


def _pooling(signals, num_keep, grid):
  return controls.pool_keep(signals.features, num_keep=num_keep, grid=grid)


def _divprune(signals, num_keep, grid):
  return divprune.divprune(signals.features, num_keep=num_keep)


def _todre(signals, num_keep, grid, objective="max_sum"):
  pivot = todre.cls_pivot(_class_row(signals.deep))
  return todre.todre(
    signals.features, pivot, num_keep=num_keep, objective=objective
  )


def _mmtok(signals, num_keep, grid):
  x = signals.features
  return mmtok.mmtok(x, x, signals.question, num_keep=num_keep)


def _catp(signals, num_keep, grid):
  mean = signals.question[:, 0]
  return catp.catp_stage1(signals.features, mean, num_keep=num_keep)


def _vtc_cls(signals, num_keep, grid):
  scores = class_attention(signals.deep)
  return vtc_cls.vtc_cls(signals.features, scores, num_keep=num_keep)


def _fastv(signals, num_keep, grid):
  # In place of the last word's row early in a language model: the class
  # token's, early in the encoder.
  scores = class_attention(signals.low)
  return fastv.fastv(signals.features, scores, num_keep=num_keep)


def _hiprune(signals, num_keep, grid):
  shallow, deep = (
    hiprune.received_scores(*attention)
    for attention in (signals.middle, signals.deep)
  )
  return hiprune.hiprune(
    signals.features, shallow, deep, num_keep=num_keep, grid=grid
  )


def _visionzip(signals, num_keep, grid):
  return visionzip.visionzip(
    signals.features,
    _mean_key(signals.deep),
    jnp.sum(_class_row(signals.deep), axis=1),
    num_keep=num_keep,
  )


def _visiondrop(signals, num_keep, grid):
  # Scored by what all patches attend to; with the class token it is VisionZip.
  queries, keys = (x[:, :, 1:] for x in signals.deep)
  num_contextual = min(round(0.135 * num_keep), num_keep - 1)
  return visiondrop.encoder_stage(
    signals.features,
    queries,
    keys,
    num_dominant=num_keep - num_contextual,
    num_contextual=num_contextual,
    class_token=False,
  )


def _prumerge(signals, num_keep, grid, plus=False):
  queries, keys = (_flat_key(x) for x in signals.deep)
  attention = prumerge.prumerge_attention(queries[:, 0], keys)
  inputs = signals.features, keys[:, 1:], attention[:, 1:]
  if not plus:  # a fixed budget instead of the outliers
    return prumerge.prumerge(
      *inputs, num_keep=num_keep, num_salient=num_keep - 1
    )
  # A fifth by attention, the rest evenly spaced, as 64 = 13 + 52 of others.
  salient = max(1, round(0.2 * num_keep))
  stride = -(-signals.features.shape[1] // max(1, num_keep - 1 - salient))
  return prumerge.prumerge_plus(
    *inputs, num_keep=num_keep, num_salient=salient, stride=stride
  )


def _correlation_guided(signals, num_keep, grid):
  return correlation_guided.correlation_guided(
    signals.features,
    _mean_key(signals.low),
    class_attention(signals.low),
    class_attention(signals.deep),
    num_keep=num_keep,
  )


def _center_clip(signals, num_keep, grid):
  return center_clip.center_clip(signals.features, num_keep=num_keep)


def _token_transforming(signals, num_keep, grid):
  return token_transforming.token_transforming(
    signals.features,
    _mean_key(signals.deep),
    class_attention(signals.deep),
    num_keep=num_keep,
  )


def _aim(signals, num_keep, grid):
  return aim.aim_merge(signals.features, num_keep=num_keep)


# What no method is worth anything without.
CONTROLS = ("random", "uniform", "pooling")

METHODS: dict[str, Callable[[Signals, int, tuple[int, int]], types.Reduced]] = {
  "random": _random,
  "uniform": _uniform,
  "pooling": _pooling,
  "divprune": _divprune,
  "todre": _todre,
  "todre k-center": functools.partial(_todre, objective="k_center"),
  "mmtok": _mmtok,
  "catp": _catp,
  "vtc_cls": _vtc_cls,
  "fastv": _fastv,
  "hiprune": _hiprune,
  "visionzip": _visionzip,
  "visiondrop": _visiondrop,
  "prumerge": _prumerge,
  "prumerge+": functools.partial(_prumerge, plus=True),
  "correlation": _correlation_guided,
  "center_clip": _center_clip,
  "transforming": _token_transforming,
  "aim": _aim,
}
