"""Multi-scale residual quantisation: few codes first, then more and more.

What is left of a map of vectors is shrunk to n_s codes, taken from one table
for all scales; those are stretched again and subtracted:

    left = x
    for each scale s:
      index_s = nearest code of down_s(left)
      added_s = smooth_s(up_s(codes[index_s]))
      left = left - added_s

The sum of what the first scales added is a coarse version of x. Tokens are the
cells of a square map ("map", the tokens of images), or a row without neighbours
in space ("row", the latents of a set):

    config = MultiScaleConfig(CodebookConfig(4096, 32))
    quantizer = MultiScaleQuantizer(config, rngs=nnx.Rngs(0))
    state = quantizer.init_state(key)
    found, state = quantizer(features, state, train=True)
    coarse = quantizer.lookup(found.indices, state, upto=5)

Sources: Tian et al., 2024, "Visual Autoregressive Modeling", and its code
(FoundationVision/VAR): means down, cubic interpolation up, convolutions that
neighbouring scales share, losses of the cumulative sums, straight-through once.
Rows of growing token counts: Chen et al., 2024, "3D representation in 512-Byte"
(VAT), whose maps are not published; means and linear interpolation along the
row are ours, and so are learned maps, dropped scales, moving means of codes.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.kernels.nearest_code import nearest_code
from tokjax.ops import estimators, resample
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

__all__ = [
  "MultiScaleConfig",
  "MultiScaleQuantizer",
  "num_bytes",
  "shared_convolutions",
]

Layout = Literal["map", "row"]
Up = Literal["cubic", "linear"]


@dataclasses.dataclass(unsafe_hash=True)
class MultiScaleConfig:
  """S scales with one table; the defaults are VAR's."""

  codebook: CodebookConfig  # of all scales; not "cosine"
  # Sides of square maps, or token counts of a row; the last is that of x.
  sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
  layout: Layout = "map"
  up: Up = "cubic"  # interpolation; down are means
  learned_maps: bool = False  # of a row: start as linear up, and learn
  num_convolutions: int = 4  # of a map, shared by scales; 0: none
  convolution_ratio: float = 0.5  # added: (1 - ratio) h + ratio conv(h)
  code_deviation: float | None = None  # of first codes; None: the codebook's
  commitment_weight: float = 0.25
  codebook_weight: float = 1.0  # teaches codes, convolutions, learned maps
  dropout_from: int = 0  # in training keep a random number >= this; 0: all

  def build(self, rngs: nnx.Rngs) -> "MultiScaleQuantizer":
    """The quantizer of these settings."""
    return MultiScaleQuantizer(self, rngs=rngs)


