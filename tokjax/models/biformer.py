"""BiFormer: a pyramid of blocks whose regions read the regions that matter.

    model = BiFormer(shape("biformer-tiny"), rngs=nnx.Rngs(0))
    logits, _ = model(images, model.init_state())       # [B, 1000]
    logits, state = model(images, state, train=True, key=key)

Batch norms read and move statistics, which are passed in and returned. Weights
come from `tokjax.models.biformer_weights`, shapes from `biformer_shapes`; the
attention is `tokjax.sparse.biformer`. `features` gives the maps of the stages,
for detection and segmentation.

Source: Zhu, Wang, Ke, Zhang, Lau (2023), "BiFormer: Vision Transformer with
Bi-Level Routing Attention", and its code.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.models import bert, biformer_shapes
from tokjax.models.biformer_shapes import CONFIGS, BiFormerConfig, shape
from tokjax.ops import attention, depthwise
from tokjax.sparse import biformer
from tokjax.typing import Array, Float, Key

__all__ = ["CONFIGS", "BatchMoments", "BiFormer", "BiFormerConfig", "shape"]

# Of the kernels of convolutions: 1 / sqrt(inputs) at most.
_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class BatchMoments(NamedTuple):
  """Moving statistics of a batch norm, float32.

  Attributes:
    mean: of each channel.
    variance: of each channel, that of a sample (divided by n - 1).
  """

  mean: Float[Array, "*batch C"]
  variance: Float[Array, "*batch C"]


class BiFormer(nnx.Module):
  """Images to logits, or to the maps of four stages.

  A stem and convolutions of stride 2, each with a batch norm, make the map of a
  stage; its blocks are

      x = x + depthwise_conv(x)                          3 x 3, if any
      y = norm(x)
      x = x + W_o (attention(y) + depthwise_conv(v))     5 x 5; "full": of y
      x = x + W_2 gelu(W_1 norm(x))

  The end is a batch norm, the mean over the map and a linear layer.

  Computes in the dtype of its parameters; norms, softmax and routes are
  float32. Sides of a map need not divide by its regions.

  Cost: `biformer_shapes.flops`.

  Args:
    config: the shape.
    rngs: seeds the parameters: linear weights normal, convolutions uniform.

  Raises:
    ValueError: for sizes that do not fit each other.

  Example:
    >>> config = BiFormerConfig(
    ...   widths=(4, 8), depths=(1, 1), attention=("routing", "full"),
    ...   num_regions=(2, 1), top_k=(1, 1), head_dim=4, full_num_heads=2,
    ...   num_outputs=5)
    >>> model = jax.jit(lambda: BiFormer(config, rngs=nnx.Rngs(0)))()
    >>> logits, _ = jax.jit(model)(jnp.ones((1, 16, 16, 3)), model.init_state())
    >>> logits.shape
    (1, 5)
  """

  def __init__(self, config: BiFormerConfig, *, rngs: nnx.Rngs):
    biformer_shapes.check(config)
    self.config = config
    stages = range(len(config.depths))
    self.downsampling = nnx.List(
      _Downsampling(config, stage, rngs) for stage in stages
    )
    # Every parameter of a stage has a leading axis of its depth.
    self.stages = nnx.List(
      jax.vmap(lambda key, stage=stage: _Block(config, stage, nnx.Rngs(key)))(
        jax.random.split(rngs.params(), config.depths[stage])
      )
      for stage in stages
    )
    self.norm = _BatchNorm(config, config.widths[-1], rngs)
    self.head = _linear(config, config.widths[-1], config.num_outputs, rngs)

  def init_state(self) -> tuple[BatchMoments, ...]:
    """Statistics before training: mean 0 and variance 1 of each batch norm."""
    norms = [norm for x in self.downsampling for norm in x.norms]
    return tuple(
      BatchMoments(jnp.zeros(width), jnp.ones(width))
      for width in (norm.scale.shape[-1] for norm in (*norms, self.norm))
    )

  def __call__(
    self,
    images: Float[Array, "B height width channels"],
    state: tuple[BatchMoments, ...],
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B classes"], tuple[BatchMoments, ...]]:
    """Logits of images.

    Args:
      images: normalised pixels, channels last.
      state: of the batch norms.
      train: normalise with the statistics of this batch, of all its images on
        all devices, and move those of the state.
      key: drops whole residuals of an image, see `drop_path_rate`; None drops
        nothing.

    Returns:
      Logits in the dtype of the parameters, and the state, unchanged but in
      training. No gradient passes through the state.

    Raises:
      ValueError: if channels or the number of statistics do not fit.
    """
    maps, state = self.features(images, state, train=train, key=key)
    x, moments = self.norm(maps[-1], state[-1], train)
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(x.dtype)
    return self.head(x), (*state[:-1], moments)

  def features(
    self,
    images: Float[Array, "B height width channels"],
    state: tuple[BatchMoments, ...],
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
  ) -> tuple[tuple[Array, ...], tuple[BatchMoments, ...]]:
    """The map of each stage [B, height / stride, width / stride, width].

    Args, returned state and errors are those of the call; the last norm, whose
    statistics come last, is not read.
    """
    config = self.config
    checks.has_rank(4, images=images)
    checks.same_size(
      channels=images.shape[-1], num_channels=config.num_channels
    )
    norms = 1 + sum(len(x.norms) for x in self.downsampling)
    checks.same_size(statistics=len(state), batch_norms=norms)
    x, maps, moved = images.astype(self.head.kernel.dtype), [], []
    rates = np.linspace(0, config.drop_path_rate, sum(config.depths))
    last = 0
    for stage, blocks in enumerate(self.stages):
      with jax.named_scope(f"stage_{stage}"):
        x, now = self.downsampling[stage](x, state[len(moved) :], train)
        first, last = last, last + config.depths[stage]
        x = _run(blocks, x, np.arange(first, last), rates[first:last], key)
      moved += now
      maps.append(x)
    return tuple(maps), (*moved, state[-1])


class _Downsampling(nnx.Module):
  """Convolutions and batch norms in front of a stage."""

  def __init__(self, config, stage, rngs):
    self.convs, self.norms = nnx.List(), nnx.List()
    # Patches of the later stages are normalised before they are merged.
    self.norm_first = bool(stage) and config.stem == "patches"
    for size, stride, inputs, outputs in biformer_shapes.convolutions(
      config, stage
    ):
      padding = "VALID" if config.stem == "patches" else ((1, 1), (1, 1))
      self.convs.append(
        _conv(inputs, outputs, size, rngs, strides=stride, padding=padding)
      )
      width = inputs if self.norm_first else outputs
      self.norms.append(_BatchNorm(config, width, rngs))

  def __call__(self, x, state, train):
    moved = []
    for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
      x = bert.gelu(x) if i else x
      x = x if self.norm_first else conv(x)
      x, moments = norm(x, state[i], train)
      x = conv(x) if self.norm_first else x
      moved.append(moments)
    return x, moved


class _Block(nnx.Module):
  """Position, attention and MLP, each added to the map."""

  def __init__(self, config, stage, rngs):
    self.config, self.stage = config, stage
    width = config.widths[stage]
    kind = config.attention[stage]
    self.position = (
      _Depthwise(width, config.position_size, rngs)
      if config.position_size
      else None
    )
    self.norm_attention = _layer_norm(config, width, rngs)
    # Queries, keys and values, side by side in that order.
    bias = kind != "full" or config.full_bias
    self.qkv = _linear(config, width, 3 * width, rngs, bias=bias)
    self.lepe = _Depthwise(width, config.lepe_size, rngs)
    self.out = _linear(config, width, width, rngs)
    self.norm_mlp = _layer_norm(config, width, rngs)
    self.up = _linear(config, width, config.mlp_ratio * width, rngs)
    self.down = _linear(config, config.mlp_ratio * width, width, rngs)

  def __call__(self, x, rate, key):
    keys = (None, None) if key is None else jax.random.split(key)
    if self.position is not None:
      x = x + self.position(x)
    with jax.named_scope("attention"):
      mixed = self.attention(self.norm_attention(x).astype(x.dtype))
      x = x + _drop_path(mixed, rate, keys[0])
    with jax.named_scope("mlp"):
      mixed = self.up(self.norm_mlp(x).astype(x.dtype))
      return x + _drop_path(self.down(bert.gelu(mixed)), rate, keys[1])

  def attention(self, x):
    """Of a normalised map, and the convolution beside it."""
    config, stage = self.config, self.stage
    kind, num_heads = config.attention[stage], config.num_heads(stage)
    batch, height, width, channels = x.shape
    qkv = self.qkv(x).reshape(batch, height, width, 3, num_heads, -1)
    q, k, v = (qkv[:, :, :, i] for i in range(3))  # [B, H, W, heads, dim]
    values = v.reshape(x.shape)
    if kind == "full":
      q, k, v = (
        y.reshape(batch, height * width, num_heads, -1).swapaxes(1, 2)
        for y in (q, k, v)
      )
      mixed = attention.attend(q, k, v).swapaxes(1, 2)  # [B, N, heads, dim]
      mixed = mixed.reshape(batch, height, width, num_heads, -1)
      local = x if config.full_lepe == "input" else values
    else:
      routed = biformer.window_attention
      if kind == "routing":
        routed = functools.partial(
          biformer.bi_level_routing_attention,
          top_k=config.top_k[stage],
          soft_routing=config.soft_routing,
        )
      mixed = routed(
        q,
        k,
        v,
        num_regions=config.num_regions[stage],
        block_size=config.block_size,
        block_queries=config.block_queries,
      )
      local = values
    return self.out(mixed.reshape(x.shape) + self.lepe(local))


class _Depthwise(nnx.Module):
  """Each channel with its own kernel, and a bias."""

  def __init__(self, width, size, rngs):
    shape = (size, size, 1, width)
    self.kernel = nnx.Param(_uniform(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    y = depthwise.depthwise_conv(x, self.kernel[...])
    return y + self.bias[...][None, None, None]


class _BatchNorm(nnx.Module):
  """Each channel over batch and map, in float32."""

  def __init__(self, config, width, rngs):
    self.config = config
    self.scale = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))

  def __call__(self, x, state, train):
    config, wide = self.config, x.astype(jnp.float32)
    mean, variance = state
    if train:
      mean = jnp.mean(wide, axis=(0, 1, 2))
      variance = jnp.mean(jnp.square(wide - _row(mean)), axis=(0, 1, 2))
      number = x.size // x.shape[-1]
      sample = variance * (number / max(number - 1, 1))
      now = jax.lax.stop_gradient(BatchMoments(mean, sample))
      step = config.batch_norm_momentum
      state = jax.tree.map(
        lambda old, new: old + step * (new - old), state, now
      )
    scale = jax.lax.rsqrt(variance + config.batch_norm_epsilon)
    y = (wide - _row(mean)) * _row(scale * self.scale[...]) + _row(self.bias)
    return y.astype(x.dtype), state


def _run(blocks, x, numbers, rates, key):
  """The blocks of a stage, one after the other."""

  def step(x, block):
    block, number, rate = block
    block_key = None if key is None else jax.random.fold_in(key, number)
    return block(x, rate, block_key), None

  rates = jnp.asarray(rates, jnp.float32)
  return jax.lax.scan(step, x, (blocks, jnp.asarray(numbers), rates))[0]


def _drop_path(x, rate, key):
  """Zero for a share of the images, larger for the others."""
  if key is None:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, 1))
  return x * (kept / (1 - rate)).astype(x.dtype)


def _row(x):
  return x[...].astype(jnp.float32)[None, None, None]


def _linear(config, inputs, outputs, rngs, *, bias=True):
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=bias,
    kernel_init=nnx.initializers.normal(config.init_scale),
    rngs=rngs,
  )


def _conv(inputs, outputs, size, rngs, **settings):
  return nnx.Conv(
    inputs, outputs, (size, size), kernel_init=_uniform, rngs=rngs, **settings
  )


def _layer_norm(config, width, rngs):
  return nnx.LayerNorm(
    width,
    epsilon=config.norm_epsilon,
    dtype=jnp.float32,
    use_fast_variance=False,
    rngs=rngs,
  )
