"""A block of a transformer whose MLP is a mixture of experts.

    block = MoeBlock(config, rngs=rngs)
    x, found = block(x, mask, folded=folded)      # x [B, S, D]

Besides its experts, of which a token has some, a block may have a shared
expert, which all tokens have.

Source: Jiang et al. (2024), "Mixtral of Experts", whose blocks these are: RMS
norm, rotary positions, grouped queries, gated experts. Shared experts: Dai et
al. (2024), "DeepSeekMoE"; with a gate: Yang et al. (2024), "Qwen2 Technical
Report".
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax.kernels.sparse_attention import rule_attention
from tokjax.ops import mask_rules, rope
from tokjax.ops.moe_experts import Experts
from tokjax.parallel import moe_folding, moe_weights
from tokjax.parallel.moe_mesh import FoldedMesh
from tokjax.parallel.moe_weights import MoeConfig, MoeWeights
from tokjax.typing import Array, Bool, Float

__all__ = [
  "MoeBlock",
  "MoeTransformerConfig",
  "SharedExpert",
  "lay",
  "linear",
  "rms_norm",
]


@dataclasses.dataclass(unsafe_hash=True)
class MoeTransformerConfig:
  """Shape of the model; defaults are those of Mixtral 8x7B."""

  vocab_size: int = 32000  # V
  width: int = 4096  # D
  num_layers: int = 32
  num_heads: int = 32  # H
  num_key_heads: int = 8  # divides H
  hidden: int = 14336  # of an expert
  rope_base: float = 1e6
  norm_epsilon: float = 1e-5
  init_scale: float = 0.02
  balance_over: str = "group"  # which of `MoeLosses`
  balance_scale: float = 1e-2  # of that loss; published 1e-4 to 1e-2
  z_scale: float = 1e-3  # of the z loss
  moe: MoeConfig = dataclasses.field(default_factory=lambda: MoeConfig(8, 2))
  qkv_bias: bool = False  # of queries, keys and values
  shared_hidden: int = 0  # of the expert that all tokens have; 0: there is none
  shared_gate: bool = False  # whether a sigmoid of the token scales its output


class MoeBlock(nnx.Module):
  """x + attention(norm(x)), then x + experts(norm(x)) + shared(norm(x))."""

  def __init__(self, config: MoeTransformerConfig, *, rngs: nnx.Rngs):
    self.config = config
    width, bias = config.width, config.qkv_bias
    of_keys = config.num_key_heads * (width // config.num_heads)
    self.norm_attention = rms_norm(config, rngs)
    self.queries = linear(config, width, width, rngs, use_bias=bias)
    self.keys = linear(config, width, of_keys, rngs, use_bias=bias)
    self.values = linear(config, width, of_keys, rngs, use_bias=bias)
    self.out = linear(config, width, width, rngs)
    self.norm_experts = rms_norm(config, rngs)
    weights = moe_weights.init_moe(
      rngs.params(), config.moe, width=width, hidden=config.hidden
    )
    self.router = nnx.Param(weights.router)
    self.up = nnx.Param(weights.experts.up)
    self.down = nnx.Param(weights.experts.down)
    self.gate = nnx.Param(weights.experts.gate)
    has_shared = config.shared_hidden > 0
    self.shared = SharedExpert(config, rngs=rngs) if has_shared else None

  def __call__(
    self,
    x: Float[Array, "B S D"],
    mask: Bool[Array, "B S"],
    bias: Float[Array, " E"] | None = None,
    *,
    folded: FoldedMesh,
  ) -> tuple[Float[Array, "B S D"], moe_folding.MoeOutput]:
    """The stream after the block, and what the experts added to it.

    Args:
      x: the stream.
      mask: True where a token is real.
      bias: of the router.
      folded: the mesh.
    """
    x = x + self._attention(self.norm_attention(x).astype(x.dtype), folded)
    y = self.norm_experts(x).astype(x.dtype)
    experts = Experts(self.up[...], self.down[...], self.gate[...])
    found = moe_folding.moe_layer(
      y,
      MoeWeights(self.router[...], experts, bias),
      mask,
      config=self.config.moe,
      folded=folded,
    )
    x = x + found.output
    if self.shared is not None:
      x = x + self.shared(y, folded=folded)
    return x, found

  def _attention(self, x, folded):
    """Causal; padding comes last, where no real token reads it."""
    batch, length, width = x.shape
    config, tp = self.config, folded.size(folded.tp)
    head = width // config.num_heads

    def heads(linear):  # [B, heads, S, d]
      return linear(x).reshape(batch, length, -1, head).swapaxes(1, 2)

    queries, keys = (
      rope.rotate(heads(linear), base=config.rope_base)
      for linear in (self.queries, self.keys)
    )
    values = heads(self.values)
    cut = folded.tp if config.num_heads % tp == 0 else ()
    if cut and config.num_key_heads % tp:  # so that each has those it reads
      shared = config.num_heads // config.num_key_heads
      keys, values = (jnp.repeat(y, shared, axis=1) for y in (keys, values))

    def local(queries, keys, values):
      """Rows of this device, and all keys of its heads."""
      rows = queries.shape[2]
      first = jax.lax.axis_index(folded.cp) * rows if folded.cp else 0
      readers = mask_rules.tokens(rows, position=first + jnp.arange(rows))
      read = mask_rules.tokens(length)
      found = rule_attention(
        queries, keys, values, mask_rules.causal, readers, read
      )
      return found.out.astype(values.dtype)

    rows, whole = jax.P(folded.dp, cut, folded.cp), jax.P(folded.dp, cut)
    read = jax.shard_map(
      local,
      mesh=folded.mesh,
      in_specs=(rows, whole, whole),
      out_specs=rows,
    )(queries, keys, values)
    read = self.out(read.swapaxes(1, 2).reshape(x.shape))
    return lay(read, folded, folded.dp, folded.sequence)


class SharedExpert(nnx.Module):
  """A gated MLP of all tokens; its hidden width is cut over tp.

  Args:
    config: the shape; `shared_hidden` is its hidden width F.
    rngs: seeds the parameters.

  Cost: 6 D F FLOPs a token. Devices of one tp group gather each other's tokens
    and sum up what they add to them, as around a dense MLP.

  Example:
    >>> from tokjax.parallel.moe_mesh import make_folded_mesh
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> config = MoeTransformerConfig(width=8, shared_hidden=6)
    >>> expert = SharedExpert(config, rngs=nnx.Rngs(0))
    >>> expert(jnp.ones((1, 3, 8)), folded=folded).shape
    (1, 3, 8)
  """

  def __init__(self, config: MoeTransformerConfig, *, rngs: nnx.Rngs):
    self.activation = config.moe.activation
    width, hidden = config.width, config.shared_hidden
    self.up = linear(config, width, hidden, rngs)
    self.gate = linear(config, width, hidden, rngs)
    self.down = linear(config, hidden, width, rngs)
    self.share = linear(config, width, 1, rngs) if config.shared_gate else None

  def __call__(
    self, x: Float[Array, "B S D"], *, folded: FoldedMesh
  ) -> Float[Array, "B S D"]:
    """down(activation(gate(x)) * up(x)), times sigmoid(share(x)) if gated.

    Args:
      x: tokens.
      folded: the mesh.
    """
    whole = lay(x, folded, folded.dp, folded.cp)
    hidden = self.activation(self.gate(whole)) * self.up(whole)
    hidden = lay(hidden, folded, folded.dp, folded.cp, folded.tp)
    y = lay(self.down(hidden), folded, folded.dp, folded.sequence)
    if self.share is None:
      return y
    share = jax.nn.sigmoid(self.share(x).astype(jnp.float32))
    return (share * y).astype(x.dtype)


def lay(x: Array, folded: FoldedMesh, *axes: tuple[str, ...]) -> Array:
  """The same array, cut so over the mesh.

  Args:
    x: an array in a program.
    folded: the mesh.
    *axes: of the mesh, that cut the first axes of `x`.

  Example:
    >>> from tokjax.parallel.moe_mesh import make_folded_mesh
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> lay(jnp.ones((2, 3)), folded, folded.dp).shape
    (2, 3)
  """
  sharding = jax.sharding.NamedSharding(folded.mesh, jax.P(*axes))
  return jax.lax.with_sharding_constraint(x, sharding)


def linear(
  config: MoeTransformerConfig,
  inputs: int,
  outputs: int,
  rngs: nnx.Rngs,
  *,
  use_bias: bool = False,
) -> nnx.Linear:
  """A linear layer whose weights start normal.

  Args:
    config: of which `init_scale` is used.
    inputs: width of what comes in.
    outputs: width of what goes out.
    rngs: seeds the weights.
    use_bias: whether something is added, zeros at the start.

  Example:
    >>> config = MoeTransformerConfig(width=8)
    >>> linear(config, 8, 3, nnx.Rngs(0)).kernel.shape
    (8, 3)
  """
  init = nnx.initializers.normal(config.init_scale)
  return nnx.Linear(
    inputs, outputs, use_bias=use_bias, kernel_init=init, rngs=rngs
  )


def rms_norm(config: MoeTransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """RMS norm over the width, in float32 whatever comes in.

  Args:
    config: of which `width` and `norm_epsilon` are used.
    rngs: as of other layers; the scale starts at one.

  Example:
    >>> rms_norm(MoeTransformerConfig(width=8), nnx.Rngs(0)).scale.shape
    (8,)
  """
  return nnx.RMSNorm(
    config.width, epsilon=config.norm_epsilon, dtype=jnp.float32, rngs=rngs
  )
