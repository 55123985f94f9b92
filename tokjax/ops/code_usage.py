"""How many codes of a codebook are in use.

State the set they are counted over: a whole validation set, not a batch.
Histograms add: sum them over batches, or over devices inside `shard_map`.
"""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int

__all__ = ["code_histogram", "perplexity", "usage"]


def code_histogram(
  index: Int[Array, "..."],
  mask: Bool[Array, "..."] | None = None,
  *,
  num_codes: int,
) -> Int[Array, " V"]:
  """How often each code occurs.

  Args:
    index: codes of any shape; -1 (padding) and whatever else lies outside
      0..num_codes - 1 is not counted.
    mask: True where the index counts; None counts all.
    num_codes: V, size of the codebook.

  Returns:
    int32 counts.

  Raises:
    ValueError: if the mask has another shape or `num_codes` is not positive.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> count = jax.jit(lambda index: code_histogram(index, num_codes=3))
    >>> count(jnp.array([[0, 2], [2, -1]])).tolist()
    [1, 0, 2]
  """
  checks.in_range(1, 2**31 - 1, num_codes=num_codes)
  valid = (index >= 0) & (index < num_codes)
  if mask is not None:
    if mask.shape != index.shape:
      raise ValueError(
        f"mask must have the shape of index, {index.shape}, got {mask.shape}"
      )
    valid = valid & mask
  code = jnp.where(valid, index, num_codes).astype(jnp.int32).reshape(-1)
  # On a mesh of Explicit axes a scatter must be told that devices add up.
  split = any(jax.typeof(code).sharding.spec)
  return (
    jnp.zeros_like(code, shape=num_codes)
    .at[code]
    .add(1, mode="drop", out_sharding=jax.P(None) if split else None)
  )


def usage(
  histogram: Float[Array, "*batch V"] | Int[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """Fraction of the codes that occur at all.

  Args:
    histogram: how often each code occurs, counts or averages of them.

  Returns:
    float32 in 0..1; times 100 it is the usage that papers print.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> float(jax.jit(usage)(jnp.array([4, 2, 1, 1, 0, 0, 0, 0])))
    0.5
  """
  return jnp.mean(histogram > 0, axis=-1, dtype=jnp.float32)


def perplexity(
  histogram: Float[Array, "*batch V"] | Int[Array, "*batch V"],
) -> Float[Array, "*batch"]:
  """Number of equally frequent codes that would be as hard to guess.

  exp(H(p)), p = histogram / sum: V when all codes are equally frequent, 1 when
  only one occurs, and 1 of an empty histogram.

  Args:
    histogram: how often each code occurs, counts or averages of them.

  Returns:
    float32 in 1..V.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> histogram = jnp.array([4, 2, 1, 1, 0, 0, 0, 0])
    >>> round(float(jax.jit(perplexity)(histogram)), 4)
    3.3636
  """
  wide = histogram.astype(jnp.float32)
  total = jnp.sum(wide, axis=-1, keepdims=True)
  p = wide / jnp.where(total > 0, total, 1.0)
  log_p = jnp.log(jnp.where(p > 0, p, 1.0))
  return jnp.exp(-jnp.sum(p * log_p, axis=-1))
