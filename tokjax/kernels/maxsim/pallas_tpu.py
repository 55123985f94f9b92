"""MaxSim on TPU: one matrix product, max and sum per tile, on chip.

Forward. Document tokens lie along the sublanes and query tokens along the
lanes, so that the large operand streams through the matrix unit and the max
over document tokens is elementwise:

  similarity[documents * tokens, rows] = document tile @ query tile^T
  best[documents, rows]   = max over tokens, kept on chip across token blocks
  scores[documents, queries] = sum of best over the rows of each query

Nothing of size queries x documents x tokens reaches HBM, except the arg max
(int32) when it is asked for. Token blocks past the last valid token of every
document in the tile are neither computed nor fetched.

Backward. With b* the arg max, both gradients are matrix products with the
same weights, W[b, a] = g where b == b*(a) and 0 elsewhere, built on chip:

  d_documents tile += W @ query tile
  d_queries tile   += W^T @ document tile

For bfloat16 inputs W enters as the sum of two bfloat16 parts, which keeps 16
bits of g; sums are float32 throughout.

Bound: a document token is read once per query tile of up to 512 rows, so one
query of 32 tokens is bound by HBM (2 D bytes per 64 D FLOPs in bfloat16) and
from about 512 query rows on the matrix unit is the bound. These kernels have
been compiled for TPU v5e, v6e and v7x and run in interpret mode; no fraction
of the bound has been measured on a chip.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokjax import compat
from tokjax.kernels.maxsim import block_sizes as block_sizes_lib
from tokjax.kernels.maxsim import reference, tpu_tiles
from tokjax.typing import Array, Bool, Float, Int32

__all__ = ["maxsim_backward", "maxsim_forward", "unsupported"]

# Extents of the document tiles travel to scalar memory, 1 MiB on a core.
_MAX_TILES = 1 << 16
_VMEM_LIMIT_BYTES = 32 << 20


def unsupported(queries, documents) -> str | None:
  """Why these kernels cannot take the arguments, or None when they can.

  Args:
    queries: [Nq, Q, D], an array or a ShapeDtypeStruct.
    documents: [Nd, N, D], likewise.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> import jax
    >>> queries = jax.ShapeDtypeStruct((2, 32, 128), "float32")
    >>> unsupported(queries, queries) is None
    True
    >>> half = jax.ShapeDtypeStruct((2, 32, 128), "float16")
    >>> unsupported(half, half)
    'dtype float16 is neither float32 nor bfloat16'
  """
  for array in (queries, documents):
    if array.dtype not in (jnp.float32, jnp.bfloat16):
      return f"dtype {array.dtype} is neither float32 nor bfloat16"
  if queries.dtype != documents.dtype:
    return (
      f"dtypes differ: queries {queries.dtype}, documents {documents.dtype}"
    )
  if 0 in queries.shape or 0 in documents.shape:
    return f"an axis is empty: {queries.shape}, {documents.shape}"
  if queries.shape[-1] > 1024:
    return f"width {queries.shape[-1]} is above 1024"
  sizes = _choose(queries, documents, backward=True)
  if pl.cdiv(documents.shape[0], sizes.documents) > _MAX_TILES:
    return f"{documents.shape[0]} documents need more than {_MAX_TILES} tiles"
  return None


def maxsim_forward(
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"],
  document_mask: Bool[Array, "Nd N"],
  *,
  return_index: bool,
  block_sizes: block_sizes_lib.BlockSizes | None = None,
  interpret: bool = False,
) -> (
  Float[Array, "Nq Nd"] | tuple[Float[Array, "Nq Nd"], Int32[Array, "Nq Nd Q"]]
):
  """Scores of all pairs: the sum over query tokens of the best similarity.

  Args:
    queries: float32 or bfloat16; rows outside the mask may hold anything.
    documents: same dtype.
    query_mask: True where a query token counts; holes are allowed.
    document_mask: True where a document token may win; holes are allowed.
    return_index: whether to return the winning token as well.
    block_sizes: tile sizes; None takes the default rule.
    interpret: whether to run the body step by step on any device.

  Returns:
    float32 scores, -1e9 for a document without valid tokens; and, when asked
    for, the position of the winning document token of each query token
    (ties: lower index; 0 where there is none).

  Example:
    >>> import jax.numpy as jnp
    >>> q = jnp.array([[[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]])
    >>> d = jnp.array([[[0.8, 0.6], [-0.6, -0.8], [0.0, 1.0]]])
    >>> mask = jnp.ones((1, 3), bool)
    >>> scores = maxsim_forward(
    ...     q, d, mask, mask, return_index=False, interpret=True)
    >>> round(float(scores[0, 0]), 2)
    2.56
  """
  sizes = block_sizes or _choose(queries, documents)
  tiles = tpu_tiles.Tiles(sizes, queries.shape, documents.shape)
  row_mask = tiles.query_tiles(query_mask[:, :, None])[..., 0]  # [I, C, R]
  operands = compat.varying_together(
    tiles.blocks_in_use(document_mask),  # [J]
    tiles.query_tiles(queries),  # [I, C, R, D]
    row_mask[:, :, None].astype(jnp.int32),  # [I, C, 1, R]
    documents,
    tiles.pad_tokens(document_mask).astype(jnp.int32),  # [J * bd, L * bl]
  )
  outputs = _forward(operands, tiles, return_index, interpret)
  scores = outputs[0].transpose(0, 2, 1)  # [I, bq, J * bd]
  scores = scores.reshape(-1, scores.shape[-1])
  scores = scores[: queries.shape[0], : documents.shape[0]]
  nonempty = document_mask.any(axis=1)
  scores = jnp.where(nonempty[None], scores, reference.EMPTY_SCORE)
  if not return_index:
    return scores
  return scores, tiles.index_from_tiles(outputs[1])


def _forward(operands, tiles, return_index, interpret):
  """Score tiles [I, J * bd, bq] and, if asked, index [I, C, J * bd, R]."""
  documents = operands[3]
  sizes, width = tiles.sizes, tiles.width
  rows, bd, bl = sizes.rows, sizes.documents, sizes.document_tokens
  out_shape = [
    compat.result_like(
      (tiles.num_i, tiles.num_j * bd, sizes.queries), jnp.float32, documents
    )
  ]
  out_specs = [
    pl.BlockSpec((None, bd, sizes.queries), lambda i, j, c, l, n: (i, j, 0))
  ]
  if return_index:
    out_shape.append(
      compat.result_like(
        (tiles.num_i, tiles.num_c, tiles.num_j * bd, rows),
        jnp.int32,
        documents,
      )
    )
    out_specs.append(
      pl.BlockSpec((None, None, bd, rows), lambda i, j, c, l, n: (i, c, j, 0))
    )
  return pl.pallas_call(
    functools.partial(_forward_kernel, sizes=sizes, return_index=return_index),
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(tiles.num_i, tiles.num_j, tiles.num_c, tiles.num_l),
      in_specs=[
        pl.BlockSpec(
          (None, None, rows, width), lambda i, j, c, l, n: (i, c, 0, 0)
        ),
        pl.BlockSpec((None, None, 1, rows), lambda i, j, c, l, n: (i, c, 0, 0)),
        pl.BlockSpec(
          (bd, bl, width), lambda i, j, c, l, n: (j, _block_in_use(j, l, n), 0)
        ),
        pl.BlockSpec(
          (bd, bl), lambda i, j, c, l, n: (j, _block_in_use(j, l, n))
        ),
      ],
      out_specs=out_specs,
      scratch_shapes=[pltpu.VMEM((bd, rows), jnp.float32)],
    ),
    compiler_params=_compiler_params("parallel", "parallel"),
    cost_estimate=tiles.cost(
      documents.nbytes * tiles.num_i * tiles.num_c
      + sum(array.size * array.dtype.itemsize for array in out_shape)
    ),
    interpret=interpret,
    name="maxsim_forward",
  )(*operands)


def _block_in_use(j, l, num_blocks_ref):
  """Token block to have on chip at step l: after the last in use, that one.

  It is there already, so that such a step copies nothing.
  """
  return jnp.minimum(l, jnp.maximum(num_blocks_ref[j] - 1, 0))


def _forward_kernel(
  num_blocks_ref,  # int32[J], scalar memory
  query_ref,  # [R, D]             R * D * itemsize, twice
  row_mask_ref,  # int32[1, R]     32 R bytes, twice
  document_ref,  # [bd, bl, D]     bd * bl * D * itemsize, twice
  token_mask_ref,  # int32[bd, bl] 4 * bd * bl, twice
  scores_ref,  # f32[bd, bq]       512 bd bytes (lanes are padded), twice
  *refs,  # [int32[bd, R], twice]; scratch f32[bd, R]: 4 * bd * R
  sizes,
  return_index,
):
  # On top, at worst: similarities, their masked copy and, with the index,
  # positions, 4 * bd * bl * R bytes each, 2 MiB with the default sizes; in all
  # 14 MiB at D = 128. The compiler folds most of it into the product and
  # reports 0.5 to 3 MiB on v5e and v7x.
  index_ref, best_ref = refs if return_index else (None, *refs)
  c, l = pl.program_id(2), pl.program_id(3)
  bd, bl, rows = sizes.documents, sizes.document_tokens, sizes.rows

  @pl.when(l == 0)
  def _():
    best_ref[...] = jnp.full((bd, rows), -jnp.inf, jnp.float32)
    if return_index:
      index_ref[...] = jnp.zeros((bd, rows), jnp.int32)

  @pl.when(l < num_blocks_ref[pl.program_id(1)])
  def _():
    document = document_ref[...].reshape(bd * bl, -1)  # [bd * bl, D]
    similarity = _dot(document, query_ref[...], ((1,), (1,)))
    similarity = similarity.reshape(bd, bl, rows)
    valid = token_mask_ref[...][:, :, None] != 0  # [bd, bl, 1]
    similarity = jnp.where(valid, similarity, -jnp.inf)
    top = jnp.max(similarity, axis=1)  # [bd, R]
    best = best_ref[...]
    if return_index:
      position = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 1)
      winner = jnp.where(similarity == top[:, None, :], position, bl)
      winner = jnp.min(winner, axis=1) + l * bl  # ties: lower index
      index_ref[...] = jnp.where(top > best, winner, index_ref[...])
    best_ref[...] = jnp.maximum(best, top)

  @pl.when(l == pl.num_programs(3) - 1)
  def _():
    best = jnp.where(row_mask_ref[...] != 0, best_ref[...], 0.0)  # [bd, R]
    lane = jax.lax.broadcasted_iota(jnp.int32, (bd, rows), 1)
    column = jax.lax.broadcasted_iota(jnp.int32, (bd, sizes.queries), 1)
    total = jnp.zeros((bd, sizes.queries), jnp.float32)
    for a in range(sizes.queries):
      own = _of_query(lane, a, sizes)
      score = jnp.sum(jnp.where(own, best, 0.0), axis=1, keepdims=True)
      total = jnp.where(column == a, score, total)

    @pl.when(c == 0)
    def _():
      scores_ref[...] = total

    @pl.when(c > 0)  # a later part of a long query
    def _():
      scores_ref[...] += total


def maxsim_backward(
  g: Float[Array, "Nq Nd"],
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"],
  document_mask: Bool[Array, "Nd N"],
  index: Int32[Array, "Nq Nd Q"],
  *,
  block_sizes: block_sizes_lib.BlockSizes | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "Nq Q D"], Float[Array, "Nd N D"]]:
  """Gradients of the scores, each sent to the winning token alone.

  Args:
    g: gradient with respect to the scores.
    queries: as given to the forward.
    documents: as given to the forward.
    query_mask: masked query tokens give and receive no gradient.
    document_mask: documents without valid tokens receive none.
    index: winning tokens, as the forward returned them.
    block_sizes: tile sizes; None takes the default rule.
    interpret: whether to run the body step by step on any device.

  Returns:
    Gradients of queries and documents, in their dtypes, summed in float32.

  Example:
    >>> import jax.numpy as jnp
    >>> q, d = jnp.ones((1, 1, 2)), jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    >>> one, two = jnp.ones((1, 1), bool), jnp.ones((1, 2), bool)
    >>> dq, dd = maxsim_backward(
    ...     jnp.ones((1, 1)), q, d, one, two, jnp.ones((1, 1, 1), jnp.int32),
    ...     interpret=True)
    >>> dq.tolist(), dd.tolist()
    ([[[3.0, 4.0]]], [[[0.0, 0.0], [1.0, 1.0]]])
  """
  sizes = block_sizes or _choose(queries, documents, backward=True)
  tiles = tpu_tiles.Tiles(sizes, queries.shape, documents.shape)
  valid_pair = query_mask[:, None, :] & document_mask.any(axis=1)[None, :, None]
  # -1 is no position: such a row of the one-hot weights is zero.
  index_tiles = tiles.index_to_tiles(jnp.where(valid_pair, index, -1))
  g_tiles = tiles.pad_pairs(g.astype(jnp.float32))  # [I * bq, J * bd]
  g_tiles = g_tiles.reshape(tiles.num_i, sizes.queries, -1).transpose(0, 2, 1)
  # Padding may hold NaN, and 0 * NaN is NaN: clear what a sum runs over.
  clean = jnp.where(query_mask[:, :, None], queries, 0)
  operands = compat.varying_together(
    tiles.blocks_in_use(document_mask),  # [J]
    index_tiles,  # [I, C, J * bd, R]
    g_tiles,  # [I, J * bd, bq]
    tiles.query_tiles(clean),  # [I, C, R, D]
    documents,
    tiles.pad_tokens(document_mask).astype(jnp.int32),
  )
  d_queries = _query_gradient(operands, tiles, interpret)
  d_documents = _document_gradient(operands, tiles, interpret)
  return d_queries, d_documents


def _document_gradient(operands, tiles, interpret):
  """d_documents: [Nd, N, D], summed over query tiles on chip."""
  num_blocks, index_tiles, g_tiles, query_tiles, documents, _ = operands
  sizes, width = tiles.sizes, documents.shape[-1]
  rows, bd, bl = sizes.rows, sizes.documents, sizes.document_tokens
  return pl.pallas_call(
    functools.partial(_document_gradient_kernel, sizes=sizes),
    out_shape=compat.result_like(documents.shape, documents.dtype, documents),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(tiles.num_j, tiles.num_l, tiles.num_i, tiles.num_c),
      in_specs=[
        pl.BlockSpec(
          (None, None, bd, rows), lambda j, l, i, c, n: (i, c, j, 0)
        ),
        pl.BlockSpec(
          (None, bd, sizes.queries), lambda j, l, i, c, n: (i, j, 0)
        ),
        pl.BlockSpec(
          (None, None, rows, width),
          lambda j, l, i, c, n: (i, c, 0, 0),
        ),
      ],
      out_specs=pl.BlockSpec((bd, bl, width), lambda j, l, i, c, n: (j, l, 0)),
      scratch_shapes=[pltpu.VMEM((bd * bl, width), jnp.float32)],
    ),
    compiler_params=_compiler_params("parallel", "parallel"),
    cost_estimate=tiles.cost(
      documents.nbytes + index_tiles.nbytes * tiles.num_l
    ),
    interpret=interpret,
    name="maxsim_document_gradient",
  )(num_blocks, index_tiles, g_tiles, query_tiles)


def _document_gradient_kernel(
  num_blocks_ref,  # int32[J], scalar memory
  index_ref,  # int32[bd, R]      4 * bd * R bytes, twice
  g_ref,  # f32[bd, bq]           512 bd, twice
  query_ref,  # [R, D]            R * D * itemsize, twice
  gradient_ref,  # [bd, bl, D]    bd * bl * D * itemsize, twice
  sum_ref,  # scratch f32[bd * bl, D]: 4 * bd * bl * D
  *,
  sizes,
):
  # On top: weights in float32 and two bfloat16 parts, 8 * bd * bl * R.
  j, l, i, c = (pl.program_id(axis) for axis in range(4))

  @pl.when((i == 0) & (c == 0))
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(l < num_blocks_ref[j])
  def _():
    weights = _winner_weights(index_ref, g_ref, l, sizes)
    sum_ref[...] += _weighted(weights, query_ref[...], ((1,), (0,)))

  last = (i == pl.num_programs(2) - 1) & (c == pl.num_programs(3) - 1)

  @pl.when(last)
  def _():
    total = sum_ref[...].astype(gradient_ref.dtype)
    gradient_ref[...] = total.reshape(gradient_ref.shape)


def _query_gradient(operands, tiles, interpret):
  """d_queries: [Nq, Q, D], summed over all documents on chip."""
  num_blocks, index_tiles, g_tiles, query_tiles, documents, token_mask = (
    operands
  )
  sizes, width = tiles.sizes, documents.shape[-1]
  rows, bd, bl = sizes.rows, sizes.documents, sizes.document_tokens

  gradient = pl.pallas_call(
    functools.partial(_query_gradient_kernel, sizes=sizes),
    out_shape=compat.result_like(
      query_tiles.shape, query_tiles.dtype, documents
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(tiles.num_i, tiles.num_c, tiles.num_j, tiles.num_l),
      in_specs=[
        pl.BlockSpec(
          (None, None, bd, rows), lambda i, c, j, l, n: (i, c, j, 0)
        ),
        pl.BlockSpec(
          (None, bd, sizes.queries), lambda i, c, j, l, n: (i, j, 0)
        ),
        pl.BlockSpec(
          (bd, bl, width),
          lambda i, c, j, l, n: (j, _block_in_use(j, l, n), 0),
        ),
        pl.BlockSpec(
          (bd, bl), lambda i, c, j, l, n: (j, _block_in_use(j, l, n))
        ),
      ],
      out_specs=pl.BlockSpec(
        (None, None, rows, width), lambda i, c, j, l, n: (i, c, 0, 0)
      ),
      scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32)],
    ),
    compiler_params=_compiler_params("parallel", "parallel"),
    cost_estimate=tiles.cost(
      documents.nbytes * tiles.num_i * tiles.num_c + index_tiles.nbytes
    ),
    interpret=interpret,
    name="maxsim_query_gradient",
  )(num_blocks, index_tiles, g_tiles, documents, token_mask)
  return tiles.queries_from_tiles(gradient)


def _query_gradient_kernel(
  num_blocks_ref,  # int32[J], scalar memory
  index_ref,  # int32[bd, R]      4 * bd * R bytes, twice
  g_ref,  # f32[bd, bq]           512 bd, twice
  document_ref,  # [bd, bl, D]    bd * bl * D * itemsize, twice
  token_mask_ref,  # int32[bd, bl] 4 * bd * bl, twice
  gradient_ref,  # [R, D]         R * D * itemsize, twice
  sum_ref,  # scratch f32[R, D]: 4 * R * D
  *,
  sizes,
):
  # On top: weights in float32 and two bfloat16 parts, 8 * bd * bl * R, and
  # their transposes.
  j, l = pl.program_id(2), pl.program_id(3)

  @pl.when((j == 0) & (l == 0))
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(l < num_blocks_ref[j])
  def _():
    document = document_ref[...]  # [bd, bl, D]
    valid = token_mask_ref[...][:, :, None] != 0
    # 0 * NaN is NaN: rows of padding leave before the product.
    document = jnp.where(valid, document, jnp.zeros_like(document))
    document = document.reshape(sizes.tokens, -1)
    weights = _winner_weights(index_ref, g_ref, l, sizes)
    sum_ref[...] += _weighted(weights, document, ((0,), (0,)))

  last = (j == pl.num_programs(2) - 1) & (l == pl.num_programs(3) - 1)

  @pl.when(last)
  def _():
    gradient_ref[...] = sum_ref[...].astype(gradient_ref.dtype)


def _winner_weights(index_ref, g_ref, l, sizes):
  """W[bd * bl, R]: g where the document token won the query token, else 0."""
  bd, bl, rows = sizes.documents, sizes.document_tokens, sizes.rows
  lane = jax.lax.broadcasted_iota(jnp.int32, (bd, rows), 1)
  spread = jnp.zeros((bd, rows), jnp.float32)  # g of the query of each row
  for a in range(sizes.queries):
    own = _of_query(lane, a, sizes)
    spread = jnp.where(own, g_ref[:, a : a + 1], spread)
  winner = index_ref[...] - l * bl  # [bd, R], position inside the block
  position = jax.lax.broadcasted_iota(jnp.int32, (bd, bl, rows), 1)
  weights = jnp.where(position == winner[:, None, :], spread[:, None, :], 0.0)
  return weights.reshape(bd * bl, rows)


def _of_query(lane, a, sizes):
  """Whether each lane holds a token of query `a` of the tile."""
  first = a * sizes.query_tokens
  return (lane >= first) & (lane < first + sizes.query_tokens)


def _weighted(weights, values, contract):
  """Product of float32 weights with values, to 16 bits of each weight."""
  if values.dtype == jnp.float32:
    return _dot(weights, values, contract)
  high = weights.astype(jnp.bfloat16)
  low = (weights - high.astype(jnp.float32)).astype(jnp.bfloat16)
  return _dot(high, values, contract) + _dot(low, values, contract)


def _dot(a, b, contract):
  # By default the matrix unit rounds float32 operands to bfloat16.
  precision = "highest" if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a,
    b,
    (contract, ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _compiler_params(*outer):
  """The outer grid axes are independent; the inner ones accumulate."""
  return pltpu.CompilerParams(
    dimension_semantics=(*outer, "arbitrary", "arbitrary"),
    vmem_limit_bytes=_VMEM_LIMIT_BYTES,
  )


def _choose(queries, documents, backward=False):
  return block_sizes_lib.default_block_sizes(
    *queries.shape[:2],
    *documents.shape[:2],
    itemsize=documents.dtype.itemsize,
    backward=backward,
  )
