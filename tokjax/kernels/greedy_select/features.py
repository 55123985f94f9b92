"""Greedy selection straight from features, without the table between them.

Where N x N similarities do not fit, each step computes the one row it needs.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels.greedy_select import picks, sharding, xla
from tokjax.typing import Array, Bool, Float, Int32

__all__ = ["Similarity", "greedy_select_features", "similarity_table"]

Similarity = Literal["inner", "l1", "squared_l2"]


def greedy_select_features(
  features: Float[Array, "B N D"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  objective: Literal["max_min", "max_sum", "mmr"] = "max_min",
  similarity: Similarity = "inner",
  bonus: Float[Array, "B N"] | None = None,
  first: Int32[Array, " B"] | None = None,
  trade_off: float | None = None,
  block_size: int = 256,
) -> picks.Picks:
  """Picks tokens as `greedy_select` does, holding no N x N table.

  The same scores, with the similarities of each pick to all tokens computed
  when it is picked. Where "max_min" starts with the most isolated token (no
  `first`), all similarities are computed once, `block_size` rows at a time.

  Args:
    features: one vector per token, float32 or bfloat16; normalise them first
      for cosines.
    mask: True where a token may be picked; None for all.
    num_keep: K, static, at most N.
    objective: which score, static.
    similarity: "inner" product, or the negative "l1" or "squared_l2" distance.
    bonus: importance in "mmr"; the others take none.
    first: token to pick first, see `greedy_select`.
    trade_off: weight of the importance in "mmr", static (None: 0.5).
    block_size: rows of similarities held at once while the most isolated token
      is looked for, static.

  Returns:
    The picks in order.

  Raises:
    ValueError: if sizes disagree, `num_keep` is out of range, or an argument
      has no meaning for the objective.

  Example:
    >>> import jax.numpy as jnp
    >>> line = jnp.array([[[0.0], [1.0], [2.0], [9.0]]])
    >>> greedy_select_features(
    ...     line, num_keep=3, similarity="squared_l2").index.tolist()
    [[3, 0, 2]]

  Cost: 2 K N D FLOPs and K reads of the features, plus 2 N^2 D once without
  `first` in "max_min"; holds `block_size` * N similarities.

  Source: ours; the objectives are those of `greedy_select`.
  """
  checks.has_rank(3, features=features)
  checks.one_of(("max_min", "max_sum", "mmr"), objective=objective)
  checks.one_of(get_args(Similarity), similarity=similarity)
  checks.in_range(1, 1 << 31, block_size=block_size)
  picks.check_settings(
    *features.shape[:2], mask, bonus, first, num_keep, objective, trade_off
  )
  return _greedy_select_features(
    features,
    mask,
    bonus,
    first,
    num_keep=num_keep,
    objective=objective,
    similarity=similarity,
    trade_off=0.5 if trade_off is None else float(trade_off),
    block_size=min(block_size, features.shape[1]),
  )


def similarity_table(
  features: Float[Array, "N D"],
  mask: Bool[Array, " N"] | None = None,
  *,
  similarity: Similarity = "inner",
) -> Float[Array, "N N"]:
  """All similarities of one example, for `greedy_select`.

  Args:
    features: one vector per token, float32 or bfloat16.
    mask: rows outside it count as zero vectors; None for all.
    similarity: "inner" product, or the negative "l1" or "squared_l2" distance.

  Returns:
    float32 similarities, symmetric.

  Raises:
    ValueError: for another similarity.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.0, 1.0], [3.0, 5.0]])
    >>> similarity_table(x).tolist()
    [[1.0, 5.0], [5.0, 34.0]]

  Cost: 2 N^2 D FLOPs.

  Source: ours.
  """
  checks.one_of(get_args(Similarity), similarity=similarity)
  x = features.astype(jnp.float32)
  if mask is not None:
    x = jnp.where(mask[:, None], x, 0)  # NaN padding must not spread
  if similarity == "l1":
    return jax.lax.map(lambda y: _to_one(x, y, similarity), x)
  return _to_many(x, x, similarity)


_STATIC = ("num_keep", "objective", "similarity", "trade_off", "block_size")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _greedy_select_features(
  features,
  mask,
  bonus,
  first,
  *,
  num_keep,
  objective,
  similarity,
  trade_off,
  block_size,
):
  weight = 1 - trade_off if objective == "mmr" else 1.0

  def local(features, mask, bonus, first):
    x = jax.lax.stop_gradient(features).astype(jnp.float32)
    if mask is not None:
      x = jnp.where(mask[:, :, None], x, 0)
    own = jnp.zeros_like(x[:, :, 0])
    if bonus is not None:
      own = trade_off * jax.lax.stop_gradient(bonus).astype(jnp.float32)
    natural = own
    if objective == "max_min" and first is None:
      valid = jnp.ones_like(own, dtype=bool) if mask is None else mask
      isolated = functools.partial(
        _isolation, similarity=similarity, block_size=block_size
      )
      natural = jax.lax.map(lambda pair: isolated(*pair), (x, valid))

    def one(x, opening, own):
      return xla.select_by_rows(
        lambda pick: _to_one(x, x[pick], similarity),
        opening,
        own,
        num_keep=num_keep,
        objective=objective,
        weight=weight,
      )

    opening = picks.open_with(natural, mask, first)
    index, gain = jax.vmap(one)(x, opening, own)
    return picks.finish(index, gain, natural, first)

  return sharding.over_batch_shards(
    local, features=features, mask=mask, bonus=bonus, first=first
  )


def _isolation(x, valid, *, similarity, block_size):
  """Minus the similarity of each token to its nearest other one, [N]."""
  num_tokens = x.shape[0]
  position = jnp.arange(num_tokens, dtype=jnp.int32)

  def block(i):
    # The last block is moved back to fit; it computes some tokens again.
    start = jnp.minimum(i * block_size, num_tokens - block_size)
    rows = jax.lax.dynamic_slice_in_dim(x, start, block_size)  # [b, D]
    if similarity == "l1":
      table = jax.lax.map(lambda y: _to_one(x, y, similarity), rows)
    else:
      table = _to_many(rows, x, similarity)
    own = start + jnp.arange(block_size, dtype=jnp.int32)
    other = valid[None, :] & (own[:, None] != position[None, :])
    return own, jnp.max(jnp.where(other, table, -jnp.inf), axis=1)

  own, nearest = jax.lax.map(block, jnp.arange(-(-num_tokens // block_size)))
  isolation = jnp.where(nearest == -jnp.inf, 0, -nearest).reshape(-1)
  return jnp.zeros_like(x[:, 0]).at[own.reshape(-1)].set(isolation)


def _to_one(x, y, similarity):
  """Similarity of every row of x [N, D] with y [D]."""
  if similarity == "l1":
    return -jnp.sum(jnp.abs(x - y[None, :]), axis=1)
  if similarity == "squared_l2":
    return -jnp.sum(jnp.square(x - y[None, :]), axis=1)
  return jnp.matmul(x, y, precision="highest")


def _to_many(x, y, similarity):
  """Similarity of every row of x [M, D] with every one of y [N, D]."""
  inner = jnp.matmul(x, y.T, precision="highest")
  if similarity == "inner":
    return inner
  lengths = [jnp.sum(jnp.square(rows), axis=1) for rows in (x, y)]
  return 2 * inner - lengths[0][:, None] - lengths[1][None, :]
