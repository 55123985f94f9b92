"""Vector quantisation: each vector becomes the nearest code of one table.

    config = VQConfig(CodebookConfig(1024, 8, learning="ema"), input_dim=256)
    quantizer = VectorQuantizer(config, rngs=nnx.Rngs(0))
    state = quantizer.init_state(key)
    found, state = quantizer(features, state, train=True)

What is trained by what: the encoder by the gradient that the estimator passes
through the codes and by the commitment loss, the table by the codebook loss,
by moving means or through the matrix of "simvq" (see `codebook`).

Sources: van den Oord, Vinyals, Kavukcuoglu, 2017, "Neural Discrete
Representation Learning"; narrow codes of length one, Yu et al., 2021,
"Vector-quantized Image Modeling with Improved VQGAN"; estimators as in
`tokjax.ops.estimators`. From published code (lucidrains/
vector-quantize-pytorch): several heads with one table, sampled codes, the
orthogonality loss. Ours: losses are means over the vectors that count, of all
devices; the form with the smaller weight on the codebook term (an early VQGAN)
is `commitment_weight=1, codebook_weight=0.25`.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.kernels.nearest_code import nearest_code
from tokjax.ops import code_entropy, estimators, similarity
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

__all__ = ["VQConfig", "VectorQuantizer"]

Estimator = Literal[
  "straight_through", "rotation", "directional", "index", "gumbel"
]


@dataclasses.dataclass(unsafe_hash=True)
class VQConfig:
  """A vector quantizer; the loss is the sum of what has a weight."""

  codebook: CodebookConfig
  input_dim: int | None = None  # D; projected to codes and back, if given
  num_heads: int = 1  # parts of a vector with a code each, of one table
  estimator: Estimator = "straight_through"
  commitment_weight: float = 0.25
  codebook_weight: float = 1.0  # of "gradient" and "simvq"
  entropy_weight: float = 0.0  # softmax over the table: N K numbers
  entropy_gamma: float = 1.0  # weight of the spread over codes
  entropy_temperature: float = 0.01
  orthogonality_weight: float = 0.0
  sample_temperature: float = 0.0  # of codes drawn in training; 0: the nearest
  directional_variance: float = 5e-3
  gumbel_temperature: float = 1.0  # of the soft choice that has the gradient

  def build(self, rngs: nnx.Rngs) -> "VectorQuantizer":
    """The quantizer of these settings."""
    return VectorQuantizer(self, rngs=rngs)


class VectorQuantizer(nnx.Module):
  """Nearest code of a learned table, with its losses.

  Costs 2 N K d FLOPs to find the codes of N vectors, and as many bytes as they
  and the table have; the entropy loss, sampling and the "index" and "gumbel"
  estimators hold N x K numbers besides.

  Attributes:
    config: its settings.
    codebook: the learned part of the table.
    project_in: [D, heads d], or None without `input_dim`.
    project_out: [heads d, D], or None.

  Args:
    config: settings.
    rngs: source of the first parameters.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> config = VQConfig(CodebookConfig(num_codes=4, dim=2, learning="ema"))
    >>> quantizer = VectorQuantizer(config, rngs=nnx.Rngs(0))
    >>> codes = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> state = CodebookState(jnp.ones(4), codes, codes)
    >>> found, _ = jax.jit(quantizer)(jnp.array([[0.9, 0.1]]), state)
    >>> found.indices.tolist(), found.codes.tolist()
    ([0], [[1.0, 0.0]])
  """

  def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    self.codebook = Codebook(config.codebook, rngs=rngs)
    width = config.num_heads * config.codebook.dim

    def matrix(*shape):
      if config.input_dim is None:
        return None
      init = jax.nn.initializers.lecun_normal()
      return nnx.Param(init(rngs.params(), shape))

    self.project_in = matrix(config.input_dim, width)
    self.project_out = matrix(width, config.input_dim)

  @property
  def num_codes(self) -> int:
    """What an index is below, K."""
    return self.config.codebook.num_codes

  @property
  def bits_per_vector(self) -> float:
    """log2 of the number of results, heads log2 K."""
    return self.config.num_heads * math.log2(self.num_codes)

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The codebook's state before the first step."""
    return self.codebook.init_state(key)

  def __call__(
    self,
    x: Float[Array, "*batch D"],
    state: CodebookState,
    mask: Bool[Array, "*batch"] | None = None,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Quantized, CodebookState]:
    """Codes for vectors; in training also the next state.

    Args:
      x: vectors, of width `input_dim`, or heads times the width of a code.
      state: of the codebook.
      mask: True where a vector counts; None means all. The others get index
        -1 and zeros, and change neither losses nor state.
      train: static; False leaves the state as it is and returns codes that
        are the table's, without estimator.
      key: for what is random in training: resets, sampled codes, the
        "directional" and "gumbel" estimators.
      axis_name: mesh axis over which a `shard_map` cuts the batch; losses,
        statistics and state are those of the whole batch.

    Returns:
      indices [*batch], or [*batch, heads] with several heads, codes in the
      dtype of x, losses "commitment", "codebook", "entropy" and
      "orthogonality" as far as they have a weight; and the state.

    Raises:
      ValueError: if a width is wrong or a key is missing.
    """
    config = self.config
    _check_call(config, x, train, key)
    if mask is None:
      mask = jnp.ones(x.shape[:-1], bool)
    keys = [None] * 2 if key is None else jax.random.split(key)
    raw, mask_of_heads = self._inward(x, mask)
    y = raw
    if config.codebook.metric == "cosine":
      y = similarity.safe_normalize(y)
    table = self.codebook.table(state)
    z = None
    if train and config.estimator == "gumbel":
      z, index = estimators.gumbel_codes(
        keys[0],
        _similarity(y, table),
        table,
        temperature=config.gumbel_temperature,
      )
      index = jnp.where(mask_of_heads, index, -1)
    elif train and config.sample_temperature:
      logits = _similarity(y, table) / config.sample_temperature
      index = jax.random.categorical(keys[0], jax.lax.stop_gradient(logits))
      index = jnp.where(mask_of_heads, index, -1).astype(jnp.int32)
    else:
      index = nearest_code(y, table, mask_of_heads)
    q = take_rows(table, index)
    losses = self._losses(y, q, table, mask_of_heads, axis_name)
    if not train:
      z = q
    else:
      z = _estimate(config, keys[0], y, q, table) if z is None else z
      codes = self.codebook.codes
      state = update(
        state,
        raw,
        index,
        config=config.codebook,
        codes=None if codes is None else codes[...],
        key=keys[1],
        axis_name=axis_name,
      )
    found = Quantized(
      index if config.num_heads > 1 else index[..., 0],
      self._outward(z, mask, x.dtype),
      mask,
      losses,
      usage_stats(index, config.codebook.num_codes, axis_name),
    )
    return found, state

  def lookup(
    self, indices: Int[Array, "*shape"], state: CodebookState
  ) -> Float[Array, "*batch D"]:
    """The codes of indices, as `__call__` returns them; zeros for -1."""
    if self.config.num_heads == 1:
      indices = indices[..., None]
    mask = indices[..., 0] >= 0
    q = take_rows(self.codebook.table(state), indices)
    return self._outward(q, mask, q.dtype)

  def _inward(self, x, mask):
    """[*batch, D] -> [*batch, heads, d] in float32, and the mask of each."""
    heads, dim = self.config.num_heads, self.config.codebook.dim
    # Zero, as NaN would spread through the products of gradients.
    y = jnp.where(mask[..., None], x.astype(jnp.float32), 0)
    if self.project_in is not None:
      y = y @ self.project_in[...].astype(jnp.float32)
    y = y.reshape(*x.shape[:-1], heads, dim)
    return y, jnp.broadcast_to(mask[..., None], y.shape[:-1])

  def _outward(self, z, mask, dtype):
    z = z.reshape(*z.shape[:-2], -1)
    if self.project_out is not None:
      z = z @ self.project_out[...].astype(jnp.float32)
    return jnp.where(mask[..., None], z, 0).astype(dtype)

  def _losses(self, y, q, table, mask, axis_name):
    config, losses = self.config, {}
    fixed = jax.lax.stop_gradient
    if config.commitment_weight:
      error = jnp.mean(jnp.square(y - fixed(q)), axis=-1)
      loss = masked_mean(error, mask, axis_name)
      losses["commitment"] = config.commitment_weight * loss
    if config.codebook.learning != "ema" and config.codebook_weight:
      error = jnp.mean(jnp.square(fixed(y) - q), axis=-1)
      loss = masked_mean(error, mask, axis_name)
      losses["codebook"] = config.codebook_weight * loss
    if config.entropy_weight:
      logits = _similarity(y, table) / config.entropy_temperature
      found = code_entropy.entropy_penalty(
        logits, mask, gamma=config.entropy_gamma, axis_name=axis_name
      )
      losses["entropy"] = config.entropy_weight * found.penalty
    if config.orthogonality_weight:
      unit = similarity.safe_normalize(table)
      cosine = jnp.einsum("kd,jd->kj", unit, unit, precision="highest")
      loss = jnp.mean(jnp.square(cosine)) - 1 / len(table)
      losses["orthogonality"] = config.orthogonality_weight * loss
    return losses


