"""Vision transformers: images in, tokens and embeddings out.

One module covers the encoders that published methods read and reduce: CLIP,
SigLIP, DINOv2, DeiT and the ViTs of AugReg. They differ in the tokens beside
the patches, in norms, activation and head; `VitConfig` says how. Weights come
from `tokjax.models.vit_weights`, published shapes from `vit_shapes`.

The module is a plain pytree: hand it to `jax.jit`, `jax.grad`, optax, orbax.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.models import positions, reducing, vit_blocks, vit_shapes
from tokjax.models.reducing import Encoded, Reduction, Stream, Tap, Taps
from tokjax.models.vit_shapes import VitConfig
from tokjax.ops import patches
from tokjax.typing import Array, Bool, Float

__all__ = ["Vit", "VitConfig"]


class Vit(nnx.Module):
  """Pre-norm transformer blocks over patches of an image.

  x = [class, distillation + position, registers, patches W + position], then
  in each block x = x + attention(norm(x)) and x = x + W2 act(W1 norm(x)).

  Computes in the dtype of its parameters; layer norm and softmax are float32.
  Products of float32 have the platform's default precision, which on TPU is
  below float32: `jax.default_matmul_precision("highest")` raises it.

  Cost in FLOPs (forward, multiply and add counted apart) for P patches and N
  rows: 2 P patch_size^2 num_channels D once, and in each layer
  8 N D^2 + 4 N^2 D for the attention and 4 N' D mlp_width for the MLP, whose
  N' is below N where rows are removed in the middle of the block; the next
  layer has N'. CLIP L/14 at 336 pixels, 577 rows: 382 GFLOPs.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not divide, or a head without its token.

  Example:
    >>> config = VitConfig(image_size=8, patch_size=4, width=8, num_layers=2,
    ...                    num_heads=2, mlp_width=16, num_outputs=10)
    >>> vit = jax.jit(lambda: Vit(config, rngs=nnx.Rngs(0)))()
    >>> jax.jit(vit)(jnp.ones((1, 8, 8, 3))).shape
    (1, 10)

  Source:
    Dosovitskiy et al. 2021, "An image is worth 16x16 words"; Radford et al.
    2021, CLIP; Zhai et al. 2023, SigLIP; Oquab et al. 2023, DINOv2; Darcet et
    al. 2024, registers; Touvron et al. 2021, DeiT; Steiner et al. 2022,
    "How to train your ViT?".
  """

  def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
    vit_shapes.check(config)
    self.config = config
    normal = nnx.initializers.normal(config.init_scale)

    def table(*shape):
      return nnx.Param(normal(rngs.params(), shape))

    patch_width = config.patch_size**2 * config.num_channels
    self.patches = vit_blocks.linear(
      config, patch_width, config.width, rngs, bias=config.patch_bias
    )
    self.class_token = table(config.width) if config.class_token else None
    self.distill_token = table(config.width) if config.distill_token else None
    self.registers = (
      table(config.num_registers, config.width)
      if config.num_registers
      else None
    )
    rows, columns = config.grid
    placed = config.class_token + config.distill_token
    self.positions = table(placed + rows * columns, config.width)
    self.norm_input = (
      vit_blocks.norm(config, rngs) if config.norm_input else None
    )
    keys = jax.random.split(rngs.params(), config.num_layers)
    # Every parameter of the blocks has a leading axis of num_layers.
    self.blocks = jax.vmap(
      lambda key: vit_blocks.Block(config, rngs=nnx.Rngs(key))
    )(keys)
    self.norm = vit_blocks.norm(config, rngs)
    self.pool = (
      vit_blocks.Pool(config, rngs=rngs) if config.pool == "attention" else None
    )

    def head():
      return vit_blocks.linear(
        config, config.width, config.num_outputs, rngs, bias=config.head_bias
      )

    self.head = head() if config.num_outputs else None
    self.distill_head = head() if config.distill_head else None

  def __call__(
    self,
    images: Float[Array, "B height width C"] | Float[Array, "B P F"],
    mask: Bool[Array, "B P"] | None = None,
    *,
    reductions: tuple[Reduction, ...] = (),
    proportional: bool = True,
  ) -> Float[Array, "B2 E"]:
    """Embedding or logits of every image: `embed` of `encode`.

    Args:
      images: as in `encode`.
      mask: as in `encode`.
      reductions: as in `encode`.
      proportional: as in `encode`.

    Returns:
      As `embed`.
    """
    encoded = self.encode(
      images, mask, reductions=reductions, proportional=proportional
    )
    return self.embed(encoded, proportional=proportional)

  def encode(
    self,
    images: Float[Array, "B height width C"] | Float[Array, "B P F"],
    mask: Bool[Array, "B P"] | None = None,
    *,
    taps: Taps | None = None,
    reductions: tuple[Reduction, ...] = (),
    proportional: bool = True,
  ) -> Encoded:
    """All tokens after the last block, and what is asked for on the way.

    Layers that nobody reads or reduces run in one `lax.scan`; the others are
    written out, each with its own number of rows. What a jitted caller does
    not return is not computed: `encode(...).taps[-2].hidden` alone leaves the
    last block out.

    Args:
      images: normalised pixels, channels last, of any size; or what
        `patches.patchify` makes of images of the config's size.
      mask: True where a patch is real; None for all. Class, distillation and
        register tokens always are.
      taps: what to return of which layers; None for nothing.
      reductions: methods and where they work; of several at one place the
        first comes first. Called while tracing.
      proportional: weigh fused tokens by their size in attention (ToMe on
        supervised models: yes; CenterCLIP: no).

    Returns:
      Tokens in the dtype of the parameters. Row 0 is the class token, if any.

    Raises:
      ValueError: for sizes that do not fit, or layers that are not there.
    """
    config, taps = self.config, Taps() if taps is None else taps
    for reduction in reductions:
      reduction.check(config.num_layers)
    asked = _by_layer(taps, config.num_layers)
    touched = {*asked, *(n for r in reductions for n in r.layers)}
    stream, found, layer = self._embed_patches(images, mask), {}, 0
    for stop in (*sorted(touched), config.num_layers):
      stream = self._run(layer, stop, stream, proportional)
      if stop < config.num_layers:
        stream, tap = self._layer(stop, stream, reductions, proportional)
        for number in asked.get(stop, ()):
          found[number] = _chosen(tap, number, taps)
      layer = stop + 1
    tokens, index, mask, size, _ = stream
    mask = jnp.ones_like(index, dtype=bool) if mask is None else mask
    size = jnp.where(mask, 1.0, 0.0) if size is None else size
    return Encoded(tokens, mask, size, index, found)

  def normalize(self, tokens: Float[Array, "*batch D"]) -> Array:
    """The final layer norm, which CLIP applies to the class token only.

    Args:
      tokens: output of the last block.

    Returns:
      The same shape and dtype.
    """
    return self.norm(tokens).astype(tokens.dtype)

  def embed(
    self, encoded: Encoded, *, proportional: bool = True
  ) -> Float[Array, "B E"]:
    """Pools the tokens of an image and applies the linear head, if any.

    Args:
      encoded: what `encode` returned; needs its tokens, mask and size.
      proportional: weigh fused tokens by their size where pooling reads all
        (the mean, SigLIP's attention); the class token is read as it is.

    Returns:
      [B, num_outputs], or [B, D] without a linear layer. With a head for the
      distillation token the mean of both heads' outputs, as DeiT.
    """
    config = self.config
    tokens, mask, size = encoded.tokens, encoded.mask, encoded.size
    if config.pool == "attention":
      stream = Stream(tokens, encoded.index, mask, size, 0)
      bias = reducing.key_bias(stream, proportional=proportional)
      pooled = self.pool(self.normalize(tokens), bias)
    elif config.pool == "mean":
      first = config.num_special
      weight = size if proportional else mask.astype(jnp.float32)
      weight = weight[:, first:, None]
      x = self.norm(tokens[:, first:])  # float32
      total = jnp.sum(jnp.where(weight > 0, weight * x, 0), axis=1)
      count = jnp.maximum(jnp.sum(weight, axis=1), 1e-6)
      pooled = (total / count).astype(tokens.dtype)
    else:
      pooled = self.normalize(tokens[:, 0])
    if self.head is None:
      return pooled
    outputs = self.head(pooled)
    if self.distill_head is not None:
      second = self.distill_head(self.normalize(tokens[:, 1]))
      outputs = (outputs + second) / 2
    return outputs

  def _embed_patches(self, images, mask):
    config = self.config
    grid = config.grid
    if images.ndim == 4:
      size = config.patch_size
      grid = (images.shape[1] // size, images.shape[2] // size)
      images = patches.patchify(images, size)
    checks.has_rank(3, images=images)
    num_patches = grid[0] * grid[1]
    checks.same_size(patches=images.shape[1], positions=num_patches)
    if mask is not None and mask.shape != images.shape[:2]:
      raise ValueError(
        f"mask must have the shape of the patches {images.shape[:2]}, got "
        f"{mask.shape}"
      )
    dtype = self.patches.kernel[...].dtype
    x = self.patches(images.astype(dtype))
    special = config.num_special
    if mask is not None:
      x = jnp.where(mask[..., None], x, 0)  # NaN padding must not spread
      mask = jnp.pad(mask, ((0, 0), (special, 0)), constant_values=True)
    # Rows of zeros for the tokens beside the patches, then all in one sum:
    # it keeps the sharding of the images, as joining with new rows does not.
    x = jnp.pad(x, ((0, 0), (special, 0), (0, 0)))
    x = x + self._table(grid)[None]
    if self.norm_input is not None:
      x = self.norm_input(x).astype(dtype)
    rows = jax.lax.iota(jnp.int32, x.shape[1])
    index = jnp.zeros_like(x[..., 0], dtype=jnp.int32) + rows[None]
    return Stream(x, index, mask, None, x.shape[1])

  def _table(self, grid):
    """What is added to each row: tokens beside the patches and positions."""
    config, table = self.config, self.positions[...]
    both = (self.class_token, self.distill_token)
    tokens = [x[...][None] for x in both if x is not None]
    placed = len(tokens)
    cells = positions.interpolate_grid(
      table[placed:], config.grid, grid, antialias=config.antialias_positions
    )
    special = [x + table[i][None] for i, x in enumerate(tokens)]
    if self.registers is not None:
      special.append(self.registers[...])
    return jnp.concatenate([*special, cells])

  def _run(self, start, stop, stream, proportional):
    """Layers start..stop-1, which nobody reads or reduces."""
    if start >= stop:
      return stream
    blocks = self.blocks
    if (start, stop) != (0, self.config.num_layers):
      blocks = jax.tree.map(lambda x: x[start:stop], blocks)
    bias = reducing.key_bias(stream, proportional=proportional)

    def step(x, block):
      return block.mlp(block.attention(x, bias)[0]), None

    return stream._replace(tokens=jax.lax.scan(step, stream.tokens, blocks)[0])

  def _layer(self, layer, stream, reductions, proportional):
    """One layer with its reductions, and all that can be read of it."""
    block = jax.tree.map(lambda x: x[layer], self.blocks)
    reduced = None

    def reduce(place, stream, reduced, *attention):
      for reduction in reductions:
        if layer in reduction.layers and reduction.place == place:
          stream, reduced = reducing.reduce_stream(
            reduction, layer, stream, *attention
          )
          if reduction.form == "remove":  # the rows are gone
            attention = (None,) * len(attention)
      return stream, reduced

    stream, reduced = reduce("before", stream, reduced)
    bias = reducing.key_bias(stream, proportional=proportional)
    x, queries, keys = block.attention(stream.tokens, bias)
    tap = Tap(queries, keys, stream.mask, stream.size)
    before = stream.tokens.shape
    stream = stream._replace(tokens=x)
    stream, reduced = reduce("middle", stream, reduced, keys, queries)
    stream = stream._replace(tokens=block.mlp(stream.tokens))
    same = stream.tokens.shape == before
    attention = (keys, queries) if same else (None, None)
    stream, reduced = reduce("after", stream, reduced, *attention)
    return stream, tap._replace(
      hidden=stream.tokens, hidden_mask=stream.mask, reduced=reduced
    )


def _by_layer(taps, num_layers):
  """{layer: numbers that ask for it}."""
  asked: dict[int, list[int]] = {}
  for number in sorted(taps.layers()):
    checks.in_range(-num_layers, num_layers - 1, tapped_layer=number)
    asked.setdefault(number % num_layers, []).append(number)
  return asked


def _chosen(tap, number, taps):
  """A tap without what was not asked for."""
  attention = number in (*taps.queries, *taps.keys)
  hidden = number in taps.hidden
  return Tap(
    tap.queries if number in taps.queries else None,
    tap.keys if number in taps.keys else None,
    tap.mask if attention else None,
    tap.size if attention else None,
    tap.hidden if hidden else None,
    tap.hidden_mask if hidden else None,
    tap.reduced if number in taps.reduced else None,
  )
