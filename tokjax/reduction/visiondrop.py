"""VisionDrop: prune by what visual tokens say of each other, stage by stage.

Each stage is one step of `tokjax.ops.merging.dominant_contextual`, with scores
from visual queries only. The first stage stands at the output of the vision
encoder, the others between layers of the language model;
`tokjax.ops.budgets.visiondrop_plan` says how many tokens each of them leaves.
"""

import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels import column_attention
from tokjax.ops import merging
from tokjax.reduction import types, visionzip
from tokjax.typing import Array, Bool, Float, Implementation

__all__ = ["encoder_stage", "llm_stage", "visual_attention"]


def encoder_stage(
  features: Float[Array, "B N D"],
  queries: Float[Array, "B H N d"],
  keys: Float[Array, "B H N d"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_dominant: int,
  num_contextual: int,
  class_token: bool = True,
  positions: str = "keep",
  implementation: Implementation | None = None,
) -> types.Reduced:
  """The stage at the output of the vision encoder.

  Scores are the attention that [CLS] pays, or without one the mean that all
  tokens pay.

  Args:
    features: output of the encoder.
    queries: of the layer before the last one. No gradient flows.
    keys: of the same layer.
    mask: True where a token counts; None for all.
    num_dominant: tokens that stay, static; [CLS] is one of them.
    num_contextual: tokens made of the others, static.
    class_token: token 0 is [CLS]: its row scores, and it always stays.
    positions: "keep" or "renumber" (as the published code does).
    implementation: of `column_attention`, without a class token.

  Returns:
    num_dominant + num_contextual tokens: those that stay in input order, then
    the fused ones.

  Raises:
    ValueError: if counts are out of range, or sizes disagree.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> x, heads = jnp.ones((1, 6, 2)), jnp.ones((1, 1, 6, 2))
    >>> reduce = jax.jit(functools.partial(
    ...     encoder_stage, num_dominant=2, num_contextual=1))
    >>> reduce(x, heads, heads).size.tolist()
    [[1.0, 1.0, 4.0]]

  Cost: 2 H N d FLOPs with a class token, `column_attention` without.

  Source: Xu et al. (2025), "Rethinking Visual Token Reduction in LVLMs under
  Cross-modal Misalignment" (VisionDrop), whose code calls that of VisionZip.
  """
  checks.same_size(
    features=features.shape[1], queries=queries.shape[2], keys=keys.shape[2]
  )
  if class_token:
    signals = visionzip.visionzip_signals(queries[:, :, :1], keys, mask)
  else:
    score = visual_attention(
      queries, keys, mask, causal=False, implementation=implementation
    )
    signals = visionzip.Signals(score, _mean_key(keys))
  return visionzip.visionzip(
    features,
    signals.metric,
    signals.score,
    mask,
    num_keep=num_dominant + num_contextual,
    num_contextual=num_contextual,
    class_token=class_token,
    positions=positions,
  )


def llm_stage(
  hidden: Float[Array, "B S D"],
  queries: Float[Array, "B H S d"],
  keys: Float[Array, "B Hk S d"],
  mask: Bool[Array, "B S"] | None = None,
  *,
  start: int,
  stop: int,
  num_dominant: int,
  num_contextual: int,
  causal_debias: bool = False,
  positions: str = "keep",
  implementation: Implementation | None = None,
) -> types.Reduced:
  """A stage between two layers of the language model.

  Args:
    hidden: the whole sequence entering the layer.
    queries: of that layer, after its norm and rotary encoding. No gradient
      flows.
    keys: of that layer, likewise; averaged over heads they are the metric.
    mask: True where a token counts; None for all.
    start: first of the visual tokens, static.
    stop: position past the last of them, static.
    num_dominant: visual tokens that stay, static.
    num_contextual: tokens made of the other visual ones, static.
    causal_debias: see `visual_attention`.
    positions: "keep" or "renumber" (as the published code does).
    implementation: of `column_attention`.

  Returns:
    The visual tokens that are left, to stand where the visual ones stood;
    `index` and `position_ids` count from `start`.

  Raises:
    ValueError: if the span or counts are out of range, or sizes disagree.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> x, heads = jnp.ones((1, 8, 2)), jnp.ones((1, 1, 8, 2))
    >>> reduce = jax.jit(functools.partial(
    ...     llm_stage, start=1, stop=7, num_dominant=2, num_contextual=1))
    >>> out = reduce(x, heads, heads)
    >>> out.index.tolist(), out.size.tolist()
    ([[0, 1, 2]], [[1.0, 1.0, 4.0]])

  Cost: 2 H n stop d FLOPs for n visual tokens. The published code projects
  queries and keys once more for it; here the layer hands over its own.

  Source: Xu et al. (2025) and its code; `causal_debias` is ours.
  """
  length = hidden.shape[1]
  checks.in_range(0, length - 1, start=start)
  checks.in_range(start + 1, length, stop=stop)
  checks.same_size(hidden=length, queries=queries.shape[2], keys=keys.shape[2])
  # Rows past `stop` are text; of what stands before `start` only keys matter.
  score = visual_attention(
    queries[:, :, start:stop],
    keys[:, :, :stop],
    None if mask is None else mask[:, :stop],
    causal=True,
    causal_debias=causal_debias,
    implementation=implementation,
  )
  fusion = merging.dominant_contextual(
    _mean_key(keys)[:, start:stop],
    score,
    num_dominant,
    num_contextual,
    None if mask is None else mask[:, start:stop],
  )
  return types.fused(hidden[:, start:stop], *fusion, positions=positions)


def visual_attention(
  queries: Float[Array, "B H N d"],
  keys: Float[Array, "B Hk S d"],
  mask: Bool[Array, "B S"] | None = None,
  *,
  causal: bool,
  causal_debias: bool = False,
  implementation: Implementation | None = None,
) -> Float[Array, "B N"]:
  """Attention that the last N tokens pay to each other, text left out.

  The mean over heads and over valid visual rows of the softmax over all keys;
  what went to keys before the visual ones is left out and not made up for.

  Args:
    queries: those of the visual tokens.
    keys: of the sequence up to the last visual token.
    mask: True where a token counts; None for all.
    causal: whether a row sees only the keys up to its own.
    causal_debias: divide by the number of rows that see a key instead of by
      all: under a causal mask early tokens are seen by more rows. Uniform
      attention over 6 tokens gives .408 .242 .158 .103 .061 .028 without it.
    implementation: of `column_attention`.

  Returns:
    float32, 0 for masked tokens. No gradient flows.

  Raises:
    ValueError: if sizes disagree, or there are fewer keys than queries.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.zeros((1, 1, 2, 4))
    >>> visual_attention(x, x, causal=True).tolist()
    [[0.75, 0.25]]

  Cost: that of `column_attention`; no N x S array.

  Source: Xu et al. (2025) and its code; `causal_debias` is ours.
  """
  num_tokens, num_keys = queries.shape[2], keys.shape[2]
  checks.in_range(num_tokens, 1 << 30, num_keys=num_keys)
  if mask is None:
    mask = jnp.ones_like(keys[:, 0, :, 0], dtype=bool)
  checks.same_size(keys=num_keys, mask=mask.shape[1])
  valid = mask[:, num_keys - num_tokens :]
  rows = valid.astype(jnp.float32)
  received = column_attention.column_attention(
    queries,
    keys,
    mask,
    rows,
    causal=causal,
    implementation=implementation,
  ).received
  total = jnp.mean(received, axis=1)[:, num_keys - num_tokens :]
  seen_by = jnp.broadcast_to(jnp.sum(rows, axis=1, keepdims=True), total.shape)
  if causal and causal_debias:
    seen_by = jnp.flip(jnp.cumsum(jnp.flip(rows, axis=1), axis=1), axis=1)
  return jnp.where(valid, total / jnp.maximum(seen_by, 1), 0)


def _mean_key(keys):
  return jnp.mean(keys.astype(jnp.float32), axis=1)  # [B, S, d]
