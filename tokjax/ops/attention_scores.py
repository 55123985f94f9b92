"""Scores of tokens from attention: rows of a softmax, and outliers.

What a few query rows attend to costs one product of those rows with the keys;
the whole attention matrix is never needed for it. (What each key receives from
all rows is `tokjax.kernels.column_attention`.)
"""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float

__all__ = ["iqr_upper", "row_attention"]


def row_attention(
  q: Float[Array, "B H R d"],
  k: Float[Array, "B Hk S d"],
  mask: Bool[Array, "B S"] | None = None,
  *,
  scale: float | None = None,
) -> Float[Array, "B H R S"]:
  """Softmax attention of a few query rows over all keys.

      p[r, s] = softmax over valid s of scale * <q[r], k[s]>

  The rows that methods want are those of the [CLS] token or of the last text
  token, so R is 1 or small. Products are taken in the input dtype and summed
  in float32. Gradients flow to both arguments; methods that choose tokens by
  these numbers stop them.

  Args:
    q: the query rows, after position encoding.
    k: all keys, same dtype; Hk divides H, and query head h reads key head
      h // (H // Hk).
    mask: True where a key exists; None for all. What masked keys hold, NaN
      included, has no influence.
    scale: factor of the inner products; None for d ** -0.5.

  Returns:
    float32 probabilities, 0 at masked keys; all 0 where no key is valid.

  Raises:
    ValueError: if ranks or sizes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1, 4, 4))
    >>> row_attention(q, k).tolist()
    [[[[0.25, 0.25, 0.25, 0.25]]]]

  Cost: 2 * H * R * S * d FLOPs, one read of the keys.

  Source: ours; softmax attention of Vaswani et al. (2017), "Attention Is All
  You Need".
  """
  checks.has_rank(4, q=q, k=k)
  checks.has_rank(2, mask=mask)
  checks.same_size(q_batch=q.shape[0], k_batch=k.shape[0])
  checks.same_size(q_dim=q.shape[3], k_dim=k.shape[3])
  checks.in_range(1, 1 << 31, key_heads=k.shape[1])
  checks.divisible(k.shape[1], query_heads=q.shape[1])
  if scale is None:
    scale = q.shape[-1] ** -0.5
  if mask is not None:
    checks.same_size(k_keys=k.shape[2], mask_keys=mask.shape[1])
    k = jnp.where(mask[:, None, :, None], k, 0)  # NaN must not spread
  batch, heads, num_rows, dim = q.shape
  grouped = q.reshape(batch, k.shape[1], -1, num_rows, dim)
  logits = scale * jnp.einsum(  # [B, Hk, H / Hk, R, S]
    "bkgrd,bksd->bkgrs",
    grouped,
    k,
    precision="highest" if q.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
  if mask is None:
    weights = jax.nn.softmax(logits, axis=-1)
  else:
    valid = mask[:, None, None, None, :]
    weights = jax.nn.softmax(jnp.where(valid, logits, -1e30), axis=-1)
    weights = jnp.where(valid, weights, 0)
  return weights.reshape(batch, heads, num_rows, -1)


def iqr_upper(
  scores: Float[Array, "*batch N"],
  mask: Bool[Array, "*batch N"] | None = None,
  *,
  factor: float = 1.5,
) -> Bool[Array, "*batch N"]:
  """Which scores lie far above the others.

  True where a score exceeds Q3 + factor * (Q3 - Q1), the rule of box plots.
  The quartiles are those of the valid scores, interpolated linearly between
  the two nearest, as `numpy.quantile` does by default.

  Args:
    scores: any values without NaN at valid places.
    mask: True where a score counts; None for all.
    factor: how many interquartile ranges above the third quartile a score
      must lie; may be traced.

  Returns:
    The outliers; none among masked entries. No gradient passes.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> scores = jnp.array([1, 1, 2, 2, 3, 3, 4, 20]) / 36
    >>> iqr_upper(scores).astype(int).tolist()
    [0, 0, 0, 0, 0, 0, 0, 1]

  Cost: a sort.

  Source: Tukey (1977), "Exploratory Data Analysis"; as a test for important
  tokens Shang et al. (2024), "LLaVA-PruMerge".
  """
  scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
  if mask is None:
    mask = jnp.ones_like(scores, dtype=bool)
  checks.same_size(scores=scores.shape[-1], mask=mask.shape[-1])
  ordered = jnp.sort(jnp.where(mask, scores, jnp.inf), axis=-1)
  last = jnp.sum(mask, axis=-1, keepdims=True) - 1  # [*batch, 1]
  low, high = (_quantile(ordered, last, quarters) for quarters in (1, 3))
  return mask & (scores > high + factor * (high - low))


def _quantile(ordered, last, quarters):
  """Quantile `quarters` / 4 of the entries 0..last, [*batch, 1]."""
  place = jnp.maximum(last, 0) * quarters
  lower, rest = place // 4, place % 4  # exact, whatever N
  upper = jnp.minimum(lower + 1, jnp.maximum(last, 0))
  a = jnp.take_along_axis(ordered, lower, axis=-1)
  b = jnp.take_along_axis(ordered, upper, axis=-1)
  return jnp.where(rest == 0, a, a + (b - a) * (rest / 4))
