"""VAT: shapes as few tokens of growing scales, and triplanes to read them by.

    points -> Fourier features -> transformer over [points ; latents]
           -> the latents as Gaussians -> codes of a row of growing token counts
           -> transformer -> three planes of features
           -> at any place: features of the planes -> inside or not

    model = Vat(VATConfig(), rngs=nnx.Rngs(0))
    state = model.init_state(key)
    found, state = model(points, queries, occupancy, state, train=True, key=key)
    tokens = model.encode(points, state).indices
    logits = model.query(model.decode(tokens, state), places)

`reads` is ("points", "queries", "occupancy"): what the shape is seen by, where
it is asked for, and the right answers; the first `num_volume` queries are
spread over the cube -1..1, the others lie near the surface. `output` are the
logits at the queries. A mesh of a grid of logits: `data.meshes.from_grid`.

Sources. From the paper (Chen et al., 2024, "3D representation in 512-Byte:
Variational tokenizer is the key for autoregressive 3D generation", arXiv
2412.02202; no code was published): the transformer in context, of which the
latents are kept, the Gaussian latents, residual quantisation over growing token
counts, the triplane. From code of Zhang et al., 2023, "3DShape2VecSet"
(1zb/3DShape2VecSet): Fourier features, losses and their weights. Ours, because
nothing is known: all sizes, the maps between scales (`multi_scale_quantizer`),
learned queries of the planes that read the latents, one shuffle of pixels and a
convolution to enlarge them; and how learning starts, without which it did not:
rows of latents and planes from waves of places, as points are embedded, little
noise, and answers of "outside". In training samples are quantised, in
evaluation means.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.ops.fourier import fourier_features
from tokjax.ops.triplanes import Combine, triplane_query
from tokjax.tokenizers import gaussian, multi_scale_quantizer, transformer
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.measures import masked_mean
from tokjax.tokenizers.multi_scale_quantizer import (
  MultiScaleConfig,
  MultiScaleQuantizer,
)
from tokjax.tokenizers.transformer import Transformer, TransformerConfig
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = [
  "CONFIGS",
  "VATConfig",
  "Vat",
  "bytes_per_shape",
]

Normals = Literal["fourier", "raw"]


def _rows(sizes, num_codes, dim):
  """A quantizer of latents whose codes start as the latents shall lie."""
  return MultiScaleConfig(
    CodebookConfig(num_codes, dim),
    sizes,
    layout="row",
    up="linear",
    num_convolutions=0,
    code_deviation=1.0,
  )


@dataclasses.dataclass(unsafe_hash=True)
class VATConfig:
  """The whole tokenizer; the paper gives no sizes, so all are ours."""

  # Of the latents: their number is the last size, their width that of a code.
  quantizer: MultiScaleConfig = dataclasses.field(
    default_factory=lambda: _rows((1, 1, 2, 4, 8, 16, 32, 64, 128), 65_536, 32)
  )
  encoder: TransformerConfig = dataclasses.field(
    default_factory=lambda: TransformerConfig(768, 12, 12)
  )
  decoder: TransformerConfig = dataclasses.field(
    default_factory=lambda: TransformerConfig(768, 12, 12)
  )  # over latents; of width `planes.context_dim`
  planes: TransformerConfig = dataclasses.field(
    default_factory=lambda: TransformerConfig(768, 2, 12, context_dim=768)
  )  # over queries of planes, which read latents
  num_frequencies: int = 8  # of the Fourier features of each coordinate
  normals: Normals = "fourier"  # how normals are embedded
  plane_tokens: int = 32  # side of the planes of the transformer
  plane_shuffle: int = 4  # each token becomes so many cells a side
  plane_dim: int = 32  # features of a cell
  combine: Combine = "sum"  # of what three planes say of a place
  head_width: int = 128  # of the two layers from there to a logit
  first_logit: float = -2.0  # of an untrained model: most of the cube is empty
  first_deviation: float = 0.05  # of the latents of an untrained model
  quantize: bool = True  # False: Gaussians alone, to begin training with
  num_volume: int = 1024  # first queries, in the volume; the rest are near
  near_weight: float = 0.1  # of the loss near the surface
  kl_weight: float = 1e-3  # of the mean over coordinates

  def build(self, rngs: nnx.Rngs) -> "Vat":
    """The model with fresh parameters."""
    return Vat(self, rngs=rngs)


# The two rates that the paper reports: 512 bytes, and 3.9 kilobytes.
CONFIGS = {
  "vat-512b": VATConfig(),
  "vat-4kb": VATConfig(
    _rows((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), 65_536, 32)
  ),
}


class Vat(nnx.Module):
  """Point sets to tokens of several scales, and to occupancy anywhere.

  Cost of a forward pass: the encoder over P + K tokens (see `Transformer`; it
  holds (P + K)^2 logits a head), `MultiScaleQuantizer`, the planes' transformer
  over 3 r^2 queries, and 24 Ct + 2 h (Ct + h) FLOPs a query.

  Attributes:
    config: its settings.

  Args:
    config: settings.
    rngs: source of the first parameters.

  Raises:
    ValueError: for sizes that do not fit.
  """

  reads = ("points", "queries", "occupancy")

  def __init__(self, config: VATConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    encoder, decoder, planes = config.encoder, config.decoder, config.planes
    self.quantizer = MultiScaleQuantizer(config.quantizer, rngs=rngs)
    num_latents = self.quantizer.num_tokens
    dim = config.quantizer.codebook.dim
    linear = transformer.linear

    features = 3 * (1 + 2 * config.num_frequencies)
    normals = features if config.normals == "fourier" else 3
    self.embed = linear(encoder, features + normals, encoder.width, rngs)
    # Latents start as points of the cube, read as the given points are.
    start = jax.random.uniform(rngs.params(), (num_latents, 3), minval=-1)
    x = fourier_features(start, num_frequencies=config.num_frequencies)
    self.latents = nnx.Param(x @ self.embed.kernel[...][:features])
    self.encoder = Transformer(encoder, rngs=rngs)
    self.to_gaussian = linear(encoder, encoder.width, 2 * dim, rngs)
    # Little noise at first: what drowns is never learned to be read.
    log_variance = jnp.full(dim, 2 * math.log(config.first_deviation))
    self.to_gaussian.bias[...] = jnp.pad(log_variance, (dim, 0))

    self.from_codes = linear(decoder, dim, decoder.width, rngs)
    self.places = _rows_of_places(start, decoder.width, rngs)
    self.decoder = Transformer(decoder, rngs=rngs)
    cells = _places_of_planes(config.plane_tokens)
    self.plane_queries = _rows_of_places(cells, planes.width, rngs)
    self.planes = Transformer(planes, rngs=rngs)
    outputs = config.plane_shuffle**2 * config.plane_dim
    self.to_cells = linear(planes, planes.width, outputs, rngs)
    self.smooth = nnx.Conv(
      config.plane_dim, config.plane_dim, (3, 3), rngs=rngs
    )
    width = config.plane_dim * (3 if config.combine == "concatenate" else 1)
    self.head = nnx.List(
      [
        nnx.Linear(width, config.head_width, rngs=rngs),
        nnx.Linear(config.head_width, config.head_width, rngs=rngs),
        nnx.Linear(config.head_width, 1, rngs=rngs),
      ]
    )
    self.head[-1].bias[...] = jnp.full(1, config.first_logit)

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The codebook's state before the first step."""
    return self.quantizer.init_state(key)

  def __call__(
    self,
    points: Float[Array, "B P 6"],
    queries: Float[Array, "B M 3"],
    occupancy: Bool[Array, "B M"] | Float[Array, "B M"],
    state: CodebookState,
    *,
    point_mask: Bool[Array, "B P"] | None = None,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, CodebookState]:
    """Logits at the queries, and what training needs.

    Args:
      points: of the surface, with normals behind the coordinates.
      queries: places in -1..1, the first `num_volume` all over it.
      occupancy: True or 1 where a query is inside.
      state: of the codebook.
      point_mask: True where a point counts; None means all.
      train: static; True draws latents from their Gaussians and returns the
        next state, False takes the means.
      key: in training, for the latents and the quantizer.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      output: float32 logits [B, M]. losses: cross-entropies "volume" and
      "near", "kl", and those of the quantizer. stats: "iou" over the volume
      queries of all shapes together; usage and perplexity of codes.

    Raises:
      ValueError: if sizes are wrong or the key is missing.
    """
    config = self.config
    checks.same_size(queries=queries.shape[1], occupancy=occupancy.shape[1])
    checks.in_range(1, queries.shape[1], num_volume=config.num_volume)
    if train and key is None:
      raise ValueError("key must be given to train, got None")
    latent = self.posterior(points, point_mask)
    z, losses, stats = latent.mean, {}, {}
    if train:
      sample_key, key = jax.random.split(key)
      if axis_name is not None:  # other noise on each device
        place = jax.lax.axis_index(axis_name)
        sample_key = jax.random.fold_in(sample_key, place)
      z = gaussian.sample(sample_key, latent)
    if config.quantize:
      found, state = self.quantizer(
        z, state, train=train, key=key, axis_name=axis_name
      )
      z, losses, stats = found.codes, dict(found.losses), dict(found.stats)
    logits = self.query(self.to_planes(z), queries)

    target = occupancy.astype(jnp.float32)
    error = jax.nn.softplus(logits) - target * logits
    here = jnp.arange(queries.shape[1]) < config.num_volume
    volume = jnp.zeros_like(logits, bool) | here[None]
    losses["volume"] = masked_mean(error, volume, axis_name)
    if config.near_weight:
      near = masked_mean(error, ~volume, axis_name)
      losses["near"] = config.near_weight * near
    if config.kl_weight:
      kl = gaussian.kl_divergence(latent, axis_name=axis_name)
      losses["kl"] = config.kl_weight * kl
    sure, right = logits > 0, target > 0.5
    share = masked_mean((sure & right).astype(jnp.float32), volume, axis_name)
    either = masked_mean((sure | right).astype(jnp.float32), volume, axis_name)
    stats["iou"] = share / jnp.where(either > 0, either, 1)
    return Reconstructed(logits, losses, stats), state

  def posterior(
    self,
    points: Float[Array, "B P 6"],
    point_mask: Bool[Array, "B P"] | None = None,
  ) -> gaussian.Gaussian:
    """The latents [B, K, C] of point sets, whose order does not matter."""
    checks.same_size(width_of_points=points.shape[-1], xyz_and_normal=6)
    frequencies = self.config.num_frequencies
    x = fourier_features(points[..., :3], num_frequencies=frequencies)
    normals = points[..., 3:].astype(jnp.float32)
    if self.config.normals == "fourier":
      normals = fourier_features(normals, num_frequencies=frequencies)
    x = jnp.concatenate([x, normals], axis=-1)
    x = self.embed(x.astype(self.embed.kernel.dtype))
    # Made of x, so that they lie on devices as it does.
    latents = jnp.zeros_like(x[:, :1]) + self.latents[...][None]
    mask, num_latents = None, latents.shape[1]
    if point_mask is not None:
      x = jnp.where(point_mask[..., None], x, 0)  # NaN padding must not spread
      mask = jnp.pad(
        point_mask, ((0, 0), (0, num_latents)), constant_values=True
      )
      mask = jnp.broadcast_to(mask[:, None], (*mask.shape, mask.shape[-1]))
    x = self.encoder(jnp.concatenate([x, latents], axis=1), mask=mask)
    return gaussian.from_features(self.to_gaussian(x[:, -num_latents:]))

  def encode(
    self,
    points: Float[Array, "B P 6"],
    state: CodebookState,
    *,
    point_mask: Bool[Array, "B P"] | None = None,
  ) -> Quantized:
    """Tokens of the latents' means: indices [B, T], coarse to fine."""
    found, _ = self.quantizer(self.posterior(points, point_mask).mean, state)
    return found

  def decode(
    self,
    indices: Int[Array, "B T"],
    state: CodebookState,
    *,
    num_scales: int | None = None,
  ) -> Float[Array, "B 3 R R C"]:
    """The planes of tokens, of the first scales only if told how many."""
    z = self.quantizer.lookup(indices, state, upto=num_scales)
    return self.to_planes(z)

  def to_planes(self, z: Float[Array, "B K C"]) -> Float[Array, "B 3 R R C2"]:
    """Three planes of features from latents."""
    config = self.config
    z = z.astype(self.from_codes.kernel.dtype)
    z = self.decoder(self.from_codes(z) + self.places[...][None])
    queries = jnp.zeros_like(z[:, :1, :1]) + self.plane_queries[...][None]
    x = self.to_cells(self.planes(queries, z))
    side, shuffle = config.plane_tokens, config.plane_shuffle
    # One axis is split at a time, as an explicit mesh wants it.
    x = x.reshape(x.shape[0], 3, side, side, -1)
    x = x.reshape(*x.shape[:4], shuffle, shuffle, -1)
    x = x.swapaxes(3, 4)  # [B, 3, r, u, r, u, C]
    x = x.reshape(*x.shape[:2], side * shuffle, *x.shape[4:])
    x = x.reshape(*x.shape[:3], side * shuffle, x.shape[-1])
    smooth = jnp.stack([self.smooth(x[:, plane]) for plane in range(3)], axis=1)
    return x + smooth

  def query(
    self,
    planes: Float[Array, "B 3 R R C"],
    places: Float[Array, "B M 3"],
    *,
    block_size: int | None = None,
  ) -> Float[Array, "B M"]:
    """float32 logits of being inside, at places in -1..1."""
    x = triplane_query(
      planes, places, combine=self.config.combine, block_size=block_size
    )
    *hidden, last = self.head
    for layer in hidden:
      x = jax.nn.gelu(layer(x), approximate=False)
    return last(x)[..., 0].astype(jnp.float32)


