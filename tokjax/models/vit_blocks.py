"""The parts of a vision transformer that hold weights of their own."""

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax.models import bert
from tokjax.models.vit_shapes import VitConfig
from tokjax.typing import Array, Float

__all__ = ["ACTIVATIONS", "Block", "Pool", "attend", "linear", "norm"]

ACTIVATIONS = {
  "gelu": bert.gelu,
  "gelu_tanh": jax.nn.gelu,
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Block(nnx.Module):
  """Attention and MLP over normalised input, each added to the stream."""

  def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.norm_attention = norm(config, rngs)
    # One matmul for queries, keys and values, side by side in that order.
    self.qkv = linear(config, config.width, 3 * config.width, rngs)
    self.out = linear(config, config.width, config.width, rngs)
    self.norm_mlp = norm(config, rngs)
    self.up = linear(config, config.width, config.mlp_width, rngs)
    self.down = linear(config, config.mlp_width, config.width, rngs)
    self.scale_attention = _layer_scale(config)
    self.scale_mlp = _layer_scale(config)

  def attention(self, x, bias):
    """The stream after attention, and its queries and keys [B, H, N, d]."""
    with jax.named_scope("attention"):
      batch, length, width = x.shape
      qkv = self.qkv(self.norm_attention(x).astype(x.dtype))
      qkv = qkv.reshape(batch, length, 3, self.config.num_heads, -1)
      q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
      mixed = attend(q, k, v, bias).transpose(0, 2, 1, 3)
      mixed = self.out(mixed.reshape(batch, length, width))
      if self.scale_attention is not None:
        mixed = mixed * self.scale_attention[...][None, None]
      return x + mixed, q, k

  def mlp(self, x):
    """The stream after the MLP."""
    with jax.named_scope("mlp"):
      mixed = _mlp(self, self.norm_mlp(x).astype(x.dtype))
      if self.scale_mlp is not None:
        mixed = mixed * self.scale_mlp[...][None, None]
      return x + mixed


class Pool(nnx.Module):
  """One learned query attends to all tokens; then an MLP (SigLIP)."""

  def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
    self.config = config
    normal = nnx.initializers.normal(config.init_scale)
    self.probe = nnx.Param(normal(rngs.params(), (config.width,)))
    self.qkv = linear(config, config.width, 3 * config.width, rngs)
    self.out = linear(config, config.width, config.width, rngs)
    self.norm = norm(config, rngs)
    self.up = linear(config, config.width, config.mlp_width, rngs)
    self.down = linear(config, config.mlp_width, config.width, rngs)

  def __call__(
    self,
    tokens: Float[Array, "B N D"],
    bias: Float[Array, "B N"] | None = None,
  ) -> Float[Array, "B D"]:
    """Pools the tokens; `bias` is added to the logits of each."""
    config, (batch, _, width) = self.config, tokens.shape
    heads = (config.num_heads, width // config.num_heads)
    kernel, offset = self.qkv.kernel[...], self.qkv.bias[...]
    query = self.probe[...] @ kernel[:, :width] + offset[:width]
    both = tokens @ kernel[:, width:] + offset[width:][None, None]
    both = both.reshape(batch, -1, 2, *heads)  # [B, N, 2, H, d]
    logits = jnp.einsum(
      "hd,bnhd->bhn",
      query.reshape(heads),
      both[:, :, 0],
      preferred_element_type=jnp.float32,
    )
    logits = logits * heads[1] ** -0.5
    if bias is not None:
      logits = logits + bias[:, None]
    weights = jax.nn.softmax(logits, axis=-1).astype(tokens.dtype)
    mixed = jnp.einsum("bhn,bnhd->bhd", weights, both[:, :, 1])
    x = self.out(mixed.reshape(batch, width))
    return x + _mlp(self, self.norm(x).astype(x.dtype))


def attend(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B H M d"],
  v: Float[Array, "B H M d"],
  key_bias: Float[Array, "B M"] | None = None,
) -> Float[Array, "B H N d"]:
  """softmax(q k^T / sqrt(d) + key_bias) v, softmax in float32.

  Args:
    q: queries.
    k: keys.
    v: values.
    key_bias: added to the logits of each key, such as log(size); a huge
      negative number hides a key. None adds nothing.

  Returns:
    The mixed values in the dtype of `v`.

  Example:
    >>> one = jnp.ones((1, 1, 2, 4))
    >>> attend(one, one, one).shape
    (1, 1, 2, 4)

  Cost: 4 B H N M d FLOPs; the logits take 4 B H N M bytes.

  Source: Vaswani et al. (2017), "Attention is all you need".
  """
  logits = jnp.matmul(
    q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32
  )  # [B, H, N, M]
  logits = logits * q.shape[-1] ** -0.5
  if key_bias is not None:
    logits = logits + key_bias[:, None, None]
  largest = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - jax.lax.stop_gradient(largest))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  mixed = jnp.matmul(
    weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  return (mixed / total).astype(v.dtype)


def _mlp(module, x):
  activation = ACTIVATIONS[module.config.activation]
  return module.down(activation(module.up(x)))


def _layer_scale(config):
  if config.layer_scale is None:
    return None
  return nnx.Param(jnp.full((config.width,), config.layer_scale))


def linear(
  config: VitConfig,
  inputs: int,
  outputs: int,
  rngs: nnx.Rngs,
  *,
  bias: bool = True,
) -> nnx.Linear:
  """A linear layer with the initial weights of the config."""
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=bias,
    kernel_init=nnx.initializers.normal(config.init_scale),
    rngs=rngs,
  )


def norm(config: VitConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """Layer norm over the width, in float32 whatever comes in."""
  return nnx.LayerNorm(
    config.width,
    epsilon=config.norm_epsilon,
    dtype=jnp.float32,
    use_fast_variance=False,
    rngs=rngs,
  )
