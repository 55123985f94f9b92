"""Column attention in plain JAX over blocks of rows, bounded in memory.

A block holds the scores of some rows against all keys, so that its softmax is
complete and one product of queries and keys is enough: the block is
normalised, added to the columns, and forgotten. It lies as [keys, rows], which
makes the maximum over keys a reduction of whole vectors of rows; the two sums
are products with a vector.
"""

import functools

import jax
import jax.numpy as jnp

from tokjax.typing import Array, Float, Int32

__all__ = ["column_attention_forward"]

# Scores of one block on CPU, in bytes. Measured on two shared cores with 16
# heads of 64 in float32: at 576 tokens blocks of 2 MiB and more take 14 ms,
# smaller ones 19 or more, the dense reference 60; at 2,880 tokens 1 to 8 MiB
# are alike.
CPU_SCRATCH_BYTES = 2 << 20

# Scores of one block of all heads elsewhere.
SCRATCH_BYTES = 64 << 20

_LEAST_ROWS = 8


def column_attention_forward(
  q: Float[Array, "B H R d"],
  k: Float[Array, "B Hk S d"],
  row_ids: Int32[Array, "B R"] | None,
  key_ids: Int32[Array, "B S"] | None,
  row_weight: Float[Array, "B H R"],
  softmax: tuple[Float[Array, "B H R"], Float[Array, "B H R"]] | None = None,
  *,
  scale: float,
  causal: bool,
):
  """Weighted column sums of the softmax, a block of rows at a time.

  Args:
    q: queries, float32 or bfloat16.
    k: keys of the same dtype.
    row_ids: a row sees the keys of its id; None, with `key_ids`, for all.
    key_ids: ids of the keys.
    row_weight: factor of each row, float32.
    softmax: highest score and highest probability of each row, where they are
      known; 0 where a row sees nothing.
    scale: factor of the inner products.
    causal: whether row i sees only keys j <= i + (S - R).

  Returns:
    What `reference.column_attention_forward` returns.
  """
  batch, heads, num_rows, dim = q.shape
  key_heads, num_keys = k.shape[1:3]
  group = heads // key_heads
  # Query heads that read one key head stand beside each other.
  q = q.reshape(batch, key_heads, group, num_rows, dim)
  per_row = batch, key_heads, group, num_rows
  weight = row_weight.reshape(per_row)
  if softmax is not None:
    softmax = tuple(x.reshape(per_row) for x in softmax)

  def block_rows(num_bytes, parallel):
    rows = num_bytes // (4 * num_keys * group * parallel)
    return min(max(rows, _LEAST_ROWS), num_rows)

  def one(block, widen):
    return functools.partial(
      _one_key_head, block=block, scale=scale, causal=causal, widen=widen
    )

  def one_by_one(q, k, row_ids, key_ids, weight, softmax):
    head = one(block_rows(CPU_SCRATCH_BYTES, 1), widen=True)

    def example(arrays):
      q, k, row_ids, key_ids, weight, softmax = arrays
      return jax.lax.map(
        lambda one: head(*one[:2], row_ids, key_ids, *one[2:]),
        (q, k, weight, softmax),
      )

    return jax.lax.map(example, (q, k, row_ids, key_ids, weight, softmax))

  def all_at_once(q, k, row_ids, key_ids, weight, softmax):
    head = one(block_rows(SCRATCH_BYTES, batch * key_heads), widen=False)
    heads = jax.vmap(head, in_axes=(0, 0, None, None, 0, 0))
    return jax.vmap(heads)(q, k, row_ids, key_ids, weight, softmax)

  received, log_normalizer, highest = jax.lax.platform_dependent(
    q,
    k,
    row_ids,
    key_ids,
    weight,
    softmax,
    # Products of bfloat16 values are exact in float32, which CPUs are fast at.
    cpu=one_by_one,
    default=all_at_once,
  )
  return (
    received.reshape(batch, heads, num_keys),
    log_normalizer.reshape(batch, heads, num_rows),
    highest.reshape(batch, heads, num_rows),
  )


def _one_key_head(
  q, k, row_ids, key_ids, weight, softmax, *, block, scale, causal, widen
):
  """Rows of a group of heads against the keys that they share.

  Args:
    q: [G, R, d].
    k: [S, d].
    row_ids: int32[R] or None.
    key_ids: int32[S] or None.
    weight: float32[G, R].
    softmax: twice float32[G, R], or None.
    block: rows per step, at most R.
    scale: factor of the inner products.
    causal: whether row i sees only keys j <= i + (S - R).
    widen: multiply bfloat16 inputs as float32.

  Returns:
    float32 [G, S], [G, R], [G, R].
  """
  group, num_rows, dim = q.shape
  num_keys = k.shape[0]
  if widen:
    k = k.astype(jnp.float32)

  def step(i, carry):
    received, log_normalizer, highest = carry
    # The last block is moved back to fit; what it repeats weighs nothing.
    start = jnp.minimum(i * block, num_rows - block)
    position = start + jnp.arange(block, dtype=jnp.int32)
    rows = jax.lax.dynamic_slice_in_dim(q, start, block, 1)  # [G, r, d]
    share = jax.lax.dynamic_slice_in_dim(weight, start, block, 1)  # [G, r]
    rows = jnp.where((share != 0)[..., None], rows, 0)  # NaN must not spread
    scores = scale * jnp.matmul(  # [S, G * r]
      k,
      rows.reshape(group * block, dim).astype(k.dtype).T,
      precision="highest" if k.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(num_keys, group, block)
    visible = None
    if row_ids is not None:
      ids = jax.lax.dynamic_slice_in_dim(row_ids, start, block)
      visible = key_ids[:, None] == ids[None, :]
    if causal:
      key = jnp.arange(num_keys, dtype=jnp.int32)
      past = key[:, None] <= position[None, :] + (num_keys - num_rows)
      visible = past if visible is None else visible & past
    if visible is not None:
      scores = jnp.where(visible[:, None, :], scores, -jnp.inf)
    if softmax is None:
      top = jnp.max(scores, axis=0)  # [G, r]
      offset = jnp.where(top == -jnp.inf, 0, top)
      exponential = jnp.exp(scores - offset[None])
      total = jnp.einsum(
        "s,sgr->gr",
        jnp.ones_like(exponential[:, 0, 0]),
        exponential,
        precision="highest",
      )
      inverse = jnp.where(total == 0, 0, 1 / total)  # the highest probability
    else:
      offset, inverse = (
        jax.lax.dynamic_slice_in_dim(x, start, block, 1) for x in softmax
      )
      exponential = jnp.exp(scores - offset[None])
    normalizer = jnp.where(inverse == 0, -jnp.inf, offset - jnp.log(inverse))
    fresh = position >= i * block
    received += jnp.einsum(
      "sgr,gr->gs",
      exponential,
      jnp.where(fresh[None, :], share * inverse, 0),
      precision="highest",
    )
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    return (
      received,
      write(log_normalizer, normalizer, start),
      write(highest, inverse, start),
    )

  carry = (
    jnp.zeros_like(weight, shape=(group, num_keys)),
    jnp.zeros_like(weight),
    jnp.zeros_like(weight),
  )
  return jax.lax.fori_loop(0, -(-num_rows // block), step, carry)
