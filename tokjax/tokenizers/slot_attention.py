"""Slot attention: a few slots compete for the inputs that each explains.

Ordinary cross-attention lets each query choose among the inputs, and two
queries may choose the same ones. Here each input chooses among the slots, so
that a slot gets what no other takes:

    config = SlotAttentionConfig(width=64, input_dim=128)
    slots = SlotAttention(config, rngs=nnx.Rngs(0))
    found = slots(queries, features)
    found.attention  # [B, S, N], sums to one over the slots

`compete="inputs"` is ordinary cross-attention with the same parameters, to
compare with.

Sources: Locatello et al., 2020, "Object-Centric Learning with Slot Attention":
competition, weighted mean, gated update; several heads that compete with each
other ("heads_slots"), from published code (lucidrains/slot-attention), as in
Slot-MLLM, 2025, which leaves out `norm_inputs`; its second version has
`norm="one_plus"`, `update="replace"`, no norms and one iteration. Ours: masks.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.tokenizers.transformer import (
  Mlp,
  TransformerConfig,
  layer_norm,
  linear,
)
from tokjax.typing import Array, Bool, Float

__all__ = [
  "GRUCell",
  "SlotAttention",
  "SlotAttentionConfig",
  "Slots",
  "attend_slots",
]

Compete = Literal["slots", "heads_slots", "inputs"]
Norm = Literal["mean", "one_plus"]
Scale = Literal["head_width", "num_slots"]
Update = Literal["gru", "sum", "replace"]


class Slots(NamedTuple):
  """Slots and what they took.

  Attributes:
    slots: vectors, of each head where there are several.
    attention: share of each input that a slot has, float32, over all heads.
  """

  slots: Float[Array, "*batch S D"]
  attention: Float[Array, "B S N"]


def attend_slots(
  queries: Float[Array, "B H S d"],
  keys: Float[Array, "B H N d"],
  values: Float[Array, "B H N e"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  scale: float | None = None,
  compete: Compete = "slots",
  norm: Norm = "mean",
  epsilon: float = 1e-6,
) -> Slots:
  """Means of the inputs, weighted by what each slot has of them.

  `compete` is what the softmax of scale * queries keys^T runs over: for each
  input the slots, or the heads and slots; or for each slot the inputs, which
  is ordinary attention. The weights p become

      (p + epsilon) / sum over inputs of (p + epsilon)   norm "mean"
      p / (1 + sum over inputs of p)                     norm "one_plus"

  Args:
    queries: of S slots.
    keys: of N inputs.
    values: of the inputs.
    mask: True where an input counts; None means all. The others are not read.
    scale: of the logits; None means 1 / sqrt(d).
    compete: "slots", "heads_slots" or "inputs".
    norm: "mean" or "one_plus".
    epsilon: keeps a slot that nothing chooses from dividing by 0.

  Returns:
    Updates [B, H, S, e] in the dtype of the values, zeros where no input
    counts; and the attention: for each input its shares sum to one over the
    slots, with "inputs" each slot's sum to one over the inputs.

  Raises:
    ValueError: for unknown settings or sizes that do not fit.

  Example:
    >>> slots = jnp.array([[[[1.0, 0.0], [0.0, 1.0]]]])
    >>> inputs = jnp.array([[[[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]])
    >>> found = jax.jit(attend_slots)(slots, inputs, inputs)
    >>> [round(x, 5) for x in found.attention[0, 0].tolist()]
    [0.80443, 0.19557, 0.5]

  Cost: 4 B H S N d FLOPs; the weights take 4 B H S N bytes.
  """
  checks.one_of(get_args(Compete), compete=compete)
  checks.one_of(get_args(Norm), norm=norm)
  if mask is None:
    keep = True
  else:
    checks.same_size(mask_inputs=mask.shape[-1], inputs=keys.shape[2])
    keep = mask[:, None, None]  # [B, 1, 1, N]
    values = jnp.where(mask[:, None, :, None], values, 0)
    keys = jnp.where(mask[:, None, :, None], keys, 0)
  scale = queries.shape[-1] ** -0.5 if scale is None else scale
  logits = scale * jnp.matmul(
    queries, keys.swapaxes(-1, -2), preferred_element_type=jnp.float32
  )
  axes = {"slots": 2, "heads_slots": (1, 2), "inputs": 3}[compete]
  chosen = jax.nn.softmax(
    logits, axes, where=jnp.broadcast_to(keep, logits.shape)
  )
  chosen = jnp.where(keep, chosen, 0)  # not NaN where all is masked
  over_heads = jnp.sum if compete == "heads_slots" else jnp.mean
  attention = over_heads(chosen, axis=1)
  if norm == "mean":
    chosen = jnp.where(keep, chosen + epsilon, 0)
    total = jnp.sum(chosen, axis=-1, keepdims=True)
    weights = chosen / jnp.where(total > 0, total, 1)
  else:
    weights = chosen / (1 + jnp.sum(chosen, axis=-1, keepdims=True))
  update = jnp.matmul(
    weights.astype(values.dtype), values, preferred_element_type=jnp.float32
  )
  return Slots(update.astype(values.dtype), attention)


@dataclasses.dataclass(unsafe_hash=True)
class SlotAttentionConfig:
  """How slots take what they explain."""

  width: int  # D of the slots
  input_dim: int  # C of the inputs
  num_heads: int = 1  # H, divides the width
  num_iterations: int = 3  # with the same parameters
  compete: Compete = "slots"  # what the softmax runs over
  norm: Norm = "mean"  # how weights are scaled over the inputs
  scale_by: Scale = "head_width"  # 1 / sqrt of it; Slot-MLLM has "num_slots"
  update: Update = "gru"  # gated; or slots + what they take; or that alone
  norm_inputs: bool = True  # layer norm of the inputs
  norm_slots: bool = True  # layer norm of the slots that ask
  mlp_ratio: float = 4.0  # of the MLP after each update; 0: there is none
  epsilon: float = 1e-6  # see `attend_slots`
  norm_epsilon: float = 1e-5  # of the layer norms
  init_scale: float = 0.02  # of the weights


class SlotAttention(nnx.Module):
  """s = GRU(what s takes of the inputs, s); s = s + MLP(norm s), repeated.

  Computes in the dtype of its parameters; norms and softmax are float32.

  Costs 4 N C D FLOPs for keys and values, and in each iteration 4 S N D for
  the attention, 2 S D^2 for queries, 12 S D^2 for the gates and 4 S D F for
  the MLP of hidden width F.

  Args:
    config: settings.
    rngs: seeds the parameters.

  Raises:
    ValueError: for settings that cannot be.

  Example:
    >>> config = SlotAttentionConfig(width=8, input_dim=6)
    >>> model = jax.jit(lambda: SlotAttention(config, rngs=nnx.Rngs(0)))()
    >>> slots = jax.random.normal(jax.random.key(1), (1, 3, 8))
    >>> found = jax.jit(model)(slots, jnp.ones((1, 5, 6)))
    >>> found.slots.shape, found.attention.shape
    ((1, 3, 8), (1, 3, 5))
  """

  def __init__(self, config: SlotAttentionConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    width, heads = config.width, config.num_heads
    inner = TransformerConfig(
      width, 1, heads, config.mlp_ratio, norm_epsilon=config.norm_epsilon,
      init_scale=config.init_scale,
    )  # fmt: skip
    outer = dataclasses.replace(inner, width=config.input_dim)
    norms = config.norm_inputs, config.norm_slots
    self.norm_inputs = layer_norm(outer, rngs) if norms[0] else None
    self.norm_slots = layer_norm(inner, rngs) if norms[1] else None
    self.query = linear(inner, width, width, rngs)
    self.key = linear(inner, config.input_dim, width, rngs)
    self.value = linear(inner, config.input_dim, width, rngs)
    gated = config.update == "gru"
    self.gru = GRUCell(width, rngs=rngs) if gated else None
    mlp = config.mlp_ratio > 0
    self.norm_mlp = layer_norm(inner, rngs) if mlp else None
    self.mlp = Mlp(inner, rngs=rngs) if mlp else None

  def __call__(
    self,
    slots: Float[Array, "B S D"],
    inputs: Float[Array, "B N C"],
    mask: Bool[Array, "B N"] | None = None,
  ) -> Slots:
    """The slots after all iterations.

    Slots that start equal stay equal: start them from learned rows or noise.

    Args:
      slots: where they start.
      inputs: what they compete for.
      mask: True where an input counts; None means all.

    Returns:
      Slots in their dtype, and the attention of the last iteration.

    Raises:
      ValueError: if a width is wrong.
    """
    config = self.config
    checks.same_size(width_of_slots=slots.shape[-1], width=config.width)
    checks.same_size(
      width_of_inputs=inputs.shape[-1], input_dim=config.input_dim
    )
    if mask is not None:
      inputs = jnp.where(mask[..., None], inputs, 0)
    dtype, outer = self.query.kernel[...].dtype, slots.dtype
    slots = slots.astype(dtype)
    if self.norm_inputs is not None:
      inputs = self.norm_inputs(inputs)
    inputs = inputs.astype(dtype)
    keys, values = (
      self._heads(self.key(inputs)),
      self._heads(self.value(inputs)),
    )
    by_width = config.scale_by == "head_width"
    size = keys.shape[-1] if by_width else slots.shape[1]

    def step(slots, _):
      y = slots if self.norm_slots is None else self.norm_slots(slots)
      found = attend_slots(
        self._heads(self.query(y.astype(slots.dtype))),
        keys,
        values,
        mask,
        scale=size**-0.5,
        compete=config.compete,
        norm=config.norm,
        epsilon=config.epsilon,
      )
      update = found.slots.swapaxes(1, 2)  # [B, S, H, d]
      update = update.reshape(*update.shape[:2], -1)
      if self.gru is not None:
        slots = self.gru(update, slots)
      else:
        slots = slots + update if config.update == "sum" else update
      if self.mlp is not None:
        slots = slots + self.mlp(self.norm_mlp(slots).astype(slots.dtype))
      return slots, found.attention

    slots, attention = jax.lax.scan(
      step, slots, length=self.config.num_iterations
    )
    return Slots(slots.astype(outer), attention[-1])

  def _heads(self, x):
    """[B, N, D] -> [B, H, N, d]."""
    heads = self.config.num_heads
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


class GRUCell(nnx.Module):
  """A gated step from a state towards what an input asks for.

      r = sigmoid(x W_r + b_r + s U_r + c_r)
      g = sigmoid(x W_g + b_g + s U_g + c_g)
      n = tanh(x W_n + b_n + r (s U_n + c_n))
      s' = (1 - g) n + g s

  The three parts stand side by side in one matrix each, in the order r, g, n,
  as torch has them, transposed.

  Args:
    width: of input and state.
    rngs: seeds the parameters, uniform within +-1 / sqrt(width).

  Example:
    >>> cell = jax.jit(lambda: GRUCell(4, rngs=nnx.Rngs(0)))()
    >>> jax.jit(cell)(jnp.ones((2, 4)), jnp.zeros((2, 4))).shape
    (2, 4)

  Source: Cho et al., 2014, "Learning Phrase Representations using RNN
  Encoder-Decoder"; the place of r as in cuDNN and torch.
  """

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    checks.in_range(1, 1 << 20, width=width)

    def uniform(key, shape, dtype, out_sharding=None):
      del out_sharding
      bound = width**-0.5
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    def gates():
      return nnx.Linear(
        width, 3 * width, kernel_init=uniform, bias_init=uniform, rngs=rngs
      )

    self.input = gates()
    self.state = gates()

  def __call__(
    self, x: Float[Array, "*batch D"], state: Float[Array, "*batch D"]
  ) -> Float[Array, "*batch D"]:
    """The next state, in its dtype; the gates are float32."""

    def parts(y):
      return jnp.split(y.astype(jnp.float32), 3, axis=-1)

    (xr, xg, xn), (sr, sg, sn) = parts(self.input(x)), parts(self.state(state))
    r, g = jax.nn.sigmoid(xr + sr), jax.nn.sigmoid(xg + sg)
    n = jnp.tanh(xn + r * sn)
    return ((1 - g) * n + g * state).astype(state.dtype)


def _check(config):
  checks.one_of(get_args(Compete), compete=config.compete)
  checks.one_of(get_args(Norm), norm=config.norm)
  checks.one_of(get_args(Scale), scale_by=config.scale_by)
  checks.one_of(get_args(Update), update=config.update)
  checks.in_range(
    1, 1 << 20, width=config.width, input_dim=config.input_dim,
    num_heads=config.num_heads, num_iterations=config.num_iterations,
  )  # fmt: skip
  checks.divisible(config.num_heads, width=config.width)
