"""Accuracy of a trained ViT whose tokens are reduced on the way, untrained.

    python -m tokjax.benchmarks.reduction_accuracy runs/vit/model cifar10

Every method reduces the patches once, after block `--layer`, to each number of
`--keep`, by what it reads of the blocks up to that one; the class token stays.
ToMe merges as many in every block, between attention and MLP, and Token
Transforming works in three places, so that the mean number of tokens in a block
is near that of the others ("tome", "transforming x3"). FLOPs are those of the
whole forward, by count.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.benchmarks import reduction_methods, timing, trained_vit
from tokjax.data import cifar10, image_batches
from tokjax.models import reducing, vit, vit_weights
from tokjax.ops import plans
from tokjax.reduction import token_transforming, tome, types
from tokjax.train import image_classification

__all__ = [
  "NAMES",
  "beside_class_token",
  "claimed",
  "forward_flops",
  "main",
  "measure",
]


def beside_class_token(
  reduced: types.Reduced, features: jax.Array
) -> types.Reduced:
  """The reduction of all rows that leaves row 0 and reduces the others.

  Args:
    reduced: of features[:, 1:].
    features: [B, 1 + N, D].

  Returns:
    1 + K rows, the class token first.
  """

  def before(x, value):
    widths = [(0, 0)] * (x.ndim - 1) + [(1, 0)]
    return jnp.pad(x, widths, constant_values=value)

  index = before(reduced.index + 1, 0)
  mask = before(reduced.mask, True)
  plan = reduced.plan
  if plan is None:
    return types.selected(features, index, mask)
  if isinstance(plan, plans.Merge):
    plan = plans.Merge(before(plan.slot + 1, 0), before(plan.weight, 1.0))
  else:
    corner = [(0, 0)] * (plan.weight.ndim - 2) + [(1, 0), (1, 0)]
    weight, share = (jnp.pad(x, corner).at[..., 0, 0].set(1.0) for x in plan)
    plan = plans.Transform(weight, share)
  return types.fused(features, plan, index, mask)


def forward_flops(
  config: vit.VitConfig, attention: Sequence[int], mlp: Sequence[int]
) -> float:
  """FLOPs of a forward, multiply and add counted apart.

  Args:
    config: shape of the model.
    attention: rows in the attention of each block.
    mlp: rows in the MLP of each block.

  Returns:
    FLOPs of one image, without head and norms.
  """
  width = config.width
  patches = config.grid[0] * config.grid[1]
  total = 2 * patches * config.patch_size**2 * config.num_channels * width
  for rows, left in zip(attention, mlp, strict=True):
    total += 8 * rows * width**2 + 4 * rows**2 * width
    total += 4 * left * width * config.mlp_width
  return float(total)


def _once(name: str, num_keep: int, config, layer: int):
  """A method of the table after one block, and the rows of every block."""
  method = reduction_methods.METHODS[name]

  def reductions(model, images):
    # Methods read several blocks: all of those up to `layer`, run once before.
    signals = reduction_methods.read(model, images, layer)
    few = method(signals, num_keep, config.grid)

    def reduce(number, features, keys, size, mask):
      return beside_class_token(few, features)

    return (reducing.Reduction(reduce, (layer,), place="after"),)

  whole = 1 + config.grid[0] * config.grid[1]
  rows = [whole] * (layer + 1)
  rows += [1 + num_keep] * (config.num_layers - layer - 1)
  return reductions, rows, rows


def _tome(num_keep: int, config, layer: int):
  """Equal numbers merged in every block; about the same mean of tokens."""
  whole, layers = 1 + config.grid[0] * config.grid[1], config.num_layers
  kept = 1 + num_keep
  mean = ((layer + 1) * whole + (layers - layer - 1) * kept) / layers
  # Block i has whole - i r rows before its merge.
  merged = round(2 * (whole - mean) / (layers - 1)) if layers > 1 else 0
  rows = [whole]
  for _ in range(layers):
    rows.append(rows[-1] - min(merged, (rows[-1] - 1) // 2))

  def reduce(number, features, keys, size, mask):
    metric = jnp.mean(keys.astype(jnp.float32), axis=1)
    return tome.tome(
      features, metric, mask, size, num_keep=rows[number + 1], class_token=True
    )

  merge = reducing.Reduction(reduce, tuple(range(layers)))
  return lambda model, images: (merge,), rows[:-1], rows[1:]


def _transforming(num_keep: int, config, layer: int):
  """Many-to-many mixing after a quarter, a half and three quarters."""
  whole, layers = 1 + config.grid[0] * config.grid[1], config.num_layers
  places = sorted({max(0, round(layers * s) - 1) for s in (0.25, 0.5, 0.75)})
  rate = ((1 + num_keep) / whole) ** (1 / len(places))
  left, rows = {}, []
  for block in range(layers):
    rows.append(left.get(block - 1, rows[-1] if rows else whole))
    if block in places:
      left[block] = max(2, round(rows[-1] * rate))

  def reduce(number, features, keys, size, mask, queries):
    metric = jnp.mean(keys.astype(jnp.float32), axis=1)
    attention = reduction_methods.Attention(queries, keys)
    return token_transforming.token_transforming(
      features,
      metric,
      jnp.pad(reduction_methods.class_attention(attention), ((0, 0), (1, 0))),
      mask,
      size,
      num_keep=left[number],
      num_protected=1,
    )

  mix = reducing.Reduction(reduce, tuple(places), place="after", queries=True)
  return lambda model, images: (mix,), rows, rows


_SPREAD: dict[str, Callable] = {"tome": _tome, "transforming x3": _transforming}
NAMES = (*reduction_methods.METHODS, *_SPREAD)


def measure(
  model: vit.Vit,
  data: image_batches.ImageSet,
  *,
  keep: Sequence[int],
  layer: int,
  methods: Sequence[str] = NAMES,
) -> list[dict[str, Any]]:
  """Accuracy and FLOPs of a model under reductions.

  Args:
    model: a ViT with a class token.
    data: test images.
    keep: numbers of patches to keep.
    layer: block after which the patches are reduced, from 0.
    methods: of `NAMES`.

  Returns:
    Rows: `method`, `keep`, `accuracy` in 0..1, `gflops` of an image, `share`
    of the FLOPs without reduction. The first is the model as it is.

  Raises:
    ValueError: if images are not of the size of the model, or a number of
      patches is out of range.
  """
  config = model.config
  checks.same_size(
    image_size=config.image_size, image_height=data.images.shape[1]
  )
  whole = [1 + config.grid[0] * config.grid[1]] * config.num_layers
  full = forward_flops(config, whole, whole)
  rows = [
    {
      "method": "none",
      "keep": whole[0] - 1,
      "accuracy": image_classification.accuracy(model, data),
      "gflops": full / 1e9,
      "share": 1.0,
    }
  ]
  for name in methods:
    for num_keep in keep:
      if name in _SPREAD:
        reductions, *counts = _SPREAD[name](num_keep, config, layer)
      else:
        reductions, *counts = _once(name, num_keep, config, layer)

      def predict(model, images, reductions=reductions):
        return model(images, reductions=reductions(model, images))

      flops = forward_flops(config, *counts)
      rows.append(
        {
          "method": name,
          "keep": num_keep,
          "accuracy": image_classification.accuracy(
            model, data, predict=predict
          ),
          "gflops": flops / 1e9,
          "share": flops / full,
        }
      )
  return rows


def claimed(
  run: trained_vit.VitRun,
  *,
  keep: Sequence[int] = (32, 16, 8),
  layer: int = 1,
  methods: Sequence[str] = NAMES,
  progress: bool = True,
) -> dict[str, trained_vit.Row]:
  """Accuracy of one trained encoder; what claims measure.

  Args:
    run: the encoder.
    keep: numbers of patches to keep, of 64.
    layer: block after which the patches are reduced, of 4.
    methods: of `NAMES`.
    progress: not used.

  Returns:
    Rows "none" and "METHOD K" with `accuracy` and `share`.
  """
  del progress
  _, test = cifar10.load(run.dataset)
  model = trained_vit.load(run)
  rows = measure(model, test, keep=keep, layer=layer, methods=methods)
  result = {}
  for row in rows:
    name = row["method"]
    name += "" if name == "none" else f" {row['keep']}"
    metrics = {metric: row[metric] for metric in ("accuracy", "share")}
    result[name] = trained_vit.Row(metrics)
  return result


def main(argv: list[str] | None = None) -> None:
  """Measures and prints the table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("model", help="folder of a ViT with a class token")
  parser.add_argument("data", help="what `tokjax.data.cifar10.load` reads")
  parser.add_argument("--keep", type=int, nargs="*", default=[32, 16, 8])
  parser.add_argument("--layer", type=int, default=1)
  parser.add_argument("--images", type=int, help="use only the first ones")
  parser.add_argument("--methods", nargs="*", choices=NAMES, default=NAMES)
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  _, test = cifar10.load(options.data)
  count = options.images or test.num_images
  test = dataclasses.replace(
    test, images=test.images[:count], labels=test.labels[:count]
  )
  rows = measure(
    vit_weights.load(options.model),
    test,
    keep=options.keep,
    layer=options.layer,
    methods=options.methods,
  )
  timing.print_rows(rows, ["method", "keep", "accuracy", "gflops", "share"])
  if options.out:
    timing.write_rows(rows, options.out)


if __name__ == "__main__":
  main()