def bytes_per_shape(
  config: VATConfig, *, num_scales: int | None = None
) -> float:
  """Bytes of the tokens of a shape, of its first scales if told how many.

  Example:
    >>> bytes_per_shape(CONFIGS["vat-512b"])
    512.0
  """
  return multi_scale_quantizer.num_bytes(config.quantizer, upto=num_scales)


def _places_of_planes(side):
  """[3 side^2, 6]: the middle of each cell, and a one on the axis it lacks."""
  along = (np.arange(side) + 0.5) / side * 2 - 1
  first, second = (x.ravel() for x in np.meshgrid(along, along, indexing="ij"))
  cells = np.zeros((3, side**2, 6), np.float32)
  for plane, (u, v) in enumerate([(0, 1), (0, 2), (1, 2)]):
    cells[plane, :, u], cells[plane, :, v] = first, second
    cells[plane, :, 6 - u - v] = 1
  return jnp.asarray(cells.reshape(-1, 6))


def _rows_of_places(places, width, rngs):
  """Learned rows that start alike where places are near each other."""
  x = fourier_features(places, num_frequencies=3)
  mix = jax.random.normal(rngs.params(), (x.shape[-1], width))
  return nnx.Param(x @ mix * math.sqrt(2 / x.shape[-1]))


def _check(config):
  checks.one_of(get_args(Combine), combine=config.combine)
  checks.one_of(get_args(Normals), normals=config.normals)
  checks.one_of(("row",), layout_of_quantizer=config.quantizer.layout)
  checks.same_size(
    decoder_width=config.decoder.width,
    planes_context_dim=config.planes.context_dim,
  )
  checks.in_range(
    1, 1 << 12, plane_tokens=config.plane_tokens,
    plane_shuffle=config.plane_shuffle, plane_dim=config.plane_dim,
    head_width=config.head_width,
  )  # fmt: skip
  checks.in_range(1e-6, 1e6, first_deviation=config.first_deviation)
