"""An overview and four crops: which budgets keep the tokens that matter.

For the claim of GlobalCom² on scenes of `tokjax.benchmarks.scenes`: all ways
see the same scores of tokens, and differ in how many each crop may keep.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.benchmarks import scenes, trained_vit
from tokjax.data import cifar10
from tokjax.models import images
from tokjax.ops import packing
from tokjax.reduction import controls, global_com, global_com_scores, types

__all__ = ["measure"]

_GRID = (2, 2)


def measure(
  run: trained_vit.VitRun,
  *,
  ratios: Sequence[float] = (0.5, 0.25, 0.1),
  temperature: float = 10.0,
  num_scenes: int = 1000,
  progress: bool = True,
) -> dict[str, trained_vit.Row]:
  """Reads scenes from what each way keeps; what the claim measures.

  Args:
    run: the encoder; `pictures` is the folder of photographs.
    ratios: shares of the tokens of overview and crops that are kept.
    temperature: of the budgets; the paper's 10 is for the logits of CLIP.
    num_scenes: test images.
    progress: not used.

  Returns:
    Rows "whole", and for each ratio "global R" (GlobalCom²), "equal R" (the
    same scores, but every crop keeps the same number) and "random R". `object`
    is the share of kept crop tokens that are the object's, `accuracy` that of a
    linear reader of the mean of kept tokens.
  """
  del progress
  model = trained_vit.load(run)
  train, test = cifar10.load(run.dataset)
  photographs = [images.read(path) for path in images.in_folder(run.pictures)]
  made = scenes.compose(test, photographs, num_scenes=num_scenes, seed=run.seed)
  accuracy, _ = scenes.reader(model, train)
  size = made.squares.shape[2]
  whole = made.squares.reshape(-1, 2, 2, size, size, 3).swapaxes(2, 3)
  whole = whole.reshape(-1, size, 2, size, 2, 3).mean(axis=(2, 4))
  overview = scenes.see(model, whole.round().astype(np.uint8))
  pieces = scenes.see(model, made.squares.reshape(-1, size, size, 3))

  def scores(seen):
    query = seen.last.queries[:, :, 0]
    return global_com_scores.class_scores(query, seen.last.keys)

  num_patches = overview.patches.shape[1]
  of_crops = scores(pieces).reshape(num_scenes, 4, num_patches)
  patches = pieces.patches.reshape(num_scenes, 4, num_patches, -1)
  joint = jnp.concatenate(
    [overview.patches, patches.reshape(num_scenes, 4 * num_patches, -1)], axis=1
  )
  everything = types.selected(
    joint, jnp.tile(jnp.arange(joint.shape[1]), (num_scenes, 1))
  )
  # Crop of each token of the stream of `global_com`, a canvas in raster order.
  by_crop = jnp.repeat(jnp.arange(4)[:, None], num_patches, axis=1)
  canvas = global_com_scores.canvas_of_crops(by_crop, _GRID).reshape(-1)

  def row(reduced, crop_of):
    crop = np.asarray(jnp.concatenate([jnp.full(num_patches, -1), crop_of]))
    crop = crop[np.asarray(reduced.index)]
    kept = np.asarray(reduced.mask)
    right = (crop == made.place[:, None]) & kept
    share = right.sum() / ((crop >= 0) & kept).sum()
    return trained_vit.Row(
      {
        "accuracy": accuracy(reduced, made.labels),
        "object": float(share),
        "tokens": float(kept.sum(1).mean()),
      }
    )

  side_by_side = jnp.repeat(jnp.arange(4), num_patches)
  budgeted = jax.jit(
    global_com.global_com,
    static_argnames=("grid", "keep_ratio", "temperature"),
  )
  result = {"whole": row(everything, side_by_side)}
  for ratio in ratios:
    found = budgeted(
      overview.patches,
      patches,
      scores(overview),
      of_crops,
      grid=_GRID,
      keep_ratio=ratio,
      temperature=temperature,
    )
    result[f"global {ratio}"] = row(found, canvas)
    budget = max(1, int(num_patches * ratio))
    best = global_com_scores.holistic_scores(
      of_crops,
      scores(overview),
      jnp.ones(of_crops.shape, bool),
      grid=_GRID,
      alpha=0.5,
    )
    every = jnp.concatenate([scores(overview)[:, None], best], axis=1)
    kept = packing.keep_top_k(
      every.reshape(-1, num_patches), budget
    ).index.reshape(num_scenes, 5, budget)
    start = num_patches * jnp.arange(5)[None, :, None]
    equal = types.selected(joint, (kept + start).reshape(num_scenes, -1))
    result[f"equal {ratio}"] = row(equal, side_by_side)
    chance = controls.random_keep(
      jax.random.key(run.seed), joint, num_keep=5 * budget
    )
    result[f"random {ratio}"] = row(chance, side_by_side)
  return result
