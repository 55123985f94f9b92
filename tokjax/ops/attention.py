"""Attention under a mask: the plain form, for what fits in memory.

    attend(queries, keys, values, mask)       # [B, H, N, e]
    parts = [attend_with_lse(queries, k, v) for k, v in pieces]
    functools.reduce(merge, parts).out        # as over all keys at once

What was read is told by its result and the logarithm of what the softmax
divided by (`lse`): two such pairs of other keys merge into that of both. Rings,
sparse and chunked attention are sums of parts in this sense.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float

__all__ = [
  "AttentionState",
  "attend",
  "attend_cotangents",
  "attend_with_highest",
  "attend_with_lse",
  "cut_rows",
  "join_rows",
  "merge",
]


class AttentionState(NamedTuple):
  """Attention over some of the keys; see `merge`.

  Attributes:
    out: float32; zeros for a query that read nothing.
    lse: log of the sum of the exponentials of its logits, float32; -inf for a
      query that read nothing.
  """

  out: Float[Array, "B H N e"]
  lse: Float[Array, "B H N"]


def attend(
  queries: Float[Array, "B H N d"],
  keys: Float[Array, "B K M d"],
  values: Float[Array, "B K M e"],
  mask: Bool[Array, "N M"] | Bool[Array, "#B N M"] | None = None,
  *,
  bias: Float[Array, "#B #H N M"] | None = None,
) -> Float[Array, "B H N e"]:
  """softmax(q k^T / sqrt(d) + bias) v over the keys that the mask allows.

  Args:
    queries: of H heads.
    keys: of K heads; K divides H, and H / K queries in a row share a key.
    values: one per key.
    mask: True where query n may read key m, for all examples or for each;
      None allows all. See `tokjax.ops.attention_masks`.
    bias: added to the logits.

  Returns:
    The mixed values in the dtype of `values`; zeros for a query that may read
    nothing. Softmax and sums are float32.

  Raises:
    ValueError: if the mask or the bias has another shape, or K does not
      divide H.

  Example:
    >>> x = jnp.array([[[[1.0], [2.0], [3.0]]]])
    >>> attend(0 * x, x, x, jnp.tril(jnp.ones((3, 3), bool)))[0, 0, :, 0]
    Array([1. , 1.5, 2. ], dtype=float32)

  Cost: 4 B H N M d FLOPs; the logits take 4 B H N M bytes.

  Source: Vaswani et al. (2017), "Attention is all you need"; shared keys,
    Ainslie et al. (2023), "GQA".
  """
  found = attend_with_lse(queries, keys, values, mask, bias=bias)
  return found.out.astype(values.dtype)


def attend_with_lse(
  queries: Float[Array, "B H N d"],
  keys: Float[Array, "B K M d"],
  values: Float[Array, "B K M e"],
  mask: Bool[Array, "N M"] | Bool[Array, "#B N M"] | None = None,
  *,
  bias: Float[Array, "#B #H N M"] | None = None,
) -> AttentionState:
  """`attend`, with what `merge` needs; arguments and errors are the same.

  Example:
    >>> x = jnp.zeros((1, 1, 2, 1))
    >>> attend_with_lse(x, x, x).lse.tolist()  # log 2
    [[[0.6931471824645996, 0.6931471824645996]]]
  """
  return attend_with_highest(queries, keys, values, mask, bias=bias)[0]


def attend_with_highest(
  queries: Float[Array, "B H N d"],
  keys: Float[Array, "B K M d"],
  values: Float[Array, "B K M e"],
  mask: Bool[Array, "N M"] | Bool[Array, "#B N M"] | None = None,
  *,
  bias: Float[Array, "#B #H N M"] | None = None,
) -> tuple[AttentionState, Float[Array, "B H N"]]:
  """`attend_with_lse`, and the highest logit of each query, float32.

  No gradient passes through that; it is -inf for a query that reads nothing.

  Example:
    >>> x = jnp.array([[[[1.0], [2.0]]]])
    >>> attend_with_highest(x, x, x)[1].tolist()
    [[[2.0, 4.0]]]
  """
  num_heads, num_shared = queries.shape[1], keys.shape[1]
  checks.divisible(num_shared, heads_of_queries=num_heads)
  shared = num_heads > num_shared
  if shared:  # [B, K, H / K * N, d]
    queries = _fold(queries, num_shared)
  logits = jnp.matmul(
    queries, keys.swapaxes(-1, -2), preferred_element_type=jnp.float32
  )
  logits = logits * queries.shape[-1] ** -0.5
  if shared:
    logits = _unfold(logits, num_heads)
  if bias is not None:
    logits = logits + _checked(bias, logits).astype(jnp.float32)
  if mask is not None:
    mask = _over_heads(mask, logits.shape)
    logits = jnp.where(mask, logits, -jnp.inf)
  highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  largest = jnp.where(jnp.isfinite(highest), highest, 0)
  weights = jnp.exp(logits - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights.astype(values.dtype)
  if shared:
    weights = _fold(weights, num_shared)
  mixed = jnp.matmul(weights, values, preferred_element_type=jnp.float32)
  if shared:
    mixed = _unfold(mixed, num_heads)
  some = jnp.where(total > 0, total, 1)
  lse = jnp.where(total > 0, jnp.log(some) + largest, -jnp.inf)
  return AttentionState(mixed / some, lse[..., 0]), highest[..., 0]


def merge(one: AttentionState, two: AttentionState) -> AttentionState:
  """Attention over the keys of both, which must be different ones.

      lse = log(exp(lse_1) + exp(lse_2))
      out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

  Associative and commutative but for rounding; a part that read nothing
  changes nothing.

  Args:
    one: over some keys.
    two: over others, of the same queries.

  Returns:
    Over all of them.

  Example:
    >>> one = AttentionState(jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1)))
    >>> two = AttentionState(3 * one.out, one.lse)
    >>> merge(one, two).out.item()
    2.0

  Source: Milakov, Gimelshein (2018), "Online normalizer calculation for
    softmax"; Dao et al. (2022), "FlashAttention".
  """
  largest = jnp.maximum(one.lse, two.lse)
  largest = jnp.where(jnp.isfinite(largest), largest, 0)
  shares = [jnp.exp(part.lse - largest) for part in (one, two)]
  total = shares[0] + shares[1]
  some = jnp.where(total > 0, total, 1)
  out = sum(
    (share / some)[..., None] * part.out
    for share, part in zip(shares, (one, two), strict=True)
  )
  lse = jnp.where(total > 0, jnp.log(some) + largest, -jnp.inf)
  return AttentionState(out, lse)


def attend_cotangents(
  queries: Float[Array, "B H N d"],
  keys: Float[Array, "B K M d"],
  values: Float[Array, "B K M e"],
  mask: Bool[Array, "N M"] | Bool[Array, "#B N M"] | None,
  *,
  lse: Float[Array, "B H N"],
  delta: Float[Array, "B H N"],
  d_out: Float[Array, "B H N e"],
) -> tuple[
  Float[Array, "B H N d"], Float[Array, "B K M d"], Float[Array, "B K M e"]
]:
  """What some of the keys add to the cotangents of attention over all.

  The weights are made again from `lse`, so that nothing but it and the result
  is kept for the backward pass.

  Args:
    queries: as of `attend`.
    keys: some of those that were read.
    values: theirs.
    mask: as of `attend`, of these keys.
    lse: over all keys; where it is -inf the mask allows nothing.
    delta: sum of d_out * out over the width, with the result over all keys;
      less the cotangent of `lse`, if that has one.
    d_out: cotangent of the result over all keys.

  Returns:
    float32 cotangents of queries, keys and values; those of the queries are to
    be summed over all parts of the keys.

  Example:
    >>> x = jnp.ones((1, 1, 1, 1))
    >>> found = attend_cotangents(
    ...   x, x, x, None, lse=x[..., 0], delta=0 * x[..., 0], d_out=x)
    >>> found[2].item()  # one key has all the weight
    1.0

  Cost: 10 B H N M d FLOPs.
  """
  shape = keys.shape[:2]  # B, K

  def grouped(x):  # [B, H, n, ...] -> [B, K, H / K, n, ...]
    return x.reshape(*shape, -1, *x.shape[2:])

  rows, d_mixed = grouped(queries), grouped(d_out)
  scale = rows.shape[-1] ** -0.5
  logits = _product("bkgnd,bkmd->bkgnm", rows, keys) * scale
  weights = jnp.exp(logits - grouped(lse)[..., None])
  if mask is not None:
    mask = mask[None] if mask.ndim == 2 else mask
    weights = jnp.where(mask[:, None, None], weights, 0)
  d_weights = _product("bkgne,bkme->bkgnm", d_mixed, values)
  d_logits = weights * (d_weights - grouped(delta)[..., None]) * scale
  weights = weights.astype(d_out.dtype)
  d_logits = d_logits.astype(rows.dtype)
  d_rows = _product("bkgnm,bkmd->bkgnd", d_logits, keys)
  return (
    d_rows.reshape(queries.shape),
    _product("bkgnm,bkgnd->bkmd", d_logits, rows),
    _product("bkgnm,bkgne->bkme", weights, d_mixed),
  )


def cut_rows(tree: Any, size: int) -> Any:
  """Arrays [B, H, N, ...] as blocks of rows, [blocks, B, H, size, ...].

  Args:
    tree: any pytree of them.
    size: rows of a block; zeros fill up the last.

  Example:
    >>> cut_rows(jnp.ones((1, 2, 5, 3)), 2).shape
    (3, 1, 2, 2, 3)
  """

  def cut(x):
    missing = -x.shape[2] % size
    x = jnp.pad(x, [(0, missing if i == 2 else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:2], -1, size, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0)

  return jax.tree.map(cut, tree)


def join_rows(tree: Any, num_rows: int) -> Any:
  """The arrays that `cut_rows` cut, without what filled them up.

  Args:
    tree: any pytree of blocks.
    num_rows: N.

  Example:
    >>> join_rows(cut_rows(jnp.ones((1, 2, 5, 3)), 2), 5).shape
    (1, 2, 5, 3)
  """

  def join(x):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :num_rows]

  return jax.tree.map(join, tree)


def _product(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _fold(x, num_shared):
  """[B, H, N, d] -> [B, K, H / K * N, d]."""
  batch, heads, rows, width = x.shape
  x = x.reshape(batch, num_shared, heads // num_shared, rows, width)
  return x.reshape(batch, num_shared, -1, width)


def _unfold(x, num_heads):
  """The way back."""
  batch, shared, _, width = x.shape
  x = x.reshape(batch, shared, num_heads // shared, -1, width)
  return x.reshape(batch, num_heads, -1, width)


def _checked(bias, logits):
  checks.has_rank(4, bias=bias)
  for axis, (got, want) in enumerate(
    zip(bias.shape, logits.shape, strict=True)
  ):
    if got not in ((1, want) if axis < 2 else (want,)):
      raise ValueError(
        f"bias must be [1 or B, 1 or H, N, M] of {logits.shape}, got"
        f" {bias.shape}"
      )
  return bias


def _over_heads(mask, shape):
  """The mask as [1 or B, 1, N, M]."""
  checks.one_of((2, 3), rank_of_mask=mask.ndim)
  mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
  batch, _, num_queries, num_keys = mask.shape
  checks.one_of((1, shape[0]), mask_batch=batch)
  checks.same_size(mask_queries=num_queries, queries=shape[2])
  checks.same_size(mask_keys=num_keys, keys=shape[3])
  return mask
