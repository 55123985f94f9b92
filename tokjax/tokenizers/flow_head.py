"""A continuous token, drawn by rectified flow from what a model has read.

A small network moves noise to a token along straight lines, under a condition:
the hidden state of a language model at that place.

    head = FlowHead(FlowHeadConfig(latent_dim=32, condition_dim=2048), ...)
    loss = jnp.mean(flow_loss(key, head, condition, z))
    z = flow_sample(key, head, (condition, without_text, without_all), ...)

Time 1 is noise and time 0 the token: x = t noise + (1 - t) z, and the network
learns v = z - noise, so that x + v dt goes to the token.

Sources: Liu et al., 2023, "Flow Straight and Fast"; Huang et al., 2025,
"Ming-UniVision", and its code: blocks with adaptive layer norm whose gates
start at zero, SwiGLU, three branches of guidance, the shift of time.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.tokenizers import transformer
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.typing import Array, Float, Key

__all__ = ["FlowHead", "FlowHeadConfig", "flow_loss", "flow_sample"]


@dataclasses.dataclass(unsafe_hash=True)
class FlowHeadConfig:
  """A stack of gated blocks; defaults are the published ones."""

  latent_dim: int = 32  # C
  condition_dim: int = 2048  # width of the hidden state
  width: int = 3072
  num_blocks: int = 12
  num_frequencies: int = 128  # of the time, as cosines and as sines
  mean: float = 1.46817409  # of latents, taken off before
  deviation: float = 8.09449291  # of latents, divided by


class FlowHead(nnx.Module):
  """The velocity at a point, a time and a condition.

  Cost in FLOPs of an evaluation of one token: for width W and hidden width
  H = 8/3 W rounded up to 8, in each block 6 W H + 6 W^2.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes below 1.

  Example:
    >>> config = FlowHeadConfig(3, 5, width=8, num_blocks=1, num_frequencies=4)
    >>> head = jax.jit(lambda: FlowHead(config, rngs=nnx.Rngs(0)))()
    >>> jax.jit(head)(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 5))).shape
    (2, 3)
  """

  def __init__(self, config: FlowHeadConfig, *, rngs: nnx.Rngs):
    checks.in_range(
      1,
      1 << 20,
      latent_dim=config.latent_dim,
      width=config.width,
      num_blocks=config.num_blocks,
      num_frequencies=config.num_frequencies,
    )
    self.config = config
    width = config.width
    hidden = -(-8 * width // 3 // 8) * 8
    shape = TransformerConfig(width, 1, 1, hidden / width, activation="swiglu")
    self.enter = transformer.linear(shape, config.latent_dim, width, rngs)
    self.condition = transformer.linear(
      shape, config.condition_dim, width, rngs
    )
    self.time_in = transformer.linear(
      shape, 2 * config.num_frequencies, width, rngs
    )
    self.time_out = transformer.linear(shape, width, width, rngs)
    keys = jax.random.split(rngs.params(), config.num_blocks)
    self.blocks = jax.vmap(lambda key: _Block(shape, nnx.Rngs(key)))(keys)
    self.modulate = _zeros(width, 2 * width, rngs)
    self.leave = _zeros(width, config.latent_dim, rngs)

  def __call__(
    self,
    x: Float[Array, "*batch C"],
    time: Float[Array, "*batch"],
    condition: Float[Array, "*batch E"],
  ) -> Float[Array, "*batch C"]:
    """The velocity, in float32.

    Args:
      x: points, of standardised latents.
      time: 1 is noise, 0 the token.
      condition: hidden states.
    """
    dtype = self.enter.kernel[...].dtype
    number = self.config.num_frequencies
    rates = jnp.exp(-math.log(1e4) * jnp.arange(number) / number)
    angle = 1000 * time[..., None].astype(jnp.float32) * _row(rates, time)
    waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    y = self.time_out(jax.nn.silu(self.time_in(waves.astype(dtype))))
    y = jax.nn.silu(y + self.condition(condition.astype(dtype)))

    def step(x, block):
      return block(x, y), None

    x, _ = jax.lax.scan(step, self.enter(x.astype(dtype)), self.blocks)
    scale, shift = jnp.split(self.modulate(y), 2, axis=-1)
    x = _plain_norm(x) * (1 + scale) + shift
    return self.leave(x.astype(dtype)).astype(jnp.float32)


class _Block(nnx.Module):
  """x + gate mlp(norm(x) (1 + scale) + shift), all three from the condition."""

  def __init__(self, shape, rngs):
    self.norm = transformer.layer_norm(shape, rngs)
    self.modulate = _zeros(shape.width, 3 * shape.width, rngs)
    self.mlp = transformer.Mlp(shape, rngs=rngs)

  def __call__(self, x, y):
    shift, scale, gate = jnp.split(self.modulate(y), 3, axis=-1)
    inner = self.norm(x).astype(x.dtype) * (1 + scale) + shift
    return x + gate * self.mlp(inner)


def flow_loss(
  key: Key[Array, ""],
  head: FlowHead,
  condition: Float[Array, "*batch E"],
  z: Float[Array, "*batch C"],
) -> Float[Array, "*batch"]:
  """Squared error of the velocity at a random time, for each token.

  Args:
    key: of noise and times, uniform in 0..1.
    head: the network.
    condition: hidden states.
    z: latents as the tokenizer gives them.

  Returns:
    Means over the coordinates of each token, float32.

  Example:
    >>> config = FlowHeadConfig(3, 5, width=8, num_blocks=1, num_frequencies=4)
    >>> head = jax.jit(lambda: FlowHead(config, rngs=nnx.Rngs(0)))()
    >>> args = head, jnp.ones((2, 5)), jnp.ones((2, 3))
    >>> jax.jit(flow_loss)(jax.random.key(0), *args).shape
    (2,)
  """
  noise_key, time_key = jax.random.split(key)
  config = head.config
  z = (z.astype(jnp.float32) - config.mean) / config.deviation
  noise = jax.random.normal(noise_key, z.shape)
  time = jax.random.uniform(time_key, z.shape[:-1])
  x = time[..., None] * noise + (1 - time[..., None]) * z
  error = head(x, time, condition) - (z - noise)
  return jnp.mean(jnp.square(error), axis=-1)


def flow_sample(
  key: Key[Array, ""],
  head: FlowHead,
  conditions: tuple[Float[Array, "*batch E"], ...],
  *,
  weights: tuple[float, ...] = (3.0, 1.1),
  num_steps: int = 16,
  temperature: float | Float[Array, ""] = 1.0,
  time_shift: float = 1.0,
  renormalize: bool = False,
) -> Float[Array, "*batch C"]:
  """Draws tokens by Euler steps from noise, under guidance.

  With conditions c, tu (without the text), u (without all) and weights
  (text, image) the velocity is

      v = v_u + image (v_tu - v_u) + text (v_c - v_tu)

  With two conditions and one weight it is v_u + weight (v_c - v_u), with one
  condition and no weight v_c. All branches see the same point.

  Args:
    key: of the noise.
    head: the network.
    conditions: hidden states, the full condition first.
    weights: one fewer than conditions; 1 for each gives v_c.
    num_steps: static.
    temperature: scales the noise.
    time_shift: s; times u of equal steps become u / (u + s - s u).
    renormalize: do not let guidance make a velocity longer than v_c.

  Returns:
    Latents as the tokenizer has them, float32.

  Raises:
    ValueError: if the numbers of conditions and weights do not fit.

  Example:
    >>> config = FlowHeadConfig(3, 5, width=8, num_blocks=1, num_frequencies=4)
    >>> head = jax.jit(lambda: FlowHead(config, rngs=nnx.Rngs(0)))()
    >>> condition = jnp.ones((2, 5))
    >>> flow_sample(jax.random.key(0), head, (condition,), weights=()).shape
    (2, 3)

  Cost: steps times conditions evaluations of the head, the branches as one
  batch.
  """
  checks.in_range(1, 3, num_conditions=len(conditions))
  checks.same_size(weights_and_one=len(weights) + 1, conditions=len(conditions))
  checks.in_range(1, 1 << 16, num_steps=num_steps)
  config = head.config
  branches = jnp.stack(conditions)
  shape = (*conditions[0].shape[:-1], config.latent_dim)
  u = jnp.linspace(0, 1, num_steps + 1)
  times = 1 - u / (u + time_shift - time_shift * u)

  def step(i, x):
    now = jnp.full(branches.shape[:-1], times[i])
    found = head(jnp.broadcast_to(x, (len(branches), *shape)), now, branches)
    v = found[-1]
    for weight, without, more in zip(
      weights[::-1], found[:0:-1], found[-2::-1], strict=True
    ):
      v = v + weight * (more - without)
    if renormalize:
      size = jnp.linalg.norm(v, axis=-1, keepdims=True)
      want = jnp.linalg.norm(found[0], axis=-1, keepdims=True)
      v = v * jnp.minimum(1, want / jnp.maximum(size, 1e-12))
    return x + v * (times[i] - times[i + 1])

  x = temperature * jax.random.normal(key, shape)
  x = jax.lax.fori_loop(0, num_steps, step, x)
  return x * config.deviation + config.mean


def _row(x, like):
  return x.reshape(*(1,) * like.ndim, -1)


def _plain_norm(x, epsilon=1e-6):
  """Layer norm without parameters, float32."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(
    jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon
  )


def _zeros(inputs, outputs, rngs):
  return nnx.Linear(
    inputs, outputs, kernel_init=nnx.initializers.zeros, rngs=rngs
  )
