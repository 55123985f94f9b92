"""Two codebooks that share their indices, over scales of a map.

A place of a map has two vectors, of what it means and of how it looks. One
index stands for both: that of the code whose two vectors are nearest together.
What is left of the map is shrunk, quantised, stretched and subtracted, coarse
to fine; at every scale both parts have length one before they are compared.

    config = DualConfig(sides=(1, 2, 4, 8, 16))
    quantizer = DualQuantizer(config, rngs=nnx.Rngs(0))
    state = quantizer.init_state(key)
    found, state = quantizer(semantic, pixel, state, train=True, key=key)

Sources: Qu et al., 2024, "TokenFlow: Unified Image Tokenizer for Multimodal
Understanding and Generation", and its code (ByteFlow-AI/TokenFlow): no
convolutions after stretching, the straight-through step and the losses at each
scale, on vectors of length one, while the map that is left keeps its length.
Ours: codes start on the sphere, not as a cube cast on it; a dropped scale
leaves shapes and program as they are; moving means and resets.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.kernels.nearest_code import nearest_code
from tokjax.ops import estimators, resample, similarity
from tokjax.ops.rows import take_rows
from tokjax.tokenizers.codebook import (
  Codebook,
  CodebookConfig,
  CodebookState,
  update,
)
from tokjax.tokenizers.measures import masked_mean, usage_stats
from tokjax.tokenizers.types import Quantized
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["DualConfig", "DualQuantizer", "DualState", "joint_nearest"]


@dataclasses.dataclass(unsafe_hash=True)
class DualConfig:
  """Two codebooks, both "cosine", of the same number of codes."""

  semantic: CodebookConfig = dataclasses.field(
    default_factory=lambda: CodebookConfig(32768, 32, metric="cosine")
  )
  pixel: CodebookConfig = dataclasses.field(
    default_factory=lambda: CodebookConfig(32768, 8, metric="cosine")
  )
  # Of the maps of codes; the last, g, is that of what is quantised.
  sides: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
  # Of the two distances, semantic and pixel; 0 leaves the choice to the other.
  match_weights: tuple[float, float] = (1.0, 1.0)
  scale_drop: float = 0.1  # chance that a step does without a random scale
  commitment_weight: float = 0.25  # published script; its code's default is 1
  codebook_weight: float = 1.0  # not for learning "ema"

  @property
  def dims(self) -> tuple[int, int]:
    """Widths of a semantic and of a pixel code."""
    return self.semantic.dim, self.pixel.dim

  @property
  def num_tokens(self) -> int:
    """T, codes of a map over all scales."""
    return sum(side**2 for side in self.sides)


class DualState(NamedTuple):
  """State of two codebooks that share their indices."""

  semantic: CodebookState
  pixel: CodebookState


class DualQuantizer(nnx.Module):
  """One index for two vectors, scale after scale.

  Attributes:
    config: its settings.
    semantic: the learned part of one table.
    pixel: that of the other.

  Args:
    config: settings.
    rngs: source of the first codes.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> book = CodebookConfig(16, 2, metric="cosine")
    >>> config = DualConfig(book, book, sides=(1, 2))
    >>> quantizer = jax.jit(lambda: DualQuantizer(config, rngs=nnx.Rngs(0)))()
    >>> state = quantizer.init_state(jax.random.key(0))
    >>> x = jnp.ones((3, 2, 2, 2))
    >>> found, _ = jax.jit(quantizer)(x, x, state)
    >>> found.indices.shape, found.codes.shape
    ((3, 5), (3, 2, 2, 4))
  """

  def __init__(self, config: DualConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    self.semantic = Codebook(config.semantic, rngs=rngs)
    self.pixel = Codebook(config.pixel, rngs=rngs)

  def init_state(self, key: Key[Array, ""]) -> DualState:
    """The state before the first step."""
    keys = jax.random.split(key)
    return DualState(
      self.semantic.init_state(keys[0]), self.pixel.init_state(keys[1])
    )

  def tables(
    self, state: DualState
  ) -> tuple[Float[Array, "K d"], Float[Array, "K d2"]]:
    """Semantic and pixel codes, of length one."""
    return (
      self.semantic.table(state.semantic),
      self.pixel.table(state.pixel),
    )

  def __call__(
    self,
    semantic: Float[Array, "B g g d"],
    pixel: Float[Array, "B g g d2"],
    state: DualState,
    *,
    keep: Bool[Array, " S"] | None = None,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Quantized, DualState]:
    """Codes of all scales for both maps at once.

        left = x
        for each scale: q = nearest code of unit(down(left))
                        left = left - up(q)

    Costs 2 T K (d + d2) FLOPs.

    Args:
      semantic: map of the semantic branch.
      pixel: map of the pixel branch.
      state: of the codebooks.
      keep: True for the scales in use, may be traced; the others get index -1
        and join neither sum nor losses. None: all, but for the one that a step
        of training drops.
      train: static; True applies the estimator and moves the state.
      key: for the dropped scale and resets in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      indices [B, T], scales one after the other, each row by row; codes
      [B, g, g, d + d2], float32, the sum over scales that decoders and
      language models read; losses "commitment" and "codebook", means over the
      scales in use; and the state.

    Raises:
      ValueError: if a key is missing.
    """
    config, fixed = self.config, jax.lax.stop_gradient
    left = jnp.concatenate([semantic, pixel], axis=-1).astype(jnp.float32)
    keep = self._keep(key if train else None, train) if keep is None else keep
    tables = self.tables(state)
    table = jnp.concatenate(tables, axis=-1)
    total, units, indices, errors = jnp.zeros_like(left), [], [], []
    for scale, side in enumerate(config.sides):
      parts = _parts(
        resample.resample(left, *[_down(config, side)] * 2), config.dims
      )
      unit = jnp.concatenate([_unit(part) for part in parts], axis=-1)
      index = joint_nearest(
        _parts(unit, config.dims), tables, config.match_weights
      )
      q = take_rows(table, index)
      errors.append([
        masked_mean(jnp.square(unit - fixed(q)), axis_name=axis_name),
        masked_mean(jnp.square(fixed(unit) - q), axis_name=axis_name),
      ])  # fmt: skip
      z = estimators.straight_through(unit, q) if train else q
      up = self._up(jnp.where(keep[scale], z, 0))
      total, left = total + up, left - fixed(up)
      indices.append(_row(jnp.where(keep[scale], index, -1)))
      units.append(_row(unit))
    indices = jnp.concatenate(indices, axis=1)
    if train:
      state = self._next_state(
        state, jnp.concatenate(units, axis=1), indices, key, axis_name
      )
    errors = jnp.where(keep[:, None], jnp.array(errors), 0)
    errors = jnp.sum(errors, axis=0) / jnp.maximum(jnp.sum(keep), 1)
    losses = {"commitment": config.commitment_weight * errors[0]}
    if config.semantic.learning != "ema":
      losses["codebook"] = config.codebook_weight * errors[1]
    mask = jnp.ones_like(total[..., 0], bool)
    stats = usage_stats(indices, config.semantic.num_codes, axis_name)
    return Quantized(indices, total, mask, losses, stats), state

  def lookup(
    self, indices: Int[Array, "B T"], state: DualState
  ) -> Float[Array, "B g g d"]:
    """The sum of the codes of all scales; an index of -1 adds nothing."""
    return sum(self._added(indices, state))

  def next_inputs(
    self, indices: Int[Array, "B T"], state: DualState
  ) -> Float[Array, "B T2 d"]:
    """What a model reads that predicts scale after scale.

    Args:
      indices: codes of all scales.
      state: of the codebooks.

    Returns:
      For each scale but the first the sum of the scales before it, shrunk to
      its side: T2 = T - sides[0]^2 rows.
    """
    total, rows = 0, []
    added = self._added(indices, state)
    for one, side in zip(added, self.config.sides[1:], strict=False):
      total = total + one
      matrix = _down(self.config, side)
      rows.append(_row(resample.resample(total, matrix, matrix)))
    return jnp.concatenate(rows, axis=1)

  def _keep(self, key, train):
    """[S]: all scales, or in training all but a random one, now and then."""
    config, scales = self.config, len(self.config.sides)
    every = jnp.ones(scales, bool)
    if not train:
      return every
    if key is None and (config.scale_drop or config.semantic.needs_key):
      raise ValueError(
        "key must be given to train with these settings, got None"
      )
    if not config.scale_drop or scales < 2:
      return every
    drop_key, which_key = jax.random.split(jax.random.fold_in(key, 0))
    drop = jax.random.bernoulli(drop_key, config.scale_drop)
    which = jax.random.randint(which_key, (), 1, scales)
    return every & ~(drop & (jnp.arange(scales) == which))

  def _next_state(self, state, units, indices, key, axis_name):
    """Both books see the same indices, and the same draw for dead codes."""
    config = self.config
    key = None if key is None else jax.random.fold_in(key, 1)
    parts = _parts(units, config.dims)
    return DualState(*(
      update(
        one, part, indices, config=book, key=key, axis_name=axis_name
      )
      for one, part, book in zip(
        state, parts, (config.semantic, config.pixel), strict=True
      )
    ))  # fmt: skip

  def _added(self, indices, state):
    """What each scale adds, [B, g, g, d]."""
    config = self.config
    checks.same_size(tokens=indices.shape[1], num_tokens=config.num_tokens)
    table, start = jnp.concatenate(self.tables(state), axis=-1), 0
    added = []
    for side in config.sides:
      index = indices[:, start : start + side * side]
      codes = take_rows(table, index.reshape(len(index), side, side))
      added.append(self._up(codes))
      start += side * side
    return added

  def _up(self, codes):
    """A map of any side on the last grid."""
    last = self.config.sides[-1]
    matrix = resample.cubic_matrix(codes.shape[1], last)
    return resample.resample(codes, matrix, matrix)


def joint_nearest(
  parts: Sequence[Float[Array, "*batch _"]],
  tables: Sequence[Float[Array, "K _"]],
  weights: Sequence[float | Float[Array, ""]],
  mask: Bool[Array, "*batch"] | None = None,
) -> Int[Array, "*batch"]:
  """The code nearest in several tables at once.

      argmin_k sum_i weights_i |unit(parts_i) - unit(tables_i[k])|^2

  One search of vectors put end to end, each times the root of its weight.
  Ties go to the lowest index; no gradient passes.

  Args:
    parts: vectors, one for each table.
    tables: codes, as many in each; both are scaled to length one.
    weights: of the distances, not negative.
    mask: True where a vector counts; None for all.

  Returns:
    Indices, -1 where the mask is False.

  Raises:
    ValueError: if there are not as many of each, or sizes differ.

  Example:
    >>> parts = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    >>> tables = (jnp.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]),
    ...           jnp.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]))
    >>> joint_nearest(parts, tables, (1.0, 1.0)).item()
    1
    >>> joint_nearest(parts, tables, (1.0, 0.2)).item()
    0

  Cost: 2 N K sum_i d_i FLOPs.
  """
  checks.same_size(parts=len(parts), tables=len(tables), weights=len(weights))

  def joined(arrays):
    scaled = [
      jnp.sqrt(jnp.float32(weight)) * _unit(x)
      for x, weight in zip(arrays, weights, strict=True)
    ]
    return jax.lax.stop_gradient(jnp.concatenate(scaled, axis=-1))

  return nearest_code(joined(parts), joined(tables), mask)


def _unit(x):
  return similarity.safe_normalize(x.astype(jnp.float32))


def _parts(x, dims):
  return x[..., : dims[0]], x[..., dims[0] :]


def _row(x):
  """[B, side, side, d] -> [B, side^2, d]."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _down(config, side):
  return resample.area_matrix(config.sides[-1], side)


def _check(config):
  sides = config.sides
  if not sides or min(sides) < 1 or list(sides) != sorted(sides):
    raise ValueError(f"sides must be positive and never fall, got {sides}")
  checks.in_range(0, 1, scale_drop=config.scale_drop)
  one, two = config.semantic, config.pixel
  checks.same_size(semantic_codes=one.num_codes, pixel_codes=two.num_codes)
  checks.one_of(
    ("cosine",), semantic_metric=one.metric, pixel_metric=two.metric
  )
  checks.one_of((one.learning,), pixel_learning=two.learning)
  checks.one_of((one.reset,), pixel_reset=two.reset)
  for weight in config.match_weights:
    checks.in_range(0, 1e6, match_weight=weight)
