"""Additive quantisation in a network: a sum of codes, all chosen together.

    config = AQConfig(CodebookConfig(256, 32), num_books=4)
    quantizer = AdditiveQuantizer(config, rngs=nnx.Rngs(0))
    state = quantizer.init_state(key)
    found, state = quantizer(features, state, train=True)

As residual quantisation, but the codes of a vector are chosen again, one given
the others, after the greedy choice; so no vector is further from its codes
than by residual quantisation with the same books. Books learn by the gradient
of |x - sum of codes|^2 with the codes as they were chosen, each book from the
error of the whole sum; the encoder gets the gradient of the sum as it is.

Sources: Babenko, Lempitsky, 2014, "Additive Quantization for Extreme Vector
Compression"; ICM, Martinez et al., 2016, "Revisiting Additive Quantization".
Ours: books learned by gradient instead of least squares, for which see
`tokjax.ops.additive_training`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import additive_codes, additive_encoding, estimators
from tokjax.tokenizers.codebook import (
  Codebook,
  CodebookConfig,
  CodebookState,
  update,
)
from tokjax.tokenizers.measures import masked_mean, usage_stats
from tokjax.tokenizers.types import Quantized
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["AQConfig", "AdditiveQuantizer"]


@dataclasses.dataclass(unsafe_hash=True)
class AQConfig:
  """An additive quantizer of `num_books` tables of the same size."""

  codebook: CodebookConfig  # of every book: "gradient", "euclidean", no reset
  num_books: int = 8  # M
  num_sweeps: int = 4  # over the books, the first of them greedy
  num_rounds: int = 0  # perturbed choices, of calls that have a key
  num_perturbed: int = 4  # codes drawn anew in a round
  commitment_weight: float = 0.25
  codebook_weight: float = 1.0

  def build(self, rngs: nnx.Rngs) -> "AdditiveQuantizer":
    """The quantizer of these settings."""
    return AdditiveQuantizer(self, rngs=rngs)


class AdditiveQuantizer(nnx.Module):
  """Sums of codes, one of each book, chosen by iterated conditional modes.

  Costs 2 N M K d FLOPs a sweep, `num_sweeps` times a residual quantizer.

  Attributes:
    config: its settings.
    codebooks: the books, stacked.

  Args:
    config: settings.
    rngs: source of the first parameters.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> config = AQConfig(CodebookConfig(2, 1), num_books=2)
    >>> quantizer = AdditiveQuantizer(config, rngs=nnx.Rngs(0))
    >>> quantizer.codebooks.codes[...] = jnp.array([[[0.], [1.]], [[0.], [.6]]])
    >>> state = quantizer.init_state(jax.random.key(0))
    >>> found, _ = jax.jit(quantizer)(jnp.array([[0.3], [1.5]]), state)
    >>> found.indices.tolist()
    [[0, 0], [1, 1]]
  """

  def __init__(self, config: AQConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    keys = jax.random.split(rngs.params(), config.num_books)
    self.codebooks = jax.vmap(
      lambda key: Codebook(config.codebook, rngs=nnx.Rngs(key))
    )(keys)

  @property
  def num_codes(self) -> int:
    """What an index of a book is below, K."""
    return self.config.codebook.num_codes

  @property
  def bits_per_vector(self) -> float:
    """log2 of the number of results, M log2 K."""
    return self.config.num_books * math.log2(self.num_codes)

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """Counts of the codes of every book; nothing is drawn."""
    keys = jax.random.split(key, self.config.num_books)
    return jax.vmap(lambda book, key: book.init_state(key))(
      self.codebooks, keys
    )

  def tables(self, state: CodebookState) -> Float[Array, "M K d"]:
    """The books, for `tokjax.ops.additive_codes`."""
    return jax.vmap(lambda book, state: book.table(state))(
      self.codebooks, state
    )

  def __call__(
    self,
    x: Float[Array, "*batch d"],
    state: CodebookState,
    mask: Bool[Array, "*batch"] | None = None,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Quantized, CodebookState]:
    """Codes for vectors; in training also the next counts.

    Args:
      x: vectors, as wide as the codes.
      state: of the books.
      mask: True where a vector counts; None means all. The others get index
        -1 and zeros, and change neither losses nor state.
      train: static; False leaves the state as it is and returns codes that
        are sums of the books', without estimator.
      key: for orders and perturbations of the choice; None: none.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      indices [*batch, M], codes in the dtype of x, losses "commitment" and
      "codebook", statistics that are means over books; and the state.

    Raises:
      ValueError: if the width is wrong.
    """
    config = self.config
    if x.shape[-1] != config.codebook.dim:
      raise ValueError(
        f"x must have width {config.codebook.dim}, got shape {x.shape}"
      )
    if mask is None:
      mask = jnp.ones(x.shape[:-1], bool)
    y = jnp.where(mask[..., None], x.astype(jnp.float32), 0)
    tables = self.tables(state)
    indices = additive_encoding.aq_encode_icm(
      tables,
      y,
      num_rounds=0 if key is None else config.num_rounds,
      num_sweeps=config.num_sweeps,
      num_perturbed=config.num_perturbed,
      key=key,
    )
    indices = jnp.where(mask[..., None], indices, -1)
    q = additive_codes.aq_decode(tables, indices)
    losses = _losses(config, y, q, mask, axis_name)
    of_books = jnp.moveaxis(indices, -1, 0)
    stats = jax.vmap(lambda i: usage_stats(i, self.num_codes, axis_name))(
      of_books
    )
    stats = jax.tree.map(jnp.mean, stats)
    z = q
    if train:
      z = estimators.straight_through(y, q)
      state = jax.vmap(
        lambda state, index: update(
          state, y, index, config=config.codebook, axis_name=axis_name
        )
      )(state, of_books)
    codes = jnp.where(mask[..., None], z, 0).astype(x.dtype)
    return Quantized(indices, codes, mask, losses, stats), state

  def lookup(
    self, indices: Int[Array, "*batch M"], state: CodebookState
  ) -> Float[Array, "*batch d"]:
    """Sums of codes; a book of index -1 adds nothing."""
    return additive_codes.aq_decode(self.tables(state), indices)


def _check(config):
  checks.in_range(1, 1 << 20, num_books=config.num_books)
  book = config.codebook
  for name, want in (
    ("learning", "gradient"), ("metric", "euclidean"), ("reset", "none"),
  ):  # fmt: skip
    checks.one_of((want,), **{name: getattr(book, name)})


def _losses(config, y, q, mask, axis_name):
  losses, fixed = {}, jax.lax.stop_gradient

  def loss(x, y):
    error = jnp.mean(jnp.square(x - y), axis=-1)
    return masked_mean(error, mask, axis_name)

  if config.commitment_weight:
    losses["commitment"] = config.commitment_weight * loss(y, fixed(q))
  if config.codebook_weight:
    losses["codebook"] = config.codebook_weight * loss(fixed(y), q)
  return losses
