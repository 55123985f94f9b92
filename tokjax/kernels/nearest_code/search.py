"""The search itself, on local arrays: operands, implementation, merge.

The nearest code of a row is the one with the largest <row, code> - offset.
Every implementation gets these three float32 arrays and returns, per row, the
index of that code and its score.
"""

import functools
import importlib
from collections.abc import Hashable
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from tokjax import checks, compat
from tokjax.kernels import hopper
from tokjax.kernels.nearest_code import reference, xla
from tokjax.ops import selection, similarity
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = [
  "METRICS",
  "NearestCodes",
  "check",
  "nearest",
  "operands",
  "top",
]

METRICS = ("euclidean", "cosine")


class NearestCodes(NamedTuple):
  """The nearest codes of each token, nearest first.

  Attributes:
    distance: float32, ascending: the squared Euclidean distance, up to
      roundings of the size of |x|^2, or 1 - cosine. inf where `index` is -1.
    index: position in the codebook; -1 for masked tokens, and where fewer than
      k codes are finite.
  """

  distance: Float[Array, "*batch k"]
  index: Int32[Array, "*batch k"]


def check(x, codebook, mask, *, metric, block_size, implementation=None):
  """Raises for what does not fit together.

  Args:
    x: as in `nearest_code`, and so on.
    codebook: likewise.
    mask: likewise.
    metric: likewise.
    block_size: likewise.
    implementation: likewise.
  """
  checks.in_range(1, 32, x_axes=len(x.shape))
  checks.has_rank(2, codebook=codebook)
  checks.same_size(x_dim=x.shape[-1], codebook_dim=codebook.shape[1])
  checks.in_range(1, 1 << 31, codes=codebook.shape[0], dim=codebook.shape[1])
  if mask is not None and mask.shape != x.shape[:-1]:
    raise ValueError(
      f"mask must have shape {x.shape[:-1]}, got {tuple(mask.shape)}"
    )
  checks.one_of(METRICS, metric=metric)
  checks.one_of(
    (None, *get_args(Implementation)), implementation=implementation
  )
  if block_size is not None:
    checks.in_range(1, 1 << 31, block_size=block_size)
    if implementation == "reference":
      raise ValueError(
        "block_size has no meaning for implementation 'reference', "
        f"got {block_size}"
      )


def nearest(
  x: Float[Array, "*batch D"],
  codebook: Float[Array, "K D"],
  mask: Bool[Array, "*batch"] | None,
  axis_name: Hashable | None = None,
  *,
  metric: str,
  block_size: int | None,
  implementation: str | None,
) -> Int32[Array, "*batch"]:
  """`nearest_code` on the arrays of one device.

  Args:
    x: tokens.
    codebook: all codes, or this device's.
    mask: as in `nearest_code`.
    axis_name: mesh axis or axes over which codes are spread; None for none.
    metric: as in `nearest_code`.
    block_size: likewise.
    implementation: likewise.

  Returns:
    What `nearest_code` returns.
  """
  arrays = compat.varying_together(*operands(x, codebook, mask, metric))
  index, score = _dispatch(arrays, implementation, block_size)
  if axis_name is not None:
    local = selection.TopK(score[:, None], index[:, None])
    found = selection.gather_top_k(
      local, 1, shard_size=codebook.shape[0], axis_name=axis_name
    )
    index = jnp.maximum(found.index[:, 0], 0)  # -1: no score but -inf
  index = index.reshape(x.shape[:-1])
  return index if mask is None else jnp.where(mask, index, -1)


def top(
  x: Float[Array, "*batch D"],
  codebook: Float[Array, "K D"],
  mask: Bool[Array, "*batch"] | None,
  axis_name: Hashable | None = None,
  *,
  k: int,
  metric: str,
  block_size: int,
) -> NearestCodes:
  """`topk_codes` on the arrays of one device.

  Args:
    x: tokens.
    codebook: all codes, or this device's.
    mask: as in `topk_codes`.
    axis_name: mesh axis or axes over which codes are spread; None for none.
    k: as in `topk_codes`.
    metric: likewise.
    block_size: likewise.

  Returns:
    What `topk_codes` returns.
  """
  rows, codes, offset = operands(x, codebook, mask, metric)
  size = codes.shape[0]
  found = xla.top(
    *compat.varying_together(rows, codes, offset),
    k=min(k, size),
    block_size=min(block_size, size),
  )
  if axis_name is not None:
    found = selection.gather_top_k(
      found, k, shard_size=size, axis_name=axis_name
    )
  if metric == "cosine":
    distance = 1 - found.values
  else:
    square = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
    distance = square - 2 * found.values
  shape = (*x.shape[:-1], k)
  distance = jnp.maximum(distance, 0).reshape(shape)
  index = found.index.reshape(shape)
  if mask is not None:
    distance = jnp.where(mask[..., None], distance, jnp.inf)
    index = jnp.where(mask[..., None], index, -1)
  return NearestCodes(distance, index)


def operands(
  x: Float[Array, "*batch D"],
  codebook: Float[Array, "K D"],
  mask: Bool[Array, "*batch"] | None,
  metric: str,
) -> tuple[Float[Array, "n D"], Float[Array, "K D"], Float[Array, " K"]]:
  """What the implementations work on.

  Args:
    x: tokens.
    codebook: codes.
    mask: True where a token is real.
    metric: as in `nearest_code`.

  Returns:
    float32 rows, codes and offsets, all finite where rows and codes are; the
    offset of a code that is not is inf, and the code zero.
  """
  x, codebook = jax.lax.stop_gradient((x, codebook))
  if mask is not None:
    x = jnp.where(mask[..., None], x, 0)
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  finite = jnp.all(jnp.isfinite(codebook), axis=1)
  codes = jnp.where(finite[:, None], codebook, 0).astype(jnp.float32)
  if metric == "cosine":
    rows, codes = map(similarity.safe_normalize, (rows, codes))
    offset = jnp.zeros_like(codes[:, 0])
  else:
    offset = jnp.sum(jnp.square(codes), axis=1) / 2
  return rows, codes, jnp.where(finite, offset, jnp.inf)


def _dispatch(arrays, implementation, block_size):
  """Runs the implementation named, or that of the platform."""
  rows, codes, _ = arrays
  if rows.shape[0] == 0:
    return jnp.zeros_like(rows[:, 0], dtype=jnp.int32), rows[:, 0]
  if implementation == "reference":
    return reference.nearest(*arrays)

  def branch(module):
    return functools.partial(module.nearest, block_size=block_size)

  if implementation is not None:
    module = _module(implementation)
    if implementation.startswith("pallas"):
      reason = module.unsupported(rows, codes, block_size)
      if reason is not None:
        raise NotImplementedError(f"{implementation}: {reason}")
    return branch(module)(*arrays)
  branches = {"default": branch(xla)}
  kernels = {"tpu": "pallas_tpu"}
  if hopper.on_hopper():
    kernels["cuda"] = "pallas_gpu"
  for platform, name in kernels.items():
    module = _module(name)
    if module.unsupported(rows, codes, block_size) is None:
      branches[platform] = branch(module)
  return jax.lax.platform_dependent(*arrays, **branches)


def _module(name: str):
  """The module of an implementation; only its users import Pallas."""
  return importlib.import_module(f"tokjax.kernels.nearest_code.{name}")
