"""Contracts of ColBERTer: one row per function of arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled
from tokjax.retrieval import colberter
from tokjax.retrieval.colberter import ColberterConfig, ColberterHead

SUMS = 2e-5  # sums of at most 6 products of width 4


def floats(random, *shape):
  return jnp.asarray(random.standard_normal(shape), jnp.float32)


def word_ids(random, *shape):
  """Ids near 2**32, each once in a row, 0 in the last slot."""
  ids = np.zeros(shape, np.uint32)
  for row in np.ndindex(shape[:-1]):
    ids[row] = np.uint32(2**32 - 20) + random.permutation(9)[: shape[-1]]
  ids[..., -1] = 0
  return jnp.asarray(ids)


def tokens(seed):
  random = np.random.default_rng(seed)
  unique = word_ids(random, 8, 6)
  slots = jnp.asarray(random.integers(0, 6, (8, 9)))
  of_token = jnp.take_along_axis(unique, slots, axis=1)
  return floats(random, 8, 9, 4), of_token, unique


def passages(seed):
  random = np.random.default_rng(seed)
  mask = jnp.asarray(random.random((8, 6)) < 0.7)
  return floats(random, 8, 6, 4), floats(random, 4), jnp.ones(()), mask


def bags(random, *shape):
  mask = random.random(shape) < 0.7
  mask[..., 0] = True  # no document without words: its score is -1e9
  return floats(random, *shape[:-1], 3), floats(random, *shape, 4), mask


def both_sides(seed, *, documents, exact):
  random = np.random.default_rng(seed)
  query, document = bags(random, 8, 5), bags(random, *documents, 6)
  ids = word_ids(random, 8, 5), word_ids(random, *documents, 6)
  arrays = (*query, *document, floats(random))
  return tuple(map(jnp.asarray, arrays + (ids if exact else ())))


def hidden_states(seed):
  random = np.random.default_rng(seed)
  _, of_token, unique = tokens(seed)
  mask = jnp.asarray(np.arange(9)[None] < random.integers(3, 9, (8, 1)))
  return floats(random, 8, 9, 5), mask, of_token, unique


def head(stage):
  config = ColberterConfig.stage(
    stage, hidden_dim=5, cls_dim=3, token_dim=4, exact_match=False
  )
  return filled(lambda: ColberterHead(config, rngs=nnx.Rngs(0)))


def encode(side, head, *arrays):
  bags = getattr(head, side)(*arrays)
  return bags._replace(word_ids=bags.mask)  # a gradient has no use for ids


def score_lists(seed):
  random = np.random.default_rng(seed)
  mask = jnp.asarray(random.random((8, 3, 6)) < 0.7).at[..., 0].set(True)
  scores = [floats(random, 8, 3) for _ in range(3)]
  return *scores, jnp.abs(floats(random, 8, 3, 6)), mask


def loss(scores, cls_scores, teacher, gates, mask):
  found = colberter.Scores(scores, cls_scores, scores)
  return colberter.loss(found, teacher, gates, mask)


def drop(cls, words, mask, gates):
  ids = jnp.ones(mask.shape, jnp.uint32)
  bags = colberter.Bags(cls, words, mask, ids, gates)
  return colberter.drop_stopwords(bags)[1:3]


def gated(seed):
  random = np.random.default_rng(seed)
  cls, words, mask = map(jnp.asarray, bags(random, 8, 6))
  return cls, words, mask, jax.nn.relu(floats(random, 8, 6))


CASES = (
  [
    Case(
      "pool_words",
      colberter.pool_words,
      tokens,
      batched=(0, 1, 2),
      differentiable=(0,),
    ),
    Case(
      "stopword_gate",
      colberter.stopword_gate,
      passages,
      batched=(0, 3),
      differentiable=(0, 1, 2),
    ),
    Case(
      "gate_sparsity",
      lambda vectors, mask: colberter.gate_sparsity(vectors[..., 0], mask),
      lambda seed: passages(seed)[::3],
      batched=(0, 1),
      differentiable=(0,),
    ),
    Case(
      "drop_stopwords",
      drop,
      gated,
      batched=(0, 1, 2, 3),
      differentiable=(1,),
    ),
    Case(
      "loss",
      loss,
      score_lists,
      batched=(0, 1, 2, 3, 4),
      differentiable=(0, 1, 3),
      tolerance=SUMS,
      bfloat16_tolerance=0.1,  # squares of differences of about 3
    ),
  ]
  + [
    Case(
      f"{name}{'-exact' if exact else ''}",
      # Two rows share a function; jit must not share what it compiled.
      lambda *arrays, function=function: function(*arrays),
      functools.partial(both_sides, documents=documents, exact=exact),
      batched=(0, 1, 2, 3, 4, 5, 7, 8),
      differentiable=(0, 1, 3, 4, 6),
      tolerance=SUMS,
    )
    for name, function, documents in (
      ("score", colberter.score, (8,)),
      ("score_pairs", colberter.score_pairs, (8, 3)),
    )
    for exact in (False, True)
  ]
  + [
    Case(
      f"head-{stage}-{side}",
      functools.partial(encode, side),
      hidden_states,
      batched=(0, 1, 2, 3),
      differentiable=(0,),
      tolerance=SUMS,
      weights=functools.partial(head, stage),
    )
    for stage, side in (
      (1, "passages"),
      (3, "passages"),
      (4, "passages"),
      (4, "queries"),
    )
  ]
)


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
