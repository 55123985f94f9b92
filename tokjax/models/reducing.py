"""Reading and reducing tokens inside the layers of a host.

A host gives the rows it is asked for (`Taps`) and calls functions that it is
handed (`Reduction`) where the published methods work: before a block, between
its attention and its MLP, or after it. It knows no method. Under static
shapes a reduction really removes rows: the layers above have fewer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import plans
from tokjax.reduction.types import Reduced
from tokjax.typing import Array, Bool, Float, Int32

__all__ = [
  "Encoded",
  "Reduction",
  "Stream",
  "Tap",
  "Taps",
  "key_bias",
  "reduce_stream",
]

PLACES = ("before", "middle", "after")
FORMS = ("remove", "mask")


@dataclasses.dataclass(frozen=True)
class Taps:
  """Which layers a host returns what of; layers count from 0.

  Negative numbers count from the end: -2 is the second last layer, whose
  output transformers calls `hidden_states[-2]`. What is not asked for is not
  computed for its own sake and not kept.

  Attributes:
    queries: layers whose attention queries are returned.
    keys: layers whose attention keys are returned.
    hidden: layers whose output is returned.
    reduced: layers whose `Reduced` is returned, to reduce other streams alike
      or to spread results over all tokens again.
  """

  queries: tuple[int, ...] = ()
  keys: tuple[int, ...] = ()
  hidden: tuple[int, ...] = ()
  reduced: tuple[int, ...] = ()

  def layers(self) -> set[int]:
    """The layers as they were asked for, each once."""
    return {*self.queries, *self.keys, *self.hidden, *self.reduced}


@dataclasses.dataclass(frozen=True)
class Reduction:
  """A method and where in the host it works.

  Attributes:
    function: `function(layer, features, keys, size, mask) -> Reduced`, for
      features [B, N, D] (the residual stream), keys [B, H, N, d] of that
      layer's attention (None before a block), size [B, N] float32 and mask
      [B, N]. Class, distillation and register tokens are its first rows; it
      must keep those that the host reads in the end, first and in order.
    layers: layers at which it is called, from 0.
    place: "before" the attention of a block (CenterCLIP), in the "middle"
      between attention and MLP (ToMe), or "after" the block.
    form: "remove" takes rows out; "mask" leaves all rows where they are and
      hides those not kept from the attention of later layers. Only a
      selection has a masked form; it costs as much as no reduction and is
      what the removed form is tested against.
    frames: so many consecutive images become one row of tokens first, frame
      after frame; only before a block. The batch shrinks by it for good.
    queries: True calls `function(..., mask, queries)`, for methods that need
      more of the attention than its keys.
  """

  function: Callable[..., Reduced]
  layers: tuple[int, ...]
  place: str = "middle"
  form: str = "remove"
  frames: int = 1
  queries: bool = False

  def check(self, num_layers: int) -> None:
    """Raises ValueError for settings that no host can follow."""
    checks.one_of(PLACES, place=self.place)
    checks.one_of(FORMS, form=self.form)
    checks.in_range(1, float("inf"), frames=self.frames)
    for layer in self.layers:
      checks.in_range(0, num_layers - 1, reduction_layer=layer)
    if self.frames > 1 and (self.place, self.form) != ("before", "remove"):
      raise ValueError(
        "frames are joined before a block, by removal: place must be 'before' "
        f"and form 'remove', got {self.place!r} and {self.form!r}"
      )
    if self.queries and self.place == "before":
      raise ValueError("queries of a layer are not there before its block")


class Stream(NamedTuple):
  """The tokens between two layers.

  Attributes:
    tokens: the residual stream.
    index: input row of each token; frame f of joined images begins at
      f num_rows. Of fused tokens the one that stands for them.
    mask: True where a row is a token; None while all are.
    size: how many input tokens each stands for; None while that is one.
    num_rows: rows per image at the input, static.
  """

  tokens: Float[Array, "B N D"]
  index: Int32[Array, "B N"]
  mask: Bool[Array, "B N"] | None
  size: Float[Array, "B N"] | None
  num_rows: int


class Tap(NamedTuple):
  """What was asked for of one layer; the rest is None.

  Attributes:
    queries: [B, H, N, d] before scaling.
    keys: [B, H, N, d]; `ops.attention_scores.row_attention` takes both.
    mask: which keys are attended to; None for all.
    size: of the keys, for attention in proportion; None for one each.
    hidden: [B, N', D], the output of the block.
    hidden_mask: which of its rows are tokens; None for all.
    reduced: what the last reduction of the layer returned.
  """

  queries: Array | None = None
  keys: Array | None = None
  mask: Array | None = None
  size: Array | None = None
  hidden: Array | None = None
  hidden_mask: Array | None = None
  reduced: Reduced | None = None


class Encoded(NamedTuple):
  """What a host made of its input.

  Attributes:
    tokens: output of the last block, before the final norm.
    mask: True where a row is a token.
    size: how many input tokens each row stands for, 0 where masked.
    index: input row of each token, see `Stream`.
    taps: what was asked for, by the layers as they were asked for.
  """

  tokens: Float[Array, "B N D"]
  mask: Bool[Array, "B N"]
  size: Float[Array, "B N"]
  index: Int32[Array, "B N"]
  taps: dict[int, Tap]


def key_bias(
  stream: Stream, *, proportional: bool = True
) -> Float[Array, "B N"] | None:
  """What is added to the logits of each key.

  Args:
    stream: has masks and sizes.
    proportional: add log(size), so that a token which stands for s equal ones
      weighs in a softmax what those s would.

  Returns:
    float32; a huge negative number where masked. None where nothing is added.

  Example:
    >>> x = jnp.zeros((1, 2, 3))
    >>> stream = Stream(x, jnp.array([[0, 1]]), None, jnp.array([[1., 2.]]), 2)
    >>> key_bias(stream)[0].round(3).tolist()
    [0.0, 0.6930000185966492]

  Source: Bolya et al. (2023), "Token Merging", proportional attention.
  """
  size = stream.size if proportional else None
  if size is not None:
    exists = size > 0
    bias = jnp.where(exists, jnp.log(jnp.where(exists, size, 1)), 0)
  elif stream.mask is not None:
    bias = jnp.zeros_like(stream.mask, dtype=jnp.float32)
  else:
    return None
  if stream.mask is None:
    return bias
  # Finite, so that a row without keys stays free of NaN.
  return jnp.where(stream.mask, bias, jnp.finfo(jnp.float32).min)


def reduce_stream(
  reduction: Reduction,
  layer: int,
  stream: Stream,
  keys: Float[Array, "B H N d"] | None = None,
  queries: Float[Array, "B H N d"] | None = None,
) -> tuple[Stream, Reduced]:
  """Calls a reduction on the tokens of a layer.

  Args:
    reduction: the method.
    layer: number of the layer, from 0.
    stream: the tokens.
    keys: of the layer's attention, where it has been computed.
    queries: the same.

  Returns:
    The tokens that are left, and what the method returned.

  Raises:
    ValueError: if images do not fill groups of frames, tokens are fused where
      rows shall only be masked, or a plan is not one of all tokens.

  Example:
    >>> from tokjax.reduction.types import selected
    >>> stream = Stream(jnp.ones((1, 3, 2)), jnp.array([[0, 1, 2]]), None, None,
    ...                 3)
    >>> last = Reduction(lambda layer, x, keys, size, mask: selected(
    ...   x, jnp.array([[2]])), layers=(0,))
    >>> reduce_stream(last, 0, stream)[0].index.tolist()
    [[2]]

  Source: ours.
  """
  if reduction.frames > 1:
    stream = _join_frames(stream, reduction.frames)
  tokens, index, mask, size, num_rows = stream
  mask = jnp.ones_like(index, dtype=bool) if mask is None else mask
  given = jnp.where(mask, 1.0, 0.0) if size is None else size
  more = (queries,) if reduction.queries else ()
  reduced = reduction.function(layer, tokens, keys, given, mask, *more)
  if reduction.form == "mask":
    if reduced.plan is not None:
      raise ValueError(
        f"form must be 'remove' for a method that fuses tokens, got 'mask' at "
        f"layer {layer}"
      )
    kept = reduced.restore(
      jnp.ones_like(reduced.size)[..., None], index.shape[1]
    )
    return stream._replace(mask=mask & (kept[..., 0] > 0)), reduced
  if reduced.plan is not None:
    checks.same_size(
      plan_tokens=reduced.plan[0].shape[-1], features_tokens=index.shape[1]
    )
  if reduced.plan is None:
    size = None if size is None else reduced.apply(size)
  else:
    num_outputs = reduced.index.shape[-1]
    size = plans.merge_sizes(reduced.plan, given, num_outputs)
    size = jnp.where(reduced.mask, size, 0)
  index = jnp.take_along_axis(index, reduced.index, axis=1)
  stream = Stream(reduced.tokens, index, reduced.mask, size, num_rows)
  return stream, reduced


def _join_frames(stream: Stream, frames: int) -> Stream:
  """Rows of `frames` consecutive images side by side."""
  checks.divisible(frames, images=stream.tokens.shape[0])

  def join(x: Any) -> Any:  # [B f, N, ...] -> [B, f N, ...]
    if x is None:
      return None
    grouped = x.reshape(-1, frames, *x.shape[1:])
    return grouped.reshape(-1, frames * x.shape[1], *x.shape[2:])

  start = jax.lax.broadcasted_iota(jnp.int32, (frames, 1), 0) * stream.num_rows
  length = stream.index.shape[1]
  start = jnp.broadcast_to(start, (frames, length)).reshape(1, -1)
  return Stream(
    join(stream.tokens),
    join(stream.index) + start,
    join(stream.mask),
    join(stream.size),
    stream.num_rows * frames,
  )
