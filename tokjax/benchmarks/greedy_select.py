"""DivPrune against the published PyTorch loop, on this machine.

    python -m tokjax.benchmarks.greedy_select --dim 1024 --out rows.jsonl
    python -m tokjax.benchmarks.greedy_select --batch 1 --encoder clip_l14_336

The loop works on one image after the other and takes the minimum over all rows
kept so far at every step. "divprune" is the whole method, features to kept
features; "selection" starts from the table of distances, which is what differs:
the product of the features is the same for both. Candidates take turns in one
process; torch takes part where it is installed. `of_gemm` is the rate of the
product's FLOPs (2 N^2 D an image) as a fraction of a product of large float32
matrices that takes its turn as well. With `--encoder` the forward pass of that
vision transformer, on as many images, takes its turn too (random weights,
float32): `of_encoder` is the method's time as a fraction of it.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.benchmarks import timing
from tokjax.kernels.greedy_select import greedy_select
from tokjax.models import vit, vit_shapes
from tokjax.reduction.divprune import divprune

__all__ = ["main", "run"]

_GEMM_SIZE = 2048
_STARTS = 16  # clusters of the random tokens


def _tokens(batch, num_tokens, dim):
  """Random tokens in clusters, so that neighbours differ in distance."""
  random = np.random.default_rng(0)
  centres = random.standard_normal((batch, _STARTS, dim), dtype=np.float32)
  of = random.integers(0, _STARTS, (batch, num_tokens, 1))
  noise = random.standard_normal((batch, num_tokens, dim), dtype=np.float32)
  return np.take_along_axis(centres, of, axis=1) + noise


def _torch_loop(num_keep):
  """The published steps for one image: distances, and the kept tokens."""
  import torch

  def distances(x):
    unit = x / x.norm(dim=1, keepdim=True)
    return 1.0 - unit @ unit.T

  def keep(far):
    kept = torch.empty(num_keep, dtype=torch.long)
    for i in range(num_keep):
      if i == 0:  # the second smallest of a column; the smallest is itself
        score = torch.topk(far, 2, dim=0, largest=False).values[1]
      else:
        score = far[kept[:i]].min(dim=0).values
      kept[i] = score.argmax()
    return kept.sort().values

  return distances, keep


def _encoder(name, batch):
  """The forward pass of a vision transformer on black images."""
  config = vit_shapes.shape(name)
  model = vit.Vit(config, rngs=nnx.Rngs(0))
  size = config.image_size
  images = jnp.zeros((batch, size, size, config.num_channels))
  forward = jax.jit(lambda model, images: model.encode(images).tokens)
  return functools.partial(forward, model, images)


def run(
  *,
  batch: int,
  num_tokens: int,
  num_keep: int,
  dim: int,
  repeats: int,
  encoder: str | None = None,
) -> list[dict[str, Any]]:
  """Times the whole method and the selection alone.

  Args:
    batch: images.
    num_tokens: tokens of each.
    num_keep: tokens kept of each.
    dim: width of a token.
    repeats: timed calls of each.
    encoder: a shape of `models.vit_shapes` to compare with; None for none.

  Returns:
    Rows, see `timing.row`.

  Raises:
    RuntimeError: if the loop keeps other tokens.
  """
  features = _tokens(batch, num_tokens, dim)
  x = jax.device_put(features)
  unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
  table = jax.device_put(unit @ unit.swapaxes(1, 2))
  method = jax.jit(functools.partial(divprune, num_keep=num_keep))
  select = jax.jit(functools.partial(greedy_select, num_keep=num_keep))
  candidates: dict[str, Callable[[], Any]] = {
    "divprune/tokjax": lambda: method(x),
    "selection/tokjax": lambda: select(table),
  }
  if importlib.util.find_spec("torch"):
    import torch

    distances, keep = _torch_loop(num_keep)
    images = torch.from_numpy(features)
    tables = 1.0 - torch.from_numpy(np.array(table))

    def whole():
      with torch.inference_mode():
        return [image[keep(distances(image))] for image in images]

    def selection():
      with torch.inference_mode():
        return torch.stack([keep(far) for far in tables])

    ours = np.sort(np.asarray(select(table).index), axis=1)
    same = (ours == selection().numpy()).mean()
    if same < 0.999:
      raise RuntimeError(f"only {same:.1%} of the kept tokens agree")
    candidates["divprune/torch loop"] = whole
    candidates["selection/torch loop"] = selection

  if encoder:
    candidates[f"encoder/{encoder}"] = _encoder(encoder, batch)
  times = timing.compare(
    {**candidates, "gemm": timing.gemm_candidate(_GEMM_SIZE)}, repeats=repeats
  )
  rate = 2 * _GEMM_SIZE**3 / times.pop("gemm")["median_s"]
  flops = 2 * batch * num_tokens**2 * dim
  shape = {"B": batch, "N": num_tokens, "K": num_keep, "D": dim}
  rows = []
  for name, taken in times.items():
    operation, implementation = name.split("/")
    seconds = taken["median_s"]
    more = {}
    if operation != "encoder":
      ours = times[f"{operation}/tokjax"]["median_s"]
      more["us_per_step"] = seconds / num_keep * 1e6
      more["ours_is_faster_by"] = seconds / ours
    if operation == "divprune":
      more["of_gemm"] = flops / seconds / rate
      if encoder:
        more["of_encoder"] = seconds / times[f"encoder/{encoder}"]["median_s"]
    rows.append(
      timing.row(operation, implementation, shape, "float32", taken, **more)
    )
  return rows


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--tokens", type=int, default=576)
  parser.add_argument("--keep", type=int, default=64)
  parser.add_argument("--dim", type=int, default=1024)
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--encoder", help="a vision transformer: clip_l14_336")
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  rows = run(
    batch=options.batch,
    num_tokens=options.tokens,
    num_keep=options.keep,
    dim=options.dim,
    repeats=options.repeats,
    encoder=options.encoder,
  )
  columns = ["operation", "implementation", "median_s", "low_s", "high_s"]
  columns += ["us_per_step", "of_gemm", "ours_is_faster_by", "of_encoder"]
  timing.print_rows(rows, columns)
  if options.out:
    timing.write_rows(rows, options.out)


if __name__ == "__main__":
  main()