class MultiScaleQuantizer(nnx.Module):
  """Codes of several scales whose sum stands for the vectors.

  Costs 2 T K d FLOPs to find T codes, the sum of those of all scales; in a map
  of side n, 4 n^2 (m + n) d to shrink or stretch to side m, and 18 n^2 d^2 for
  each convolution.

  Attributes:
    config: its settings.
    codebook: the learned part of the table.
    convolutions: [P, ...] stacked 3 x 3 convolutions, or None.
    links: of a row with learned maps, for each scale but the last [n, N]; the
      softmax over N shrinks, the one over n stretches. (The choice of a code
      passes no gradient: a map down of its own would never learn.)

  Args:
    config: settings.
    rngs: source of the first parameters.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> config = MultiScaleConfig(CodebookConfig(5, 1), (1, 2),
    ...                           num_convolutions=0)
    >>> quantizer = MultiScaleQuantizer(config, rngs=nnx.Rngs(0))
    >>> codes = jnp.array([[2.5], [-1.5], [-0.5], [0.5], [1.5]])
    >>> quantizer.codebook.codes = nnx.Param(codes)
    >>> state = quantizer.init_state(jax.random.key(0))
    >>> x = jnp.array([[1.0], [2.0], [3.0], [4.0]])  # a 2 x 2 map
    >>> found, _ = jax.jit(quantizer)(x, state)
    >>> found.indices.tolist(), found.codes[:, 0].tolist()
    ([0, 1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0])
  """

  def __init__(self, config: MultiScaleConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    dim, sizes = config.codebook.dim, config.sizes
    self.codebook = Codebook(config.codebook, rngs=rngs)
    if config.code_deviation is not None and self.codebook.codes is not None:
      self.codebook.codes = nnx.Param(self._first_codes(rngs.params()))
    convolutions = None
    if config.num_convolutions:
      keys = jax.random.split(rngs.params(), config.num_convolutions)
      convolutions = jax.vmap(
        lambda key: nnx.Conv(dim, dim, (3, 3), rngs=nnx.Rngs(key))
      )(keys)
    self.convolutions = convolutions
    links = None
    if config.learned_maps:
      ups = [resample.linear_matrix(n, sizes[-1]) for n in sizes[:-1]]
      links = nnx.List(
        nnx.Param(jnp.log(jnp.asarray(up.T) + 1e-2)) for up in ups
      )
    self.links = links

  @property
  def num_codes(self) -> int:
    """What an index is below, K of all scales."""
    return self.config.codebook.num_codes

  @property
  def num_tokens(self) -> int:
    """N, how many vectors stand beside each other in x."""
    return self._counts()[-1]

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The codebook's state before the first step."""
    key, codes_key = jax.random.split(key)
    state = self.codebook.init_state(key)
    if self.config.code_deviation is not None and state.sums is not None:
      codes = self._first_codes(codes_key)
      state = state._replace(codes=codes, sums=codes)
    return state

  def __call__(
    self,
    x: Float[Array, "*batch N d"],
    state: CodebookState,
    mask: Bool[Array, "*batch"] | None = None,
    *,
    num_active: int | Int[Array, "*batch"] | None = None,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Quantized, CodebookState]:
    """Codes of all scales; in training also the next state.

    Args:
      x: vectors, those of a map row by row.
      state: of the codebook.
      mask: True where an example counts; None means all. The others get
        index -1 and zeros, and change neither losses nor state.
      num_active: first scales in use, a number or one for each example; may
        be traced. Codes of the others are -1. None: all, or in training a
        random number, if `dropout_from` is set.
      train: static; False leaves the state as it is and returns the sum of
        codes as it is.
      key: for resets and dropped scales in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch; losses,
        statistics and state are those of the whole batch.

    Returns:
      indices [*batch, T], the scales one after the other, coarse to fine
      (`split` cuts them); codes [*batch, N, d] in the dtype of x; losses
      "commitment" and "codebook" as far as they have a weight, means over
      scales of the error of each cumulative sum; and the state.

    Raises:
      ValueError: if a size is wrong or a key is missing.
    """
    config = self.config
    self._check_call(x, train, key)
    if mask is None:
      mask = jnp.ones(x.shape[:-2], bool)
    keys = [None] * 2 if key is None else jax.random.split(key)
    num_scales = len(config.sizes)
    if num_active is None:
      num_active = num_scales
      if train and config.dropout_from:
        num_active = jax.random.randint(
          keys[0], (), config.dropout_from, num_scales + 1
        )
    num_active = jnp.broadcast_to(jnp.asarray(num_active), mask.shape)

    # Zero, as NaN would spread through the products of gradients.
    y = jnp.where(mask[..., None, None], x.astype(jnp.float32), 0)
    table = self.codebook.table(state)
    fixed = jax.lax.stop_gradient
    total, inputs, indices = jnp.zeros_like(y), [], []
    errors, valid = {"commitment": [], "codebook": []}, []
    for scale, count in enumerate(self._counts()):
      counts = mask & (scale < num_active)
      each = jnp.broadcast_to(counts[..., None], (*counts.shape, count))
      inputs.append(self._down(fixed(y - total), scale))
      indices.append(nearest_code(inputs[-1], fixed(table), each))
      total = total + self._added(table, indices[-1], scale)
      valid.append(counts)
      for name, error in (
        ("commitment", y - fixed(total)),
        ("codebook", fixed(y) - total),
      ):
        errors[name].append(jnp.mean(jnp.square(error), axis=(-2, -1)))

    weights = {
      "commitment": config.commitment_weight,
      "codebook": config.codebook_weight * self._teaches_by_gradient(),
    }
    losses = {
      name: weight
      * masked_mean(jnp.stack(errors[name]), jnp.stack(valid), axis_name)
      for name, weight in weights.items()
      if weight
    }
    index = jnp.concatenate(indices, axis=-1)
    z = total
    if train:
      z = estimators.straight_through(y, total)
      codes = self.codebook.codes
      state = update(
        state,
        jnp.concatenate(inputs, axis=-2),
        index,
        config=config.codebook,
        codes=None if codes is None else codes[...],
        key=keys[1],
        axis_name=axis_name,
      )
    tokens = jnp.broadcast_to(mask[..., None], y.shape[:-1])
    codes = jnp.where(tokens[..., None], z, 0).astype(x.dtype)
    stats = usage_stats(index, config.codebook.num_codes, axis_name)
    return Quantized(index, codes, tokens, losses, stats), state

  def split(
    self, indices: Int[Array, "*batch T"]
  ) -> tuple[Int[Array, "*batch n"], ...]:
    """The indices of each scale."""
    ends = np.cumsum(self._counts())
    checks.same_size(indices=indices.shape[-1], tokens=int(ends[-1]))
    return tuple(jnp.split(indices, ends[:-1].tolist(), axis=-1))

  def contributions(
    self, indices: Int[Array, "*batch T"], state: CodebookState
  ) -> Float[Array, "S *batch N d"]:
    """What each scale adds, float32; zeros for scales with index -1."""
    table = self.codebook.table(state)
    return jnp.stack(
      [
        self._added(table, index, scale)
        for scale, index in enumerate(self.split(indices))
      ]
    )

  def lookup(
    self,
    indices: Int[Array, "*batch T"],
    state: CodebookState,
    *,
    upto: int | None = None,
  ) -> Float[Array, "*batch N d"]:
    """The sum of what the scales add, as `__call__` returns it.

    Args:
      indices: codes of all scales; -1 adds nothing.
      state: of the codebook.
      upto: static, how many first scales count; None means all.

    Raises:
      ValueError: if `upto` is out of range or there are not T indices.
    """
    if upto is None:
      upto = len(self.config.sizes)
    checks.in_range(0, len(self.config.sizes), upto=upto)
    return jnp.sum(self.contributions(indices, state)[:upto], axis=0)

  def ar_inputs(
    self, indices: Int[Array, "*batch T"], state: CodebookState
  ) -> Float[Array, "*batch T2 d"]:
    """What a generator of the next scale is given, teacher forced.

    For each scale but the first: the sum of the scales before it, shrunk to
    its size. (Not the codes of the scale before, which has another size.) The
    first scale begins with an embedding of the condition.

    Args:
      indices: codes of all scales.
      state: of the codebook.

    Returns:
      float32, T - n_1 vectors; those of a scale depend on scales before it.
    """
    sums = jnp.cumsum(self.contributions(indices, state), axis=0)
    later = range(1, len(self.config.sizes))
    given = [self._down(sums[scale - 1], scale) for scale in later]
    return jnp.concatenate([jnp.zeros_like(sums[0, ..., :0, :]), *given], -2)

  def _counts(self):
    """Tokens of each scale."""
    power = 2 if self.config.layout == "map" else 1
    return tuple(n**power for n in self.config.sizes)

  def _first_codes(self, key):
    shape = self.config.codebook.num_codes, self.config.codebook.dim
    return self.config.code_deviation * jax.random.normal(key, shape)

  def _teaches_by_gradient(self):
    learning = self.config.codebook.learning != "ema"
    return learning or self.convolutions is not None or self.links is not None

  def _added(self, table, index, scale):
    """[*batch, n] -> [*batch, N, d]; zeros for an index of -1."""
    h = self._up(take_rows(table, index), scale)
    if self.convolutions is not None:
      number = len(self.config.sizes), self.config.num_convolutions
      place = shared_convolutions(*number)[scale]
      smooth = jax.tree.map(lambda x: x[place], self.convolutions)
      side, ratio = self.config.sizes[-1], self.config.convolution_ratio
      mixed = smooth(h.reshape(*h.shape[:-2], side, side, h.shape[-1]))
      h = (1 - ratio) * h + ratio * mixed.reshape(h.shape)
    # A convolution has a bias, which nothing must not add.
    return jnp.where((index[..., :1] >= 0)[..., None], h, 0)

  def _down(self, x, scale):
    """[*batch, N, d] -> [*batch, n, d]."""
    first, last = self.config.sizes[scale], self.config.sizes[-1]
    if first == last:
      return x
    if self.links is not None:
      matrix = jax.nn.softmax(self.links[scale][...], axis=1)
      return _matmul(matrix, x)
    return self._resample(x, resample.area_matrix(last, first))

  def _up(self, x, scale):
    """[*batch, n, d] -> [*batch, N, d]."""
    first, last = self.config.sizes[scale], self.config.sizes[-1]
    if first == last:
      return x
    if self.links is not None:
      return _matmul(jax.nn.softmax(self.links[scale][...], axis=0).T, x)
    cubic = self.config.up == "cubic"
    make = resample.cubic_matrix if cubic else resample.linear_matrix
    return self._resample(x, make(first, last))

  def _resample(self, x, matrix):
    if self.config.layout == "row":
      return _matmul(matrix, x)
    outputs, inputs = matrix.shape
    grid = x.reshape(*x.shape[:-2], inputs, inputs, x.shape[-1])
    grid = resample.resample(grid, matrix, matrix)
    return grid.reshape(*x.shape[:-2], outputs**2, x.shape[-1])

  def _check_call(self, x, train, key):
    want = self.num_tokens, self.config.codebook.dim
    if x.shape[-2:] != want:
      raise ValueError(
        f"x must end in {want[0]} tokens of width {want[1]}, got shape"
        f" {x.shape}"
      )
    random = self.config.codebook.needs_key or self.config.dropout_from
    if train and random and key is None:
      raise ValueError(
        "key must be given to train with these settings, got None"
      )


def num_bytes(config: MultiScaleConfig, *, upto: int | None = None) -> float:
  """Bytes of the indices, log2 K bits each, packed.

  Args:
    config: settings.
    upto: how many first scales; None means all.

  Raises:
    ValueError: if `upto` is out of range.

  Example:
    >>> num_bytes(MultiScaleConfig(CodebookConfig(4096, 32)))
    1020.0
  """
  upto = len(config.sizes) if upto is None else upto
  checks.in_range(0, len(config.sizes), upto=upto)
  power = 2 if config.layout == "map" else 1
  tokens = sum(n**power for n in config.sizes[:upto])
  return tokens * math.log2(config.codebook.num_codes) / 8


def shared_convolutions(num_scales: int, num_convolutions: int) -> list[int]:
  """Which convolution smooths each scale: the nearest on an even division.

  Args:
    num_scales: S; scale s lies at s / (S - 1).
    num_convolutions: P; convolution p at (p + 1/2) / P, of four at 1/12 to
      11/12.

  Returns:
    One number in 0 to P - 1 for each scale; the lower of two as near.

  Raises:
    ValueError: if one of them is not positive.

  Example:
    >>> shared_convolutions(10, 4)
    [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]

  Source: code of Tian et al. (2024). Of ten scales and four convolutions two
  scales lie in the middle between two; the published weights hold for how
  rounding decided there, which is written down here.
  """
  checks.in_range(
    1, 1 << 10, num_scales=num_scales, num_convolutions=num_convolutions
  )
  if (num_scales, num_convolutions) == (10, 4):
    return [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
  edge = (1 / 3 if num_convolutions == 4 else 1 / 2) / num_convolutions
  ticks = np.linspace(edge, 1 - edge, num_convolutions)
  places = np.arange(num_scales) / max(1, num_scales - 1)
  away = np.abs(places[:, None] - ticks[None])
  return np.argmin(away.round(9), axis=1).tolist()


def _matmul(matrix, x):
  return jnp.einsum("nm,...md->...nd", matrix, x, precision="highest")


def _check(config):
  checks.one_of(get_args(Layout), layout=config.layout)
  checks.one_of(get_args(Up), up=config.up)
  sizes = config.sizes
  if not sizes or min(sizes) < 1 or list(sizes) != sorted(sizes):
    raise ValueError(f"sizes must be positive and never fall, got {sizes}")
  checks.in_range(0, len(sizes), dropout_from=config.dropout_from)
  checks.in_range(0, 1, convolution_ratio=config.convolution_ratio)
  checks.in_range(0, 1 << 10, num_convolutions=config.num_convolutions)
  if config.codebook.metric != "euclidean":
    raise ValueError(
      f'metric must be "euclidean", got {config.codebook.metric!r}: what is'
      " left has no fixed length"
    )
  if config.layout == "row" and config.num_convolutions:
    raise ValueError(
      "num_convolutions must be 0 where tokens have no neighbours in space,"
      f" got {config.num_convolutions}"
    )
  if config.layout == "map" and config.learned_maps:
    raise ValueError('learned_maps needs layout "row", got "map"')
  learned = config.codebook.learning == "simvq"
  if learned and config.code_deviation is not None:
    raise ValueError('code_deviation does not go with learning "simvq"')
