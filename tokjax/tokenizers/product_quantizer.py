"""Product quantisation in a network: groups of channels with a table each.

    config = PQConfig(VQConfig(CodebookConfig(256, 8, learning="ema")))
    quantizer = ProductQuantizer(config, rngs=nnx.Rngs(0))  # of width 64
    state = quantizer.init_state(key)
    found, state = quantizer(features, state, train=True)

The K^G codes of the whole are the pairs, triples, .. of those of the groups.
Trained, it is a product codebook like any other: `product_codebook` gives the
tables in the form of `tokjax.ops.quantize.pq_scores`, to search with.

Sources: Jegou, Douze, Schmid, 2011, "Product Quantization for Nearest Neighbor
Search"; as the bottleneck of a tokenizer, Ma et al., 2025, "UniTok" (several
codebooks over channels). Ours: the rotation of OPQ learned by gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax.tokenizers.codebook import CodebookState, from_data
from tokjax.tokenizers.grouped_quantizer import GroupedConfig, GroupedQuantizer
from tokjax.tokenizers.types import Quantized
from tokjax.tokenizers.vector_quantizer import VQConfig
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["PQConfig", "ProductQuantizer"]


@dataclasses.dataclass(unsafe_hash=True)
class PQConfig:
  """A product quantizer of `num_groups` tables."""

  quantizer: VQConfig  # of every group, of one head
  num_groups: int = 8  # G; with 256 codes 64 bits, as is usual for search
  rotate: bool = False  # learn a rotation of the channels before the cut

  def build(self, rngs: nnx.Rngs) -> "ProductQuantizer":
    """The quantizer of these settings."""
    return ProductQuantizer(self, rngs=rngs)


class ProductQuantizer(nnx.Module):
  """Independent vector quantizers over groups of channels.

  Costs what one vector quantizer of the whole width costs, and with a rotation
  4 N D^2 FLOPs more and a solve of D x D.

  Attributes:
    config: its settings.
    groups: the quantizers, every array with a leading axis of groups.
    skew: [D, D] of the rotation (I + A)^-1 (I - A), A = skew - skew^T, from
      the identity; None without.

  Args:
    config: settings.
    rngs: source of the first parameters.

  Raises:
    ValueError: for settings that contradict each other.

  Example:
    >>> from tokjax.tokenizers.codebook import CodebookConfig
    >>> config = PQConfig(VQConfig(CodebookConfig(2, 1, learning="ema")), 2)
    >>> quantizer = ProductQuantizer(config, rngs=nnx.Rngs(0))
    >>> codes = jnp.array([[[0.0], [4.0]], [[1.0], [3.0]]])
    >>> state = CodebookState(jnp.ones((2, 2)), codes, codes)
    >>> found, _ = jax.jit(quantizer)(jnp.array([[3.5, 1.1]]), state)
    >>> found.indices.tolist(), found.codes.tolist()
    ([[1, 0]], [[4.0, 1.0]])
  """

  def __init__(self, config: PQConfig, *, rngs: nnx.Rngs):
    if config.quantizer.num_heads != 1:
      raise ValueError(
        f"num_heads must be 1, got {config.quantizer.num_heads}: a group of"
        " product quantisation has one code"
      )
    self.config = config
    grouped = GroupedConfig(config.quantizer, config.num_groups)
    self.groups = GroupedQuantizer(grouped, rngs=rngs)
    width = self.width
    self.skew = nnx.Param(jnp.zeros((width, width))) if config.rotate else None

  @property
  def width(self) -> int:
    """D of the vectors it takes."""
    inner = self.config.quantizer
    return self.config.num_groups * (inner.input_dim or inner.codebook.dim)

  @property
  def num_codes(self) -> int:
    """What an index of a group is below, K."""
    return self.groups.num_codes

  @property
  def bits_per_vector(self) -> float:
    """log2 of the number of results, G log2 K."""
    return self.groups.bits_per_vector

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The states of all tables, stacked."""
    return self.groups.init_state(key)

  def init_from_data(
    self,
    key: Key[Array, ""],
    x: Float[Array, "*batch D"],
    mask: Bool[Array, "*batch"] | None = None,
  ) -> CodebookState:
    """State whose tables are k-means of the groups of data.

    Args:
      key: for the first means.
      x: vectors as they come, at least K.
      mask: True where a vector counts; None means all.

    Returns:
      The states of all tables, stacked.

    Raises:
      ValueError: if tables are not learned by "ema", or are of projections.
    """
    config = self.config.quantizer
    if config.input_dim is not None:
      raise ValueError(
        f"input_dim must be None, got {config.input_dim}: means of vectors are"
        " no codes of their projections"
      )
    self._check_width(x)
    x = x.astype(jnp.float32)
    rotation = self.rotation()
    if rotation is not None:
      x = _times(x, rotation.T)
    parts = x.reshape(*x.shape[:-1], self.config.num_groups, -1)
    keys = jax.random.split(key, self.config.num_groups)
    states = [
      from_data(keys[i], parts[..., i, :], mask, config=config.codebook)
      for i in range(self.config.num_groups)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

  def rotation(self) -> Float[Array, "D D"] | None:
    """The orthogonal R of the vectors R x that are cut; None without."""
    if self.skew is None:
      return None
    skew = self.skew[...].astype(jnp.float32)
    skew, one = skew - skew.T, jnp.eye(self.width)
    return jnp.linalg.solve(one + skew, one - skew)

  def product_codebook(self, state: CodebookState) -> Float[Array, "G K d"]:
    """The tables of all groups, for `tokjax.ops.quantize.pq_scores`.

    Codes of up to 256 values are `indices.astype(jnp.uint8)`; with a rotation
    queries are rotated by `rotation`.
    """
    return jax.vmap(lambda quantizer, state: quantizer.codebook.table(state))(
      self.groups.quantizers, state
    )

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
      x: vectors, G times as wide as a group.
      state: of all tables.
      mask: True where a vector counts; None means all. The others get index
        -1 and zeros, and change neither losses nor state.
      train: static; False leaves the state as it is and returns codes that
        are the tables', without estimator.
      key: for what is random in training; each group draws for itself.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      indices [*batch, G], codes in the dtype of x, losses and statistics of a
      vector quantizer, means over groups; and the state.

    Raises:
      ValueError: if the width is wrong or a key is missing.
    """
    self._check_width(x)
    settings = dict(train=train, key=key, axis_name=axis_name)
    rotation = self.rotation()
    if rotation is None:
      return self.groups(x, state, mask, **settings)
    y = x.astype(jnp.float32)
    if mask is not None:  # NaN would spread through the products of gradients
      y = jnp.where(mask[..., None], y, 0)
    found, state = self.groups(_times(y, rotation.T), state, mask, **settings)
    codes = _times(found.codes, rotation).astype(x.dtype)
    return found._replace(codes=codes), state

  def lookup(
    self, indices: Int[Array, "*batch G"], state: CodebookState
  ) -> Float[Array, "*batch D"]:
    """The codes of indices, as `__call__` returns them; zeros for -1."""
    codes, rotation = self.groups.lookup(indices, state), self.rotation()
    return codes if rotation is None else _times(codes, rotation)

  def _check_width(self, x):
    if x.shape[-1] != self.width:
      raise ValueError(f"x must have width {self.width}, got shape {x.shape}")


def _times(x, matrix):
  return jnp.einsum("...d,de->...e", x, matrix, precision="highest")
