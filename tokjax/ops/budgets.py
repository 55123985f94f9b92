"""How many tokens to keep, where, and what that costs.

Counts are Python numbers wherever they decide a shape, and every method
rounds in its own way: the rule has a name and is never unified silently. A
`Plan` says how many tokens each decoder layer sees.
"""

import fractions
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Float, Int32

__all__ = [
  "Plan",
  "allocate",
  "average_tokens",
  "keep_count",
  "layer_tokens",
  "linear_decay_plan",
  "prefill_flops",
  "visiondrop_plan",
]

# (first layer, tokens from it on), first layers ascending from 0.
Plan = Sequence[tuple[int, int]]

_ROUNDING = {
  "half_even": round,
  "floor": math.floor,
  "ceil": math.ceil,
  "half_up": lambda count: math.floor(count + 0.5),
}


def keep_count(
  ratio: float, num_tokens: int, *, rounding: str, at_least: int = 1
) -> int:
  """Number of tokens that a keep ratio stands for.

  Args:
    ratio: share that is kept, 0..1. A method that states how much it removes
      multiplies by 1 - R.
    num_tokens: tokens there are.
    rounding: "half_even" (DivPrune, HiPrune for Qwen, FastV: Python's `round`),
      "floor" (MMTok for Qwen, GlobalCom^2, CATP: Python's `int`), "half_up"
      or "ceil". There is no default: published budgets differ by it.
    at_least: lowest result; 1 is ours, the published codes return 0.

  Returns:
    The count. The product is that of doubles, as in the published codes:
    floor(0.29 * 100) is 28.

  Raises:
    ValueError: for a ratio outside of 0..1 or another rounding.

  Example:
    >>> keep_count(0.098, 576, rounding="half_even")
    56

  Source: the codes of the methods named above.
  """
  checks.in_range(0, 1, ratio=ratio)
  checks.in_range(0, 1 << 30, num_tokens=num_tokens, at_least=at_least)
  checks.one_of(tuple(_ROUNDING), rounding=rounding)
  count = int(_ROUNDING[rounding](ratio * num_tokens))
  return min(max(count, at_least), num_tokens)


