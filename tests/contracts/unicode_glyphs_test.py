"""Contracts of frozen glyphs, the model that reads them, rotary positions."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled
from tokjax.ops import rope
from tokjax.tokenizers import unicode_glyphs
from tokjax.tokenizers.glyph_language_model import GlyphLanguageModelConfig


def bitmaps(seed):
  # Pixels apart in variance: which axis comes first does not hang on rounding.
  rates = jnp.linspace(0.05, 0.5, 8)[None]
  bits = jax.random.bernoulli(jax.random.key(seed), rates, (32, 8))
  return (bits.astype(jnp.uint8),)


def vectors(seed):
  return (jax.random.normal(jax.random.key(seed), (8, 5, 4)),)


def tokens(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  ids = jax.random.randint(keys[0], (8, 5), 0, 7)
  mask = jax.random.bernoulli(keys[1], 0.8, (8, 5)).at[:, 0].set(True)
  return ids, jax.random.normal(keys[2], (7, 8)), mask


def projected(bits, **settings):
  return unicode_glyphs.frozen_embedding(bits, 4, **settings)


def random_projected(*inputs):
  return projected(
    *inputs, method="random_projection", key=jax.random.key(1)
  )  # fmt: skip


def packed(ids, table, _):
  bits = (table > 0).astype(jnp.uint8)
  glyphs = unicode_glyphs.packed_embedding(
    bits, 4, method="random_projection", key=jax.random.key(0)
  )
  return unicode_glyphs.embed(glyphs, ids)


def language(model, ids, table, mask):
  rows = table if model.config.embedding == "frozen" else None
  return model.negative_log_likelihood(ids, rows, mask)


def language_model(**settings):
  config = GlyphLanguageModelConfig(
    7, 8, num_layers=2, num_heads=2, init_scale=0.3, max_length=5, **settings
  )
  return filled(lambda: config.build(nnx.Rngs(0)))


CASES = [
  Case("frozen-random", random_projected, bitmaps,
       bfloat16_tolerance=None),
  Case("frozen-pca", projected, bitmaps, tolerance=2e-4,
       bfloat16_tolerance=None),
  Case("packed", packed, tokens, (0,), bfloat16_tolerance=None),
  Case("embed", lambda ids, table, _: unicode_glyphs.embed(table, ids),
       tokens, (0, 2)),
  Case("language-frozen", language, tokens, (0, 2),
       weights=functools.partial(language_model, embedding="frozen")),
  Case("language-trainable", language, tokens, (0, 2),
       weights=functools.partial(
         language_model, embedding="trainable", positions="learned")),
  Case("rotate", rope.rotate, vectors, (0,), (0,)),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
