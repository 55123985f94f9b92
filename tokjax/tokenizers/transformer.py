"""The transformer that tokenizers are made of: blocks under any mask.

    config = TransformerConfig(width=256, num_layers=6, num_heads=4)
    encoder = Transformer(config, rngs=nnx.Rngs(0))
    y = encoder(x, mask=attention_masks.causal(x.shape[1]))

Sources: Vaswani et al., 2017, "Attention is all you need"; norms before the
blocks and no dropout, as the published image tokenizers; the gated MLP,
Shazeer, 2020, "GLU variants improve Transformer".
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.ops import attention
from tokjax.typing import Array, Bool, Float

__all__ = [
  "Attention",
  "Block",
  "Mlp",
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
    q, k, v = self.query(x), self.key(context), self.value(context)
    mixed = attention.attend(*(self._heads(y) for y in (q, k, v)), mask)
    mixed = mixed.swapaxes(1, 2)  # [B, N, H, d]
    return self.out(mixed.reshape(*mixed.shape[:2], -1))

  def _heads(self, x):
    """[B, N, D] -> [B, H, N, d]."""
    return x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)


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
