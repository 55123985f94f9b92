"""Entropy losses of code choices: each one sure, all codes in use.

With p_i the distribution over codes of vector i and pbar the mean of all p_i,
the penalty is mean_i H(p_i) - gamma H(pbar), in nats: lowest, at
-gamma log V, when every choice is certain and every code equally frequent. It
is negative by right. pbar is a mean over the whole batch: under `jit` that of
all devices; inside `shard_map` name the axis the batch is split over.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float

__all__ = ["CodeEntropy", "bit_entropy_penalty", "entropy_penalty"]


class CodeEntropy(NamedTuple):
  """Entropies of code choices in nats, float32.

  Attributes:
    per_sample: mean entropy of one choice; small when choices are certain.
    codebook: entropy of the mean choice; large when all codes are in use.
    penalty: per_sample - gamma * codebook.
  """

  per_sample: Float[Array, ""]
  codebook: Float[Array, ""]
  penalty: Float[Array, ""]


def entropy_penalty(
  logits: Float[Array, "*batch V"],
  mask: Bool[Array, "*batch"] | None = None,
  *,
  gamma: float | Float[Array, ""] = 1.0,
  axis_name: str | tuple[str, ...] | None = None,
) -> CodeEntropy:
  """Entropy penalty of choices given by logits over all codes.

  Args:
    logits: -|x - code|^2 / temperature, for instance, with 0.01 as
      temperature in MAGVIT; -inf for codes that cannot be chosen.
    mask: True where the vector counts; None counts all. All False gives 0.
    gamma: weight of the codebook term; 1 in most public code.
    axis_name: mesh axis (or axes) the batch is split over, inside `shard_map`
      only.

  Returns:
    Both terms and the penalty.

  Raises:
    ValueError: if the mask does not fit the logits.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0], [-1.0]])
    >>> logits = -jnp.square(x - jnp.array([[1.0, -1.0]]))
    >>> [round(float(h), 4) for h in jax.jit(entropy_penalty)(logits)]
    [0.0901, 0.6931, -0.6031]

  Source: Jansen et al., 2019, "Coincidence, Categorization, and
  Consolidation"; as loss of a quantiser: Yu et al., 2023, "MAGVIT".
  """
  mask = _whole_mask(mask, logits=logits)
  wide = jnp.where(mask[..., None], logits.astype(jnp.float32), 0)
  log_p = jax.nn.log_softmax(wide, axis=-1)
  p = jnp.exp(log_p)
  entropy = -jnp.sum(p * jnp.where(p > 0, log_p, 0), axis=-1)  # 0 log 0 = 0
  return _terms(
    _mean(entropy, mask, axis_name), _entropy(_mean(p, mask, axis_name)), gamma
  )


def bit_entropy_penalty(
  bit_logits: Float[Array, "*batch D"],
  mask: Bool[Array, "*batch"] | None = None,
  *,
  group_size: int = 9,
  gamma: float | Float[Array, ""] = 1.0,
  axis_name: str | tuple[str, ...] | None = None,
) -> CodeEntropy:
  """Entropy penalty of sign codes, from one logit per bit.

  Bits are independent given x, so that the entropy of one choice is the sum
  over its bits, exactly. The mean choice does not factorise: its entropy is
  taken exactly within groups of bits and summed over groups, which is an upper
  bound of the true one, and equal to it with one group. Per group it costs
  2 N 2^g FLOPs and holds 2^g + N 2^(g/2) numbers.

  Args:
    bit_logits: log odds of each bit being 1: 4 s x / temperature for codes
      +-s, whose logits are 2 x.code / temperature. LFQ: s = 1, temperature
      0.01; BSQ: x of length one, s = 1 / sqrt(D), temperature 1.
    mask: True where the vector counts; None counts all. All False gives 0.
    group_size: bits per group, g, 1..20; the last group takes what is left. 9
      as in BSQ, where 1 is called analytical.
    gamma: weight of the codebook term; 1 in most public code.
    axis_name: mesh axis (or axes) the batch is split over, inside `shard_map`
      only.

  Returns:
    Both terms and the penalty.

  Raises:
    ValueError: if `group_size` is out of range or the mask does not fit.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> u = jnp.array([[0.203653, -0.543075, 0.814613]])
    >>> terms = jax.jit(bit_entropy_penalty)(4 * u / jnp.sqrt(3))
    >>> round(float(terms.per_sample), 5)
    1.58627

  Source: Yu et al., 2024, "Language Model Beats Diffusion" (MAGVIT-v2); in
  groups: Zhao, Xiong, Kraehenbuehl, 2024, "Image and Video Tokenization with
  Binary Spherical Quantization".
  """
  checks.in_range(1, 20, group_size=group_size)
  mask = _whole_mask(mask, bit_logits=bit_logits)
  wide = jnp.where(mask[..., None], bit_logits.astype(jnp.float32), 0)
  # h(a) is even; on this side nothing cancels: log(1 + e^-|a|) + |a| / (1 +
  # e^|a|).
  size = jnp.abs(wide)
  entropy = jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)
  per_sample = _mean(jnp.sum(entropy, axis=-1), mask, axis_name)
  num_bits = wide.shape[-1]
  whole = num_bits - num_bits % group_size
  codebook = 0.0
  if whole:
    shape = (*wide.shape[:-1], -1, group_size)
    groups = wide[..., :whole].reshape(shape)
    codebook += _group_entropy(groups, mask, axis_name)
  if whole < num_bits:
    rest = wide[..., None, whole:]
    codebook += _group_entropy(rest, mask, axis_name)
  return _terms(per_sample, codebook, gamma)


def _terms(per_sample, codebook, gamma):
  return CodeEntropy(per_sample, codebook, per_sample - gamma * codebook)


def _group_entropy(logits, mask, axis_name):  # [*batch, G, g] -> scalar
  # Over all bits of a group, p is the outer product of its halves: the sum
  # over the batch is a matmul, and p of each vector is never written down.
  half = (logits.shape[-1] + 1) // 2
  left = _distribution(logits[..., :half])  # [*batch, G, 2^half]
  right = _distribution(logits[..., half:])
  left = jnp.where(mask[..., None, None], left, 0)
  *batch, group, low, high = range(mask.ndim + 3)
  # On a mesh of Explicit axes it must be told that devices add up.
  split = any(jax.typeof(left).sharding.spec)
  total = jnp.einsum(
    left,
    [*batch, group, low],
    right,
    [*batch, group, high],
    [group, low, high],
    precision="highest",
    out_sharding=jax.P(None, None, None) if split else None,
  )
  return _entropy(_over_count(total, mask, axis_name))


def _distribution(logits):  # [..., g] -> [..., 2^g]
  """Probabilities of all settings of the bits; [..., 1] of no bits."""
  p = 1 + jnp.sum(logits[..., :0], axis=-1, keepdims=True)
  for j in range(logits.shape[-1]):
    bit = logits[..., j : j + 1]
    p = jnp.concatenate(
      [p * jax.nn.sigmoid(-bit), p * jax.nn.sigmoid(bit)], axis=-1
    )
  return p


def _entropy(p):
  safe = jnp.where(p > 0, p, 1.0)  # 0 log 0 = 0, and no gradient of log there
  return -jnp.sum(p * jnp.log(safe))


def _mean(values, mask, axis_name):
  """Mean over the axes of the mask, where it is True."""
  shape = mask.shape + (1,) * (values.ndim - mask.ndim)
  kept = jnp.where(mask.reshape(shape), values, 0)
  total = jnp.sum(kept, axis=tuple(range(mask.ndim)))
  return _over_count(total, mask, axis_name)


def _over_count(total, mask, axis_name):
  count = jnp.sum(mask, dtype=jnp.float32)
  if axis_name is not None:
    total, count = jax.lax.psum((total, count), axis_name)
  return total / jnp.maximum(count, 1.0)


def _whole_mask(mask, **logits):
  ((name, values),) = logits.items()
  if mask is None:
    return jnp.ones_like(values[..., 0], dtype=bool)
  if mask.shape != values.shape[:-1]:
    raise ValueError(
      f"mask must have the shape of {name} without its last axis, "
      f"{values.shape[:-1]}, got {mask.shape}"
    )
  return mask
