"""A layer of experts on one device, for those on many to be compared with.

want = oracle(config)
got, overflow = found(config, (dict(dp=2, cp=2, tp=2), dict(ep=8)))
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.ops import moe_dispatch, moe_experts, moe_losses, moe_routing
from tokjax.parallel import moe_folding, moe_mesh, moe_weights, processes

__all__ = [
  "Found",
  "alone",
  "assert_close",
  "compiled_gradient",
  "example",
  "folded_mesh",
  "found",
  "oracle",
  "spread",
  "weights_of",
]

NUM_EXPERTS, WIDTH, HIDDEN = 8, 6, 4


class Found(NamedTuple):
  """What a layer gives, and the gradients of tokens and weights."""

  output: np.ndarray
  losses: np.ndarray  # balance over all, balance of sequences, z
  dropped: np.ndarray
  gradients: tuple


def folded_mesh(attention, experts, kind=jax.sharding.AxisType.Auto):
  """On the first of the eight devices of tests."""
  count = int(np.prod(list(attention.values()), dtype=int))
  return moe_mesh.make_folded_mesh(
    attention, experts, devices=jax.devices()[:count], axis_types=kind
  )


@functools.cache
def weights_of(config):
  """Experts, and a router that prefers the first of them."""
  make = functools.partial(
    moe_weights.init_moe, config=config, width=WIDTH, hidden=HIDDEN
  )
  weights = jax.device_get(jax.jit(make)(jax.random.key(0)))
  if weights.bias is not None:
    bias = np.linspace(0.3, 0, config.num_experts, dtype=np.float32)
    weights = weights._replace(bias=bias)
  return weights


def example(batch=4, length=8):
  """Tokens, of which three are padding and not a number, and a cotangent."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch, length, WIDTH)).astype(np.float32)
  x += 0.5  # a common part, so that experts are not asked evenly
  mask = np.ones(x.shape[:2], bool)
  mask[1, -3:] = False
  x[~mask] = np.nan
  return x, mask, rng.normal(size=x.shape).astype(np.float32)


def _total(output, losses, d_out):
  """Something that every output has a part in."""
  return jnp.sum(output * d_out) + sum(
    scale * loss for scale, loss in zip((3.0, 2.0, 0.1), losses, strict=True)
  )


def alone(x, mask, weights, d_out, config):
  """By the functions of `tokjax.ops`, capacities by whole sequences."""
  gradients, found = jax.device_get(_program(config)(x, weights, mask, d_out))
  return Found(*found, gradients)


@functools.cache
def _program(config):
  def loss(x, weights, mask, d_out):
    x = jnp.where(mask[..., None], x, 0)
    logits = jnp.matmul(x, weights.router, precision="highest")
    routing = moe_routing.route(
      logits,
      mask,
      weights.bias,
      num_chosen=config.num_chosen,
      score=config.score,
    )
    index = routing.index
    if config.capacity_factor is not None:
      capacity = moe_dispatch.expert_capacity(
        x.shape[1],
        num_chosen=config.num_chosen,
        num_experts=config.num_experts,
        factor=config.capacity_factor,
      )
      keep = functools.partial(
        moe_dispatch.keep_within_capacity,
        capacity=capacity,
        num_experts=config.num_experts,
        policy=config.policy,
      )
      kept = jax.vmap(keep)(index, routing.weights)
      index = jnp.where(kept, index, -1)
    mixed = moe_experts.mixture(
      x.reshape(-1, WIDTH),
      index.reshape(-1, config.num_chosen),
      routing.weights.reshape(-1, config.num_chosen),
      weights.experts,
    )
    output = mixed.output.reshape(x.shape)
    losses = (
      moe_losses.balance_loss(routing.probabilities, routing.counts, mask),
      moe_losses.sequence_balance_loss(
        routing.probabilities, index=routing.index, mask=mask
      ),
      moe_losses.z_loss(logits, mask),
    )
    dropped = jnp.sum(routing.index >= 0) - jnp.sum(index >= 0)
    return _total(output, losses, d_out), (output, losses, dropped)

  return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def spread(x, mask, weights, d_out, config, folded):
  """By `moe_layer`, and how many had no room."""

  def loss(x, weights, mask, d_out):
    found = moe_folding.moe_layer(
      x, weights, mask, config=config, folded=folded
    )
    losses = found.losses.everywhere, found.losses.sequence, found.losses.z
    total = _total(found.output, losses, d_out)
    return total, (found.output, losses, found.dropped, found.overflow)

  gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  told = processes.whole(gradient(x, weights, mask, d_out))
  gradients, (*found, overflow) = jax.device_get(told)
  return Found(*found, gradients), int(overflow)


@functools.cache
def oracle(config):
  """`alone` of the example."""
  x, mask, d_out = example()
  weights = weights_of(config)
  return alone(x, mask, weights, d_out, config)


def found(config, layout):
  """`spread` of the example over a layout of attention and of experts."""
  x, mask, d_out = example()
  weights = weights_of(config)
  folded = folded_mesh(*layout)
  return spread(x, mask, weights, d_out, config, folded)


def assert_close(got, want, tolerance=1e-5):
  """Of all leaves of two trees."""
  got, want = (jax.tree.leaves(x) for x in (got, want))
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def compiled_gradient(config, folded):
  """The program of a step of training in bfloat16, of a mesh of any devices."""
  make = functools.partial(
    moe_weights.init_moe, config=config, width=256, hidden=512
  )

  def placed(x, spec):
    sharding = jax.sharding.NamedSharding(folded.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding)

  weights = jax.eval_shape(make, jax.random.key(0))
  weights = jax.tree.map(
    placed, weights, moe_weights.weight_specs(weights, folded)
  )
  x = jax.ShapeDtypeStruct((2, 512, 256), jnp.bfloat16)
  x = placed(x, jax.P(folded.dp, folded.sequence))

  def loss(x, weights):
    layer = moe_folding.moe_layer(x, weights, config=config, folded=folded)
    return jnp.sum(jnp.square(layer.output.astype(jnp.float32)))

  step = jax.jit(jax.grad(loss, (0, 1)))
  return step.lower(x, weights).compile().as_text()
