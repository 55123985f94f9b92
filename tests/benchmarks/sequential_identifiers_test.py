"""The baseline of SETRec: codes emitted one after the other."""

import jax
import numpy as np
from flax import nnx

from tokjax.benchmarks import sequential_identifiers as sequential
from tokjax.benchmarks.sequential_identifiers import SequentialConfig

CODES = np.array([[0, 0], [0, 1], [1, 0], [2, 2], [1, 2]], np.int32)
CONFIG = SequentialConfig(3, 2, width=8, num_layers=2, history=3)


def test_trie_leads_to_the_items_that_may_be_found():
  mask = np.array([1, 1, 0, 1, 1], bool)
  tree = sequential.trie(CODES, mask, num_codes=3)
  for item, (first, second) in enumerate(CODES.tolist()):
    node = int(tree.child[0, first])
    leaf = int(tree.child[node, second])
    found = -1 if leaf < 0 else int(tree.item[leaf])
    assert found == (item if mask[item] else -1)
  assert int(tree.child[int(tree.child[0, 2]), 0]) == -1


def test_codes_tell_all_items_apart():
  x = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
  x[7] = x[3]
  codes = sequential.item_codes(x, num_codes=4, num_places=3)
  assert codes.shape == (12, 3)
  assert len({tuple(row) for row in codes.tolist()}) == 12
  np.testing.assert_array_equal(codes[7, :2], codes[3, :2])
  assert codes[3, 2] < codes[7, 2]


def test_a_wide_beam_finds_the_order_of_the_likelihoods():
  """With kept keys and values, in passes: what one pass over all says."""
  model = jax.jit(lambda: CONFIG.build(nnx.Rngs(0)))()
  history = np.array([[-1, 4, 2], [3, 0, 1]], np.int32)
  loss = jax.jit(type(model).loss)
  want = np.array(
    [
      [loss(model, CODES, row[None], np.array([item])) for item in range(5)]
      for row in history
    ]
  )
  tree = sequential.trie(CODES, np.ones(5, bool), num_codes=3)
  generate = jax.jit(type(model).generate, static_argnames="beam_size")
  got = generate(model, CODES, history, tree, beam_size=6)
  np.testing.assert_array_equal(got[:, :5], np.argsort(want, axis=1))
  assert (got[:, 5] == -1).all()
