"""A language model whose MLPs are mixtures of experts, on one device or many.

    folded = make_folded_mesh(dict(dp=2, cp=2, tp=2), dict(ep=8))
    model = rules.shard(model, folded.mesh, placement(folded))
    loss, out = next_token_loss(model, ids, folded=folded)

Between layers tokens are cut over dp x cp x tp; attention gathers the keys of a
sequence over cp and cuts heads over tp, experts are spread as
`tokjax.parallel.moe_folding` says. On one device it is the same program, on a
mesh of one: `make_folded_mesh({}, {}, devices=jax.devices()[:1])`.

With pipeline stages, pp > 1, devices hold other layers, and a batch goes
through them in micro-batches: `tokjax.parallel.pipeline`.

Blocks and their source: `tokjax.models.moe_block`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.models import moe_block
from tokjax.models.moe_block import MoeBlock, MoeTransformerConfig
from tokjax.parallel import pipeline
from tokjax.parallel.moe_folding import MoeLosses
from tokjax.parallel.moe_mesh import FoldedMesh
from tokjax.parallel.moe_weights import MoeConfig
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


# Published shapes by name.
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
    qkv_bias=True,
    shared_hidden=20480,
    shared_gate=True,
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
    self.norm = moe_block.rms_norm(config, rngs)
    self.head = moe_block.linear(config, config.width, config.vocab_size, rngs)

  def __call__(
    self,
    ids: Int[Array, "B S"],
    mask: Bool[Array, "B S"] | None = None,
    bias: Float[Array, "L E"] | None = None,
    *,
    folded: FoldedMesh,
    num_micro: int = 1,
  ) -> Predicted:
    """Predicts each next token.

    Every micro-batch is routed by itself: its balance losses are over its own
    tokens, and so are capacities of devices.

    Args:
      ids: of tokens.
      mask: True where a token is real, at the start of each row; None for all.
      bias: of the routers; see `tokjax.ops.moe_losses.balancing_bias`.
      folded: the mesh of the run.
      num_micro: micro-batches, which follow each other through the stages of
        the mesh; legal without stages.

    Returns:
      Logits, and what the experts tell: losses are means over micro-batches,
      counts are sums.

    Raises:
      ValueError: if sizes do not divide.
    """
    checks.in_range(1, math.inf, num_micro=num_micro)
    checks.divisible(num_micro * folded.size(folded.dp), batch=ids.shape[0])
    stages = folded.size(folded.pp)
    checks.divisible(stages, num_layers=self.config.num_layers)
    if mask is None:
      mask = jnp.ones_like(ids, dtype=bool)
    x = self.table[...][ids]
    x = moe_block.lay(x, folded, folded.dp, folded.sequence)
    cut = functools.partial(pipeline.cut_batch, num_micro=num_micro)
    x, found = pipeline.pipeline(
      _stage, (self.blocks, bias), cut(x), cut(mask), folded=folded
    )
    x = pipeline.join_batch(x)
    # Behind the last layer stages have other rows: none repeats the head.
    rows = folded.dp + folded.pp
    rows = folded.dp if x.shape[0] % folded.size(rows) else rows
    x = moe_block.lay(x, folded, rows, folded.sequence)
    x = self.norm(x).astype(x.dtype)
    return Predicted(
      logits=self.head(x).astype(jnp.float32),
      losses=jax.tree.map(jnp.mean, found.losses),
      counts=jnp.sum(found.counts, axis=0),
      dropped=jnp.sum(found.dropped),
      overflow=jnp.sum(found.overflow),
    )


def _stage(layers, x, mask, folded):
  """Some layers of the model, for `pipeline.pipeline`."""

  def step(x, layer):
    block, bias = layer
    x, found = block(x, mask, bias, folded=folded)
    return x, found._replace(output=None)

  return jax.lax.scan(step, x, layers)


def next_token_loss(
  model: MoeTransformer,
  ids: Int[Array, "B S"],
  mask: Bool[Array, "B S"] | None = None,
  bias: Float[Array, "L E"] | None = None,
  *,
  folded: FoldedMesh,
  num_micro: int = 1,
) -> tuple[Float[Array, ""], Predicted]:
  """Mean of -log p(next token), with the losses of the routers.

  Args:
    model: what predicts.
    ids: of tokens; the last of a row is not predicted from.
    mask: True where a token is real; None for all.
    bias: of the routers.
    folded: the mesh of the run.
    num_micro: as of the model. The first term does not depend on it, but for
      tokens that are dropped.

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
  found = model(ids, mask, bias, folded=folded, num_micro=num_micro)
  log_p = jax.nn.log_softmax(found.logits[:, :-1])
  chosen = jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]
  real = mask[:, 1:]
  loss = -jnp.sum(jnp.where(real, chosen, 0)) / jnp.maximum(jnp.sum(real), 1)
  config = model.config
  balance = getattr(found.losses, config.balance_over)
  loss += config.balance_scale * balance + config.z_scale * found.losses.z
  return loss, found


def placement(folded: FoldedMesh) -> Rules:
  """Where weights live: layers over pp, heads and shared experts over tp,
  experts over ep and etp, the rest whole.

  Args:
    folded: the mesh of the run.

  Returns:
    Rules for `tokjax.parallel.rules.shard`, of a model or its optimizer state.

  Example:
    >>> from tokjax.parallel.moe_mesh import make_folded_mesh
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> placement(folded)[0]
    ('blocks/(queries|keys|values)/kernel$', (('pp',), None, ('tp',)))
  """
  pp, tp = folded.pp, folded.tp
  return (
    (r"blocks/(queries|keys|values)/kernel$", (pp, None, tp)),
    (r"blocks/(queries|keys|values)/bias$", (pp, tp)),
    (r"blocks/out/kernel$", (pp, tp)),
    (r"blocks/(up|gate)$", (pp, folded.ep, None, folded.etp)),
    (r"blocks/down$", (pp, folded.ep, folded.etp)),
    (r"blocks/shared/(up|gate)/kernel$", (pp, None, tp)),
    (r"blocks/shared/down/kernel$", (pp, tp)),
    (r"blocks/", (pp,)),
    (r"", ()),
  )
