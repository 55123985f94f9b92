"""Mixtures of experts on devices that attention lays out in another way.

    folded = make_folded_mesh(dict(dp=2, cp=2, tp=2), dict(ep=8))
    found = moe_layer(x, weights, config=config, folded=folded)  # x [B, S, D]
    loss = loss + 1e-2 * found.losses.group + 1e-3 * found.losses.z

Attention leaves its tokens cut over dp x cp x tp. Each device routes those that
it has, sends them to the devices of their experts, which may be any of these,
and gets them back: two all-to-alls, and nothing else where experts are whole.
Flattening [B, S, D] to tokens happens on each device, so it moves nothing.

Three ways to send, of the same result:

- "capacity": as many rows for every expert. Static; the least work where a
  capacity drops what is above it.
- "padded": as many rows for every device, sorted by expert there. Static; what
  does not fit, above `buffer_factor` times the mean, is counted as `overflow`.
- "ragged": no more than there is, by `jax.lax.ragged_all_to_all`, which TPUs
  and GPUs have; only the rows that one device can take are bounded.

Source: Liu et al. (2025), "MoE Parallel Folding: Heterogeneous Parallelism
Mappings for Efficient Large-Scale MoE Model Training with Megatron Core", whose
code sends by lists of varying lengths. Bounded buffers are ours, after the
dispatchers of AI-Hypercomputer/maxtext.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import moe_dispatch, moe_losses, moe_routing
from tokjax.parallel import moe_exchange, moe_weights
from tokjax.parallel.moe_mesh import FoldedMesh
from tokjax.parallel.moe_weights import MoeConfig, MoeWeights
from tokjax.typing import Array, Bool, Float, Int32

__all__ = [
  "MoeLosses",
  "MoeOutput",
  "moe_layer",
  "moe_shard",
]


class MoeLosses(NamedTuple):
  """Unscaled losses, float32; what is not used is not computed.

  Attributes:
    group: `moe_losses.balance_loss` over the tokens of all devices of the
      same dp index, averaged over dp.
    sequence: `moe_losses.sequence_balance_loss`, averaged over all.
    everywhere: `moe_losses.balance_loss` over the tokens of all devices.
    z: `moe_losses.z_loss` over the tokens of all devices.
  """

  group: Float[Array, ""]
  sequence: Float[Array, ""]
  everywhere: Float[Array, ""]
  z: Float[Array, ""]


class MoeOutput(NamedTuple):
  """What experts add to tokens, and how it went.

  Attributes:
    output: in the dtype of the tokens.
    losses: of the router.
    counts: tokens that chose each expert, of all devices, before dropping; for
      `moe_losses.balancing_bias`.
    dropped: assignments above capacity, of all devices.
    overflow: assignments above `buffer_factor`, of all devices: make it larger
      if this is not 0.
  """

  output: Float[Array, "B S D"]
  losses: MoeLosses
  counts: Int32[Array, " E"]
  dropped: Int32[Array, ""]
  overflow: Int32[Array, ""]


def moe_layer(
  x: Float[Array, "B S D"],
  weights: MoeWeights,
  mask: Bool[Array, "B S"] | None = None,
  *,
  config: MoeConfig,
  folded: FoldedMesh,
) -> MoeOutput:
  """`moe_shard` for whole arrays.

  Args:
    x: tokens, cut over `folded.dp` and `folded.sequence`; they are moved there
      if they are not.
    weights: cut as `moe_weights.weight_specs` says.
    mask: True where a token counts; None for all.
    config: how to route, drop and send.
    folded: the mesh.

  Returns:
    Zeros for tokens that do not count. Gradients are those of the layer on one
    device, for experts on all copies the same.

  Raises:
    ValueError: if sizes do not divide.
    NotImplementedError: for "ragged" on devices that do not have it.

  Example:
    >>> from tokjax.parallel.moe_mesh import make_folded_mesh
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> config = MoeConfig(num_experts=4, num_chosen=2)
    >>> weights = moe_weights.init_moe(
    ...   jax.random.key(0), config, width=8, hidden=6)
    >>> layer = jax.jit(lambda x: moe_layer(
    ...   x, weights, config=config, folded=folded))
    >>> layer(jnp.ones((1, 3, 8))).counts.sum().item()
    6
  """
  hidden = weights.experts.up.shape[2]
  checks.divisible(folded.size(folded.dp), batch=x.shape[0])
  checks.divisible(folded.size(folded.sequence), sequence=x.shape[1])
  checks.divisible(folded.size(folded.ep), num_experts=config.num_experts)
  checks.divisible(folded.size(folded.etp), hidden=hidden)
  tokens = jax.P(folded.dp, folded.sequence)
  whole = MoeOutput(tokens, jax.P(), jax.P(), jax.P(), jax.P())
  given = () if mask is None else (mask,)
  local = functools.partial(moe_shard, config=config, folded=folded)
  return jax.shard_map(
    local,
    mesh=folded.mesh,
    in_specs=(
      tokens,
      moe_weights.weight_specs(weights, folded),
      *(tokens for _ in given),
    ),
    out_specs=whole,
  )(x, weights, *given)


def moe_shard(
  x: Float[Array, "b s D"],
  weights: MoeWeights,
  mask: Bool[Array, "b s"] | None = None,
  *,
  config: MoeConfig,
  folded: FoldedMesh,
) -> MoeOutput:
  """The layer on the tokens of one device; for `jax.shard_map`.

  Args:
    x: this device's part of its sequences.
    weights: the router, and this device's part of the experts.
    mask: True where a token counts; None for all.
    config: how to route, drop and send.
    folded: the mesh.

  Returns:
    The output of these tokens; all else is of all devices, and the same on
    each.

  Raises:
    ValueError: if a setting is unknown or sizes do not fit.
    NotImplementedError: for "ragged" on devices that do not have it.

  Cost: of the rows of `tokjax.parallel.moe_exchange`, 6 D F / etp FLOPs each;
    `tokjax.parallel.moe_costs` has the bytes. "sequence" dropping gathers 8
    bytes for each assignment of the device's sequences.
  """
  checks.one_of(("device", "sequence"), drop_over=config.drop_over)
  checks.one_of(("capacity", "padded", "ragged"), exchange=config.exchange)
  shape = x.shape[:2]
  if mask is None:
    mask = jnp.ones_like(x[..., 0], dtype=bool)
  x = jnp.where(mask[..., None], x, 0)  # NaN padding must not reach gradients
  logits = jnp.matmul(
    x.astype(jnp.float32),
    weights.router.astype(jnp.float32),
    precision="highest",
  )
  routing = moe_routing.route(
    logits,
    mask,
    weights.bias,
    num_chosen=config.num_chosen,
    score=config.score,
    num_groups=config.num_groups,
    num_kept_groups=config.num_kept_groups,
    scale=config.scale,
  )
  kept = _kept(routing, config, folded)
  index = jnp.where(kept, routing.index, -1)
  output, overflow = moe_exchange.exchange(
    x.reshape(-1, x.shape[-1]),
    index.reshape(-1, config.num_chosen),
    routing.weights.reshape(-1, config.num_chosen),
    weights.experts,
    folded=folded,
    way=config.exchange,
    rows=_buffer_rows(shape, config, folded),
    activation=config.activation,
  )
  dropped = jnp.sum((routing.index >= 0) & ~kept, dtype=jnp.int32)

  def total(number):
    return jax.lax.psum(number, folded.tokens)

  return MoeOutput(
    output=output.reshape(x.shape),
    losses=_losses(logits, routing, mask, folded),
    counts=total(routing.counts),
    dropped=total(dropped),
    overflow=total(overflow),
  )


def _kept(routing, config, folded):
  """Assignments within capacity, bool [b, s, k]."""
  index, weights = routing.index, routing.weights
  if config.capacity_factor is None:
    return index >= 0

  def keep(index, weights):
    return moe_dispatch.keep_within_capacity(
      index,
      weights,
      capacity=_capacity(index.shape[0], config),
      num_experts=config.num_experts,
      policy=config.policy,
    )

  if config.drop_over == "device":
    flat = (x.reshape(-1, x.shape[-1]) for x in (index, weights))
    return keep(*flat).reshape(index.shape)
  num_tokens = index.shape[1]
  index, weights = jax.lax.all_gather(
    (index, jax.lax.stop_gradient(weights)),
    folded.sequence,
    axis=1,
    tiled=True,
  )
  kept = jax.vmap(keep)(index, weights)  # [b, S, k]
  start = jax.lax.axis_index(folded.sequence) * num_tokens
  return jax.lax.dynamic_slice_in_dim(kept, start, num_tokens, axis=1)


def _capacity(num_tokens, config):
  return moe_dispatch.expert_capacity(
    num_tokens,
    num_chosen=config.num_chosen,
    num_experts=config.num_experts,
    factor=config.capacity_factor,
  )


def _buffer_rows(shape, config, folded):
  """Rows of one buffer that a device fills, or of "ragged" of all it gets."""
  num_tokens = shape[0] * shape[1]
  if config.exchange == "capacity":  # one for each expert; always enough
    if config.capacity_factor is None:
      return num_tokens
    if config.drop_over == "device":
      return max(1, _capacity(num_tokens, config))
    sequence = shape[1] * folded.size(folded.sequence)
    return max(1, min(num_tokens, shape[0] * _capacity(sequence, config)))
  checks.in_range(0, math.inf, buffer_factor=config.buffer_factor)
  num_ranks = folded.size(folded.ep)
  share = config.num_experts // num_ranks
  # Of what one device sends to another, or of what it gets in all.
  senders = num_ranks if config.exchange == "ragged" else 1
  mean = senders * num_tokens * config.num_chosen / num_ranks
  most = senders * num_tokens * min(config.num_chosen, share)
  rows = math.ceil(round(mean * config.buffer_factor, 6))
  return max(1, min(most, rows))


def _losses(logits, routing, mask, folded):
  def mean(loss):  # over groups of other sequences
    return jax.lax.pmean(loss, folded.dp)

  balance = functools.partial(
    moe_losses.balance_loss, routing.probabilities, routing.counts, mask
  )
  return MoeLosses(
    group=mean(balance(axis_name=folded.sequence)),
    sequence=mean(
      moe_losses.sequence_balance_loss(
        routing.probabilities,
        routing.index,
        mask,
        axis_name=folded.sequence,
      )
    ),
    everywhere=balance(axis_name=folded.tokens),
    z=moe_losses.z_loss(logits, mask, axis_name=folded.tokens),
  )
