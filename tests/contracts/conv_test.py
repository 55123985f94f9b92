"""Contracts of the convolutional modules and the adversarial losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled
from tokjax.tokenizers import adversarial
from tokjax.tokenizers.conv import ConvConfig, ConvDecoder, ConvEncoder
from tokjax.tokenizers.discriminator import Discriminator, DiscriminatorConfig


def images(seed):
  keys = jax.random.split(jax.random.key(seed))
  return tuple(jax.random.normal(key, (8, 8, 8, 3)) for key in keys)


TINY = ConvConfig(
  width=4, multipliers=(1, 1), num_res_blocks=1, z_dim=3, groups=2
)
PLAIN = dataclasses.replace(TINY, flavour="maskgit", attention=False)


def coder():
  config = dataclasses.replace(PLAIN, condition_dim=3)
  return (
    filled(lambda: ConvEncoder(TINY, rngs=nnx.Rngs(0))),
    filled(lambda: ConvDecoder(config, rngs=nnx.Rngs(0))),
  )


def coded_and_back(coder, images, other):
  encoder, decoder = coder
  z = encoder(images)
  return z, decoder(z, other[:, ::2, ::2])


def judge(norm):
  config = DiscriminatorConfig(width=4, num_layers=1, norm=norm, groups=4)
  return filled(lambda: Discriminator(config, rngs=nnx.Rngs(0)))


def judged(judge, images, other):
  return adversarial.losses(
    adversarial.AdversarialConfig(start_step=0, lecam_weight=0.1),
    judge,
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
    weights=weights,
  )
  for name, function, differentiable, weights in (
    ("conv", coded_and_back, (0, 1), coder),
    ("adversarial-group", judged, (1,), functools.partial(judge, "group")),
    ("adversarial-batch", judged, (1,), functools.partial(judge, "batch")),
  )
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
