"""Contracts of product and additive codes, and of their quantizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.ops import (
  additive_codes,
  additive_encoding,
  additive_training,
  product_codes,
)
from tokjax.tokenizers.additive_quantizer import AdditiveQuantizer, AQConfig
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.product_quantizer import PQConfig, ProductQuantizer
from tokjax.tokenizers.vector_quantizer import VQConfig

M, K, D = 2, 4, 4
RANDOM = np.random.default_rng(7)
# Small numbers of few bits: which code is best does not hang on rounding.
BOOKS = (RANDOM.integers(-8, 9, (M, K, D)) / 4).astype(np.float32)
QUERIES = RANDOM.normal(size=(3, D)).astype(np.float32)
OPQ = product_codes.OPQ(
  np.eye(D, dtype=np.float32)[::-1].copy(),
  (RANDOM.integers(-8, 9, (M, K, D // M)) / 4).astype(np.float32),
  np.zeros(1, np.float32),
)


def rows(seed):
  random = np.random.default_rng(seed)
  x = random.normal(size=(16, D)) + 0.01
  return (jnp.asarray(np.round(8 * x) / 8, jnp.float32),)


def coded(seed):
  random = np.random.default_rng(seed)
  return *rows(seed), jnp.asarray(random.integers(-1, K, (16, M)), jnp.int32)


def vectors(seed):
  x_key, mask_key = jax.random.split(jax.random.key(seed))
  x = jnp.round(2 * jax.random.normal(x_key, (8, 5, 4))) / 2
  return x, jax.random.bernoulli(mask_key, 0.7, x.shape[:2])


def opq_trained(x):
  start = product_codes.balanced_rotation(x, num_groups=M)
  opq = product_codes.opq_train(
    jax.random.key(0), x, start, group_size=D // M, num_centroids=3,
    num_iterations=2,
  )  # fmt: skip
  # A rotation of a group and its centroids is as good: no single answer.
  return opq.distortion[-1], opq.rotation @ opq.rotation.T


def opq_searched(x):
  opq = jax.tree.map(jnp.asarray, OPQ)
  codes = product_codes.opq_encode(opq, x)
  turned = product_codes.opq_rotate(opq, jnp.asarray(QUERIES))
  distances = product_codes.pq_distances(opq.codebook, codes, turned)
  return codes, distances, product_codes.opq_decode(opq, codes)


def decoded(x, codes):
  books = jnp.asarray(BOOKS)
  return (
    additive_codes.aq_decode(books, codes),
    additive_codes.aq_squared_norms(books, codes),
    additive_codes.aq_cross_term(books, codes),
  )


def searched(x, codes):
  books = jnp.asarray(BOOKS)
  norms = additive_codes.aq_squared_norms(books, codes)
  few = additive_codes.aq_distances(books, codes, norms, x[:3])
  many = additive_codes.aq_scores(books, codes, x, block_size=5)
  return few, many, additive_codes.aq_from_pq(books)


def icm(x, **settings):
  return additive_encoding.aq_encode_icm(
    jnp.asarray(BOOKS), x, num_rounds=1, num_sweeps=2, num_perturbed=1,
    key=jax.random.key(3), block_size=3, **settings,
  )  # fmt: skip


def beam(x):
  return additive_encoding.aq_encode_beam(
    jnp.asarray(BOOKS), x, beam_size=4, block_size=3
  )


def updated(x, codes):
  books = jnp.asarray(BOOKS)
  least = additive_training.aq_update(books, x, codes)
  return least, additive_training.cq_update(
    books, x, codes, cross_weight=0.1, num_steps=1
  )


def fitted(x, codes):
  fit = additive_training.aq_fit(
    jax.random.key(0), x, jnp.asarray(BOOKS), codes, num_iterations=1,
    num_rounds=1, num_sweeps=1, block_size=3,
  )  # fmt: skip
  return fit.codes, fit.distortion


def product(**settings):
  book = CodebookConfig(6, 2, learning="ema")
  config = PQConfig(VQConfig(book), num_groups=2, **settings)
  quantizer = ProductQuantizer(config, rngs=nnx.Rngs(0))
  return quantizer, quantizer.init_state(jax.random.key(1))


def additive():
  config = AQConfig(CodebookConfig(4, 4), num_books=2)
  quantizer = AdditiveQuantizer(config, rngs=nnx.Rngs(0))
  quantizer.codebooks.codes = nnx.Param(jnp.asarray(BOOKS))
  return quantizer, quantizer.init_state(jax.random.key(1))


def quantized(weights, x, mask):
  quantizer, state = weights
  return quantizer(x, state, mask, train=True)


penalised = functools.partial(
  icm, penalty=additive_encoding.CrossPenalty(0.5, 0.25)
)
CASES = [
  Case("opq_train", opq_trained, rows, batched=(), tolerance=1e-4),
  Case("opq-search", opq_searched, rows, batched=()),
  Case("aq_decode", decoded, coded, batched=(0, 1)),
  Case("aq-search", searched, coded, batched=()),
  Case("aq_encode_icm", icm, rows),
  Case("aq_encode_icm-penalty", penalised, rows),
  Case("aq_encode_beam", beam, rows),
  Case("aq_update", updated, coded, batched=(0, 1), tolerance=1e-3),
  Case("aq_fit", fitted, coded, batched=(0, 1), tolerance=1e-3),
  Case("product", quantized, vectors, (0, 1), (0,), weights=product),
  Case("product-rotated", quantized, vectors, (0, 1), (0,),
       weights=functools.partial(product, rotate=True)),
  Case("additive", quantized, vectors, (0, 1), (0,), weights=additive),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
