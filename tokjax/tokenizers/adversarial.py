"""Adversarial losses of images: a discriminator to please, and to teach.

    found, state = losses(
      config, discriminator, images, reconstructions, state, step=step
    )
    loss = reconstruction_loss + found.generator + found.discriminator

One backward pass of that sum gives each side its own gradient: in `generator`
the discriminator is fixed, in `discriminator` the reconstructions are. Both
sides step at every step, before `start_step` with gradients of zero.

Sources: hinge losses, Lim, Ye, 2017, "Geometric GAN"; the weight that balances
gradients, Esser, Rombach, Ommer, 2021, "Taming Transformers for
High-Resolution Image Synthesis"; LeCam, Tseng et al., 2021, "Regularizing
Generative Adversarial Networks under Limited Data", with means of logits as in
the code of TiTok; R1, Mescheder, Geiger, Nowozin, 2018, "Which Training Methods
for GANs do actually Converge?", without its factor 1/2, as in the code of
MAGVIT.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.tokenizers.discriminator import Discriminator
from tokjax.typing import Array, Float, Int

__all__ = [
  "Adversarial",
  "AdversarialConfig",
  "AdversarialState",
  "adaptive_weight",
  "discriminator_hinge",
  "gate",
  "generator_hinge",
  "init_state",
  "lecam",
  "losses",
  "r1_penalty",
]


@dataclasses.dataclass(unsafe_hash=True)
class AdversarialConfig:
  """What the losses weigh. TokenFlow: weight .5; TiTok: .01 and LeCam .001."""

  weight: float = 0.5  # of the generator's loss
  start_step: int = 20_000  # before it both sides have weight 0
  lecam_weight: float = 0.0  # published: .001 (TiTok), .05 (Open-MAGVIT2)
  lecam_decay: float = 0.999  # of the moving means
  r1_weight: float = 0.0  # published: 10 (MAGVIT); needs norm "group"


class AdversarialState(NamedTuple):
  """Moving means of the logits, for LeCam.

  Attributes:
    real: of images.
    fake: of reconstructions.
  """

  real: Float[Array, ""]
  fake: Float[Array, ""]


class Adversarial(NamedTuple):
  """The two sides of the game; their sum joins the loss.

  Attributes:
    generator: weighted; its gradient reaches the reconstructions alone.
    discriminator: its gradient reaches the discriminator alone.
    stats: scalars by name: mean logits "real" and "fake", "lecam" and "r1"
      before their weights.
  """

  generator: Float[Array, ""]
  discriminator: Float[Array, ""]
  stats: dict[str, Float[Array, ""]]


def init_state() -> AdversarialState:
  """Moving means of zero.

  Example:
    >>> init_state().real.item()
    0.0
  """
  return AdversarialState(jnp.zeros(()), jnp.zeros(()))


def losses(
  config: AdversarialConfig,
  discriminator: Discriminator,
  images: Float[Array, "B height width channels"],
  reconstructions: Float[Array, "B height width channels"],
  state: AdversarialState,
  *,
  step: int | Int[Array, ""],
  balance: float | Float[Array, ""] = 1.0,
  axis_name: str | None = None,
) -> tuple[Adversarial, AdversarialState]:
  """Losses of both sides, each with its own gradient.

      generator      g weight balance mean(-D(r))
      discriminator  g (hinge(D(x), D(r)) + lecam + r1),   g = step >= start

  Costs three forward passes of the discriminator, a fourth for R1.

  Args:
    config: the weights.
    discriminator: D.
    images: x, real ones.
    reconstructions: r.
    state: moving means.
    step: number of the step, from 0; may be traced.
    balance: factor of the generator's loss, from `adaptive_weight`.
    axis_name: mesh axis over which a `shard_map` cuts the batch.

  Returns:
    The losses, float32, and the moving means after the step, which move from
    `start_step` on.

  Raises:
    ValueError: if shapes differ, the decay is none, or R1 is asked for with
      statistics over the batch.
  """
  if images.shape != reconstructions.shape:
    raise ValueError(
      f"reconstructions must have the shape of images, {images.shape}, got"
      f" {reconstructions.shape}"
    )
  checks.in_range(0, 1, lecam_decay=config.lecam_decay)
  if config.r1_weight:
    checks.one_of(("group",), norm=discriminator.config.norm)
  fixed = jax.lax.stop_gradient

  def judge(discriminator, images):
    return discriminator(images, axis_name=axis_name)

  def mean(x):
    return x if axis_name is None else jax.lax.pmean(x, axis_name)

  opened = gate(step, config.start_step)
  pleased = generator_hinge(judge(fixed(discriminator), reconstructions))
  real = judge(discriminator, fixed(images))
  fake = judge(discriminator, fixed(reconstructions))
  found = AdversarialState(mean(jnp.mean(real)), mean(jnp.mean(fake)))
  loss = mean(discriminator_hinge(real, fake))
  stats = {"real": found.real, "fake": found.fake}
  if config.lecam_weight:
    stats["lecam"] = lecam(found, state)
    loss = loss + config.lecam_weight * stats["lecam"]
  if config.r1_weight:
    stats["r1"] = mean(r1_penalty(discriminator, fixed(images)))
    loss = loss + config.r1_weight * stats["r1"]
  decay = jnp.where(opened > 0, config.lecam_decay, 1.0)
  state = jax.tree.map(
    lambda old, new: fixed(decay * old + (1 - decay) * new), state, found
  )
  generator = opened * config.weight * fixed(balance) * mean(pleased)
  return Adversarial(generator, opened * loss, stats), state


def discriminator_hinge(
  real: Float[Array, "..."], fake: Float[Array, "..."]
) -> Float[Array, ""]:
  """(mean relu(1 - real) + mean relu(1 + fake)) / 2.

  Args:
    real: logits of images.
    fake: logits of reconstructions.

  Example:
    >>> real, fake = jnp.array([0.5]), jnp.array([-0.2])
    >>> round(jax.jit(discriminator_hinge)(real, fake).item(), 6)
    0.65
  """
  real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
  return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def generator_hinge(fake: Float[Array, "..."]) -> Float[Array, ""]:
  """-mean fake.

  Args:
    fake: logits of reconstructions.

  Example:
    >>> generator_hinge(jnp.array([1.0, 2.0])).item()
    -1.5
  """
  return -jnp.mean(fake.astype(jnp.float32))


def gate(
  step: int | Int[Array, ""], start_step: int | Int[Array, ""]
) -> Float[Array, ""]:
  """0 before a step and 1 from it on.

  Example:
    >>> gate(4, 5).item(), gate(5, 5).item()
    (0.0, 1.0)
  """
  return jnp.where(jnp.asarray(step) >= start_step, 1.0, 0.0)


def lecam(found: AdversarialState, state: AdversarialState) -> Float[Array, ""]:
  """relu(real - moving fake)^2 + relu(moving real - fake)^2.

  Keeps the two sides from drifting apart where data are few. No gradient to
  the moving means.

  Args:
    found: mean logits of the step.
    state: moving means before the step.

  Example:
    >>> found = AdversarialState(jnp.array(2.0), jnp.array(-1.0))
    >>> state = AdversarialState(jnp.array(1.0), jnp.array(0.5))
    >>> jax.jit(lecam)(found, state).item()  # 1.5^2 + 2^2
    6.25
  """
  state = jax.lax.stop_gradient(state)
  return (
    jax.nn.relu(found.real - state.fake) ** 2
    + jax.nn.relu(state.real - found.fake) ** 2
  )


def r1_penalty(
  discriminator: Callable[[Float[Array, "B *image"]], Float[Array, "B ..."]],
  images: Float[Array, "B *image"],
) -> Float[Array, ""]:
  """Mean over images of |gradient of the sum of their logits|^2.

  Args:
    discriminator: images to logits, each image by itself.
    images: real ones.

  Example:
    >>> model = lambda x: jnp.sum(x**2, axis=1, keepdims=True) / 2
    >>> r1_penalty(model, jnp.array([[3.0, 4.0]])).item()
    25.0
  """
  gradient = jax.grad(lambda x: jnp.sum(discriminator(x)))(images)
  square = jnp.square(gradient.astype(jnp.float32))
  return jnp.mean(jnp.sum(square, axis=tuple(range(1, images.ndim))))


def adaptive_weight(
  reconstruction_loss: Callable[[Float[Array, "..."]], Float[Array, ""]],
  generator_loss: Callable[[Float[Array, "..."]], Float[Array, ""]],
  last_layer: Float[Array, "..."],
  *,
  epsilon: float = 1e-4,
  limit: float = 1e4,
) -> Float[Array, ""]:
  """|gradient of one loss| / |gradient of the other|, at the last layer.

  Costs the last layer and the losses, forward and backward, twice: let the
  functions start from what the layer before it gave, with a stop_gradient.

  Args:
    reconstruction_loss: of the kernel of the last layer; pixels and perception.
    generator_loss: of that kernel.
    last_layer: the kernel.
    epsilon: joins the lower gradient.
    limit: largest weight.

  Returns:
    In 0..limit, without a gradient.

  Example:
    >>> def weight(w):
    ...   return adaptive_weight(lambda w: 6 * w[0], lambda w: 2 * w[1], w)
    >>> round(jax.jit(weight)(jnp.ones(2)).item(), 3)
    3.0
  """
  kernel = jax.lax.stop_gradient(last_layer)
  lengths = [
    jnp.linalg.norm(jnp.ravel(jax.grad(loss)(kernel)).astype(jnp.float32))
    for loss in (reconstruction_loss, generator_loss)
  ]
  weight = jnp.clip(lengths[0] / (lengths[1] + epsilon), 0, limit)
  return jax.lax.stop_gradient(weight)
