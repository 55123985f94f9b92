"""Groups of channels, each with a quantizer of its own.

    stages = RVQConfig(CodebookConfig(256, 16, learning="ema"), num_stages=2)
    config = GroupedConfig(stages, num_groups=2)  # of vectors of width 32
    quantizer = GroupedQuantizer(config, rngs=nnx.Rngs(0))
    state = quantizer.init_state(key)
    found, state = quantizer(features, state, train=True)

Any quantizer may be grouped: residual ones (grouped RVQ), those with one table
(a table each, where `num_heads` of a vector quantizer shares one), those
without. The groups are stacked and run as one.

Source: Yang et al., 2023, "HiFi-Codec: Group-residual Vector Quantization for
High Fidelity Audio Codec". Ours: all groups use the same number of residual
stages in a step; losses are means over groups.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.tokenizers.residual_quantizer import RVQConfig
from tokjax.tokenizers.types import Quantized
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["GroupedConfig", "GroupedQuantizer"]


@dataclasses.dataclass(unsafe_hash=True)
class GroupedConfig:
  """`num_groups` quantizers of the same settings."""

  quantizer: Any  # settings with `build(rngs)`, of the width of a group
  num_groups: int = 2  # G, divides the width of vectors

  def build(self, rngs: nnx.Rngs) -> "GroupedQuantizer":
    """The quantizer of these settings."""
    return GroupedQuantizer(self, rngs=rngs)


class GroupedQuantizer(nnx.Module):
  """Vectors cut into G parts of neighbouring channels, quantised apart.

  Costs what G quantizers of parts cost.

  Attributes:
    config: its settings.
    quantizers: one quantizer, every array with a leading axis of groups.

  Args:
    config: settings.
    rngs: source of the first parameters.

  Raises:
    ValueError: if the number of groups is not positive.

  Example:
    >>> from tokjax.tokenizers.lookup_free import LookupFreeConfig
    >>> signs = LookupFreeConfig("lfq", num_bits=2)
    >>> quantizer = GroupedQuantizer(GroupedConfig(signs), rngs=nnx.Rngs(0))
    >>> state = quantizer.init_state(jax.random.key(0))
    >>> found, _ = jax.jit(quantizer)(jnp.array([[3.0, -2, 1, 5]]), state)
    >>> found.indices.tolist(), quantizer.bits_per_vector
    ([[2, 3]], 4.0)
  """

  def __init__(self, config: GroupedConfig, *, rngs: nnx.Rngs):
    checks.in_range(1, 1 << 20, num_groups=config.num_groups)
    self.config = config
    keys = jax.random.split(rngs.params(), config.num_groups)
    self.quantizers = jax.vmap(
      lambda key: config.quantizer.build(nnx.Rngs(key))
    )(keys)

  @property
  def num_codes(self) -> int:
    """What an index of a group is below."""
    return self.quantizers.num_codes

  @property
  def bits_per_vector(self) -> float:
    """log2 of the number of results, the sum over groups."""
    return self.config.num_groups * self.quantizers.bits_per_vector

  def init_state(self, key: Key[Array, ""]) -> Any:
    """The states of all groups, stacked."""
    keys = jax.random.split(key, self.config.num_groups)
    return jax.vmap(lambda quantizer, key: quantizer.init_state(key))(
      self.quantizers, keys
    )

  def __call__(
    self,
    x: Float[Array, "*batch D"],
    state: Any,
    mask: Bool[Array, "*batch"] | None = None,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
    num_active: int | Int[Array, "..."] | None = None,
  ) -> tuple[Quantized, Any]:
    """Codes for vectors; in training also the next states.

    Args:
      x: vectors, G times as wide as the quantizers take them.
      state: of all groups.
      mask: True where a vector counts; None means all.
      train: static, as the quantizers take it.
      key: for what is random in training; each group draws for itself.
      axis_name: mesh axis over which a `shard_map` cuts the batch.
      num_active: residual stages in use, the same in all groups.

    Returns:
      indices with one more axis, the last, of groups; codes in the dtype of
      x; losses and statistics, means over groups; and the states.

    Raises:
      ValueError: if the width is no multiple of the groups, `num_active` is
        given to quantizers without stages, or for what a quantizer refuses.
    """
    groups, inner = self.config.num_groups, self.config.quantizer
    checks.divisible(groups, width_of_x=x.shape[-1])
    residual = isinstance(inner, RVQConfig)
    if num_active is not None and not residual:
      raise ValueError(
        "num_active is for residual stages, got quantizers of"
        f" {type(inner).__name__}"
      )
    if mask is None:
      mask = jnp.ones(x.shape[:-1], bool)
    if residual and num_active is None and train and inner.dropout_from:
      if key is not None:
        key, stages = jax.random.split(key)
        num_active = self.quantizers.draw_num_active(stages)
    settings = {} if num_active is None else {"num_active": num_active}
    parts = x.reshape(*x.shape[:-1], groups, -1)
    keys = None if key is None else jax.random.split(key, groups)

    def one(quantizer, part, state, key):
      return quantizer(
        part, state, mask, train=train, key=key, axis_name=axis_name, **settings
      )

    found, state = jax.vmap(one)(
      self.quantizers, jnp.moveaxis(parts, -2, 0), state, keys
    )
    codes = jnp.moveaxis(found.codes, 0, -2)  # [*batch, G, D / G]
    losses, stats = jax.tree.map(
      lambda x: jnp.mean(x, axis=0), (found.losses, found.stats)
    )
    indices = jnp.moveaxis(found.indices, 0, -1)
    found = Quantized(indices, codes.reshape(x.shape), mask, losses, stats)
    return found, state

  def lookup(
    self, indices: Int[Array, "*shape G"], state: Any
  ) -> Float[Array, "*batch D"]:
    """The codes of indices, as `__call__` returns them; zeros for -1."""
    checks.same_size(
      groups_of_indices=indices.shape[-1], num_groups=self.config.num_groups
    )
    codes = jax.vmap(lambda quantizer, index, state: quantizer.lookup(
      index, state
    ))(self.quantizers, jnp.moveaxis(indices, -1, 0), state)  # fmt: skip
    codes = jnp.moveaxis(codes, 0, -2)
    return codes.reshape(*codes.shape[:-2], -1)
