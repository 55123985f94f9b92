"""The weights of a layer of experts, where they live, and its settings.

weights = init_moe(key, config, width=4096, hidden=14336)
specs = weight_specs(weights, folded)             # jax.P for each
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tokjax.ops import moe_experts
from tokjax.ops.moe_experts import Experts
from tokjax.parallel.moe_mesh import FoldedMesh
from tokjax.typing import Array, Float, Key

__all__ = ["MoeConfig", "MoeWeights", "init_moe", "weight_specs"]


@dataclasses.dataclass(unsafe_hash=True)
class MoeConfig:
  """How tokens are routed, dropped and sent."""

  num_experts: int  # E
  num_chosen: int  # experts of a token, k
  score: str = "softmax"  # one of `moe_routing.SCORES`
  num_groups: int = 1  # of experts, see `moe_routing.route`
  num_kept_groups: int = 1  # that a token chooses from
  scale: float = 1.0  # of the weights
  capacity_factor: float | None = None  # published 1 to 1.25; None drops none
  policy: Literal["probs", "position"] = "probs"  # who stays
  # Tokens that share a capacity: those of a device, which costs nothing, or
  # of a sequence, which does not depend on how it is cut.
  drop_over: Literal["device", "sequence"] = "device"
  exchange: Literal["capacity", "padded", "ragged"] = "capacity"
  buffer_factor: float = 2.0  # rows to make room for, times the mean; ours
  activation: Callable[[Array], Array] = jax.nn.silu


class MoeWeights(NamedTuple):
  """Weights of a layer.

  Attributes:
    router: to logits; used in float32.
    experts: their MLPs.
    bias: of `moe_routing.route`; None where the score takes none.
  """

  router: Float[Array, "D E"]
  experts: Experts
  bias: Float[Array, " E"] | None = None


def init_moe(
  key: Key[Array, ""],
  config: MoeConfig,
  *,
  width: int,
  hidden: int,
  gated: bool = True,
) -> MoeWeights:
  """Normal weights of variance 1 / inputs, and no bias.

  Args:
    key: of the draw.
    config: of the layer.
    width: D, of tokens.
    hidden: F, of each expert.
    gated: whether experts have gates.

  Returns:
    float32 weights; a bias of zeros where the score takes one.

  Example:
    >>> config = MoeConfig(num_experts=4, num_chosen=2)
    >>> weights = init_moe(jax.random.key(0), config, width=8, hidden=6)
    >>> weights.router.shape, weights.experts.down.shape
    ((8, 4), (4, 6, 8))
  """
  router_key, experts_key = jax.random.split(key)
  router = jax.random.normal(router_key, (width, config.num_experts))
  experts = moe_experts.init_experts(
    experts_key,
    num_experts=config.num_experts,
    width=width,
    hidden=hidden,
    gated=gated,
  )
  biased = config.score in ("sigmoid", "sqrt_softplus")
  bias = jnp.zeros(config.num_experts) if biased else None
  return MoeWeights(router * width**-0.5, experts, bias)


def weight_specs(weights: MoeWeights, folded: FoldedMesh) -> MoeWeights:
  """How weights are cut: experts over ep and etp, the router not at all.

  Args:
    weights: arrays or their shapes.
    folded: the mesh.

  Returns:
    `jax.P` in the place of arrays.

  Example:
    >>> from tokjax.parallel.moe_mesh import make_folded_mesh
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> config = MoeConfig(num_experts=4, num_chosen=2)
    >>> weights = init_moe(jax.random.key(0), config, width=8, hidden=6)
    >>> weight_specs(weights, folded).router == jax.P()
    True
  """
  into = jax.P(folded.ep, None, folded.etp)
  out_of = jax.P(folded.ep, folded.etp, None)
  gate = None if weights.experts.gate is None else into
  bias = None if weights.bias is None else jax.P()
  return MoeWeights(jax.P(), Experts(into, out_of, gate), bias)
