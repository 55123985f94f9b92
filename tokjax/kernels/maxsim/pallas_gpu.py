"""MaxSim on Hopper GPUs: one matrix product, max and sum per tile, on chip.

Query tokens are the rows and document tokens the columns of a warpgroup's
matrix product, whose accumulator stays in registers:

  similarity[rows, tokens] = query tile @ document tile^T     (wgmma)
  best[rows]   = max over the valid tokens, kept across the tiles of a document
  score        = sum of best over the rows of a query

A block stays on its multiprocessor and walks over documents. It holds its
query rows in shared memory; one warpgroup does nothing but ask for document
tiles, which land in a ring of shared-memory slots, and two warpgroups compute.
With few query rows each of the two walks its own documents; with many, both
take the same document tile with different rows.

bfloat16 products are exact in float32. The tensor cores read float32 as tf32
(10 bits of mantissa), so float32 inputs are split in two tf32 parts each and
multiplied three times, high * high + low * high + high * low, which leaves an
error near 2^-20 of |query| * |document|.

Bound: a document token is read once per query block of up to 256 rows, so one
query of 32 tokens is bound by HBM (2 D bytes per 64 D FLOPs in bfloat16).
The kernel has been compiled for H100 and run in the Mosaic GPU interpreter on
CPU, in bfloat16 and in float32; it has not run on a GPU, and no fraction of
the bound has been measured.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokjax import compat
from tokjax.kernels.hopper_tiles import COLUMN, ROW, fill_rings, load_vector
from tokjax.kernels.maxsim import gpu_block_sizes
from tokjax.kernels.maxsim.gpu_block_sizes import BlockSizes
from tokjax.kernels.maxsim.pallas_gpu_backward import maxsim_backward
from tokjax.kernels.maxsim.reference import EMPTY_SCORE
from tokjax.kernels.padding import pad_to
from tokjax.typing import Array, Bool, Float

__all__ = ["maxsim_backward", "maxsim_forward", "unsupported"]

_MAX_WIDTH = {"bfloat16": 256, "float32": 128}  # by shared memory
_COMPUTE = 2  # warpgroups that compute; one more fetches


def unsupported(queries, documents) -> str | None:
  """Why this kernel cannot take the arguments, or None when it can.

  Args:
    queries: [Nq, Q, D], an array or a ShapeDtypeStruct.
    documents: [Nd, N, D], likewise.

  Returns:
    The reason, from shapes and dtypes alone.

  Example:
    >>> bf16 = jnp.zeros((2, 8, 64), jnp.bfloat16)
    >>> unsupported(bf16, bf16) is None
    True
    >>> unsupported(bf16.astype(jnp.float16), bf16.astype(jnp.float16))
    'dtype must be bfloat16 or float32, got float16'
  """
  dtype = jnp.dtype(queries.dtype)
  if dtype.name not in _MAX_WIDTH:
    return f"dtype must be bfloat16 or float32, got {dtype.name}"
  if documents.dtype != dtype:
    return f"dtypes must agree, got {dtype.name}, {documents.dtype.name}"
  width = queries.shape[-1]
  if width % 16:
    return f"D must be a multiple of 16, got {width}"
  if width > _MAX_WIDTH[dtype.name]:
    most = _MAX_WIDTH[dtype.name]
    return f"D must be at most {most} in {dtype.name}, got {width}"
  if 0 in (*queries.shape, *documents.shape):
    return f"no axis may be empty, got {queries.shape}, {documents.shape}"
  return None


def maxsim_forward(
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"],
  document_mask: Bool[Array, "Nd N"],
  *,
  return_index: bool,
  block_sizes: BlockSizes | None = None,
  interpret=False,
):
  """Scores every query against every document, as the reference does.

  Args:
    queries: query vectors, float32 or bfloat16.
    documents: document vectors, same dtype.
    query_mask: True where the query token is valid.
    document_mask: True where the document token is valid; holes are allowed.
    return_index: also return which document token each query token met.
    block_sizes: tile sizes; None takes those of `default_block_sizes`.
    interpret: settings of the Mosaic GPU interpreter; False on a GPU.

  Returns:
    Scores float32[Nq, Nd]; with `return_index` also int32[Nq, Nd, Q], lowest
    index among ties, 0 for an empty document and for a masked query token.
  """
  num_queries, query_tokens, width = queries.shape
  num_documents, document_tokens, _ = documents.shape
  sizes = block_sizes or gpu_block_sizes.default_block_sizes(
    num_queries,
    query_tokens,
    document_tokens,
    width,
    itemsize=queries.dtype.itemsize,
    return_index=return_index,
  )
  query_rows = gpu_block_sizes.padded_query(query_tokens)
  num_blocks = pl.cdiv(num_queries * query_rows, sizes.block_rows)
  num_rows = num_blocks * sizes.block_rows
  rows = pad_to(queries, 1, query_rows).reshape(-1, width)
  rows = pad_to(rows, 0, num_rows)  # [rows, D]
  row_valid = pad_to(query_mask, 1, query_rows).reshape(-1)
  row_valid = pad_to(row_valid, 0, num_rows).astype(jnp.float32)
  num_tiles = pl.cdiv(document_tokens, sizes.tokens)
  padded = num_tiles * sizes.tokens
  token_valid = pad_to(document_mask, 1, padded).astype(jnp.float32)
  if document_tokens < sizes.tokens:  # a tile may not exceed its array
    documents = pad_to(documents, 1, sizes.tokens)

  segment = min(query_rows, 64)
  sums, *index = _call(
    rows,
    documents,
    row_valid.reshape(-1, sizes.rows),
    token_valid.reshape(num_documents, num_tiles, sizes.tokens),
    sizes=sizes,
    segment=segment,
    return_index=return_index,
    interpret=interpret,
  )
  sums = sums[: num_queries * query_rows // segment]
  scores = jnp.sum(sums.reshape(num_queries, -1, num_documents), axis=1)
  # An empty document sums to -inf.
  scores = jnp.maximum(scores, EMPTY_SCORE)
  if not return_index:
    return scores
  index = index[0].swapaxes(0, 1).reshape(num_documents, num_rows)
  index = index[:, : num_queries * query_rows]
  index = index.reshape(num_documents, num_queries, query_rows)
  return scores, index.swapaxes(0, 1)[:, :, :query_tokens]


def _call(
  rows,  # [rows, D]
  documents,  # [Nd, N, D]
  row_valid,  # float32[row tiles, sizes.rows], 1 or 0
  token_valid,  # float32[Nd, tiles, sizes.tokens], 1 or 0
  *,
  sizes,
  segment,
  return_index,
  interpret,
):
  """Sums per segment of rows, and the arg max per row when asked for.

  Returns:
    float32[rows / segment, Nd] and, with `return_index`,
    int32[row tiles, Nd, sizes.rows].
  """
  num_rows, width = rows.shape
  num_documents = documents.shape[0]
  num_blocks = num_rows // sizes.block_rows
  programs = gpu_block_sizes.walking_blocks(num_blocks, num_documents, sizes)
  rows, documents, row_valid, token_valid = compat.varying_together(
    rows, documents, row_valid, token_valid
  )
  out = [
    compat.result_like((num_rows // segment, num_documents), jnp.float32, rows)
  ]
  if return_index:
    shape = (num_rows // sizes.rows, num_documents, sizes.rows)
    out.append(compat.result_like(shape, jnp.int32, rows))
  operands = _split(rows) if rows.dtype == jnp.float32 else (rows,)
  program = _Program(
    sizes=sizes,
    segment=segment,
    width=width,
    dtype=rows.dtype,
    num_blocks=num_blocks,
    programs=programs,
    num_documents=num_documents,
    num_tiles=token_valid.shape[1],
    return_index=return_index,
  )
  kernel = plgpu.kernel(
    program.body,
    out_type=out,
    scratch_types=program.scratch(),
    grid=(num_blocks * programs,),
    grid_names=("block",),
    num_threads=_COMPUTE + 1,
    thread_name="warpgroup",
    kernel_name="maxsim_forward",
    interpret=interpret or None,
  )
  out = kernel(*operands, documents, row_valid, token_valid)
  # `plgpu.kernel` forgets over which mesh axes its results vary.
  return compat.varying_together(*out, rows)[:-1]


@dataclasses.dataclass(frozen=True)
class _Program:
  """What one block does; every size is static.

  A block holds the rows of query block `block % num_blocks`, so that blocks
  that run side by side read the same documents at about the same time, and
  walks over documents in steps of `programs` walkers (times the rings).
  """

  sizes: BlockSizes
  segment: int
  width: int
  dtype: jnp.dtype
  num_blocks: int
  programs: int
  num_documents: int
  num_tiles: int
  return_index: bool

  @property
  def parts(self) -> int:
    """Arrays that hold the query rows."""
    return 2 if self.dtype == jnp.float32 else 1

  @property
  def walkers(self) -> int:
    """Documents that are worked on at once by the blocks of a query block."""
    return self.programs * self.sizes.rings

  @property
  def documents_per_walker(self) -> int:
    return pl.cdiv(self.num_documents, self.walkers)

  @property
  def row_tiles(self) -> int:
    """Row tiles of a block."""
    return self.sizes.block_rows // self.sizes.rows

  @property
  def swizzle(self) -> int:
    """Bytes of a slab's row: 128, 64 or 32, whichever divides D."""
    return plgpu.find_swizzle(self.width * self.dtype.itemsize * 8)

  @property
  def slab(self) -> int:
    """Values in a slab's row."""
    return self.swizzle // self.dtype.itemsize

  @property
  def slabs(self) -> int:
    """Slabs in a tile."""
    return self.width // self.slab

  def scratch(self):
    """Shared memory and barriers of a block.

    A document tile is stored as slabs [tokens, slab] without tiles along the
    tokens: a tiled copy would need N to be a multiple of 8.
    """
    sizes = self.sizes
    swizzle = plgpu.SwizzleTransform(self.swizzle)
    tiling = plgpu.TilingTransform((8, self.slab))
    slots = sizes.rings * sizes.stages

    def tiles(count):
      shape = (count, self.slabs, sizes.tokens, self.slab)
      return plgpu.SMEM(shape, self.dtype, transforms=(swizzle,))

    return dict(
      rows_smem=plgpu.SMEM(
        (self.row_tiles * self.parts, sizes.rows, self.width),
        self.dtype,
        transforms=(tiling, swizzle),
      ),
      tiles_smem=tiles(slots),
      low_smem=tiles(_COMPUTE) if self.parts == 2 else None,
      best_smem=plgpu.SMEM((_COMPUTE, sizes.rows), jnp.float32),
      rows_ready=plgpu.Barrier(
        num_arrivals=self.parts, num_barriers=self.row_tiles
      ),
      full=plgpu.Barrier(num_arrivals=self.slabs, num_barriers=slots),
      empty=plgpu.Barrier(
        num_arrivals=_COMPUTE // sizes.rings, num_barriers=slots
      ),
    )

  def body(self, *refs, **scratch):
    """One block.

    Args:
      *refs: in device memory, the query rows [rows, D] (float32: high and low
        parts), documents [Nd, N, D], row_valid [row tiles, sizes.rows],
        token_valid [Nd, tiles, sizes.tokens]; the results as in `_call`.
      **scratch: what `scratch` names.
    """
    operands, refs = refs[: self.parts], refs[self.parts :]
    documents, row_valid, token_valid, *outputs = refs
    block = lax.axis_index("block")
    query_block = lax.rem(block, jnp.int32(self.num_blocks))
    program = lax.div(block, jnp.int32(self.num_blocks))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COMPUTE)
    def _():
      plgpu.set_max_registers(56, action="decrease")
      self.fetch(operands, documents, query_block, program, **scratch)

    @pl.when(warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(224, action="increase")
      self.compute(
        row_valid,
        token_valid,
        outputs,
        query_block,
        program,
        warpgroup,
        **scratch,
      )

  def document(self, walker, step):
    """Document of a walker; past the end it repeats the last one."""
    document = walker + step * self.walkers
    return jnp.minimum(document, self.num_documents - 1)

  def fetch(
    self,
    operands,
    documents,
    query_block,
    program,
    *,
    rows_smem,
    tiles_smem,
    rows_ready,
    full,
    empty,
    **_,
  ):
    """Asks for the query rows, then keeps the rings full."""
    sizes = self.sizes
    for tile in range(self.row_tiles):
      start = query_block * sizes.block_rows + tile * sizes.rows
      for part, operand in enumerate(operands):
        plgpu.copy_gmem_to_smem(
          operand.at[pl.ds(start, sizes.rows)],
          rows_smem.at[tile * self.parts + part],
          rows_ready.at[tile],
        )

    def ask(step, slot):
      for ring in range(sizes.rings):
        walker = program * sizes.rings + ring
        document = self.document(
          walker, lax.div(step, jnp.int32(self.num_tiles))
        )
        tile = lax.rem(step, jnp.int32(self.num_tiles))
        tokens = pl.ds(tile * sizes.tokens, sizes.tokens)
        place = ring * sizes.stages + slot
        for i in range(self.slabs):
          plgpu.copy_gmem_to_smem(
            documents.at[document, tokens, pl.ds(i * self.slab, self.slab)],
            tiles_smem.at[place, i],
            full.at[place],
          )

    def wait(slot):
      for ring in range(sizes.rings):
        plgpu.barrier_wait(empty.at[ring * sizes.stages + slot])

    total = self.documents_per_walker * self.num_tiles
    fill_rings(total, sizes.stages, (wait, ask))

  def compute(
    self,
    row_valid,
    token_valid,
    outputs,
    query_block,
    program,
    warpgroup,
    *,
    rows_smem,
    tiles_smem,
    low_smem,
    best_smem,
    rows_ready,
    full,
    empty,
  ):
    """Walks over documents with one row tile."""
    sizes = self.sizes
    ring = 0 if sizes.shared else warpgroup
    row_tile = warpgroup if sizes.shared else 0
    out_tile = query_block * self.row_tiles + row_tile
    walker = program * sizes.rings + ring
    best_smem = best_smem.at[warpgroup]
    keep = load_vector(row_valid, out_tile, ROW) > 0
    plgpu.barrier_wait(rows_ready.at[row_tile])

    @pl.loop(0, self.documents_per_walker)
    def _(step):
      document = self.document(walker, step)

      def reduce_tile(tile, carry):
        best, index = carry
        slot = lax.rem(step * self.num_tiles + tile, jnp.int32(sizes.stages))
        slot = ring * sizes.stages + slot
        valid = load_vector(token_valid, (document, tile), COLUMN)
        plgpu.barrier_wait(full.at[slot])
        similarity = self.similarity(
          rows_smem, row_tile, tiles_smem.at[slot], low_smem, warpgroup
        )
        plgpu.barrier_arrive(empty.at[slot])
        valid = lax.broadcast_in_dim(valid, similarity.shape, [1])
        similarity = jnp.where(valid > 0, similarity, -jnp.inf)
        tile_best = jnp.max(similarity, axis=1)
        if self.return_index:
          column = self.first_column(similarity, tile_best)
          index = jnp.where(
            tile_best > best, column + tile * sizes.tokens, index
          )
        return jnp.maximum(best, tile_best), index

      def full_rows(value, dtype):
        return plgpu.layout_cast(jnp.full((sizes.rows,), value, dtype), ROW)

      best, index = lax.fori_loop(
        0,
        self.num_tiles,
        reduce_tile,
        (full_rows(-jnp.inf, jnp.float32), full_rows(0, jnp.int32)),
      )
      # An empty document stays -inf, whatever the query mask says.
      best_smem[...] = jnp.where(keep | (best == -jnp.inf), best, 0.0)
      for i in range(sizes.rows // self.segment):
        rows = pl.ds(i * self.segment, self.segment)
        part = load_vector(best_smem, rows, COLUMN)
        place = out_tile * (sizes.rows // self.segment) + i
        outputs[0][place, document] = jnp.sum(part)
      if self.return_index:
        outputs[1][out_tile, document] = jnp.where(keep, index, 0)

  def first_column(self, similarity, best):
    """First column of each row that holds its maximum."""
    columns = plgpu.broadcasted_iota(
      jnp.int32, similarity.shape, 1, layout=plgpu.Layout.WGMMA
    )
    hit = similarity == lax.broadcast_in_dim(best, similarity.shape, [0])
    return jnp.min(jnp.where(hit, columns, self.sizes.tokens - 1), axis=1)

  def operand(self, slab):
    """A slab as the tensor cores address it: in tiles of 8 tokens."""
    tiling = (8, self.slab)
    slab = slab.reshape(self.sizes.tokens // 8, 1, *tiling)
    return plgpu.transform_ref(slab, plgpu.TilingTransform(tiling).undo(None))

  def similarity(self, rows_smem, row_tile, tile_smem, low_smem, warpgroup):
    """float32[rows, tokens] products of the query rows with a tile."""
    slabs = range(self.slabs)
    tile = [self.operand(tile_smem.at[i]) for i in slabs]
    if self.parts == 1:
      pairs = [(row_tile, tile)]
    else:
      low = [self.operand(low_smem.at[warpgroup, i]) for i in slabs]
      self.split_tile(tile, low)
      pairs = [
        (2 * row_tile, tile),
        (2 * row_tile + 1, tile),
        (2 * row_tile, low),
      ]

    def multiply(accumulator):
      for part, tokens in pairs:
        for i in slabs:
          columns = pl.ds(i * self.slab, self.slab)
          plgpu.wgmma(
            accumulator,
            rows_smem.at[part, :, columns],
            plgpu.transpose_ref(tokens[i], (1, 0)),
          )
      return accumulator[...]

    shape = (self.sizes.rows, self.sizes.tokens)
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

  def split_tile(self, tile, low):
    """Leaves the high parts of a float32 tile in place, writes the low."""
    shape = (self.sizes.tokens, self.slab)
    layout = plgpu.Layout.SMEM_GMEM_COPY(shape, self.dtype, self.swizzle)
    for whole, rest in zip(tile, low, strict=True):
      values = plgpu.layout_cast(whole[...], layout)
      high = _high(values)
      whole[...] = high
      rest[...] = values - high
    plgpu.commit_smem()


def _high(x):
  """The part of float32 values that tf32 holds: 10 bits of mantissa."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  return lax.bitcast_convert_type(bits & -(1 << 13), jnp.float32)


def _split(x):
  high = _high(x)
  return high, x - high
