"""Losses that make experts share the tokens evenly.

    routing = route(logits, mask, num_chosen=2)
    balance = balance_loss(routing.probabilities, routing.counts, mask)
    loss = loss + 1e-2 * balance + 1e-3 * z_loss(logits, mask)

All of it is float32. Where tokens are cut among devices, inside
`jax.shard_map`, `axis_name` says over which of them a loss looks as over one
set: those of one sequence, or all.

Source: Fedus et al. (2021), "Switch Transformers" (balance); Zoph et al.
(2022), "ST-MoE" (z); Wang et al. (2024), "Auxiliary-loss-free load balancing"
(bias). Details are those of NVIDIA/Megatron-LM, `core/transformer/moe`.
"""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "balance_loss",
  "balancing_bias",
  "sequence_balance_loss",
  "z_loss",
]

_AxisName = str | tuple[str, ...] | None


def balance_loss(
  probabilities: Float[Array, "*tokens E"],
  counts: Int[Array, " E"],
  mask: Bool[Array, "*tokens"] | None = None,
  *,
  axis_name: _AxisName = None,
) -> Float[Array, ""]:
  """E sum_e p_e f_e: mean probability times share of the choices, of experts.

  1 where both are even; E / k where all tokens choose the same k experts and
  are sure of one of them.

  Args:
    probabilities: of `moe_routing.route`.
    counts: of `moe_routing.route`, before anything is dropped. To look over
      several micro-batches at a time add up their counts.
    mask: True where a token counts; None for all.
    axis_name: mesh axes whose devices hold parts of one set of tokens.

  Returns:
    float32; 0 without tokens. Gradients reach the probabilities only.

  Raises:
    ValueError: if sizes do not fit.

  Example:
    >>> even = jnp.full((4, 2), 0.5)
    >>> float(jax.jit(balance_loss)(even, jnp.array([2, 2])))
    1.0
  """
  checks.same_size(counts=counts.shape[0], experts=probabilities.shape[-1])
  mask = _checked(mask, probabilities)
  tokens = tuple(range(mask.ndim))
  total = jnp.sum(jnp.where(mask[..., None], probabilities, 0), axis=tokens)
  number = jnp.sum(mask, dtype=jnp.float32)
  counts = counts.astype(jnp.float32)
  if axis_name is not None:
    total, number, counts = jax.lax.psum((total, number, counts), axis_name)
  mean = total / jnp.maximum(number, 1)
  share = counts / jnp.maximum(jnp.sum(counts), 1)
  return counts.shape[0] * jnp.sum(mean * share)


def sequence_balance_loss(
  probabilities: Float[Array, "B S E"],
  index: Int[Array, "B S k"],
  mask: Bool[Array, "B S"] | None = None,
  *,
  axis_name: _AxisName = None,
) -> Float[Array, ""]:
  """`balance_loss` of each sequence, averaged: no sequence may be one-sided.

  Args:
    probabilities: of `moe_routing.route`.
    index: of `moe_routing.route`.
    mask: True where a token counts; None for all.
    axis_name: mesh axes over which sequences are cut.

  Returns:
    float32, the mean over the B sequences, empty ones too, which count 0.

  Raises:
    ValueError: if sizes do not fit.

  Example:
    >>> even = jnp.full((1, 2, 2), 0.5)
    >>> loss = jax.jit(sequence_balance_loss)
    >>> float(loss(even, jnp.array([[[0], [0]]])))
    1.0
  """
  mask = _checked(mask, probabilities)
  checks.same_size(tokens=mask.shape[1], index_tokens=index.shape[1])
  chosen = jax.nn.one_hot(index, probabilities.shape[-1], dtype=jnp.int32)
  counts = jnp.sum(chosen, axis=(1, 2))  # [B, E]

  def one(probabilities, counts, mask):
    return balance_loss(probabilities, counts, mask, axis_name=axis_name)

  return jnp.mean(jax.vmap(one)(probabilities, counts, mask))


def z_loss(
  logits: Float[Array, "*tokens E"],
  mask: Bool[Array, "*tokens"] | None = None,
  *,
  axis_name: _AxisName = None,
) -> Float[Array, ""]:
  """Mean of log(sum exp logits)^2, which keeps logits small.

  Args:
    logits: of the router.
    mask: True where a token counts; None for all.
    axis_name: mesh axes whose devices hold parts of one set of tokens.

  Returns:
    float32; 0 without tokens.

  Example:
    >>> round(float(jax.jit(z_loss)(jnp.zeros((3, 2)))), 4)  # (log 2)^2
    0.4805
  """
  mask = _checked(mask, logits)
  logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0)
  square = jnp.square(jax.nn.logsumexp(logits, axis=-1))
  total = jnp.sum(jnp.where(mask, square, 0))
  number = jnp.sum(mask, dtype=jnp.float32)
  if axis_name is not None:
    total, number = jax.lax.psum((total, number), axis_name)
  return total / jnp.maximum(number, 1)


def balancing_bias(
  bias: Float[Array, " E"],
  counts: Int[Array, " E"],
  *,
  rate: float = 1e-3,
  axis_name: _AxisName = None,
) -> Float[Array, " E"]:
  """The bias after a step: up for experts with few tokens, down for many.

  Args:
    bias: of `moe_routing.route`, before.
    counts: of `moe_routing.route`; add those of micro-batches.
    rate: by how much; the default is the published one.
    axis_name: mesh axes over which the tokens are cut; counts are summed.

  Returns:
    bias + rate sign(mean(counts) - counts), float32.

  Raises:
    ValueError: if sizes do not fit.

  Example:
    >>> jax.jit(balancing_bias)(jnp.zeros(2), jnp.array([3, 1])).tolist()
    [-0.0010000000474974513, 0.0010000000474974513]
  """
  checks.same_size(bias=bias.shape[0], counts=counts.shape[0])
  if axis_name is not None:
    counts = jax.lax.psum(counts, axis_name)
  counts = counts.astype(jnp.float32)
  return bias.astype(jnp.float32) + rate * jnp.sign(jnp.mean(counts) - counts)


def _checked(mask, rows):
  """The mask, of which there is one value a row."""
  if mask is None:
    return jnp.ones_like(rows[..., 0], dtype=bool)
  if mask.shape != rows.shape[:-1]:
    raise ValueError(
      f"mask must be of the tokens {rows.shape[:-1]}, got {mask.shape}"
    )
  return mask
