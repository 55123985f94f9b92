"""Residual quantisation: a sum of codes, each of what the ones before left.

    config = RVQConfig(CodebookConfig(256, 32, learning="ema"), num_stages=4)
    quantizer = ResidualQuantizer(config, rngs=nnx.Rngs(0))
    state = quantizer.init_state(key)
    found, state = quantizer(features, state, train=True)
    coarse = quantizer.lookup(found.indices, state, num_active=2)

The estimator is applied once, to the sum: the encoder gets the gradient of its
output as it is. (Published code adds up straight-through stages while the
residuals hide the codes before, which makes that gradient as many times too
large as there are stages.)

Sources: Zeghidour et al., 2021, "SoundStream", with quantizer dropout (one
number of stages a step); Lee et al., 2022, "Autoregressive Image Generation
using Residual Quantization", with the shared table. Ours: one compiled program
for every number of stages in use; the beam keeps the partial sums that are
closest to x, where published code adds up the errors of the stages.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.kernels.nearest_code import nearest_code
from tokjax.ops import estimators
from tokjax.ops.rows import take_rows
from tokjax.tokenizers.codebook import (
  Codebook,
  CodebookConfig,
  CodebookState,
  from_data,
  update,
)
from tokjax.tokenizers.measures import masked_mean, usage_stats
from tokjax.tokenizers.types import Quantized
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["RVQConfig", "ResidualQuantizer"]

Estimator = Literal["straight_through", "rotation"]


@dataclasses.dataclass(unsafe_hash=True)
class RVQConfig:
  """A residual quantizer of `num_stages` tables of the same size."""

  codebook: CodebookConfig  # of every stage; not "cosine"
  num_stages: int = 4  # M
  shared: bool = False  # one table for all stages
  estimator: Estimator = "straight_through"
  commitment_weight: float = 0.25
  codebook_weight: float = 1.0  # of "gradient" and "simvq"
  dropout_from: int = 0  # in training keep a random number >= this; 0: all
  beam_size: int = 1  # partial sums kept outside of training

  def build(self, rngs: nnx.Rngs) -> "ResidualQuantizer":
    """The quantizer of these settings."""
    return ResidualQuantizer(self, rngs=rngs)


class ResidualQuantizer(nnx.Module):
  """Sums of codes, one of each table; costs M times a vector quantizer.

  Attributes:
    config: its settings.
    codebooks: the learned parts, stacked over stages; not if shared.

  Args:
    config: settings.
    rngs: source of the first parameters.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> config = RVQConfig(CodebookConfig(2, 2, learning="ema"), num_stages=2)
    >>> quantizer = ResidualQuantizer(config, rngs=nnx.Rngs(0))
    >>> codes = jnp.array([[[1.0, 1], [-1, -1]], [[0.5, 0], [0, 0.5]]])
    >>> state = CodebookState(jnp.ones((2, 2)), codes, codes)
    >>> found, _ = jax.jit(quantizer)(jnp.array([[1.4, 0.8]]), state)
    >>> found.indices.tolist(), found.codes.tolist()
    ([[0, 0]], [[1.5, 1.0]])
  """

  def __init__(self, config: RVQConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    keys = jax.random.split(rngs.params(), config.num_stages)
    if config.shared:
      self.codebooks = Codebook(config.codebook, rngs=nnx.Rngs(keys[0]))
    else:
      self.codebooks = jax.vmap(
        lambda key: Codebook(config.codebook, rngs=nnx.Rngs(key))
      )(keys)

  @property
  def num_codes(self) -> int:
    """What an index is below, K of each stage."""
    return self.config.codebook.num_codes

  @property
  def bits_per_vector(self) -> float:
    """log2 of the number of results, M log2 K."""
    return self.config.num_stages * math.log2(self.num_codes)

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """States of all stages, stacked unless shared."""
    if self.config.shared:
      return self.codebooks.init_state(key)
    keys = jax.random.split(key, self.config.num_stages)
    return jax.vmap(lambda book, key: book.init_state(key))(
      self.codebooks, keys
    )

  def tables(self, state: CodebookState) -> Float[Array, "M K d"]:
    """The code vectors of every stage."""
    if self.config.shared:
      table = self.codebooks.table(state)
      return jnp.broadcast_to(table, (self.config.num_stages, *table.shape))
    return jax.vmap(lambda book, state: book.table(state))(
      self.codebooks, state
    )

  def init_from_data(
    self,
    key: Key[Array, ""],
    x: Float[Array, "*batch d"],
    mask: Bool[Array, "*batch"] | None = None,
  ) -> CodebookState:
    """State whose tables are k-means of what the stages before leave.

    Args:
      key: for the first means.
      x: vectors as they come, at least K.
      mask: True where a vector counts; None means all.

    Raises:
      ValueError: if the tables are not learned by "ema", or shared.
    """
    if self.config.shared:
      raise ValueError("shared must be False: one table has one k-means")
    states = []
    for stage_key in jax.random.split(key, self.config.num_stages):
      found = from_data(stage_key, x, mask, config=self.config.codebook)
      x = x - found.codes[nearest_code(x, found.codes)]
      states.append(found)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

  def __call__(
    self,
    x: Float[Array, "*batch d"],
    state: CodebookState,
    mask: Bool[Array, "*batch"] | None = None,
    *,
    num_active: int | Int[Array, "..."] | None = None,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Quantized, CodebookState]:
    """Codes for vectors; in training also the next state.

    Args:
      x: vectors, as wide as the codes.
      state: of the tables.
      mask: True where a vector counts; None means all. The others get index
        -1 and zeros, and change neither losses nor state.
      num_active: stages in use, a number or one for each row of the batch;
        may be traced. The other stages get index -1. None: all, or in
        training a random number, if `dropout_from` is set.
      train: static; False leaves the state as it is and returns codes that
        are sums of the tables', without estimator, found by the beam.
      key: for dropout and resets in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      indices [*batch, M], codes in the dtype of x, losses "commitment" and
      "codebook", means over the stages in use, statistics that are means over
      all stages; and the state.

    Raises:
      ValueError: if the width is wrong or a key is missing.
    """
    config = self.config
    _check_call(config, x, train, key)
    if mask is None:
      mask = jnp.ones(x.shape[:-1], bool)
    keys = [None] * 2 if key is None else jax.random.split(key)
    if num_active is None:
      num_active = config.num_stages
      if train and config.dropout_from:
        num_active = self.draw_num_active(keys[0])
    # Zero, as NaN would spread through the products of gradients.
    y = jnp.where(mask[..., None], x.astype(jnp.float32), 0)
    tables = self.tables(state)
    valid = _active(num_active, config.num_stages, mask)
    if config.beam_size > 1 and not train:
      indices = _beam(y, tables, valid, config.beam_size)
      left, q = _left(y, tables, indices)
    else:
      indices, left, q = _greedy(y, tables, valid)
    losses = _losses(config, left, q, valid, axis_name)
    z = jnp.sum(q, axis=0)
    if train:
      state = self._next_state(state, left, indices, keys[1], axis_name)
      estimate = estimators.straight_through
      if config.estimator == "rotation":
        estimate = estimators.rotate_to
      z = estimate(y, z)
    stats = jax.vmap(
      lambda index: usage_stats(index, config.codebook.num_codes, axis_name)
    )(indices)
    stats = jax.tree.map(jnp.mean, stats)
    codes = jnp.where(mask[..., None], z, 0).astype(x.dtype)
    found = Quantized(jnp.moveaxis(indices, 0, -1), codes, mask, losses, stats)
    return found, state

  def draw_num_active(self, key: Key[Array, ""]) -> Int[Array, ""]:
    """The number of stages of a training step, `dropout_from` to all."""
    config = self.config
    return jax.random.randint(
      key, (), config.dropout_from, config.num_stages + 1
    )

  def lookup(
    self,
    indices: Int[Array, "*batch M"],
    state: CodebookState,
    *,
    num_active: int | Int[Array, "..."] | None = None,
  ) -> Float[Array, "*batch d"]:
    """Sums of codes; a stage of index -1 adds nothing.

    Args:
      indices: codes of every stage.
      state: of the tables.
      num_active: only so many first stages count; None means all.
    """
    indices = jnp.moveaxis(indices, -1, 0)
    if num_active is not None:
      whole = jnp.ones(indices.shape[1:], bool)
      valid = _active(num_active, len(indices), whole)
      indices = jnp.where(valid, indices, -1)
    return jnp.sum(_codes(self.tables(state), indices), axis=0)

  def _next_state(self, state, left, indices, key, axis_name):
    config, codes = self.config.codebook, self.codebooks.codes
    codes = None if codes is None else codes[...]
    if self.config.shared:
      return update(
        state, left, indices, config=config, codes=codes, key=key,
        axis_name=axis_name,
      )  # fmt: skip

    def one(state, left, index, codes, key):
      return update(
        state, left, index, config=config, codes=codes, key=key,
        axis_name=axis_name,
      )  # fmt: skip

    keys = None if key is None else jax.random.split(key, len(indices))
    return jax.vmap(one)(state, left, indices, codes, keys)


def _check(config):
  checks.one_of(get_args(Estimator), estimator=config.estimator)
  checks.in_range(1, 1 << 20, num_stages=config.num_stages)
  checks.in_range(0, config.num_stages, dropout_from=config.dropout_from)
  checks.in_range(1, 1 << 20, beam_size=config.beam_size)
  if config.codebook.metric != "euclidean":
    raise ValueError(
      'metric must be "euclidean", got'
      f" {config.codebook.metric!r}: what is left has no fixed length"
    )


def _check_call(config, x, train, key):
  if x.shape[-1] != config.codebook.dim:
    raise ValueError(
      f"x must have width {config.codebook.dim}, got shape {x.shape}"
    )
  random = config.codebook.needs_key or config.dropout_from
  if train and random and key is None:
    raise ValueError("key must be given to train with these settings, got None")


def _active(num_active, num_stages, mask):
  """[M, *batch]: which stages count for which vectors."""
  num_active = jnp.asarray(num_active)
  trailing = (1,) * (mask.ndim - num_active.ndim)
  num_active = num_active.reshape(*num_active.shape, *trailing)
  stage = jnp.arange(num_stages).reshape(-1, *(1,) * mask.ndim)
  return (stage < num_active[None]) & mask[None]


def _codes(tables, indices):
  """[M, K, d] and [M, *batch] -> [M, *batch, d], zeros for -1."""
  return jax.vmap(take_rows)(tables, indices)


def _left(y, tables, indices):
  """What each stage is given, without a gradient to codes, and its codes."""
  q = _codes(tables, indices)
  before = jnp.cumsum(q, axis=0) - q
  return y[None] - jax.lax.stop_gradient(before), q


def _greedy(y, tables, valid):
  """Indices [M, *batch], what each stage is given, and its codes."""

  def stage(left, each):
    table, valid = each
    index = nearest_code(left, table, valid)
    return left - take_rows(table, index), index

  inputs = jax.lax.stop_gradient((y, tables))
  _, indices = jax.lax.scan(stage, inputs[0], (inputs[1], valid))
  return indices, *_left(y, tables, indices)


def _beam(y, tables, valid, size):
  """Indices of the best of `size` partial sums kept; holds N b K numbers."""
  y, tables = jax.lax.stop_gradient((y, tables))
  num_stages, num_codes, _ = tables.shape
  left = jnp.broadcast_to(y[..., None, :], (*y.shape[:-1], size, y.shape[-1]))
  none = jnp.zeros_like(left[..., 0], jnp.int32)  # laid out as the vectors
  place = jnp.arange(size, dtype=jnp.int32)
  alive = none + jnp.broadcast_to(place, none.shape) == 0
  paths = jnp.stack([none - 1] * num_stages, axis=-1)

  def stage(carry, each):
    left, paths, alive = carry
    number, table, valid = each
    inner = jnp.einsum("...d,kd->...k", left, table, precision="highest")
    squares = jnp.sum(jnp.square(table), axis=-1)
    error = jnp.broadcast_to(squares, inner.shape) - 2 * inner
    error = error + jnp.sum(jnp.square(left), axis=-1, keepdims=True)
    error = jnp.where(alive[..., None], error, jnp.inf)
    flat = error.reshape(*error.shape[:-2], -1)
    score, best = jax.lax.top_k(-flat, size)
    parent, index = best // num_codes, best % num_codes
    kept = jnp.take_along_axis(left, parent[..., None], axis=-2)
    path = jnp.take_along_axis(paths, parent[..., None], axis=-2)
    found = kept - take_rows(table, index), path.at[..., number].set(index)
    found = *found, jnp.isfinite(score)

    def choose(new, old):
      where = valid.reshape(*valid.shape, *(1,) * (new.ndim - valid.ndim))
      return jnp.where(where, new, old)

    return jax.tree.map(choose, found, carry), None

  stages = jnp.arange(num_stages), tables, valid
  (left, paths, alive), _ = jax.lax.scan(stage, (left, paths, alive), stages)
  error = jnp.sum(jnp.square(left), axis=-1)
  best = jnp.argmin(jnp.where(alive, error, jnp.inf), axis=-1)
  path = jnp.take_along_axis(paths, best[..., None, None], axis=-2)
  return jnp.moveaxis(path[..., 0, :], -1, 0)


def _losses(config, left, q, valid, axis_name):
  losses, fixed = {}, jax.lax.stop_gradient

  def loss(x, y):
    error = jnp.mean(jnp.square(x - y), axis=-1)
    return masked_mean(error, valid, axis_name)

  if config.commitment_weight:
    losses["commitment"] = config.commitment_weight * loss(left, fixed(q))
  if config.codebook.learning != "ema" and config.codebook_weight:
    losses["codebook"] = config.codebook_weight * loss(fixed(left), q)
  return losses
