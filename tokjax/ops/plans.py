"""What became of each token: plans that merge a stream and spread it again.

A reduction of N tokens to K is linear, Y = W X. `Merge` is W with at most one
non-zero a column (every token goes into one output, or is dropped), held as
two vectors; `Transform` is any W. A plan is made once, from the features that
decide, and then applied to any other stream of the same tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.typing import Array, Float, Int32

__all__ = [
  "Merge",
  "Transform",
  "apply_plan",
  "compose_plans",
  "merge_sizes",
  "restore_plan",
  "to_transform",
]


class Merge(NamedTuple):
  """Every token goes into one output: y_k = sum of weight_n x_n over slot k.

  Attributes:
    slot: output of each token; `num_outputs` (one too many) where it is
      dropped.
    weight: factor of each token in its output.
  """

  slot: Int32[Array, "*batch N"]
  weight: Float[Array, "*batch N"]


class Transform(NamedTuple):
  """A token may go into several outputs: Y = weight X.

  Attributes:
    weight: row k mixes the tokens of output k.
    share: column n says how token n, or its size, is shared among the outputs;
      its sum is 1, or 0 where the token is dropped.
  """

  weight: Float[Array, "*batch K N"]
  share: Float[Array, "*batch K N"]


def apply_plan(
  plan: Merge | Transform, x: Float[Array, "*batch N D"], num_outputs: int
) -> Float[Array, "*batch K D"]:
  """Merges a stream of tokens as a plan says.

  Args:
    plan: where the tokens go. Its weights may be traced; they get gradients.
    x: the stream, float32 or bfloat16; sums are float32. Tokens that go
      nowhere may hold anything.
    num_outputs: K, static.

  Returns:
    The outputs, in the dtype of `x`.

  Raises:
    ValueError: if the token axes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> plan = Merge(jnp.array([0, 0, 1, 2]), jnp.array([0.5, 0.5, 1.0, 0.0]))
    >>> apply_plan(plan, jnp.array([[1.0], [3.0], [5.0], [7.0]]), 2).tolist()
    [[2.0], [5.0]]

  Cost: 2 N D FLOPs for a `Merge` (a scatter-add), 2 K N D for a `Transform`.

  Source: the algebra is that of Zeng et al. (2025), "Token Transforming".
  """
  checks.same_size(plan_tokens=plan[0].shape[-1], x_tokens=x.shape[-2])
  if isinstance(plan, Transform):
    checks.same_size(num_outputs=num_outputs, weight=plan.weight.shape[-2])
    used = jnp.any((plan.weight != 0) | (plan.share != 0), axis=-2)
  else:
    used = plan.slot < num_outputs
  # A token that goes nowhere may hold NaN, which a weight of 0 would not stop.
  wide = jnp.where(used[..., None], x.astype(jnp.float32), 0)
  if isinstance(plan, Transform):
    mixed = jnp.matmul(
      plan.weight,
      wide,
      precision="highest",
      preferred_element_type=jnp.float32,
    )
    return mixed.astype(x.dtype)
  weighted = plan.weight[..., None] * wide
  return _scatter(weighted, plan.slot, num_outputs).astype(x.dtype)


def merge_sizes(
  plan: Merge | Transform, size: Float[Array, "*batch N"], num_outputs: int
) -> Float[Array, "*batch K"]:
  """How many original tokens each output stands for.

  Args:
    plan: where the tokens go.
    size: how many each token stood for before, all 1 at the start.
    num_outputs: K, static.

  Returns:
    float32 sizes; their sum is that of the tokens which were not dropped.

  Example:
    >>> import jax.numpy as jnp
    >>> plan = Merge(jnp.array([0, 0, 1]), jnp.array([0.5, 0.5, 1.0]))
    >>> merge_sizes(plan, jnp.ones(3), 2).tolist()
    [2.0, 1.0]

  Source: Bolya et al. (2023), "Token Merging"; for `Transform` ours.
  """
  size = size.astype(jnp.float32)
  if isinstance(plan, Transform):
    return jnp.einsum("...kn,...n->...k", plan.share, size, precision="highest")
  return _scatter(size[..., None], plan.slot, num_outputs)[..., 0]


def restore_plan(
  plan: Merge | Transform, y: Float[Array, "*batch K D"]
) -> Float[Array, "*batch N D"]:
  """Gives every original token what became of it; dropped ones get zero.

  Args:
    plan: where the tokens went.
    y: one row per output.

  Returns:
    One row per original token, in the dtype of `y`: its output, or for a
    `Transform` the mean of its outputs by its shares.

  Example:
    >>> import jax.numpy as jnp
    >>> plan = Merge(jnp.array([0, 0, 1, 2]), jnp.ones(4))
    >>> restore_plan(plan, jnp.array([[2.0], [5.0]])).tolist()
    [[2.0], [2.0], [5.0], [0.0]]

  Source: the un-merge of Bolya et al. (2023); for `Transform` ours.
  """
  if isinstance(plan, Transform):
    checks.same_size(plan_outputs=plan.share.shape[-2], y=y.shape[-2])
    wide = y.astype(jnp.float32)
    return jnp.einsum(
      "...kn,...kd->...nd", plan.share, wide, precision="highest"
    ).astype(y.dtype)
  num_outputs = y.shape[-2]
  place = jnp.minimum(plan.slot, num_outputs - 1)
  rows = jnp.take_along_axis(y, place[..., None], axis=-2)
  return jnp.where((plan.slot < num_outputs)[..., None], rows, 0)


def to_transform(plan: Merge | Transform, num_outputs: int) -> Transform:
  """The same plan as a matrix.

  Args:
    plan: a `Transform` comes back as it is.
    num_outputs: K, static.

  Returns:
    A `Transform` of [*batch, K, N]; each token has one share, in its output.

  Example:
    >>> import jax.numpy as jnp
    >>> plan = Merge(jnp.array([1, 0, 2]), jnp.array([0.5, 1.0, 1.0]))
    >>> to_transform(plan, 2).weight.tolist()
    [[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]]

  Source: Zeng et al. (2025), "Token Transforming".
  """
  if isinstance(plan, Transform):
    return plan
  share = jax.nn.one_hot(plan.slot, num_outputs, axis=-2, dtype=jnp.float32)
  return Transform(share * plan.weight[..., None, :], share)


def compose_plans(
  second: Merge | Transform, first: Merge | Transform, num_outputs: int
) -> Merge | Transform:
  """One plan that does what two do in turn.

  Args:
    second: applied to the outputs of the first; its token axis is their number.
    first: applied to the tokens.
    num_outputs: outputs of the second, static.

  Returns:
    A `Merge` of two `Merge`s, else a `Transform`.

  Raises:
    ValueError: if the outputs of a `Transform` are not the tokens of the next.

  Example:
    >>> import jax.numpy as jnp
    >>> half = Merge(jnp.array([0, 0, 1, 1]), jnp.full(4, 0.5))
    >>> last = Merge(jnp.array([0, 0]), jnp.array([0.5, 0.5]))
    >>> compose_plans(last, half, 1).weight.tolist()
    [0.25, 0.25, 0.25, 0.25]

  Cost: 2 K2 K1 N FLOPs for matrices, twice; a gather for two `Merge`s.

  Source: Zeng et al. (2025), "Token Transforming".
  """
  between = second[0].shape[-1]
  if isinstance(second, Merge) and isinstance(first, Merge):
    gone = first.slot >= between
    at = jnp.minimum(first.slot, between - 1)
    slot = jnp.take_along_axis(second.slot, at, axis=-1)
    weight = jnp.take_along_axis(second.weight, at, axis=-1)
    return Merge(
      jnp.where(gone, num_outputs, slot),
      jnp.where(gone, 0, weight * first.weight),
    )
  first = to_transform(first, between)
  second = to_transform(second, num_outputs)
  checks.same_size(first_outputs=first.weight.shape[-2], second_tokens=between)
  return Transform(
    jnp.matmul(second.weight, first.weight, precision="highest"),
    jnp.matmul(second.share, first.share, precision="highest"),
  )


def _scatter(x, slot, num_outputs):
  """Sums rows [*batch, N, D] by slot; slots past the last are dropped."""

  def one(x, slot):  # [N, D], [N]
    zeros = jnp.zeros_like(x, shape=(num_outputs, x.shape[-1]))
    return zeros.at[slot].add(x, mode="drop")

  for _ in range(slot.ndim - 1):
    one = jax.vmap(one)
  return one(x, slot)
