"""Which experts a token goes to.

    routing = route(logits, mask, num_chosen=2)        # [T, E] -> [T, 2]
    out = mixture(x, routing.index, routing.weights, experts)

All of it is float32, whatever the tokens are. `tokjax.ops.moe_losses` keeps the
choices even, `tokjax.ops.moe_experts` makes use of them.

Source: Shazeer et al. (2017), "Outrageously large neural networks"; Clark et
al. (2022), "Unified scaling laws for routed language models" (Sinkhorn);
DeepSeek-AI (2024), "DeepSeek-V2" and "-V3" (groups, sigmoid). Details are those
of NVIDIA/Megatron-LM, `core/transformer/moe`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import code_usage
from tokjax.typing import Array, Bool, Float, Int32

__all__ = [
  "SCORES",
  "Routing",
  "route",
  "sinkhorn",
]

SCORES = ("softmax", "pre_softmax", "sigmoid", "sqrt_softplus", "sinkhorn")
_UNBIASED = ("softmax", "pre_softmax", "sinkhorn")


class Routing(NamedTuple):
  """The experts of each token, the first the one that it wants most.

  Attributes:
    index: of the experts; -1 for tokens that do not count.
    weights: of their outputs in the sum, float32; 0 for tokens that do not
      count.
    probabilities: of all experts, float32, sum 1; what losses look at.
    counts: tokens that chose each expert, before any is dropped.
  """

  index: Int32[Array, "*tokens k"]
  weights: Float[Array, "*tokens k"]
  probabilities: Float[Array, "*tokens E"]
  counts: Int32[Array, " E"]


def route(
  logits: Float[Array, "*tokens E"],
  mask: Bool[Array, "*tokens"] | None = None,
  bias: Float[Array, " E"] | None = None,
  *,
  num_chosen: int,
  score: Literal[
    "softmax", "pre_softmax", "sigmoid", "sqrt_softplus", "sinkhorn"
  ] = "softmax",
  num_groups: int = 1,
  num_kept_groups: int = 1,
  scale: float = 1.0,
) -> Routing:
  """Each token's k best experts, and what their outputs weigh.

  With z the logits and "chosen" the k experts of the largest scores:

  - "softmax": exp(z) over its sum among the chosen. With k = 1 the weight is 1
    and the router learns from losses only.
  - "pre_softmax": exp(z) over its sum among all.
  - "sigmoid", "sqrt_softplus": s = sigmoid(z) or sqrt(log(1 + e^z)); chosen by
    s + bias, weighted by s, for k > 1 over its sum among the chosen.
  - "sinkhorn": chosen by `sinkhorn(z)`, which shares tokens evenly; weighted by
    sigmoid(z) for k = 1, else by "pre_softmax". Tokens are seen together, which
    is for training: afterwards use "pre_softmax".

  Args:
    logits: of the router.
    mask: True where a token counts; None for all. What others hold, NaN
      included, has no influence.
    bias: added to sigmoid and square-root scores when choosing, and only then;
      see `moe_losses.balancing_bias`.
    num_chosen: k, static, at most E.
    score: see above.
    num_groups: groups that neighbouring experts form. A token chooses among
      the experts of some groups only, such as those of few devices.
    num_kept_groups: how many. A group is as good as its best
      k // num_kept_groups experts together.
    scale: factor of all weights.

  Returns:
    The choice. Gradients reach the logits through weights and probabilities;
    none reaches the bias. Of equal scores the lower expert goes first.

  Raises:
    ValueError: if sizes do not fit, or a bias comes with a score that takes
      none.

  Example:
    >>> logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    >>> found = jax.jit(lambda x: route(x, num_chosen=2))(logits)
    >>> found.index.tolist(), found.counts.tolist()
    ([[0, 1]], [1, 1, 0, 0])
    >>> [round(weight, 4) for weight in found.weights[0].tolist()]
    [0.7311, 0.2689]

  Cost: T E numbers and a top-k of each row.
  """
  num_experts = logits.shape[-1]
  checks.one_of(SCORES, score=score)
  checks.in_range(1, num_experts, num_chosen=num_chosen)
  checks.in_range(1, num_groups, num_kept_groups=num_kept_groups)
  checks.divisible(num_groups, num_experts=num_experts)
  checks.divisible(num_kept_groups, num_chosen=num_chosen)
  room = num_kept_groups * (num_experts // num_groups)
  checks.in_range(1, room, num_chosen=num_chosen)
  if bias is not None:
    checks.same_size(bias=bias.shape[0], experts=num_experts)
    if score in _UNBIASED:
      raise ValueError(f"score {score!r} takes no bias")
  mask = _checked(mask, logits)
  logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0)
  values, probabilities = _scores(logits, score, num_chosen)
  wanted = values
  if score == "softmax":
    wanted = logits  # the same order, and no ties by rounding
  elif score == "sinkhorn":
    wanted = sinkhorn(logits, mask)
  elif bias is not None:
    row = bias.astype(jnp.float32).reshape((1,) * (logits.ndim - 1) + (-1,))
    wanted = values + row
  wanted = jax.lax.stop_gradient(wanted)
  if num_kept_groups < num_groups:
    best = num_chosen // num_kept_groups
    wanted = _in_kept_groups(wanted, num_groups, num_kept_groups, best)
  _, index = jax.lax.top_k(wanted, num_chosen)
  weights = jnp.take_along_axis(values, index, axis=-1)
  if score == "softmax":
    weights = jax.nn.softmax(weights, axis=-1)
  elif score in ("sigmoid", "sqrt_softplus") and num_chosen > 1:
    weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
  index = jnp.where(mask[..., None], index, -1)
  return Routing(
    index=index,
    weights=jnp.where(mask[..., None], weights * scale, 0),
    probabilities=probabilities,
    counts=code_usage.code_histogram(index, num_codes=num_experts),
  )


def sinkhorn(
  logits: Float[Array, "*tokens E"],
  mask: Bool[Array, "*tokens"] | None = None,
  *,
  tolerance: float = 1e-4,
  max_rounds: int = 100,
) -> Float[Array, "*tokens E"]:
  """exp(logits) with rows and columns scaled to equal sums.

  Rows and columns are scaled in turn, until the factors of columns move by less
  than the tolerance on average. Every expert then has 1 / E of all, and every
  token 1 / T of it.

  Args:
    logits: of T tokens together.
    mask: True where a token counts; None for all.
    tolerance: when to stop; the default is that of Megatron-LM.
    max_rounds: when to stop at the latest; ours.

  Returns:
    float32, sum 1, without gradient; zeros for tokens that do not count.

  Example:
    >>> x = jax.jit(sinkhorn)(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
    >>> [[round(value, 2) for value in row] for row in x.tolist()]
    [[0.13, 0.37], [0.37, 0.13]]

  Source: Megatron-LM's `sinkhorn`, here by logarithms, so that none overflows.
  """
  mask = _checked(mask, logits)[..., None]
  logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
  logits = jnp.where(mask, logits, 0)
  num_experts, tokens = logits.shape[-1], tuple(range(logits.ndim - 1))
  num_tokens = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)

  def rows(columns):  # the logarithms of the factors of rows
    scaled = logits + columns
    sums = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    return jnp.where(mask, -jnp.log(num_tokens) - sums, -jnp.inf)

  def one_round(columns):
    scaled = logits + rows(columns)
    sums = jax.nn.logsumexp(scaled, axis=tokens, keepdims=True)
    sums = jnp.where(jnp.isfinite(sums), sums, 0)  # no token counts
    return -jnp.log(float(num_experts)) - sums

  def goes_on(state):
    columns, before, count = state
    moved = jnp.mean(jnp.abs(jnp.exp(columns) - jnp.exp(before)))
    return (moved > tolerance) & (count < max_rounds)

  def step(state):
    columns, _, count = state
    return one_round(columns), columns, count + 1

  start = jnp.sum(jnp.zeros_like(logits), axis=tokens, keepdims=True)
  state = one_round(start), start, 1
  columns, _, _ = jax.lax.while_loop(goes_on, step, state)
  return jnp.exp(logits + columns + rows(columns))


def _checked(mask, rows):
  """The mask, of which there is one value a row."""
  if mask is None:
    return jnp.ones_like(rows[..., 0], dtype=bool)
  if mask.shape != rows.shape[:-1]:
    raise ValueError(
      f"mask must be of the tokens {rows.shape[:-1]}, got {mask.shape}"
    )
  return mask


def _scores(logits, score, num_chosen):
  """What outputs weigh, but for a sum among the chosen; and probabilities."""
  probabilities = jax.nn.softmax(logits, axis=-1)
  if score == "softmax":
    return logits, probabilities
  if score == "pre_softmax" or (score == "sinkhorn" and num_chosen > 1):
    return probabilities, probabilities
  if score == "sinkhorn":
    return jax.nn.sigmoid(logits), probabilities
  if score == "sigmoid":
    values = jax.nn.sigmoid(logits)
  else:
    values = jnp.sqrt(jax.nn.softplus(logits))
  total = jnp.sum(values, axis=-1, keepdims=True)
  return values, values / (total + 1e-20)


def _in_kept_groups(wanted, num_groups, num_kept_groups, best):
  """What is wanted, -inf outside of the best groups of each token."""
  groups = wanted.reshape(*wanted.shape[:-1], num_groups, -1)
  value = jnp.sum(jax.lax.top_k(groups, best)[0], axis=-1)  # [*tokens, n]
  _, kept = jax.lax.top_k(value, num_kept_groups)
  inside = jnp.any(jax.nn.one_hot(kept, num_groups, dtype=bool), axis=-2)
  groups = jnp.where(inside[..., None], groups, -jnp.inf)
  return groups.reshape(wanted.shape)
