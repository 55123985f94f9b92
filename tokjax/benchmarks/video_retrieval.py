"""Finding videos by a still, with the tokens of their frames clustered.

For the claim of CenterCLIP, whose text-video data sets need a text tower that
is not here. A video is two photographs, one after the other: a slow pan over
the first, a cut, a pan over the second. A question is another view of one of
the photographs, mirrored and closer; the video that shows it is to be found by
the cosine of class tokens. Twelve frames become four pseudo-frames in the
middle of the encoder.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tokjax.benchmarks import trained_vit
from tokjax.benchmarks.reduction_accuracy import forward_flops
from tokjax.models import reducing, vit
from tokjax.ops import plans, similarity
from tokjax.reduction import center_clip, controls, types
from tokjax.train import image_classification

__all__ = [
  "METHODS",
  "found_videos",
  "measure",
  "pan",
  "pseudo_frame",
  "still",
]

_FRAMES, _SEGMENTS = 12, 4


def pan(photograph: np.ndarray, num_frames: int, side: int) -> np.ndarray:
  """A window that moves over a photograph from left to right.

  Args:
    photograph: uint8 [height, width, 3].
    num_frames: windows, evenly spaced over the middle half of the width.
    side: pixels of a window.

  Returns:
    uint8 [num_frames, side, side, 3]; two thirds of the height are seen.
  """
  whole = _resized(photograph, side * 3 // 2)
  top, room = (whole.shape[0] - side) // 2, whole.shape[1] - side
  starts = np.linspace(room / 4, 3 * room / 4, num_frames).round().astype(int)
  return np.stack(
    [whole[top : top + side, x : x + side] for x in starts.tolist()]
  )


def still(photograph: np.ndarray, side: int) -> np.ndarray:
  """Another view of a photograph: its middle, closer, mirrored.

  Args:
    photograph: uint8 [height, width, 3].
    side: pixels.

  Returns:
    uint8 [side, side, 3].
  """
  whole = _resized(photograph, side * 9 // 5)
  top, left = ((size - side) // 2 for size in whole.shape[:2])
  return whole[top : top + side, left : left + side][:, ::-1]


def _resized(photograph, shorter):
  image = Image.fromarray(photograph)
  scale = shorter / min(image.size)
  size = [round(x * scale) for x in image.size]
  return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def pseudo_frame(
  reduced: types.Reduced, features: jax.Array, num_frames: int
) -> types.Reduced:
  """Joined frames with their class tokens averaged and patches reduced.

  Args:
    reduced: K of all patches of the frames, frame after frame.
    features: [B, f (1 + P), D], each frame with its class token first.
    num_frames: f.

  Returns:
    1 + K rows; a `plans.Merge` of all rows.
  """
  rows = features.shape[1]
  patch = np.arange(rows).reshape(num_frames, -1)[:, 1:].reshape(-1)
  plan = reduced.plan
  if plan is None:
    plan = _as_merge(reduced, patch.size)

  def one(slot, weight, index):
    slots = jnp.zeros(rows, jnp.int32).at[patch].set(slot + 1)
    weights = jnp.full(rows, 1 / num_frames).at[patch].set(weight)
    index = jnp.concatenate(
      [jnp.zeros(1, jnp.int32), jnp.asarray(patch)[index]]
    )
    return plans.Merge(slots, weights), index

  plan, index = jax.vmap(one)(plan.slot, plan.weight, reduced.index)
  mask = jnp.pad(reduced.mask, ((0, 0), (1, 0)), constant_values=True)
  return types.fused(features, plan, index, mask)


def _as_merge(reduced, num_patches):
  """A selection as a plan; what is dropped goes behind the last slot."""

  def one(index, mask):
    number = jnp.arange(index.size, dtype=jnp.int32)
    place = jnp.where(mask, index, num_patches)  # out of range: not written
    slot = jnp.full(num_patches, index.size, jnp.int32)
    return slot.at[place].set(number, mode="drop")

  slot = jax.vmap(one)(reduced.index, reduced.mask)
  return plans.Merge(slot, jnp.ones(slot.shape, jnp.float32))


def _medoids(patches, num_keep, aggregation="medoid", algorithm="kmedoids"):
  return center_clip.center_clip(
    patches, num_keep=num_keep, aggregation=aggregation, algorithm=algorithm
  )


def _spectral(patches, num_keep):
  return _medoids(patches, num_keep, algorithm="spectral")


def _means(patches, num_keep):
  return _medoids(patches, num_keep, aggregation="mean")


def _random(patches, num_keep):
  return controls.random_keep(jax.random.key(0), patches, num_keep=num_keep)


def _pooled(patches, num_keep):
  """The mean of the frames, neighbors averaged where fewer are left."""
  frames = _FRAMES // _SEGMENTS
  per_frame = patches.shape[1] // frames
  side = round(per_frame**0.5)
  first = controls.pool_keep(
    patches[:, :per_frame], num_keep=num_keep, grid=(side, side)
  )
  slot, weight = (jnp.tile(x, (1, frames)) for x in first.plan)
  return types.fused(patches, plans.Merge(slot, weight / frames), first.index)


METHODS: dict[str, Callable[[jax.Array, int], types.Reduced]] = {
  "medoids": _medoids,
  "spectral": _spectral,
  "cluster means": _means,
  "random": _random,
  "pooling": _pooled,
}


def found_videos(
  model: vit.Vit,
  photographs: Sequence[np.ndarray],
  reduce: Callable[[jax.Array, int], types.Reduced] | None,
  num_keep: int = 0,
) -> float:
  """Share of stills whose video comes first.

  Args:
    model: an encoder with a class token.
    photographs: uint8 [height, width, 3], two for each video.
    reduce: `reduce(patches, num_keep)` of the joined frames of a segment; None
      for all frames as they are.
    num_keep: patches of a pseudo-frame.

  Returns:
    R@1 in 0..1.
  """
  side = model.config.image_size
  half = _FRAMES // 2
  frames = np.concatenate([pan(photo, half, side) for photo in photographs])
  stills = np.stack([still(photo, side) for photo in photographs])
  group, reductions = 1, ()
  if reduce is not None:
    group = _FRAMES // _SEGMENTS

    def function(layer, features, keys, size, mask):
      batch, _, width = features.shape
      by_frame = features.reshape(batch, group, -1, width)[:, :, 1:]
      reduced = reduce(by_frame.reshape(batch, -1, width), num_keep)
      return pseudo_frame(reduced, features, group)

    half_up = (model.config.num_layers // 2,)
    reductions = (
      reducing.Reduction(function, half_up, "before", frames=group),
    )

  def embed(model, pixels, reductions):
    x = image_classification.pixels(pixels)
    found = model.encode(x, reductions=reductions, proportional=False)
    return model.normalize(found.tokens[:, 0])

  embed = jax.jit(embed, static_argnums=2)
  size = 20 * _FRAMES
  parts = [
    embed(model, frames[i : i + size], reductions)
    for i in range(0, len(frames), size)
  ]
  videos = jnp.concatenate(parts).reshape(
    len(photographs) // 2, _FRAMES // group, -1
  )
  videos = center_clip.pool_frames(videos)
  questions = similarity.safe_normalize(embed(model, stills, ()))
  scores = jnp.matmul(questions, videos.T, precision="highest")
  right = jnp.arange(len(photographs)) // 2
  return float(jnp.mean(jnp.argmax(scores, axis=1) == right))


def measure(
  run: trained_vit.VitRun,
  *,
  keep: Sequence[int] = (64, 32, 16),
  progress: bool = True,
) -> dict[str, trained_vit.Row]:
  """R@1 of all methods; what the claim measures.

  Args:
    run: the encoder; `pictures` is the folder of photographs.
    keep: patches of a pseudo-frame, of 192.
    progress: not used.

  Returns:
    Rows "all frames" and "METHOD K" with `R@1` and `share`, the FLOPs of the
    encoder without the clustering.
  """
  del progress
  model = trained_vit.load(run)
  photographs = trained_vit.photographs(run)
  photographs = photographs[: len(photographs) // 2 * 2]
  result = {
    "all frames": trained_vit.Row(
      {"R@1": found_videos(model, photographs, None), "share": 1.0}
    )
  }
  for num_keep in keep:
    share = _share(model.config, num_keep)
    for name, method in METHODS.items():
      found = found_videos(model, photographs, method, num_keep)
      result[f"{name} {num_keep}"] = trained_vit.Row(
        {"R@1": found, "share": share}
      )
  return result


def _share(config, num_keep):
  """FLOPs of a reduced video over those of all its frames."""
  whole, below = config.num_layers, config.num_layers // 2
  rows = 1 + config.grid[0] * config.grid[1]
  patches = forward_flops(config, [], [])
  above = [1 + num_keep] * (whole - below)
  first = _FRAMES * forward_flops(config, [rows] * below, [rows] * below)
  second = _SEGMENTS * (forward_flops(config, above, above) - patches)
  full = _FRAMES * forward_flops(config, [rows] * whole, [rows] * whole)
  return (first + second) / full
