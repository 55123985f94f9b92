"""The transformer that tokenizers are made of: blocks under any mask.

    config = TransformerConfig(width=256, num_layers=6, num_heads=4)
    encoder = Transformer(config, rngs=nnx.Rngs(0))
    y = encoder(x, mask=attention_masks.causal(x.shape[1]))

Sources: Vaswani et al., 2017, "Attention is all you need"; norms before the
blocks and no dropout, as the published image tokenizers; the gated MLP,
Shazeer, 2020, "GLU variants improve Transformer".
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.ops import attention
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "Attention",
  "Block",
  "Cache",
  "Mlp",
  "TaskLayer",
  "Transformer",
  "TransformerConfig",
  "layer_norm",
  "linear",
  "table",
]

Activation = Literal["gelu", "swiglu"]
Mask = Bool[Array, "N M"] | Bool[Array, "#B N M"] | np.ndarray | None


@dataclasses.dataclass(unsafe_hash=True)
class TransformerConfig:
  """A stack of blocks."""

  width: int  # D
  num_layers: int  # L
  num_heads: int  # H, divides the width
  mlp_ratio: float = 4.0  # hidden width of the MLP over the width
  activation: Activation = "gelu"
  context_dim: int = 0  # width of what is also read; 0: nothing is
  norm_output: bool = True  # a last layer norm
  norm_epsilon: float = 1e-5
  init_scale: float = 0.02  # of the weights


class Cache(NamedTuple):
  """Keys and values of the tokens that `Transformer.step` has seen.

  Attributes:
    keys: of all layers; rows from `length` on are not read.
    values: likewise.
    length: tokens so far.
  """

  keys: Float[Array, "L B H N d"]
  values: Float[Array, "L B H N d"]
  length: Int[Array, ""]


class Transformer(nnx.Module):
  """x = x + attention(norm x); x = x + context(norm x); x = x + mlp(norm x).

  Computes in the dtype of its parameters; layer norm and softmax are float32.

  Cost in FLOPs of a forward pass over N tokens: in each layer 8 N D^2 + 4 N^2 D
  for attention, 4 N D F for an MLP of hidden width F (6 N D F gated), and with
  M tokens of context of width C 4 N D^2 + 4 M C D + 4 N M D more.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> config = TransformerConfig(width=8, num_layers=2, num_heads=2)
    >>> model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    >>> jax.jit(model)(jnp.ones((1, 5, 8))).shape
    (1, 5, 8)
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    keys = jax.random.split(rngs.params(), config.num_layers)
    # Every parameter of the blocks has a leading axis of num_layers.
    self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
    self.norm = layer_norm(config, rngs) if config.norm_output else None

  def __call__(
    self,
    x: Float[Array, "B N D"],
    context: Float[Array, "B M C"] | None = None,
    *,
    mask: Mask = None,
    context_mask: Mask = None,
  ) -> Float[Array, "B N D"]:
    """The tokens after the last block.

    Args:
      x: tokens.
      context: what each token also reads, of width `context_dim`.
      mask: True where token n may read token m, [N, N] or [B, N, N].
      context_mask: True where token n may read row m of the context.

    Returns:
      Tokens in the dtype of x; the blocks compute in that of the parameters.

    Raises:
      ValueError: if the width is wrong, or context comes unasked or is
        missing.
    """
    config = self.config
    checks.same_size(width_of_x=x.shape[-1], width=config.width)
    if (context is None) != (config.context_dim == 0):
      came = None if context is None else context.shape
      raise ValueError(
        f"context must have width {config.context_dim} (0: None), got {came}"
      )

    kept, dtype = x.dtype, self.blocks.mlp.up.kernel[...].dtype
    x = x.astype(dtype)
    context = None if context is None else context.astype(dtype)

    def step(x, block):
      return block(x, context, mask=mask, context_mask=context_mask), None

    x, _ = jax.lax.scan(step, x, self.blocks)
    return (x if self.norm is None else self.norm(x)).astype(kept)

  def init_cache(self, batch_size: int, num_tokens: int) -> Cache:
    """Room for so many tokens of `step`."""
    config = self.config
    shape = (
      config.num_layers,
      batch_size,
      config.num_heads,
      num_tokens,
      config.width // config.num_heads,
    )
    dtype = self.blocks.mlp.up.kernel[...].dtype
    zeros = jnp.zeros(shape, dtype)
    return Cache(zeros, zeros, jnp.int32(0))

  def step(
    self, x: Float[Array, "B 1 D"], cache: Cache
  ) -> tuple[Float[Array, "B 1 D"], Cache]:
    """The next token under a causal mask, as the whole sequence gives it.

    Args:
      x: the token.
      cache: of those before it; has room left. Blocks with a context have no
        such form.

    Returns:
      The token after the last block, and the cache with it.
    """
    kept, dtype = x.dtype, self.blocks.mlp.up.kernel[...].dtype
    place = cache.length
    readable = jnp.arange(cache.keys.shape[3])[None] <= place

    def one(x, each):
      block, keys, values = each
      y = block.norm_attention(x).astype(dtype)
      q, k, v = block.attention.heads(y, y)
      keys = jax.lax.dynamic_update_slice_in_dim(keys, k, place, axis=2)
      values = jax.lax.dynamic_update_slice_in_dim(values, v, place, axis=2)
      mixed = attention.attend(q, keys, values, readable)
      x = x + block.attention.join(mixed)
      x = x + block.mlp(block.norm_mlp(x).astype(dtype))
      return x, (keys, values)

    x, (keys, values) = jax.lax.scan(
      one, x.astype(dtype), (self.blocks, cache.keys, cache.values)
    )
    x = (x if self.norm is None else self.norm(x)).astype(kept)
    return x, Cache(keys, values, place + 1)


