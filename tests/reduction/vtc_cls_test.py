"""VTC-CLS against a float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.reduction import vtc_cls

vtc_cls = compiled(vtc_cls)

# Attention of two layers; the sums are .5, .6, .5, .4.
LAYERS = np.array([[0.1, 0.5, 0.2, 0.2], [0.4, 0.1, 0.3, 0.2]], np.float32)


def case(seed, batch=100, tokens=12, width=3):
  """Features and scores with ties; masked ones hold NaN."""
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(batch, tokens, width)).astype(np.float32)
  scores = rng.integers(0, 6, (batch, tokens)).astype(np.float32) / 8
  mask = rng.random((batch, tokens)) < 0.75
  mask[0], mask[1] = False, True
  features = np.where(mask[..., None], features, np.float32(np.nan))
  return features, np.where(mask, scores, np.float32(np.nan)), mask


def best(scores, mask, num_keep):
  """Ascending positions of the highest valid scores, ties to the lower."""
  order = sorted(np.flatnonzero(mask), key=lambda j: (-scores[j], j))
  return sorted(order[:num_keep])


@pytest.mark.parametrize("num_keep", [1, 5, 12])
def test_keeps_what_a_loop_keeps(num_keep):
  keep = jax.jit(vtc_cls.vtc_cls, static_argnames="num_keep")
  for seed in range(4):
    features, scores, mask = case(seed)
    got = jax.device_get(keep(features, scores, mask, num_keep=num_keep))
    for b in range(len(features)):
      want = best(scores[b], mask[b], num_keep)
      count = len(want)
      np.testing.assert_array_equal(got.index[b, :count], want)
      np.testing.assert_array_equal(got.mask[b], np.arange(num_keep) < count)
      np.testing.assert_array_equal(got.tokens[b, :count], features[b, want])
      np.testing.assert_array_equal(got.tokens[b, count:], 0)


@pytest.mark.parametrize(
  "reduce, want, index",
  [
    ("sum", [0.5, 0.6, 0.5, 0.4], [0, 1]),
    ("max", [0.4, 0.5, 0.3, 0.2], [0, 1]),
    ("min", [0.1, 0.1, 0.2, 0.2], [2, 3]),
  ],
)
def test_two_layers_by_hand(reduce, want, index):
  # With d = 1, q = 1 and no [CLS] key, the softmax of log p is p.
  k = jnp.log(jnp.asarray(LAYERS))[:, None, None, :, None]
  q = jnp.ones((2, 1, 1, 1, 1))
  scores = vtc_cls.cls_scores(q, k, num_prefix=0, reduce=reduce, scale=1.0)
  np.testing.assert_allclose(scores[0], want, rtol=1e-6)
  # Ties that rounding breaks are set right before choosing.
  kept = vtc_cls.vtc_cls(jnp.ones((1, 4, 2)), jnp.round(scores, 4), num_keep=2)
  assert kept.index.tolist() == [index]


def attention_case(seed, layers=3, batch=8, heads=2, tokens=9, dim=4):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(layers, batch, heads, 1, dim)).astype(np.float32)
  k = rng.normal(size=(layers, batch, heads, 1 + tokens, dim))
  mask = rng.random((batch, tokens)) < 0.8
  return q, k.astype(np.float32), mask


@pytest.mark.parametrize("reduce", ["sum", "max", "min"])
def test_scores_equal_a_loop(reduce):
  q, k, mask = attention_case(0)
  k[:, :, :, 1:][:, ~mask[:, None].repeat(2, 1)] = np.nan
  got = vtc_cls.cls_scores(*map(jnp.asarray, (q, k, mask)), reduce=reduce)
  layers = np.zeros((3, 8, 9))
  for l, b in np.ndindex(3, 8):
    seen = np.r_[0, 1 + np.flatnonzero(mask[b])]
    for h in range(2):
      e = np.exp(k[l, b, h, seen].astype(float) @ q[l, b, h, 0] / 2)
      layers[l, b, seen[1:] - 1] += e[1:] / e.sum() / 2
  want = getattr(layers, reduce)(axis=0)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_identical_layers_choose_as_one():
  q, k, _ = map(jnp.asarray, attention_case(1, layers=1))
  features = jnp.ones((8, 9, 2))
  one = vtc_cls.cls_scores(q, k)
  four = vtc_cls.cls_scores(q.repeat(4, 0), k.repeat(4, 0))
  np.testing.assert_array_equal(
    vtc_cls.vtc_cls(features, one, num_keep=4).index,
    vtc_cls.vtc_cls(features, four, num_keep=4).index,
  )


def test_permuting_patches_permutes_scores():
  q, k, mask = map(jnp.asarray, attention_case(2))
  order = np.random.default_rng(0).permutation(9)
  want = vtc_cls.cls_scores(q, k, mask)[:, order]
  turned = jnp.concatenate([k[:, :, :, :1], k[:, :, :, 1:][..., order, :]], 3)
  got = vtc_cls.cls_scores(q, turned, mask[:, order])
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gradient_goes_to_kept_features_only():
  features, scores, mask = map(jnp.asarray, case(0))

  def total(features, scores):
    kept = vtc_cls.vtc_cls(features, scores, mask, num_keep=4)
    return jnp.sum(kept.tokens)

  clean = jnp.where(mask[..., None], features, 0)
  got, none = jax.grad(total, argnums=(0, 1))(clean, scores)
  want = np.zeros_like(got)
  for b in range(len(want)):
    want[b, best(np.asarray(scores[b]), np.asarray(mask[b]), 4)] = 1
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(none, jnp.zeros_like(none))
  q, k, mask = map(jnp.asarray, attention_case(3))
  gradient = jax.grad(lambda q: jnp.sum(vtc_cls.cls_scores(q, k, mask)))(q)
  np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


def test_batch_equals_one_by_one_and_positions_can_be_renumbered():
  features, scores, mask = map(jnp.asarray, case(4, batch=6))
  whole = vtc_cls.vtc_cls(
    features, scores, mask, num_keep=5, positions="renumber"
  )
  for b in range(6):
    alone = vtc_cls.vtc_cls(
      features[b : b + 1],
      scores[b : b + 1],
      mask[b : b + 1],
      num_keep=5,
    )
    np.testing.assert_array_equal(whole.index[b], alone.index[0])
  np.testing.assert_array_equal(whole.position_ids[1], np.arange(5))


@pytest.mark.unchecked
def test_errors_name_the_argument():
  features, scores, mask = map(jnp.asarray, case(0, batch=2))
  for arrays, message in (
    ((features, scores[:, 1:]), "features_tokens=12, scores_tokens=11"),
    ((features, scores, mask[:, 1:]), "features_tokens=12, mask_tokens=11"),
  ):
    with pytest.raises(ValueError, match=message):
      vtc_cls.vtc_cls(*arrays, num_keep=3)
  with pytest.raises(ValueError, match="num_keep must lie in 1..12, got 13"):
    vtc_cls.vtc_cls(features, scores, num_keep=13)
  q, k, mask = map(jnp.asarray, attention_case(0))
  with pytest.raises(ValueError, match="reduce must be one of 'sum'"):
    vtc_cls.cls_scores(q, k, reduce="mean")
  with pytest.raises(ValueError, match="patch_keys=9, mask_tokens=8"):
    vtc_cls.cls_scores(q, k, mask[:, 1:])
  with pytest.raises(ValueError, match="q_layers=3, k_layers=2"):
    vtc_cls.cls_scores(q, k[:2])
