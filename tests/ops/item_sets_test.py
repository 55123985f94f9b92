"""Sets of item tokens: positions, who reads whom, scores and their loss."""

import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.ops import item_sets

item_sets = compiled(item_sets, leave=("set_mask", "set_positions"))

EIGHT = {
  "num_instruction": 1,
  "num_items": 2,
  "set_size": 2,
  "num_response": 1,
  "num_queries": 2,
}


def sets(n=3, batch=2, items=7, width=4, seed=0):
  rng = np.random.default_rng(seed)
  answers = rng.standard_normal((n, batch, width)).astype(np.float32)
  catalogue = rng.standard_normal((n, items, width)).astype(np.float32)
  weights = np.linspace(0.2, 0.7, n).astype(np.float32)
  return answers, catalogue, weights


def by_loop(answers, catalogue, weights):
  n, batch, _ = answers.shape
  scores = np.zeros((batch, catalogue.shape[1]))
  for j in range(n):
    for b in range(batch):
      for v in range(catalogue.shape[1]):
        dot = np.dot(answers[j, b].astype(float), catalogue[j, v].astype(float))
        scores[b, v] += weights[j] * dot
  return scores


def test_mask_of_eight_tokens():
  mask = item_sets.set_mask(**EIGHT)
  reads = [np.flatnonzero(row).tolist() for row in mask]
  assert reads == [
    [0],
    [0, 1],
    [0, 2],
    [0, 1, 2, 3],
    [0, 1, 2, 4],
    [0, 1, 2, 3, 4, 5],
    [0, 1, 2, 3, 4, 5, 6],
    [0, 1, 2, 3, 4, 5, 7],
  ]
  positions = item_sets.set_positions(**EIGHT)
  assert positions.tolist() == [0, 1, 1, 2, 2, 5, 6, 7]
  assert positions.dtype == np.int32


def test_mask_is_its_definition():
  sizes = {**EIGHT, "num_instruction": 2, "num_items": 3, "set_size": 3}
  mask = item_sets.set_mask(**sizes)
  item = [-1] * 2 + [0] * 3 + [1] * 3 + [2] * 3 + [-1] + [3] * 2
  for q in range(len(item)):
    for k in range(len(item)):
      apart = item[q] < 0 or item[k] != item[q] or k == q
      assert mask[q, k] == (k <= q and apart)


def test_encoder_reads_all_and_queries_only_themselves():
  mask = item_sets.set_mask(**EIGHT, causal=False)
  assert mask[:6, :6].all() and not mask[:6, 6:].any()
  assert mask[6:, :6].all()
  np.testing.assert_array_equal(mask[6:, 6:], np.eye(2, dtype=bool))


def test_worked_scores():
  answers = np.ones((2, 1, 1), np.float32)
  catalogue = np.array([[[1], [3]], [[4], [1]]], np.float32)
  even = item_sets.set_score(answers, catalogue, np.array([0.5, 0.5], "f"))
  np.testing.assert_allclose(even, [[2.5, 2.0]], rtol=1e-6)
  uneven = item_sets.set_score(answers, catalogue, np.array([0.9, 0.1], "f"))
  np.testing.assert_allclose(uneven, [[1.3, 2.8]], rtol=1e-6)


def test_score_is_a_loop():
  np.testing.assert_allclose(
    item_sets.set_score(*sets()), by_loop(*sets()), rtol=1e-5, atol=1e-5
  )


def test_one_slot_is_retrieval_by_one_vector():
  answers, catalogue, _ = sets(n=1)
  got = item_sets.set_score(answers, catalogue, np.ones(1, np.float32))
  np.testing.assert_allclose(got, answers[0] @ catalogue[0].T, rtol=1e-5)


def test_order_of_slots_means_nothing():
  order = np.array([2, 0, 1])
  answers, catalogue, weights = sets()
  got = item_sets.set_score(answers[order], catalogue[order], weights[order])
  want = item_sets.set_score(answers, catalogue, weights)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_size", [3, 16])
def test_top_k_in_blocks_and_under_a_mask(block_size):
  mask = np.array([1, 0, 1, 1, 0, 1, 1], bool)
  found = item_sets.set_top_k(*sets(), k=3, block_size=block_size, mask=mask)
  scores = np.where(mask[None], by_loop(*sets()), -np.inf)
  order = np.argsort(-scores, axis=1)[:, :3]
  np.testing.assert_array_equal(found.index, order)
  np.testing.assert_allclose(
    found.values, np.take_along_axis(scores, order, 1), rtol=1e-5, atol=1e-5
  )


def test_loss_is_the_mean_of_all_cross_entropies():
  answers, catalogue, _ = sets(batch=3)
  mask = np.array([1, 0, 1, 1, 1, 1, 1], bool)
  target = np.array([2, -1, 6], np.int32)
  got = item_sets.set_loss(answers, catalogue, target, mask)
  losses = []
  for j in range(3):
    for b in (0, 2):
      scores = catalogue[j].astype(float) @ answers[j, b].astype(float)
      losses.append(np.log(np.exp(scores[mask]).sum()) - scores[target[b]])
  np.testing.assert_allclose(got, np.mean(losses), rtol=1e-5)


def test_errors():
  answers, catalogue, weights = sets()
  with pytest.raises(ValueError, match="answers=3, catalogue=3, weights=2"):
    item_sets.set_score(answers, catalogue, weights[:2])
  with pytest.raises(ValueError, match="answers_dim=4, catalogue_dim=3"):
    item_sets.set_score(answers, catalogue[..., :3], weights)
  with pytest.raises(ValueError, match="set_size must lie in"):
    item_sets.set_mask(**{**EIGHT, "set_size": 0})
