"""Contracts of the image metrics."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.eval import image_quality, lpips, reconstruction


def images(seed, side=16):
  x_key, noise_key = jax.random.split(jax.random.key(seed))
  x = jax.random.uniform(x_key, (8, side, side, 3))
  return x, jnp.clip(x + 0.2 * jax.random.normal(noise_key, x.shape), 0, 1)


def learned(x, y):
  # Built inside, so that the weights live on the mesh of the inputs.
  sizes = [(11, 3, 4), (5, 4, 4), (3, 4, 4), (3, 4, 4), (3, 4, 4)]
  keys = jax.random.split(jax.random.key(0), 5)
  weights = lpips.LpipsWeights(
    tuple(
      jax.random.normal(key, (size, size, i, o)) / size
      for key, (size, i, o) in zip(keys, sizes, strict=True)
    ),
    tuple(jnp.zeros(o) for _, _, o in sizes),
    tuple(jnp.ones(o) for _, _, o in sizes),
    "alexnet",
  )
  return lpips.lpips(weights, x, y)


def metric(function, name=None, side=16):
  # Wide before anything else: bfloat16 inputs give what float32 ones give.
  return Case(
    name or function.__name__,
    function,
    functools.partial(images, side=side),
    batched=(0, 1),
    differentiable=(0, 1),
    bfloat16_tolerance=1e-5,
  )


CASES = [
  metric(image_quality.psnr),
  metric(image_quality.ssim),
  metric(
    functools.partial(image_quality.ms_ssim, num_scales=2), "ms_ssim", side=21
  ),
  metric(learned, "lpips", side=32),
  Case(
    "to_bytes",
    lambda x, y: reconstruction.to_bytes(x - y, low=-1.0),
    images,
    batched=(0, 1),
    bfloat16_tolerance=None,
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
