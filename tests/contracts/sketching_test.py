"""Contracts of the sketches, codecs, clusterings and MUVERA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.ops import clustering, quantize, sketching
from tokjax.retrieval import muvera

FDE = muvera.FDEConfig(
  dim=16, num_simhash_bits=3, num_repetitions=4, projection_dim=8
)
FINAL = dataclasses.replace(FDE, final_dim=40)
PLANES = sketching.init_hyperplanes(jax.random.key(7), (16, 4))
SIGNS = sketching.init_signs(jax.random.key(8), (16, 4))
SKETCH = sketching.init_count_sketch(jax.random.key(9), (16,), num_outputs=6)
BOOK = jax.random.normal(jax.random.key(10), (4, 32, 4))


def rows(seed, num_rows=24):
  return (jax.random.normal(jax.random.key(seed), (num_rows, 16)),)


@jax.jit
def texts(seed):
  x_key, mask_key = jax.random.split(jax.random.key(seed))
  x = jax.random.normal(x_key, (8, 11, 16))
  return x, jax.random.bernoulli(mask_key, 0.7, x.shape[:2])


@jax.jit
def packed(seed):
  x, _ = texts(seed)
  key = jax.random.fold_in(jax.random.key(seed), 1)
  ids = jnp.sort(jax.random.randint(key, (88,), 0, 9))
  return x.reshape(88, 16), ids


@jax.jit
def codes(seed):
  key = jax.random.key(seed)
  codes = jax.random.randint(key, (24, 4), 0, 32).astype(jnp.uint8)
  return codes, jax.random.normal(jax.random.fold_in(key, 1), (8, 16))


@jax.jit
def small(seed):
  key = jax.random.key(seed)
  return (jax.random.randint(key, (8, 16), 0, 4).astype(jnp.uint8),)


@jax.jit
def cells(seed):
  return (jax.random.randint(jax.random.key(seed), (8, 3, 16), 0, 14),)


def fde(name, encode, config):
  params = muvera.init(jax.random.key(3), config)
  return Case(
    name,
    functools.partial(encode, params, config),
    texts,
    batched=(0, 1),
    differentiable=(0,),
  )


CASES = [
  Case("simhash_bits", lambda x: sketching.simhash_bits(x, PLANES), rows),
  Case(
    "bits_to_index",
    lambda x: sketching.bits_to_index(x > 0),
    rows,
  ),
  Case(
    "nearest_by_hamming",
    lambda first: sketching.nearest_by_hamming(first, num_tokens=9),
    cells,
  ),
  Case(
    "sign_projection",
    lambda x: sketching.sign_projection(x, SIGNS),
    rows,
    differentiable=(0,),
  ),
  Case(
    "count_sketch",
    lambda x: sketching.count_sketch(x, SKETCH, num_outputs=6),
    rows,
    differentiable=(0,),
  ),
  Case(
    "assign",
    lambda x: clustering.assign(x, BOOK.reshape(32, 16), block_size=10),
    rows,
    batched=(),
  ),
  Case(
    "kmeans",
    lambda x: clustering.kmeans(
      jax.random.key(0), x, num_clusters=4, num_iterations=3
    ),
    rows,
    batched=(),
  ),
  Case(
    "masked_kmeans",
    functools.partial(clustering.masked_kmeans, num_clusters=3),
    texts,
    batched=(0, 1),
    differentiable=(0,),
  ),
  Case("pack_bits", functools.partial(quantize.pack_bits, num_bits=2), small),
  Case(
    "unpack_bits", functools.partial(quantize.unpack_bits, num_bits=4), small
  ),
  Case(
    "bucketize",
    lambda x: quantize.bucketize(x, jnp.array([-0.5, 0.0, 0.5])),
    rows,
  ),
  Case(
    "bucket_cutoffs",
    functools.partial(quantize.bucket_cutoffs, num_bits=2),
    rows,
    batched=(),
  ),
  Case(
    "bucket_weights",
    functools.partial(quantize.bucket_weights, num_bits=2),
    rows,
    batched=(),
  ),
  Case("quantize_rows", quantize.quantize_rows, rows),
  Case(
    "dequantize_rows",
    lambda x: quantize.dequantize_rows(quantize.quantize_rows(x)),
    rows,
  ),
  Case(
    "pq_train",
    lambda x: quantize.pq_train(
      jax.random.key(0), x, group_size=4, num_centroids=5
    ),
    rows,
    batched=(),
  ),
  Case("pq_encode", lambda x: quantize.pq_encode(BOOK, x), rows, batched=()),
  Case(
    "pq_decode",
    lambda c, q: quantize.pq_decode(BOOK, c),
    codes,
    batched=(),
  ),
  Case(
    "pq_scores-table",
    lambda c, q: quantize.pq_scores(BOOK, c, q),
    codes,
    batched=(),
  ),
  Case(
    "pq_scores-decoding",
    lambda c, q: quantize.pq_scores(
      BOOK, c, jnp.concatenate([q, q]), block_size=10
    ),
    codes,
    batched=(),
  ),
  fde("encode_queries", muvera.encode_queries, FDE),
  fde("encode_queries-final", muvera.encode_queries, FINAL),
  fde("encode_documents", muvera.encode_documents, FDE),
  fde("encode_documents-final", muvera.encode_documents, FINAL),
  Case(
    "encode_packed",
    lambda x, ids: muvera.encode_packed(
      muvera.init(jax.random.key(3), FDE), FDE, x, ids, num_documents=8
    ),
    packed,
    batched=(),
    differentiable=(0,),
  ),
  # A threshold that no inner product of bfloat16 numbers comes near.
  Case(
    "ball_carve",
    functools.partial(muvera.ball_carve, threshold=4.0),
    texts,
    batched=(0, 1),
    differentiable=(0,),
    bfloat16_tolerance=0.1,
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
