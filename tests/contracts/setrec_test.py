"""Contracts of SETRec, SASRec and the scores of item sets."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled
from tokjax.ops import item_sets
from tokjax.tokenizers import sasrec
from tokjax.tokenizers.sasrec import SasrecConfig
from tokjax.tokenizers.setrec import SetRecConfig

WEIGHTS = (0.5, 0.25, 0.25)


def items(seed):
  keys = jax.random.split(jax.random.key(seed), 5)
  cf = jax.random.normal(keys[0], (9, 3))
  features = jax.random.normal(keys[1], (9, 5))
  history = jax.random.randint(keys[2], (8, 3), -1, 9)
  target = jax.random.randint(keys[3], (8,), 0, 9)
  return cf, features, history, target


def sets(seed):
  keys = jax.random.split(jax.random.key(seed))
  answers = jax.random.normal(keys[0], (8, 3, 4))
  return answers, jax.random.normal(keys[1], (3, 9, 4))


def cast(model, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), model)


def losses(model, cf, features, history, target):
  return cast(model, cf.dtype).losses(cf, features, history, target)


def answers(model, cf, features, history, target):
  setrec = cast(model, cf.dtype)
  catalogue = setrec.catalogue(cf, features)
  return setrec(setrec.histories(catalogue, history), history >= 0)


def next_item(model, cf, features, history, target):
  target = jnp.broadcast_to(target[:, None], history.shape)
  return sasrec.next_item_loss(model, history, target)


def score(answers, catalogue):
  return item_sets.set_score(
    answers.swapaxes(0, 1), catalogue, jnp.array(WEIGHTS)
  )


def top(answers, catalogue):
  return item_sets.set_top_k(
    answers.swapaxes(0, 1), catalogue, jnp.array(WEIGHTS), k=2, block_size=4
  )


def loss(answers, catalogue):
  target = jnp.arange(8, dtype=jnp.int32)
  return item_sets.set_loss(answers.swapaxes(0, 1), catalogue, target)


def setrec():
  config = SetRecConfig(
    cf_dim=3, feature_dim=5, num_semantic=2, hidden=(4,), width=8,
    num_layers=1, history=3,
  )  # fmt: skip
  return filled(lambda: config.build(nnx.Rngs(0)))


def next_items():
  config = SasrecConfig(9, width=8, num_layers=1, history=3)
  return filled(lambda: config.build(nnx.Rngs(0)))


CASES = [
  Case("setrec-losses", losses, items, (2, 3), (0, 1), weights=setrec),
  Case("setrec-answers", answers, items, (2,), (0, 1), weights=setrec),
  Case("sasrec-loss", next_item, items, (2, 3), weights=next_items),
  Case("set-score", score, sets, (0,), (0, 1), bfloat16_tolerance=0.1),
  Case("set-top-k", top, sets, bfloat16_tolerance=0.1),
  Case("set-loss", loss, sets, (0,), (0, 1)),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
