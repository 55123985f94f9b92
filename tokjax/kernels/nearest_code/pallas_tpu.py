"""Nearest codes on TPU: product, offset and arg max of a tile in one launch.

The grid walks over tiles of tokens and, inside, over tiles of codes. A tile of
scores is made by the matrix unit and lies as [tokens, codes]; its 128-column
slices are compared one after the other with the best score that each token has
seen in each lane. What stays in vector memory is that best score and the
number of its slice, per token and lane. A slice takes a subtraction, a
comparison and two selections; the lanes are compared with each other once,
after the last tile of codes. Earlier slices keep ties, and so do lower indices
among the lanes.

Bound: the matrix unit. float32 products are six passes over bfloat16 parts,
and a width below 128 (256 on v6e and v7x) takes as long as 128. Codes are read
once for each tile of tokens, from an array that lies as [D, K], as a width
of 8 along the lanes would be padded to 128. The kernel has been compiled for
TPU v5e, v6e and v7x and run in interpret mode; nothing has been measured on a
chip.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokjax import compat
from tokjax.kernels.nearest_code import block_sizes
from tokjax.kernels.padding import pad_to
from tokjax.typing import Array, Float, Int32

__all__ = ["nearest", "unsupported"]

_LANES = 128
_MAX_DIM = 512
_MAX_BLOCK = 1024
_VMEM_LIMIT_BYTES = 56 << 20


def unsupported(x, codes, block_size: int | None = None) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    x: [n, D], an array or a ShapeDtypeStruct.
    codes: [K, D], likewise.
    block_size: as in `nearest_code`.

  Returns:
    The reason, from shapes alone.

  Example:
    >>> import jax
    >>> x = jax.ShapeDtypeStruct((256, 8), "float32")
    >>> codes = jax.ShapeDtypeStruct((4096, 8), "float32")
    >>> unsupported(x, codes) is None
    True
    >>> unsupported(x, codes, 1000)
    'block_size 1000 is not a multiple of 128 up to 1024'
  """
  if 0 in x.shape:
    return f"x is empty: {x.shape}"
  if codes.shape[1] > _MAX_DIM:
    return f"width {codes.shape[1]} is more than {_MAX_DIM}"
  if block_size is not None and (
    block_size % _LANES or block_size > _MAX_BLOCK
  ):
    return f"block_size {block_size} is not a multiple of 128 up to 1024"
  return None


def nearest(
  x: Float[Array, "n D"],
  codes: Float[Array, "K D"],
  offset: Float[Array, " K"],
  *,
  block_size: int | None = None,
  interpret: bool = False,
) -> tuple[Int32[Array, " n"], Float[Array, " n"]]:
  """The code of each row, as `reference.nearest` finds it.

  Args:
    x: rows, float32.
    codes: finite, float32.
    offset: float32; inf for a code that must not be chosen.
    block_size: codes of one tile, a multiple of 128; None for a rule.
    interpret: whether to run the body step by step on any device.

  Returns:
    What `reference.nearest` returns, but the score of a row that holds NaN is
    -inf.

  Example:
    >>> x, codes = jnp.array([[1.0], [9.0]]), jnp.array([[0.0], [8.0], [8.0]])
    >>> run = jax.jit(nearest, static_argnames="interpret")
    >>> offset = jnp.array([0.0, 32.0, 32.0])
    >>> index, score = run(x, codes, offset, interpret=True)
    >>> index.tolist(), score.tolist()
    ([0, 1], [0.0, 40.0])
  """
  (num_tokens, dim), num_codes = x.shape, codes.shape[0]
  sizes = block_sizes.default_block_sizes(num_tokens, num_codes)
  if block_size is not None:
    sizes = block_sizes.BlockSizes(sizes.tokens, block_size)
  num_i = pl.cdiv(num_tokens, sizes.tokens)
  num_j = pl.cdiv(num_codes, sizes.codes)
  # A tile may not exceed its array; larger arrays stay as they are. Whatever
  # is read past the end of the codes has an offset of inf.
  x = pad_to(x, 0, max(num_tokens, sizes.tokens), 0)
  codes = pad_to(codes.T, 1, max(num_codes, sizes.codes), 0)
  offset = pad_to(offset[None, :], 1, num_j * sizes.codes, jnp.inf)
  x, codes, offset = compat.varying_together(x, codes, offset)

  per_token = pl.BlockSpec((None, 1, sizes.tokens), lambda i, j: (i, 0, 0))
  index, score = pl.pallas_call(
    _kernel,
    out_shape=[
      compat.result_like((num_i, 1, sizes.tokens), dtype, x)
      for dtype in (jnp.int32, jnp.float32)
    ],
    grid=(num_i, num_j),
    in_specs=[
      pl.BlockSpec((sizes.tokens, dim), lambda i, j: (i, 0)),
      pl.BlockSpec((dim, sizes.codes), lambda i, j: (0, j)),
      pl.BlockSpec((1, sizes.codes), lambda i, j: (0, j)),
    ],
    out_specs=[per_token] * 2,
    scratch_shapes=dict(
      best_ref=pltpu.VMEM((sizes.tokens, _LANES), jnp.float32),
      first_ref=pltpu.VMEM((sizes.tokens, _LANES), jnp.int32),
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=_VMEM_LIMIT_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * num_tokens * num_codes * dim,
      bytes_accessed=x.nbytes + num_i * codes.nbytes + 8 * num_tokens,
      transcendentals=0,
    ),
    interpret=interpret,
    name="nearest_code",
  )(x, codes, offset)
  return index.reshape(-1)[:num_tokens], score.reshape(-1)[:num_tokens]


def _kernel(
  x_ref,  # f32[tokens, D]       4 * tokens * max(D, 128) bytes, twice
  codes_ref,  # f32[D, codes]    4 * D * codes, twice
  offset_ref,  # f32[1, codes]   32 * codes (sublanes are padded), twice
  index_ref,  # int32[1, tokens]  32 * tokens, twice
  score_ref,  # f32[1, tokens]    32 * tokens, twice
  *,
  best_ref,  # scratch f32[tokens, 128]: best score of each lane
  first_ref,  # scratch int32[tokens, 128]: index of lane 0 of its slice
):
  # On top: scores, and the bfloat16 parts that the compiler makes of the
  # operands. With 1,024 tokens and 512 codes of width 256 it reports 8 MB, 5 of
  # them operands, results and scratch.
  j = pl.program_id(1)

  @pl.when(j == 0)
  def _():
    best_ref[...] = jnp.full(best_ref.shape, -jnp.inf, jnp.float32)
    first_ref[...] = jnp.zeros(first_ref.shape, jnp.int32)

  scores = jnp.dot(  # [tokens, codes]
    x_ref[...],
    codes_ref[...],
    # By default the matrix unit rounds float32 operands to bfloat16.
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  scores -= offset_ref[...]
  num_codes = scores.shape[1]
  best, first = best_ref[...], first_ref[...]
  for start in range(0, num_codes, _LANES):
    part = scores[:, start : start + _LANES]
    better = part > best  # strict, and False for NaN
    best = jnp.where(better, part, best)
    first = jnp.where(better, j * num_codes + start, first)
  best_ref[...], first_ref[...] = best, first

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    lane = jax.lax.broadcasted_iota(jnp.int32, first.shape, 1)
    index, score = (first + lane).T, best.T  # [128, tokens]
    highest = jnp.max(score, axis=0, keepdims=True)
    last = jnp.iinfo(jnp.int32).max
    index = jnp.where(score == highest, index, last)
    index_ref[...] = jnp.min(index, axis=0, keepdims=True)
    score_ref[...] = highest
