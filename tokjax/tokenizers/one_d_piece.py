"""One-D-Piece: a row of tokens of which any beginning is an image.

A TiTok trained so that the tail of its tokens is dropped at random: what
matters most comes first, and the number of tokens is chosen when an image is
decoded, without encoding it again.

    tokenizer = OneDPieceConfig(num_tokens=256).build(nnx.Rngs(0))
    found = tokenizer.encode(images, state)
    coarse = tokenizer.decode(found.indices[:, :16], state)
    mixed = tokenizer.decode(found.indices, state, length=jnp.array([16, 64]))

Sources: Miwa et al., 2025, "One-D-Piece: Image Tokenizer Meets Quality-
Controllable Compression": tail token drop after quantisation, one uniform
length a step, at least one token; the quantizer's loss over all tokens (code).
Ours: lengths under static shapes, by a mask that gives what dropping gives; a
length of each image; log-uniform lengths; `choose_length`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.tokenizers.codebook import CodebookState
from tokjax.tokenizers.titok import TiTok, TiTokConfig
from tokjax.tokenizers.types import Reconstructed
from tokjax.typing import Array, Float, Int, Key

__all__ = [
  "OneDPiece",
  "OneDPieceConfig",
  "choose_length",
  "length_stats",
  "tail_drop_length",
]

Lengths = Literal["uniform", "log_uniform", "all"]


@dataclasses.dataclass(unsafe_hash=True)
class OneDPieceConfig(TiTokConfig):
  """A TiTok with tail token drop; defaults are the published B."""

  num_tokens: int = 256
  lengths: Lengths = "uniform"  # of training; "all" drops nothing: TiTok
  per_image: bool = False  # a length for each image instead of each step

  def build(self, rngs: nnx.Rngs) -> "OneDPiece":
    """The tokenizer with new parameters."""
    return OneDPiece(self, rngs=rngs)


class OneDPiece(TiTok):
  """A TiTok that keeps a random beginning of its tokens in training.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Example:
    >>> from tokjax.tokenizers.codebook import CodebookConfig
    >>> from tokjax.tokenizers.transformer import TransformerConfig
    >>> from tokjax.tokenizers.vector_quantizer import VQConfig
    >>> small = TransformerConfig(width=8, num_layers=1, num_heads=2)
    >>> book = CodebookConfig(num_codes=16, dim=4, metric="cosine")
    >>> config = OneDPieceConfig(8, 4, 6, small, small, VQConfig(book))
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> state = tokenizer.init_state(jax.random.key(0))
    >>> images = jnp.zeros((2, 8, 8, 3))
    >>> found = jax.jit(tokenizer.encode)(images, state)
    >>> jax.jit(tokenizer.decode)(found.indices[:, :2], state).shape
    (2, 8, 8, 3)
  """

  def __init__(self, config: OneDPieceConfig, *, rngs: nnx.Rngs):
    checks.one_of(get_args(Lengths), lengths=config.lengths)
    super().__init__(config, rngs=rngs)

  def __call__(
    self,
    images: Float[Array, "B height width 3"],
    state: CodebookState,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, CodebookState]:
    """Images from a random beginning of their tokens, or from all.

    Args:
      images: in -1..1.
      state: of the codebook.
      train: static; False drops nothing and leaves the state as it is.
      key: for the length and the quantizer, in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      As `TiTok`; in training the statistic "length" besides.

    Raises:
      ValueError: if a key is missing.
    """
    length, key = self.draw_length(key, images.shape[0], train)
    found, state = self.quantizer(
      self.vectors(images), state, train=train, key=key, axis_name=axis_name
    )
    output = self.decode_codes(found.codes, length)
    judged = self.judge(images, output, found, axis_name)
    return judged._replace(stats=judged.stats | length_stats(length)), state

  def draw_length(
    self, key: Key[Array, ""] | None, batch_size: int, train: bool
  ) -> tuple[Int[Array, "..."] | None, Key[Array, ""] | None]:
    """How many tokens of a step stay, None for all, and what is left of a key.

    Raises:
      ValueError: if a key is missing.
    """
    config = self.config
    if not train or config.lengths == "all":
      return None, key
    if key is None:
      raise ValueError("key must be given to train with dropped tokens")
    length_key, key = jax.random.split(key)
    shape = (batch_size,) if config.per_image else ()
    length = tail_drop_length(
      length_key, config.num_tokens, shape, lengths=config.lengths
    )
    return length, key


def length_stats(
  length: Int[Array, "..."] | None,
) -> dict[str, Float[Array, ""]]:
  """The mean length of a step under "length"; nothing for all tokens.

  Example:
    >>> length_stats(jnp.array([2, 4]))["length"].item(), length_stats(None)
    (3.0, {})
  """
  if length is None:
    return {}
  return {"length": jnp.mean(length.astype(jnp.float32))}


def tail_drop_length(
  key: Key[Array, ""],
  num_tokens: int,
  shape: tuple[int, ...] = (),
  *,
  lengths: Lengths = "uniform",
) -> Int[Array, "..."]:
  """How many tokens stay: 1..num_tokens.

  Token i of K, counted from 1, is in use with probability (K - i + 1) / K
  under uniform lengths: that is the weight that training gives it.

  Args:
    key: PRNG key.
    num_tokens: K.
    shape: of the draws.
    lengths: "uniform", or "log_uniform": as many short ones of each octave.

  Returns:
    int32.

  Example:
    >>> draws = tail_drop_length(jax.random.key(0), 4, (1000,))
    >>> int(draws.min()), int(draws.max())
    (1, 4)
  """
  checks.one_of(("uniform", "log_uniform"), lengths=lengths)
  checks.in_range(1, 1 << 16, num_tokens=num_tokens)
  if lengths == "uniform":
    return jax.random.randint(key, shape, 1, num_tokens + 1)
  exponent = jax.random.uniform(key, shape, maxval=np.log(num_tokens + 1))
  length = jnp.floor(jnp.exp(exponent)).astype(jnp.int32)
  return jnp.clip(length, 1, num_tokens)


def choose_length(
  tokenizer: OneDPiece,
  images: Float[Array, "B height width 3"],
  state: CodebookState,
  target: float,
  *,
  lengths: Sequence[int],
  quality: Callable[[Array, Array], Float[Array, " B"]],
) -> Int[Array, " B"]:
  """The shortest length at which each image is as good as asked for.

  Args:
    tokenizer: trained with dropped tails.
    images: in -1..1.
    state: of the codebook.
    target: quality to reach.
    lengths: to try, ascending, static.
    quality: `quality(images, output)` [B], higher is better.

  Returns:
    One of the lengths for each image; the last where none is good enough.

  Raises:
    ValueError: if the lengths do not ascend in 1..K.

  Cost: one encoding and one decoding for each length.
  """
  config = tokenizer.config
  if not lengths or sorted(set(lengths)) != list(lengths):
    raise ValueError(f"lengths must ascend, got {tuple(lengths)}")
  checks.in_range(1, config.num_tokens, first_length=lengths[0])
  checks.in_range(1, config.num_tokens, last_length=lengths[-1])
  indices = tokenizer.encode(images, state).indices

  def one(length):
    return quality(images, tokenizer.decode(indices, state, length))

  tried = jnp.asarray(lengths)
  good = jax.lax.map(one, tried) >= target  # [lengths, B]
  last = jnp.arange(len(lengths))[:, None] == len(lengths) - 1
  return tried[jnp.argmax(good | last, axis=0)]