def _check(config):
  checks.one_of(get_args(Estimator), estimator=config.estimator)
  checks.in_range(1, 1 << 20, num_heads=config.num_heads)
  fixed = config.codebook.learning == "ema"
  if fixed and config.estimator == "index":
    raise ValueError(
      'estimator "index" teaches the table by gradient, so learning must be'
      ' "gradient" or "simvq", got "ema"'
    )
  if fixed and config.orthogonality_weight:
    raise ValueError(
      "orthogonality_weight needs a table with gradients, so learning must be"
      ' "gradient" or "simvq", got "ema"'
    )
  if config.gumbel_temperature <= 0:
    raise ValueError(
      f"gumbel_temperature must be positive, got {config.gumbel_temperature}"
    )
  if config.sample_temperature and config.estimator != "straight_through":
    raise ValueError(
      'sampled codes go with estimator "straight_through" only, got'
      f" {config.estimator!r}: a rotation to a far code diverges, and"
      ' "gumbel" samples by itself'
    )


def _check_call(config, x, train, key):
  width = config.input_dim or config.num_heads * config.codebook.dim
  if x.shape[-1] != width:
    raise ValueError(f"x must have width {width}, got shape {x.shape}")
  random = (
    config.codebook.needs_key
    or config.sample_temperature
    or config.estimator in ("directional", "gumbel")
  )
  if train and random and key is None:
    raise ValueError("key must be given to train with these settings, got None")


def _estimate(config, key, y, q, table):
  if config.estimator == "rotation":
    return estimators.rotate_to(y, q)
  if config.estimator == "directional":
    return estimators.directional(
      key, y, q, variance=config.directional_variance
    )
  if config.estimator == "index":
    return estimators.index_backpropagation(_similarity(y, table), table).codes
  return estimators.straight_through(y, q)


def _similarity(y, table):
  """-|y - code|^2 but for |y|^2, which no softmax over codes sees."""
  inner = jnp.einsum("...d,kd->...k", y, table, precision="highest")
  squares = jnp.sum(jnp.square(table), axis=-1)
  return 2 * inner - jnp.broadcast_to(squares, inner.shape)
