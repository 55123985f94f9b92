"""Contracts of clustering, and of the reductions that cluster or budget."""

import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.ops import density_peaks, medoids, ranking, spectral
from tokjax.reduction import (
  center_clip,
  correlation_guided,
  correlation_scores,
  global_com,
  sparsevlm,
  sparsevlm_scores,
)


def normal(seed, *shapes):
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return tuple(
    jax.random.normal(key, shape)
    for key, shape in zip(keys, shapes, strict=True)
  )


def mask_of(seed, *shape):
  return jax.random.bernoulli(jax.random.key(100 + seed), 0.8, shape)


def tokens(seed):
  return *normal(seed, (8, 10, 4)), mask_of(seed, 8, 10)


def scored(seed):
  x, scores = normal(seed, (8, 12, 4), (8, 12))
  return x, scores, mask_of(seed, 8, 12)


def video(seed):
  return *normal(seed, (8, 4, 4, 3)), mask_of(seed, 8, 4)


def document(seed):
  x, keys, low, high = normal(seed, (8, 9, 4), (8, 9, 2), (8, 9), (8, 9))
  return x, keys, jnp.square(low), jnp.square(high), mask_of(seed, 8, 9)


def heads(seed):
  q, k = normal(seed, (8, 2, 3, 4), (8, 2, 8, 4))
  return q, k, mask_of(seed, 8, 3), mask_of(seed, 8, 8)


def words(seed):
  visual, text = normal(seed, (8, 6, 4), (8, 5, 4))
  return visual, text, mask_of(seed, 8, 6), mask_of(seed + 1, 8, 5)


def crops(seed):
  x, cut, t, s = normal(seed, (8, 9, 3), (8, 4, 9, 3), (8, 9), (8, 4, 9))
  return x, cut, t, s, jnp.tile(mask_of(seed, 8, 1, 3), (1, 4, 3))


def draw(p, count):
  kept = correlation_scores.sample_tokens(
    jnp.square(p), count, key=jax.random.key(0)
  )
  return kept


def draws(seed):
  return *normal(seed, (8, 9)), jnp.arange(8) % 5


def density(keys, mask):
  return correlation_scores.information_density(
    keys, mask, threshold=0.5, min_similar=2, block_size=4
  )


VISUAL = {"first_visual": 1, "num_visual": 4}

OPS = [
  Case(
    "kmedoids",
    functools.partial(medoids.kmedoids, num_clusters=3),
    tokens,
    (0, 1),
  ),
  Case(
    "spectral_medoids",
    functools.partial(
      spectral.spectral_medoids, num_clusters=3, num_neighbors=4
    ),
    tokens,
    (0, 1),
  ),
  Case(
    "density_peaks",
    functools.partial(density_peaks.density_peaks, num_clusters=3),
    tokens,
    (0, 1),
  ),
  Case(
    "keep_best",
    lambda scores, count: ranking.keep_best(scores, count),
    draws,
    (0, 1),
  ),
]

METHODS = [
  Case(
    "center_clip",
    functools.partial(
      center_clip.center_clip,
      num_keep=4,
      num_segments=2,
      aggregation="mean",
    ),
    tokens,
    (0, 1),
    (0,),
  ),
  Case(
    "center_cluster",
    functools.partial(
      center_clip.center_cluster, num_segments=2, num_centers=3
    ),
    video,
    (0, 1),
    (0,),
  ),
  Case(
    "sparsevlm",
    functools.partial(
      sparsevlm.sparsevlm, num_keep=4, recycle_ratio=0.8, tokens_per_center=3
    ),
    scored,
    (0, 1, 2),
    (0,),
  ),
  Case("select_raters", sparsevlm_scores.select_raters, words, (0, 1, 2, 3)),
  Case(
    "corrected_scores",
    functools.partial(sparsevlm_scores.corrected_scores, num_heads=1, **VISUAL),
    heads,
    (0, 1, 2, 3),
  ),
  Case(
    "correlation_guided",
    functools.partial(
      correlation_guided.correlation_guided,
      num_keep=5,
      threshold=0.5,
      min_similar=2,
      aggregation="nearest_mean",
    ),
    document,
    (0, 1, 2, 3, 4),
    (0,),
  ),
  Case("information_density", density, tokens, (0, 1)),
  Case("sample_tokens", draw, draws, (0, 1), bfloat16_tolerance=None),
  Case(
    "global_com",
    functools.partial(global_com.global_com, grid=(2, 2), keep_ratio=0.5),
    crops,
    (0, 1, 2, 3, 4),
    (0, 1),
  ),
]


@harness.all_checks([*OPS, *METHODS])
def test_contract(check, case):
  check(case)
