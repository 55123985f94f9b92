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
  photographs = trained_vit.photographs(run)
  made = scenes.compose(test, photographs, num_scenes=num_scenes, seed=run.seed)
  accuracy, _ = scenes.reader(model, train)
  overview = scenes.see(model, _overviews(made.squares))
  pieces = scenes.see(model, made.squares)
  num_patches = overview.patches.shape[1]
  of_overview = _scores(overview)
  of_crops = _scores(pieces).reshape(num_scenes, 4, num_patches)
  crops = pieces.patches.reshape(num_scenes, 4, num_patches, -1)
  joint = jnp.concatenate(
    [overview.patches, crops.reshape(num_scenes, 4 * num_patches, -1)], axis=1
  )
  best = global_com_scores.holistic_scores(
    of_crops,
    of_overview,
    jnp.ones(of_crops.shape, bool),
    grid=_GRID,
    alpha=0.5,
  )
  every = jnp.concatenate([of_overview[:, None], best], axis=1)

  def row(reduced, crop_of):
    crop = np.concatenate([np.full(num_patches, -1), np.asarray(crop_of)])
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

  # Crop of each token of the stream of `global_com`, a canvas in raster order,
  # and of crops one after the other.
  by_crop = jnp.repeat(jnp.arange(4)[:, None], num_patches, axis=1)
  canvas = global_com_scores.canvas_of_crops(by_crop, _GRID).reshape(-1)
  in_turn = by_crop.reshape(-1)
  budgeted = jax.jit(
    global_com.global_com,
    static_argnames=("grid", "keep_ratio", "temperature"),
  )
  result = {"whole": row(_equal(joint, every, num_patches), in_turn)}
  for ratio in ratios:
    found = budgeted(
      overview.patches,
      crops,
      of_overview,
      of_crops,
      grid=_GRID,
      keep_ratio=ratio,
      temperature=temperature,
    )
    result[f"global {ratio}"] = row(found, canvas)
    budget = max(1, int(num_patches * ratio))
    result[f"equal {ratio}"] = row(_equal(joint, every, budget), in_turn)
    chance = controls.random_keep(
      jax.random.key(run.seed), joint, num_keep=5 * budget
    )
    result[f"random {ratio}"] = row(chance, in_turn)
  return result


def _overviews(squares):
  """Scenes at half their size: uint8 [B, 4, s, s, 3] to [B, s, s, 3]."""
  size = squares.shape[2]
  whole = squares.reshape(-1, 2, 2, size, size, 3).swapaxes(2, 3)
  whole = whole.reshape(-1, size, 2, size, 2, 3).mean(axis=(2, 4))
  return whole.round().astype(np.uint8)


def _scores(seen):
  """Attention of the class token to the patches, as GlobalCom² takes it."""
  query = seen.last.queries[:, :, 0]
  return global_com_scores.class_scores(query, seen.last.keys)


def _equal(joint, every, budget):
  """The `budget` best tokens of each view, by scores [B, 5, N] of all views."""
  num_scenes, num_views, num_patches = every.shape
  kept = packing.keep_top_k(every.reshape(-1, num_patches), budget).index
  start = num_patches * jnp.arange(num_views)[:, None]
  kept = kept.reshape(num_scenes, num_views, budget) + start[None]
  return types.selected(joint, kept.reshape(num_scenes, -1))