def allocate(
  weights: Float[Array, "*batch G"],
  total: int | Int32[Array, "*batch"],
  cap: int | Int32[Array, "*batch G"],
) -> Int32[Array, "*batch G"]:
  """Splits a budget over groups in proportion to weights, each up to a cap.

  What a full group cannot take goes to the others in proportion; what
  rounding down leaves goes to the largest fractions, ties to the lower group.
  Where all open groups weigh nothing they share evenly.

  Args:
    weights: not negative; their scale does not matter. No gradient flows.
    total: tokens to give away; static, or one number per row.
    cap: most a group can take, one for all or one for each.

  Returns:
    Counts that sum to `total`, or to the sum of the caps if that is less.

  Example:
    >>> import jax.numpy as jnp
    >>> allocate(jnp.array([6.0, 3.0, 1.0]), 10, 5).tolist()
    [5, 4, 1]

  Cost: G^2 operations a row.

  Source: ours (the largest remainder method); GlobalCom^2 instead drops what
  rounding leaves and what a full crop cannot take.
  """
  weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
  cap = jnp.zeros_like(weights, dtype=jnp.int32) + jnp.asarray(cap, jnp.int32)
  total = jnp.asarray(total, jnp.int32)
  total = jnp.broadcast_to(total, weights.shape[:-1])[..., None]
  total = jnp.minimum(total, jnp.sum(cap, axis=-1, keepdims=True))
  weights = jnp.where(cap > 0, weights, 0)
  num_groups = weights.shape[-1]

  def fill(_, full):
    """Marks groups whose share of what is left is more than their cap."""
    return full | (_shares(weights, total, cap, full) >= cap)

  # Each round that changes something fills a group.
  full = jax.lax.fori_loop(0, num_groups, fill, cap <= 0)
  share = jnp.where(full, cap, _shares(weights, total, cap, full))
  count = jnp.floor(share).astype(jnp.int32)
  missing = total - jnp.sum(count, axis=-1, keepdims=True)
  room = jnp.where(count < cap, share - count, -1)
  order = jnp.argsort(-room, axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return count + ((rank < missing) & (count < cap))


def _shares(weights, total, cap, full):
  """What each open group gets of what the full ones leave, float32."""
  rest = total - jnp.sum(jnp.where(full, cap, 0), axis=-1, keepdims=True)
  weigh = jnp.where(full, 0, weights)
  weigh = jnp.where(jnp.sum(weigh, axis=-1, keepdims=True) > 0, weigh, ~full)
  sum_ = jnp.sum(weigh, axis=-1, keepdims=True)
  return rest * weigh / jnp.where(sum_ > 0, sum_, 1)


def layer_tokens(plan: Plan, num_layers: int) -> tuple[int, ...]:
  """Number of tokens that each layer sees.

  Args:
    plan: (first layer, tokens) pairs, from layer 0 on.
    num_layers: L.

  Returns:
    L counts.

  Raises:
    ValueError: if the first layers do not ascend from 0, or end past L.

  Example:
    >>> layer_tokens(((0, 9), (2, 4)), 5)
    (9, 9, 4, 4, 4)

  Source: ours.
  """
  starts = [start for start, _ in plan]
  if not starts or starts[0] != 0 or starts != sorted(set(starts)):
    raise ValueError(f"plan must start at layer 0 and ascend, got {starts}")
  checks.in_range(starts[-1] + 1, 1 << 20, num_layers=num_layers)
  stops = [*starts[1:], num_layers]
  return tuple(
    count
    for (start, count), stop in zip(plan, stops, strict=True)
    for _ in range(start, stop)
  )


def average_tokens(plan: Plan, num_layers: int) -> float:
  """Mean number of tokens over the layers, which in-model methods quote.

  Args:
    plan: (first layer, tokens) pairs, from layer 0 on.
    num_layers: L.

  Returns:
    The mean.

  Example:
    >>> average_tokens(((0, 48), (8, 35), (16, 26), (24, 19)), 32)
    32.0

  Source: common to the papers of PyramidDrop, SparseVLM and VisionDrop.
  """
  return sum(layer_tokens(plan, num_layers)) / num_layers


def linear_decay_plan(
  num_visual: int,
  num_text: int,
  *,
  start: int,
  stop: int,
  delayed: bool = True,
) -> tuple[tuple[int, int], ...]:
  """Visual tokens that fall linearly to none, text tokens that stay.

  Layers before `start` see all visual tokens, layers from `stop` on none;
  each between them is charged 1 / (stop - start) of all less than the one
  before. Counts are rounded down.

  Args:
    num_visual: visual tokens at the entry.
    num_text: tokens that are never dropped.
    start: first layer that drops tokens.
    stop: first layer without visual tokens.
    delayed: what a layer drops is missing from the next one on, as in the
      model. False: that layer is already charged with less, as in the
      published count of FLOPs.

  Returns:
    A plan for any decoder with at least `stop` layers.

  Raises:
    ValueError: if the layers do not ascend.

  Example:
    >>> linear_decay_plan(8, 1, start=2, stop=4)
    ((0, 9), (3, 5), (4, 1))

  Source: Zhong et al. (2025), "AIM: Adaptive Inference of Multi-Modal LLMs via
  Token Merging and Pruning"; start 14 and stop 22 of 28 layers.
  """
  checks.in_range(start + 1, 1 << 20, stop=stop)
  plan = {0: num_visual + num_text}
  for layer in range(start, stop):
    dropped = fractions.Fraction(layer - start + 1, stop - start)
    count = math.floor(num_visual * (1 - dropped)) + num_text
    plan[layer + int(delayed)] = count
  return tuple(plan.items())


def prefill_flops(
  plan: Plan,
  num_layers: int,
  *,
  width: int,
  ffn_width: int,
  key_value_width: int | None = None,
  convention: str = "full",
  attention: str = "square",
) -> float:
  """FLOPs of the prefill of a decoder, by one of three conventions.

  With n tokens, width d, FFN width m and key/value width k, a layer costs
  "full": 2 n (2 d^2 + 2 d k + 3 d m) + 4 n^2 d, multiplications and additions
  counted apart; "fastv": 4 n d^2 + 2 n^2 d + 3 n d m; "divprune": the same
  with 2 n d m. The last two count a multiplication and an addition as one and
  take k = d. Norms, softmax and the output layer are left out.

  Args:
    plan: (first layer, tokens) pairs, from layer 0 on.
    num_layers: L.
    width: d.
    ffn_width: m.
    key_value_width: k, number of key/value heads times their width; None for
      d. Only "full" knows it.
    convention: "full", "fastv" (FastV, SparseVLM, CATP) or "divprune".
    attention: "square" (every pair is computed; published numbers compare) or
      "causal" (half of the pairs and the diagonal).

  Returns:
    FLOPs.

  Raises:
    ValueError: for an unknown convention, or a `key_value_width` that the
      convention does not know.

  Example:
    >>> cost = prefill_flops(((0, 6372),), 28, width=3584, ffn_width=18944,
    ...     key_value_width=512)
    >>> round(cost / 1e12, 2)
    99.46

  Source: the codes of FastV, DivPrune and AIM; AIM states 99.63 TFLOPs for
  this example (Qwen2-7B, 32 frames of 196 tokens, 100 of text).
  """
  checks.one_of(("full", "fastv", "divprune"), convention=convention)
  checks.one_of(("square", "causal"), attention=attention)
  if convention != "full" and key_value_width not in (None, width):
    raise ValueError(
      f"key_value_width must be None for {convention!r}, got {key_value_width}"
    )
  if key_value_width is None:
    key_value_width = width
  matrices = 2 if convention == "divprune" else 3
  weights = 2 * width * (width + key_value_width)
  weights += matrices * width * ffn_width
  total = 0
  for count in layer_tokens(plan, num_layers):
    pairs = count**2 if attention == "square" else count * (count + 1) / 2
    total += count * weights + 2 * pairs * width
  return float(total * (2 if convention == "full" else 1))


def visiondrop_plan(
  target: int | float,
  num_layers: int = 32,
  *,
  num_stages: int = 4,
  first: float = 1.5,
  decay: float = 0.735,
  contextual: float = 0.135,
) -> tuple[tuple[int, int, int], ...]:
  """Stages of equal depth whose token counts fall geometrically.

  Stage s starts at layer s L / num_stages with round(first target decay^s)
  tokens, of which round(contextual ...), at least one, are contextual.

  Args:
    target: mean number of visual tokens over the layers.
    num_layers: L, a multiple of `num_stages`.
    num_stages: stages, the one at the entry included.
    first: tokens at the entry, in units of `target`: 1.5 for images, 3 for
      video (paper). With another value or number of stages choose `decay` so
      that `average_tokens` meets the target.
    decay: ratio of two stages; inferred from the published counts.
    contextual: share of contextual tokens; inferred, as is the rounding, from
      one published example, which it gives.

  Returns:
    Triples (first layer, dominant tokens, contextual tokens).

  Raises:
    ValueError: if the layers do not divide.

  Example:
    >>> visiondrop_plan(32)
    ((0, 42, 6), (8, 30, 5), (16, 22, 4), (24, 16, 3))

  Source: Xu et al. (2025), "Rethinking Visual Token Reduction in LVLMs under
  Cross-modal Misalignment" (VisionDrop).
  """
  checks.in_range(1, num_layers, num_stages=num_stages)
  checks.divisible(num_stages, num_layers=num_layers)
  plan = []
  for stage in range(num_stages):
    count = max(round(first * target * decay**stage), 2)
    few = max(round(contextual * count), 1)
    plan.append((stage * num_layers // num_stages, count - few, few))
  return tuple(plan)
