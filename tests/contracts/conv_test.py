"""Contracts of the convolutional modules and the adversarial losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.tokenizers import adversarial
from tokjax.tokenizers.conv import ConvConfig, ConvDecoder, ConvEncoder
from tokjax.tokenizers.discriminator import Discriminator, DiscriminatorConfig


@functools.cache
def weights(kind, config):
  """A module of NumPy arrays: built once, not in every program."""
  with jax.ensure_compile_time_eval():
    module = jax.jit(lambda: kind(config, rngs=nnx.Rngs(0)))()
    return jax.tree.map(np.asarray, module)


def build(kind, config):
  """A module that lives on the mesh of the inputs."""
  return jax.tree.map(jnp.asarray, weights(kind, config))


def images(seed):
  keys = jax.random.split(jax.random.key(seed))
  return tuple(jax.random.normal(key, (8, 8, 8, 3)) for key in keys)


TINY = ConvConfig(
  width=4, multipliers=(1, 1), num_res_blocks=1, z_dim=3, groups=2
)
PLAIN = dataclasses.replace(TINY, flavour="maskgit", attention=False)


def coded_and_back(images, other):
  z = build(ConvEncoder, TINY)(images)
  config = dataclasses.replace(PLAIN, condition_dim=3)
  return z, build(ConvDecoder, config)(z, other[:, ::2, ::2])


def judged(images, other, norm):
  config = DiscriminatorConfig(width=4, num_layers=1, norm=norm, groups=4)
  return adversarial.losses(
    adversarial.AdversarialConfig(start_step=0, lecam_weight=0.1),
    build(Discriminator, config),
    images,
    other,
    adversarial.init_state(),
    step=jnp.int32(3),
  )


CASES = [
  Case(
    name,
    function,
    images,
    batched=(0, 1),
    differentiable=differentiable,
    tolerance=1e-4,
    bfloat16_tolerance=0.1,
  )
  for name, function, differentiable in (
    ("conv", coded_and_back, (0, 1)),
    ("adversarial-group", functools.partial(judged, norm="group"), (1,)),
    ("adversarial-batch", functools.partial(judged, norm="batch"), (1,)),
  )
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
