"""Column attention in its shortest correct form: the definition of truth.

It holds every probability at once, so it is for small inputs and for tests.
"""

import jax.numpy as jnp

from tokjax.typing import Array, Bool, Float, Int32

__all__ = ["column_attention_forward", "visible_keys"]


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
) -> tuple[Float[Array, "B H S"], Float[Array, "B H R"], Float[Array, "B H R"]]:
  """Weighted column sums of the softmax, and two numbers of each row.

      p[i, j] = softmax over visible j of scale * <q_i, k_j>
      received[j] = sum_i row_weight[i] * p[i, j]

  Products are taken in the input dtype and summed in float32. Rows of weight
  zero have no influence, whatever they hold.

  Args:
    q: queries, float32 or bfloat16.
    k: keys of the same dtype; head h reads key head h // (H // Hk).
    row_ids: a row sees the keys of its id; None, with `key_ids`, for all.
    key_ids: ids of the keys; ids that no row has hide a key.
    row_weight: factor of each row, float32.
    softmax: highest score and highest probability of each row, where they are
      known; 0 where a row sees nothing.
    scale: factor of the inner products.
    causal: whether row i sees only keys j <= i + (S - R).

  Returns:
    `received`; the logarithm of the sum over visible keys of the exponentials,
    -inf in a row that sees nothing; and the highest probability, 0 there.
  """
  group = q.shape[1] // k.shape[1]
  scores = scale * jnp.einsum(  # [B, H, R, S]
    "bhrd,bhsd->bhrs",
    q,
    jnp.repeat(k, group, axis=1),
    precision="highest" if q.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
  visible = visible_keys(
    q.shape[2], k.shape[2], row_ids, key_ids, causal=causal
  )
  if visible is not None:
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
  if softmax is None:
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)  # a row that sees nothing
    exponential = jnp.exp(scores - top)
    total = jnp.sum(exponential, axis=-1, keepdims=True)
  else:
    top, highest = (x[..., None] for x in softmax)
    exponential = jnp.exp(scores - top)
    total = jnp.where(highest == 0, 0, 1 / highest)
  probability = exponential / jnp.where(total == 0, 1, total)
  weighted = row_weight[..., None] * probability
  live = row_weight[..., None] != 0
  received = jnp.sum(jnp.where(live, weighted, 0), axis=2)
  log_normalizer = top[..., 0] + jnp.log(total[..., 0])
  return received, log_normalizer, jnp.max(probability, axis=-1)


def visible_keys(
  num_rows: int,
  num_keys: int,
  row_ids: Int32[Array, "B R"] | None,
  key_ids: Int32[Array, "B S"] | None,
  *,
  causal: bool,
) -> Bool[Array, "_ R S"] | None:
  """Which keys each row sees; None when every row sees all.

  Args:
    num_rows: R.
    num_keys: S.
    row_ids: as in `column_attention_forward`.
    key_ids: likewise.
    causal: likewise.

  Returns:
    True where seen; the first axis has size 1 without ids.

  Example:
    >>> seen = visible_keys(2, 3, None, None, causal=True)
    >>> seen[0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]
  """
  visible = None
  if row_ids is not None:
    visible = row_ids[:, :, None] == key_ids[:, None, :]
  if causal:
    row = jnp.arange(num_rows, dtype=jnp.int32) + (num_keys - num_rows)
    key = jnp.arange(num_keys, dtype=jnp.int32)
    past = (key[None, :] <= row[:, None])[None]
    visible = past if visible is None else visible & past
  return visible
