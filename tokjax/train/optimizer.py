"""Optimisers by name: one config, one optax transform.

Every optimiser is the same chain, so that a learning rate and a weight decay
mean the same thing under each name:

    gradient -> clip by global norm -> direction of the optimiser
             -> + weight_decay * parameter, where it decays -> * -rate(step)

What is frozen is 0 at both ends of it.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from tokjax import checks
from tokjax.parallel import rules

__all__ = [
  "OptimizerConfig",
  "decay_mask",
  "frozen_mask",
  "make",
  "schedule",
]

NAMES = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig:
  """What an optimiser is made of; defaults are ours where none is named."""

  name: str = "adamw"  # adamw, adafactor, lion, muon or sgd
  learning_rate: float = 1e-3  # the peak, after warm-up
  warmup_steps: int = 0  # linear from 0 to the peak
  schedule: str = "cosine"  # after warm-up: constant, linear or cosine
  final_ratio: float = 0.0  # of the peak, at the last step
  weight_decay: float = 0.0  # decoupled; multiplied by the learning rate
  no_decay: tuple[str, ...] = ("bias$", "scale$", "norm")  # path patterns
  frozen: tuple[str, ...] = ()  # path patterns of what no step changes
  clip_norm: float | None = 1.0  # of the whole gradient; None does not clip
  b1: float = 0.9  # decay of the mean; momentum of sgd; Muon has its own 0.95
  b2: float = 0.999  # decay of the mean square; of the mean in lion
  epsilon: float = 1e-8  # added to the root mean square in adamw


def schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then the named decay.

  The rate of step 0 is 0 when there is a warm-up. The decay ends at
  `num_steps` and stays there.

  Args:
    config: peak, warm-up, shape of the decay.
    num_steps: steps of the whole run, warm-up included.

  Returns:
    A function of the step, traceable.

  Raises:
    ValueError: for an unknown schedule or a warm-up longer than the run.

  Example:
    >>> config = OptimizerConfig(learning_rate=0.5, warmup_steps=2,
    ...                          schedule="linear")
    >>> rate = schedule(config, num_steps=4)
    >>> [float(rate(step)) for step in range(5)]
    [0.0, 0.25, 0.5, 0.25, 0.0]
  """
  checks.one_of(SCHEDULES, schedule=config.schedule)
  checks.in_range(0, num_steps, warmup_steps=config.warmup_steps)
  peak, final = config.learning_rate, config.learning_rate * config.final_ratio
  decay_steps = max(1, num_steps - config.warmup_steps)
  decay = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, final, decay_steps),
    "cosine": optax.cosine_decay_schedule(
      peak, decay_steps, alpha=config.final_ratio
    ),
  }[config.schedule]
  warmup = optax.linear_schedule(0.0, peak, max(1, config.warmup_steps))
  return optax.join_schedules([warmup, decay], [config.warmup_steps])


def frozen_mask(params: Any, frozen: tuple[str, ...]) -> Any:
  """Which parameters no step changes, not even weight decay.

  Args:
    params: a pytree of arrays.
    frozen: patterns searched in the path, lower-cased.

  Returns:
    The tree of bools: True where a pattern matches.

  Raises:
    ValueError: if a pattern matches nothing.

  Example:
    >>> params = {"encoder": {"w": jnp.ones(2)}, "head": jnp.ones(2)}
    >>> frozen_mask(params, ("^encoder/",))
    {'encoder': {'w': True}, 'head': False}
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  paths = [rules.leaf_path(path).lower() for path, _ in leaves]
  for pattern in frozen:
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(f"frozen matches no parameter, got {pattern!r}")
  found = [any(re.search(p, path) for p in frozen) for path in paths]
  return jax.tree.unflatten(jax.tree.structure(params), found)


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
  """Which parameters weight decay pulls towards zero.

  Args:
    params: a pytree of arrays.
    no_decay: patterns searched in the path, lower-cased. They are needed
      beside the rank because stacked layers have biases of two axes.

  Returns:
    The tree of bools: True where the array has two axes or more and no
    pattern matches.

  Example:
    >>> decay_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, ())
    {'bias': False, 'kernel': True}
  """

  def decays(path, x):
    text = rules.leaf_path(path).lower()
    return jnp.ndim(x) >= 2 and not any(re.search(p, text) for p in no_decay)

  return jax.tree_util.tree_map_with_path(decays, params)


def make(
  config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """The optax transform that a config describes.

  Args:
    config: the optimiser.
    num_steps: steps of the whole run, for the schedule.

  Returns:
    A transform; its `update` needs the parameters.

  Raises:
    ValueError: for an unknown name or schedule, or numbers out of range.

  Example:
    >>> transform = make(OptimizerConfig(name="sgd", b1=0.0), num_steps=10)
    >>> state = transform.init({"w": jnp.ones(2)})

  Source:
    adamw: Loshchilov and Hutter 2019, decay times learning rate. adafactor:
    Shazeer and Stern 2018, without momentum, the rate given here times the
    root mean square of each parameter. lion: Chen et al. 2023. muon: Jordan
    2024, scaled by 0.2 sqrt(longer side) after Liu et al. 2025 so that it
    shares Adam's learning rate; on the last two axes of every array that
    decays and is not an embedding, each layer of a stack by itself; Adam for
    the rest. No decay on biases, scales and norms is common practice (BERT).
  """
  checks.one_of(NAMES, name=config.name)
  checks.in_range(0, 1, b1=config.b1, b2=config.b2)
  checks.in_range(0, 1, final_ratio=config.final_ratio)
  checks.in_range(0, float("inf"), weight_decay=config.weight_decay)
  clip = (
    optax.identity()
    if config.clip_norm is None
    else optax.clip_by_global_norm(config.clip_norm)
  )
  chain = [
    clip,
    _direction(config),
    optax.add_decayed_weights(
      config.weight_decay, mask=lambda p: decay_mask(p, config.no_decay)
    ),
    optax.scale_by_learning_rate(schedule(config, num_steps)),
  ]
  if config.frozen:
    freeze = optax.masked(
      optax.set_to_zero(), lambda p: frozen_mask(p, config.frozen)
    )
    chain = [freeze, *chain, freeze]
  return optax.chain(*chain)


def _direction(config):
  adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
  if config.name == "adamw":
    return adam
  if config.name == "adafactor":
    return optax.chain(
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.scale_by_param_block_rms(),
    )
  if config.name == "lion":
    return optax.scale_by_lion(config.b1, config.b2)
  if config.name == "sgd":
    return optax.trace(config.b1) if config.b1 else optax.identity()
  muon = optax.chain(
    contrib.scale_by_muon(weight_dimension_numbers=_last_two_axes),
    optax.stateless_with_tree_map(_scale_to_adam),
  )
  return optax.partition(
    {"muon": muon, "adam": adam}, lambda p: _muon_labels(p, config.no_decay)
  )


def _last_two_axes(params):
  numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
  return jax.tree.map(lambda _: numbers, params)


def _scale_to_adam(update, _):
  """Brings an orthogonal matrix to the size of a typical Adam update."""
  return update * (0.2 * max(update.shape[-2:]) ** 0.5)


def _muon_labels(params, no_decay):
  mask = decay_mask(params, (*no_decay, "embed"))
  return jax.tree.map(lambda decays: "muon" if decays else "adam", mask)
