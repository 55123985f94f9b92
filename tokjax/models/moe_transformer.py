"""A language model whose MLPs are mixtures of experts, on one device or many.

    folded = make_folded_mesh(dict(dp=2, cp=2, tp=2), dict(ep=8))
    model = rules.shard(model, folded.mesh, placement(folded))
    loss, out = next_token_loss(model, ids, folded=folded)

Between layers tokens are cut over dp x cp x tp; attention gathers the keys of a
sequence over cp and cuts heads over tp, experts are spread as
`tokjax.parallel.moe_folding` says. On one device it is the same program, on a
mesh of one: `make_folded_mesh({}, {}, devices=jax.devices()[:1])`.

Source: Jiang et al. (2024), "Mixtral of Experts", whose blocks these are:
RMS norm, rotary positions, grouped queries, gated experts.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import attention, attention_masks, rope
from tokjax.ops.moe_experts import Experts
from tokjax.parallel import moe_folding, moe_weights
from tokjax.parallel.moe_folding import MoeLosses
from tokjax.parallel.moe_mesh import FoldedMesh
from tokjax.parallel.moe_weights import MoeConfig, MoeWeights
from tokjax.parallel.rules import Rules
from tokjax.typing import Array, Bool, Float, Int, Int32

__all__ = [
  "CONFIGS",
  "MoeBlock",
  "MoeTransformer",
  "MoeTransformerConfig",
  "Predicted",
  "next_token_loss",
  "placement",
]

_BALANCES = ("group", "sequence", "everywhere")


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


# Published shapes by name. Qwen2 also has a shared expert, which is left out.
CONFIGS: dict[str, MoeTransformerConfig] = {
  "mixtral-8x7b": MoeTransformerConfig(),
  "mixtral-8x22b": MoeTransformerConfig(
    vocab_size=32768,
    width=6144,
    num_layers=56,
    num_heads=48,
    hidden=16384,
    moe=MoeConfig(8, 2, capacity_factor=1.0),
  ),
  "qwen2-57b-a14b": MoeTransformerConfig(
    vocab_size=151936,
    width=3584,
    num_layers=28,
    num_heads=28,
    num_key_heads=4,
    hidden=2560,
    norm_epsilon=1e-6,
    moe=MoeConfig(64, 8, score="pre_softmax", capacity_factor=1.0),
  ),
}


class Predicted(NamedTuple):
  """Logits of next tokens, and how the experts did.

  Attributes:
    logits: float32.
    losses: unscaled, means over layers.
    counts: tokens that chose each expert, of each layer.
    dropped: assignments above capacity, of all layers.
    overflow: assignments without room in buffers, of all layers.
  """

  logits: Float[Array, "B S V"]
  losses: MoeLosses
  counts: Int32[Array, "L E"]
  dropped: Int32[Array, ""]
  overflow: Int32[Array, ""]


class MoeBlock(nnx.Module):
  """x + attention(norm(x)), then x + experts(norm(x))."""

  def __init__(self, config: MoeTransformerConfig, *, rngs: nnx.Rngs):
    self.config = config
    head = config.width // config.num_heads
    self.norm_attention = _norm(config, rngs)
    self.queries = _linear(config, config.width, config.width, rngs)
    self.keys = _linear(config, config.width, config.num_key_heads * head, rngs)
    self.values = _linear(
      config, config.width, config.num_key_heads * head, rngs
    )
    self.out = _linear(config, config.width, config.width, rngs)
    self.norm_experts = _norm(config, rngs)
    weights = moe_weights.init_moe(
      rngs.params(), config.moe, width=config.width, hidden=config.hidden
    )
    self.router = nnx.Param(weights.router)
    self.up = nnx.Param(weights.experts.up)
    self.down = nnx.Param(weights.experts.down)
    self.gate = nnx.Param(weights.experts.gate)

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
    experts = Experts(self.up[...], self.down[...], self.gate[...])
    found = moe_folding.moe_layer(
      self.norm_experts(x).astype(x.dtype),
      MoeWeights(self.router[...], experts, bias),
      mask,
      config=self.config.moe,
      folded=folded,
    )
    return x + found.output, found

  def _attention(self, x, folded):
    """Causal; padding comes last, where no real token reads it."""
    batch, length, width = x.shape
    head = width // self.config.num_heads

    def heads(linear, sequence):  # [B, heads, S, d]
      y = linear(x).reshape(batch, length, -1, head).swapaxes(1, 2)
      divides = y.shape[1] % folded.size(folded.tp) == 0
      among = folded.tp if divides else ()
      return _laid(y, folded, folded.dp, among, sequence)

    queries = heads(self.queries, folded.cp)
    keys, values = heads(self.keys, ()), heads(self.values, ())
    base = self.config.rope_base
    read = attention.attend(
      rope.rotate(queries, base=base),
      rope.rotate(keys, base=base),
      values,
      jnp.asarray(attention_masks.causal(length)),
    )
    read = self.out(read.swapaxes(1, 2).reshape(x.shape))
    return _laid(read, folded, folded.dp, folded.sequence)


class MoeTransformer(nnx.Module):
  """Token ids to logits of the next ones.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not divide.

  Example:
    >>> from tokjax.parallel.moe_mesh import make_folded_mesh
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> config = MoeTransformerConfig(16, 8, 2, 2, 1, 6, moe=MoeConfig(4, 2))
    >>> model = jax.jit(lambda: MoeTransformer(config, rngs=nnx.Rngs(0)))()
    >>> run = jax.jit(lambda model, ids: model(ids, folded=folded).logits)
    >>> run(model, jnp.zeros((1, 3), int)).shape
    (1, 3, 16)
  """

  def __init__(self, config: MoeTransformerConfig, *, rngs: nnx.Rngs):
    checks.divisible(2 * config.num_heads, width=config.width)
    checks.divisible(config.num_key_heads, num_heads=config.num_heads)
    checks.one_of(_BALANCES, balance_over=config.balance_over)
    self.config = config
    normal = nnx.initializers.normal(config.init_scale)
    self.table = nnx.Param(
      normal(rngs.params(), (config.vocab_size, config.width))
    )
    keys = jax.random.split(rngs.params(), config.num_layers)
    # Every parameter of the blocks has a leading axis of num_layers.
    self.blocks = jax.vmap(lambda key: MoeBlock(config, rngs=nnx.Rngs(key)))(
      keys
    )
    self.norm = _norm(config, rngs)
    self.head = _linear(config, config.width, config.vocab_size, rngs)

  def __call__(
    self,
    ids: Int[Array, "B S"],
    mask: Bool[Array, "B S"] | None = None,
    bias: Float[Array, "L E"] | None = None,
    *,
    folded: FoldedMesh,
  ) -> Predicted:
    """Predicts each next token.

    Args:
      ids: of tokens.
      mask: True where a token is real, at the start of each row; None for all.
      bias: of the routers; see `tokjax.ops.moe_losses.balancing_bias`.
      folded: the mesh of the run.

    Returns:
      Logits, and what the experts tell.
    """
    if mask is None:
      mask = jnp.ones_like(ids, dtype=bool)
    x = _laid(self.table[...][ids], folded, folded.dp, folded.sequence)

    def step(x, layer):
      block, bias = layer
      x, found = block(x, mask, bias, folded=folded)
      return x, found._replace(output=None)

    x, found = jax.lax.scan(step, x, (self.blocks, bias))
    x = self.norm(x).astype(x.dtype)
    return Predicted(
      logits=self.head(x).astype(jnp.float32),
      losses=jax.tree.map(jnp.mean, found.losses),
      counts=found.counts,
      dropped=jnp.sum(found.dropped),
      overflow=jnp.sum(found.overflow),
    )


def next_token_loss(
  model: MoeTransformer,
  ids: Int[Array, "B S"],
  mask: Bool[Array, "B S"] | None = None,
  bias: Float[Array, "L E"] | None = None,
  *,
  folded: FoldedMesh,
) -> tuple[Float[Array, ""], Predicted]:
  """Mean of -log p(next token), with the losses of the routers.

  Args:
    model: what predicts.
    ids: of tokens; the last of a row is not predicted from.
    mask: True where a token is real; None for all.
    bias: of the routers.
    folded: the mesh of the run.

  Returns:
    The loss, float32, and what the model told.

  Example:
    >>> from tokjax.parallel.moe_mesh import make_folded_mesh
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> config = MoeTransformerConfig(16, 8, 2, 2, 1, 6, moe=MoeConfig(4, 2))
    >>> model = jax.jit(lambda: MoeTransformer(config, rngs=nnx.Rngs(0)))()
    >>> gradient = jax.value_and_grad(next_token_loss, has_aux=True)
    >>> run = jax.jit(lambda model, ids: gradient(model, ids, folded=folded))
    >>> (loss, found), d_model = run(model, jnp.zeros((1, 3), int))
    >>> d_model.blocks.up[...].shape, found.counts.sum(axis=1).tolist()
    ((2, 4, 8, 6), [6, 6])
  """
  mask = jnp.ones_like(ids, dtype=bool) if mask is None else mask
  found = model(ids, mask, bias, folded=folded)
  log_p = jax.nn.log_softmax(found.logits[:, :-1])
  chosen = jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]
  real = mask[:, 1:]
  loss = -jnp.sum(jnp.where(real, chosen, 0)) / jnp.maximum(jnp.sum(real), 1)
  config = model.config
  balance = getattr(found.losses, config.balance_over)
  loss += config.balance_scale * balance + config.z_scale * found.losses.z
  return loss, found


def placement(folded: FoldedMesh) -> Rules:
  """Where weights live: heads over tp, experts over ep and etp, the rest whole.

  Args:
    folded: the mesh of the run.

  Returns:
    Rules for `tokjax.parallel.rules.shard`, of a model or its optimizer state.

  Example:
    >>> from tokjax.parallel.moe_mesh import make_folded_mesh
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> placement(folded)[0]
    ('blocks/(queries|keys|values)/kernel$', (None, None, ('tp',)))
  """
  return (
    (r"blocks/(queries|keys|values)/kernel$", (None, None, folded.tp)),
    (r"blocks/out/kernel$", (None, folded.tp)),
    (r"blocks/(up|gate)$", (None, folded.ep, None, folded.etp)),
    (r"blocks/down$", (None, folded.ep, folded.etp)),
    (r"", ()),
  )


def _laid(x, folded, *axes):
  """The same array, cut so."""
  sharding = jax.sharding.NamedSharding(folded.mesh, jax.P(*axes))
  return jax.lax.with_sharding_constraint(x, sharding)


def _linear(config, inputs, outputs, rngs):
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=False,
    kernel_init=nnx.initializers.normal(config.init_scale),
    rngs=rngs,
  )


def _norm(config, rngs):
  return nnx.RMSNorm(
    config.width, epsilon=config.norm_epsilon, dtype=jnp.float32, rngs=rngs
  )