class Block(nnx.Module):
  """Attention to itself, to a context if there is one, and an MLP.

  Args:
    config: the shape.
    rngs: seeds the parameters.
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    self.norm_attention = layer_norm(config, rngs)
    self.attention = Attention(config, config.width, rngs=rngs)
    context = config.context_dim
    self.norm_context = layer_norm(config, rngs) if context else None
    self.context = Attention(config, context, rngs=rngs) if context else None
    self.norm_mlp = layer_norm(config, rngs)
    self.mlp = Mlp(config, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B N D"],
    context: Float[Array, "B M C"] | None = None,
    *,
    mask: Mask = None,
    context_mask: Mask = None,
  ) -> Float[Array, "B N D"]:
    """The tokens after the block; arguments as of `Transformer`."""
    with jax.named_scope("attention"):
      y = self.norm_attention(x).astype(x.dtype)
      x = x + self.attention(y, y, mask)
    if self.context is not None:
      with jax.named_scope("context"):
        y = self.norm_context(x).astype(x.dtype)
        x = x + self.context(y, context, context_mask)
    with jax.named_scope("mlp"):
      return x + self.mlp(self.norm_mlp(x).astype(x.dtype))


class Attention(nnx.Module):
  """Tokens read tokens: queries of one, keys and values of the other.

  Args:
    config: the shape; its width is that of the queries.
    context_dim: width of what is read.
    rngs: seeds the parameters.
  """

  def __init__(
    self, config: TransformerConfig, context_dim: int, *, rngs: nnx.Rngs
  ):
    self.num_heads = config.num_heads
    self.query = linear(config, config.width, config.width, rngs)
    self.key = linear(config, context_dim, config.width, rngs)
    self.value = linear(config, context_dim, config.width, rngs)
    self.out = linear(config, config.width, config.width, rngs)

  def __call__(
    self,
    x: Float[Array, "B N D"],
    context: Float[Array, "B M C"],
    mask: Mask = None,
  ) -> Float[Array, "B N D"]:
    """What each token of x reads in the context."""
    mask = None if mask is None else jnp.asarray(mask)
    return self.join(attention.attend(*self.heads(x, context), mask))

  def heads(
    self, x: Float[Array, "B N D"], context: Float[Array, "B M C"]
  ) -> tuple[
    Float[Array, "B H N d"], Float[Array, "B H M d"], Float[Array, "B H M d"]
  ]:
    """Queries of x, keys and values of the context."""

    def split(y):
      return y.reshape(*y.shape[:2], self.num_heads, -1).swapaxes(1, 2)

    return (
      split(self.query(x)),
      split(self.key(context)),
      split(self.value(context)),
    )

  def join(self, mixed: Float[Array, "B H N d"]) -> Float[Array, "B N D"]:
    """The output of all heads together."""
    mixed = mixed.swapaxes(1, 2)  # [B, N, H, d]
    return self.out(mixed.reshape(*mixed.shape[:2], -1))


class Mlp(nnx.Module):
  """W2 gelu(W1 x), or W2 (silu(W3 x) * W1 x) for "swiglu".

  Args:
    config: the shape.
    rngs: seeds the parameters.
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    hidden = int(config.width * config.mlp_ratio)
    gated = config.activation == "swiglu"
    self.up = linear(config, config.width, hidden, rngs)
    self.gate = linear(config, config.width, hidden, rngs) if gated else None
    self.down = linear(config, hidden, config.width, rngs)

  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Each token by itself."""
    y = self.up(x)
    if self.gate is None:
      return self.down(jax.nn.gelu(y, approximate=False))
    return self.down(jax.nn.silu(self.gate(x)) * y)


class TaskLayer(nnx.Module):
  """W2 tanh(W1 x), which several tokenizers have on both sides of their codes.

  Args:
    config: the initial weights.
    inputs: width of x and of what is inside.
    outputs: width of the result.
    rngs: seeds the parameters.
  """

  def __init__(
    self,
    config: TransformerConfig,
    inputs: int,
    outputs: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.inner = linear(config, inputs, inputs, rngs)
    self.outer = linear(config, inputs, outputs, rngs)

  def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C2"]:
    """Each vector by itself."""
    return self.outer(jnp.tanh(self.inner(x)))


def linear(
  config: TransformerConfig, inputs: int, outputs: int, rngs: nnx.Rngs
) -> nnx.Linear:
  """A linear layer whose weights start truncated normal.

  Example:
    >>> config = TransformerConfig(width=8, num_layers=2, num_heads=2)
    >>> linear(config, 8, 3, nnx.Rngs(0)).kernel.shape
    (8, 3)
  """
  init = nnx.initializers.truncated_normal(config.init_scale)
  return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)


def layer_norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """Layer norm over the width, in float32 whatever comes in.

  Example:
    >>> config = TransformerConfig(width=8, num_layers=2, num_heads=2)
    >>> layer_norm(config, nnx.Rngs(0)).scale.shape
    (8,)
  """
  return nnx.LayerNorm(
    config.width,
    epsilon=config.norm_epsilon,
    dtype=jnp.float32,
    use_fast_variance=False,
    rngs=rngs,
  )


def table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
  """Learned rows, as positions and queries are: normal over sqrt(width).

  Example:
    >>> table(4, 8, nnx.Rngs(0)).shape
    (4, 8)
  """
  return nnx.Param(
    jax.random.normal(rngs.params(), (rows, width)) * width**-0.5
  )


def _check(config):
  checks.one_of(get_args(Activation), activation=config.activation)
  checks.in_range(1, 1 << 20, width=config.width, num_heads=config.num_heads)
  checks.in_range(1, 1 << 10, num_layers=config.num_layers)
  checks.divisible(config.num_heads, width=config.width)
