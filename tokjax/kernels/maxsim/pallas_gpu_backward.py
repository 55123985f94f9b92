"""Gradients of MaxSim on Hopper GPUs, given the arg max of the forward pass.

With b* the arg max, the gradient of the documents is a matrix product with
weights that are built in registers, 64 document tokens by 64 query rows:

  W[b, r]       = g[r] where b == b*[r], else 0
  d_documents  += W @ query rows                              (wgmma)

so that no scatter with atomics is needed and the sum is the same every time.
The tensor cores take bfloat16 here: g enters as the sum of two bfloat16 parts
(16 bits) for bfloat16 inputs; for float32 inputs g and the queries enter as
three parts each (24 bits), of whose nine products the six large ones are kept.

The gradient of the queries, one weighted row per (query token, document),
is a gather and a sum that XLA writes.

Bound: 2 * Nd * N * Nq * Q * D FLOPs per product, as many as the forward pass,
and one write of d_documents. Like the forward kernel it has been compiled for
H100 and run in the Mosaic GPU interpreter, and timed nowhere.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokjax import compat
from tokjax.kernels.bfloat16_parts import bfloat16_parts
from tokjax.kernels.hopper_tiles import COLUMN, fill_rings, load_vector
from tokjax.kernels.maxsim import xla
from tokjax.typing import Array, Bool, Float, Int32

__all__ = ["maxsim_backward"]

_CHUNK = 64  # query rows of one product
_TOKENS = 64  # document tokens of one warpgroup
_COMPUTE = 2  # warpgroups that compute; one more fetches
_STAGES = 2
_GATHERED_BYTES = 64 << 20


def maxsim_backward(
  g: Float[Array, "Nq Nd"],
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"],
  document_mask: Bool[Array, "Nd N"],
  index: Int32[Array, "Nq Nd Q"],
  *,
  interpret=False,
):
  """Sends the gradient of each score through its arg max.

  Args:
    g: gradient with respect to the scores.
    queries: as given to `maxsim_forward`.
    documents: as given to `maxsim_forward`.
    query_mask: as given to `maxsim_forward`.
    document_mask: as given to `maxsim_forward`.
    index: as returned by `maxsim_forward`.
    interpret: settings of the Mosaic GPU interpreter; False on a GPU.

  Returns:
    What `reference.maxsim_backward` returns, in the dtypes of the inputs.
  """
  found = jnp.any(document_mask, axis=1)
  g = jnp.where(found[None, :], g.astype(jnp.float32), 0)
  queries = jnp.where(query_mask[:, :, None], queries, 0)
  d_queries = _query_gradient(g, documents, document_mask, index)
  d_queries = jnp.where(query_mask[:, :, None], d_queries, 0)
  # A masked query token, or an empty document, met no token: -1.
  valid = query_mask[:, None, :] & found[None, :, None]
  met = jnp.where(valid, index, -1).swapaxes(0, 1)  # [Nd, Nq, Q]
  weight = jnp.broadcast_to(g.T[:, :, None], met.shape)
  d_documents = _document_gradient(
    queries.reshape(-1, queries.shape[-1]),
    met.reshape(met.shape[0], -1),
    weight.reshape(met.shape[0], -1),
    documents,
    interpret=interpret,
  )
  return d_queries.astype(queries.dtype), d_documents


def _query_gradient(g, documents, document_mask, index):
  """float32[Nq, Q, D], the sum over documents j of g[i, j] documents[j, b*].

  In blocks of documents that gather about 64 MiB at a time.
  """
  g, documents, document_mask, index = compat.varying_together(
    g, documents, document_mask, index
  )
  num_queries, num_documents, query_tokens = index.shape
  _, num_tokens, width = documents.shape
  gathered = num_queries * query_tokens * width * 4
  block = max(1, min(num_documents, _GATHERED_BYTES // gathered))

  def add(total, start, fresh):
    part = lax.dynamic_slice_in_dim(documents, start, block)
    mask = lax.dynamic_slice_in_dim(document_mask, start, block)
    part = jnp.where(mask[:, :, None], part, 0).reshape(-1, width)
    met = lax.dynamic_slice_in_dim(index, start, block, axis=1)
    own = jnp.arange(block, dtype=jnp.int32)[None, :, None]
    rows = part[own * num_tokens + met]  # [Nq, block, Q, D]
    weight = lax.dynamic_slice_in_dim(g, start, block, axis=1)
    weight = jnp.where(fresh[None, :], weight, 0)[:, :, None, None]
    return total + jnp.sum(weight * rows.astype(jnp.float32), axis=1)

  start = jnp.zeros_like(
    documents, shape=(num_queries, query_tokens, width), dtype=jnp.float32
  )
  return xla.each_block(add, start, num_documents, block)


def _document_gradient(rows, met, weight, documents, *, interpret):
  """[Nd, N, D], the sum over query rows r of weight[j, r] rows[r] at met[j, r].

  Args:
    rows: query rows [R, D].
    met: int32[Nd, R], the document token each row met, or -1.
    weight: float32[Nd, R].
    documents: [Nd, N, D], for their shape, dtype and mesh axes.
    interpret: as in `maxsim_backward`.
  """
  num_rows, width = rows.shape
  num_documents, num_tokens, _ = documents.shape
  num_chunks = pl.cdiv(num_rows, _CHUNK)
  extra = num_chunks * _CHUNK - num_rows
  rows = jnp.pad(rows, ((0, extra), (0, 0)))
  met = jnp.pad(met, ((0, 0), (0, extra)), constant_values=-1)
  weight = jnp.pad(weight, ((0, 0), (0, extra)))
  short = max(_TOKENS - num_tokens, 0)  # a tile may not exceed its array
  parts = bfloat16_parts(rows, 3 if rows.dtype == jnp.float32 else 1)
  *parts, met, weight, documents = compat.varying_together(
    *parts,
    met.reshape(num_documents, num_chunks, _CHUNK),
    weight.reshape(num_documents, num_chunks, _CHUNK),
    documents,
  )
  program = _Program(
    dtype=documents.dtype,
    width=width,
    num_tokens=num_tokens,
    num_chunks=num_chunks,
    num_parts=len(parts),
  )
  kernel = plgpu.kernel(
    program.body,
    out_type=[
      compat.result_like(
        (num_documents, num_tokens + short, width),
        documents.dtype,
        documents,
      )
    ],
    scratch_types=program.scratch(),
    grid=(num_documents, pl.cdiv(num_tokens, _TOKENS * _COMPUTE)),
    grid_names=("document", "tile"),
    num_threads=_COMPUTE + 1,
    thread_name="warpgroup",
    kernel_name="maxsim_backward_documents",
    interpret=interpret or None,
  )
  # `plgpu.kernel` forgets over which mesh axes its results vary.
  gradient, _ = compat.varying_together(*kernel(*parts, met, weight), documents)
  return gradient[:, :num_tokens]


def _weight_parts(x, count):
  """As `bfloat16_parts`, inside the kernel, where casts stay."""
  parts = []
  for _ in range(count):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(x.dtype)
  return parts


@dataclasses.dataclass(frozen=True)
class _Program:
  """What one block does: 128 tokens of one document, all query rows."""

  dtype: jnp.dtype
  width: int
  num_tokens: int
  num_chunks: int
  num_parts: int

  def scratch(self):
    """Shared memory and barriers of a block.

    At D = 128 in bfloat16: 2 stages of 16 KiB rows and 32 KiB for the result;
    in float32 three times the rows and twice the result, 160 KiB.
    """
    row_swizzle = plgpu.find_swizzle(self.width * 16)
    out_swizzle, slab = self.out_slab()
    return dict(
      rows_smem=plgpu.SMEM(
        (_STAGES, self.num_parts, _CHUNK, self.width),
        jnp.bfloat16,
        transforms=(
          plgpu.TilingTransform((8, row_swizzle // 2)),
          plgpu.SwizzleTransform(row_swizzle),
        ),
      ),
      out_smem=plgpu.SMEM(
        (_COMPUTE, self.width // slab, _TOKENS, slab),
        self.dtype,
        transforms=(plgpu.SwizzleTransform(out_swizzle),),
      ),
      full=plgpu.Barrier(num_arrivals=self.num_parts, num_barriers=_STAGES),
      empty=plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=_STAGES),
    )

  def out_slab(self):
    """Bytes and values of a result slab's row (as in the forward kernel)."""
    swizzle = plgpu.find_swizzle(self.width * self.dtype.itemsize * 8)
    return swizzle, swizzle // self.dtype.itemsize

  def body(self, *refs, **scratch):
    """One block.

    Args:
      *refs: in device memory, the bfloat16 parts of the query rows, each
        [chunks * 64, D]; met and weight [Nd, chunks, 64]; the gradient
        [Nd, N, D].
      **scratch: what `scratch` names.
    """
    parts, (met, weight, gradient) = refs[: self.num_parts], refs[-3:]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COMPUTE)
    def _():
      plgpu.set_max_registers(56, action="decrease")
      self.fetch(parts, **scratch)

    @pl.when(warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(224, action="increase")
      self.compute(met, weight, gradient, warpgroup, **scratch)

  def fetch(self, parts, *, rows_smem, full, empty, **_):
    """Keeps the ring of query rows full."""

    def wait(slot):
      plgpu.barrier_wait(empty.at[slot])

    def ask(chunk, slot):
      for i, part in enumerate(parts):
        plgpu.copy_gmem_to_smem(
          part.at[pl.ds(chunk * _CHUNK, _CHUNK)],
          rows_smem.at[slot, i],
          full.at[slot],
        )

    fill_rings(self.num_chunks, _STAGES, (wait, ask))

  def compute(
    self, met, weight, gradient, warpgroup, *, rows_smem, out_smem, full, empty
  ):
    """Sums the gradient of 64 tokens in registers and writes it."""
    document = lax.axis_index("document")
    start = (lax.axis_index("tile") * _COMPUTE + warpgroup) * _TOKENS
    shape = (_TOKENS, _CHUNK)
    num_weights = max(2, self.num_parts)

    def multiply(accumulator):
      @pl.loop(0, self.num_chunks)
      def _(chunk):
        slot = lax.rem(chunk, jnp.int32(_STAGES))
        place = (document, chunk)
        token = load_vector(met, place, COLUMN)
        scale = load_vector(weight, place, COLUMN)
        own = start + plgpu.broadcasted_iota(
          jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA
        )
        hit = own == lax.broadcast_in_dim(token, shape, [1])
        dense = jnp.where(hit, lax.broadcast_in_dim(scale, shape, [1]), 0.0)
        weights = _weight_parts(dense, num_weights)
        plgpu.barrier_wait(full.at[slot])
        for i, left in enumerate(weights):
          for j in range(min(self.num_parts, num_weights - i)):
            plgpu.wgmma(accumulator, left, rows_smem.at[slot, j])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[slot])

      return accumulator[...]

    total = pl.run_scoped(
      multiply, plgpu.ACC((_TOKENS, self.width), jnp.float32)
    ).astype(self.dtype)
    _, slab = self.out_slab()
    tiling = (8, slab)
    untile = plgpu.TilingTransform(tiling).undo(None)
    for i in range(self.width // slab):
      tiled = out_smem.at[warpgroup, i].reshape(_TOKENS // 8, 1, *tiling)
      columns = lax.slice(total, (0, i * slab), (_TOKENS, (i + 1) * slab))
      plgpu.transform_ref(tiled, untile)[...] = columns
    plgpu.commit_smem()

    @pl.when(start < self.num_tokens)
    def _():
      for i in range(self.width // slab):  # rows past the end are not written
        plgpu.copy_smem_to_gmem(
          out_smem.at[warpgroup, i],
          gradient.at[document, pl.ds(start, _TOKENS), pl.ds(i * slab, slab)],
        )

    plgpu.wait_smem_to_gmem(0)
