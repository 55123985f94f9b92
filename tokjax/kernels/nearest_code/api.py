"""Public nearest-code search: checks, and one program per call."""

import functools
from typing import Literal

import jax

from tokjax import checks
from tokjax.kernels.nearest_code import search, sharding
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = ["nearest_code", "topk_codes"]


def nearest_code(
  x: Float[Array, "*batch D"],
  codebook: Float[Array, "K D"],
  mask: Bool[Array, "*batch"] | None = None,
  *,
  metric: Literal["euclidean", "cosine"] = "euclidean",
  block_size: int | None = None,
  implementation: Implementation | None = None,
) -> Int32[Array, "*batch"]:
  """Index of the code nearest to each token, without the [tokens, K] scores.

      euclidean  argmax_k <x, e_k> - |e_k|^2 / 2       orders as |x - e_k| does
      cosine     argmax_k <x / |x|, e_k / |e_k|>       a zero vector stays zero

  Exact up to float32 roundings of the size of |x| |e_k| (centre vectors that
  lie far from zero); ties go to the lowest index. A block of codes is scored
  and only the best score and index of each token are kept. Inputs of any float
  dtype are computed with as float32, products at full precision: bfloat16
  passes would swap near ties. No gradient passes.

  Args:
    x: tokens, one or many.
    codebook: one code per row. A code that holds NaN or inf is never chosen.
    mask: True where a token is real; None for all. What the others hold has no
      influence.
    metric: what nearest means, static.
    block_size: codes scored at once, static; None for the choice of the
      implementation. The TPU kernel takes multiples of 128 up to 1,024, the
      GPU kernel multiples of 32 up to 128; "reference", which scores all at
      once, takes none.
    implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu" runs that
      one or raises. None chooses when the program is lowered: the TPU kernel
      on TPU where it takes the arguments, "xla" elsewhere, and the GPU kernel
      only where the mesh of `jax.set_mesh` says that its devices are Hopper
      GPUs.

  Returns:
    Positions in the codebook; -1 where `mask` is False, 0 for a token that
    holds NaN.

  Raises:
    ValueError: if widths or shapes disagree, for an unknown metric, or if a
      sharded axis would have to be whole.
    NotImplementedError: if the named implementation cannot take the arguments.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> codebook = jnp.array([[0.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> x = jnp.array([[1.0, 1.0], [3.0, 0.0], [9.0, 9.0]])
    >>> mask = jnp.array([True, True, False])
    >>> jax.jit(nearest_code)(x, codebook, mask).tolist()
    [0, 1, -1]

  Cost: 2 N K D FLOPs for N tokens; 4 (N D + K D) + 4 N bytes, codes read again
  for each block of tokens; holds one block of scores. The GPU kernel holds
  6 (N D + K D) bytes of bfloat16 parts instead, and no score.

  On an Explicit mesh tokens may be sharded over all axes but the last and
  codes over their first: each device searches its codes, then pairs of a score
  and an index are compared. A mesh axis that shards both shards tokens, and
  the codes are gathered. On an Auto mesh use `sharded_nearest_code` for
  sharded codes, and wrap the kernels in `jax.shard_map`.

  Source: the formula is that of van den Oord, Vinyals and Kavukcuoglu (2017),
  "Neural Discrete Representation Learning"; blocks, masks and the tie rule are
  ours.
  """
  search.check(
    x, codebook, mask, metric=metric, block_size=block_size,
    implementation=implementation,
  )  # fmt: skip
  return _nearest_code(
    x,
    codebook,
    mask,
    metric=metric,
    block_size=block_size,
    implementation=implementation,
  )


@functools.partial(
  jax.jit, static_argnames=("metric", "block_size", "implementation")
)
def _nearest_code(x, codebook, mask, **settings):
  local = functools.partial(search.nearest, **settings)
  return sharding.over_shards(local, x, codebook, mask)


def topk_codes(
  x: Float[Array, "*batch D"],
  codebook: Float[Array, "K D"],
  k: int,
  mask: Bool[Array, "*batch"] | None = None,
  *,
  metric: Literal["euclidean", "cosine"] = "euclidean",
  block_size: int = 4096,
) -> search.NearestCodes:
  """The k codes nearest to each token, nearest first, for beam searches.

  A block of codes is scored at a time and merged with the best k so far.
  Exact as `nearest_code` is, with its tie rule. No gradient passes.

  Args:
    x: tokens, any float dtype; computed with as float32.
    codebook: one code per row. A code that holds NaN or inf is never chosen.
    k: how many, static, at most K.
    mask: True where a token is real; None for all.
    metric: what nearest means, static.
    block_size: codes scored at once, static.

  Returns:
    Distances, ascending, and positions in the codebook.

  Raises:
    ValueError: if widths or shapes disagree, `k` is out of range, for an
      unknown metric, or if a sharded axis would have to be whole.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> codebook = jnp.array([[0.0], [5.0], [2.0]])
    >>> search = jax.jit(topk_codes, static_argnames="k")
    >>> found = search(jnp.array([[4.0]]), codebook, k=2)
    >>> found.index.tolist(), found.distance.tolist()
    ([[1, 2]], [[1.0, 4.0]])

  Cost: 2 N K D FLOPs for N tokens, and a selection among `block_size` scores
  for each token and block. Holds at most 16 MiB of scores, but those of eight
  tokens always fit. May be sharded on an Explicit mesh as `nearest_code`.

  Source: ours.
  """
  search.check(x, codebook, mask, metric=metric, block_size=block_size)
  checks.in_range(1, codebook.shape[0], k=k)
  return _topk_codes(
    x, codebook, mask, k=k, metric=metric, block_size=block_size
  )


@functools.partial(jax.jit, static_argnames=("k", "metric", "block_size"))
def _topk_codes(x, codebook, mask, **settings):
  local = functools.partial(search.top, **settings)
  return sharding.over_shards(local, x, codebook, mask)
