"""Contracts of encoders, scoring masks, heads and pooling."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled
from tokjax.models import bert
from tokjax.ops import pooling
from tokjax.retrieval import colbert, masks

CONFIG = bert.BertConfig(
  vocab_size=30,
  width=12,
  num_layers=2,
  num_heads=3,
  mlp_width=20,
  max_positions=16,
)


def built():
  return filled(lambda: bert.Bert(CONFIG, rngs=nnx.Rngs(0)))


def bert_forward(model, ids, attention_mask):
  return model(ids, attention_mask)


def token_ids(seed):
  ids_key, length_key = jax.random.split(jax.random.key(seed))
  ids = jax.random.randint(ids_key, (8, 7), 0, 30)
  lengths = jax.random.randint(length_key, (8, 1), 1, 8)
  return ids, jnp.arange(7)[None] < lengths


def features(seed):
  values = jax.random.normal(jax.random.key(seed), (8, 7, 12))
  return values, token_ids(seed)[1]


def projected(seed):
  matrix = jax.random.normal(
    jax.random.fold_in(jax.random.key(seed), 9), (12, 4)
  )
  return (matrix, *features(seed))


def heads(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  return (
    *(jax.random.normal(key, (8, 7, 3, 4)) for key in keys),
    token_ids(seed)[1],
  )


CASES = [
  Case(
    "bert",
    bert_forward,
    token_ids,
    batched=(0, 1),
    bfloat16_tolerance=None,
    weights=built,
  ),
  Case("attend", bert.attend, heads, (0, 1, 2, 3), (0, 1, 2)),
  Case("mean_pool", pooling.mean_pool, features, (0, 1), (0,)),
  Case("encode_head", colbert.encode_head, projected, (1, 2), (0, 1)),
  Case(
    "scoring_mask_document",
    lambda ids, mask: masks.scoring_mask_document(ids, mask, jnp.array([3, 4])),
    token_ids,
    batched=(0, 1),
  ),
  Case(
    "scoring_mask_query",
    masks.scoring_mask_query,
    token_ids,
    batched=(0, 1),
  ),
  Case(
    "expand_queries",
    lambda ids, mask: masks.expand_queries(ids, mask, mask_id=1, length=9),
    token_ids,
    batched=(0, 1),
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
