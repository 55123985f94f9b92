"""Reductions inside a ViT: rows that are gone, fused, and joined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.tiny_vit import (
  attention64,
  block_of,
  cut,
  embed,
  embed64,
  encode,
  keep_all,
  mlp64,
  output,
  photos,
  tiny,
)
from tokjax.models import vit_shapes
from tokjax.models.reducing import Reduction, Taps
from tokjax.ops import plans
from tokjax.reduction import types


def by_norm(num_keep):
  """Keeps the class token and the largest others, by what is given."""

  def method(layer, x, keys, size, mask):
    assert (keys is None) == (layer == 0)
    score = jnp.sum(jnp.square(x if keys is None else keys.mean(1)), -1)
    score = jnp.where(mask, score, -jnp.inf).at[:, 0].set(jnp.inf)
    picks = jax.lax.top_k(score, num_keep[layer])[1]
    return types.selected(x, picks, jnp.take_along_axis(mask, picks, 1))

  return method


EIGHT_SIX_FOUR = by_norm({0: 8, 1: 6, 2: 4})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pool", vit_shapes.POOLS)
def test_removed_rows_equal_masked_rows(pool, padded):
  """Before block 0, in the middle of block 1, after block 2."""
  model, patches = tiny(num_layers=4, pool=pool), cut(photos(2))
  mask = np.arange(9) < np.array([[9], [5 if padded else 9]])
  forms = {}
  for form in ("remove", "mask"):
    reductions = tuple(
      Reduction(EIGHT_SIX_FOUR, (layer,), place, form)
      for layer, place in enumerate(("before", "middle", "after"))
    )
    encoded = encode(
      model,
      patches,
      mask,
      taps=Taps(reduced=(0, 1, 2), keys=(2,)),
      reductions=reductions,
    )
    forms[form] = jax.device_get((encoded, output(model, encoded)))
  (removed, small), (masked, large) = forms["remove"], forms["mask"]
  assert removed.tokens.shape[1] == 4 and masked.tokens.shape[1] == 10
  assert removed.taps[2].keys.shape[2] == 6
  np.testing.assert_allclose(small, large, atol=1e-5)
  for b in range(2):
    kept = removed.index[b][removed.mask[b]]
    np.testing.assert_array_equal(kept, np.flatnonzero(masked.mask[b]))
    np.testing.assert_allclose(
      removed.tokens[b, : len(kept)], masked.tokens[b, kept], atol=1e-5
    )
  np.testing.assert_array_equal(removed.size, removed.mask)


def test_keeping_all_is_no_reduction():
  model, images = tiny(), photos()
  want = encode(model, images)
  for place in ("before", "middle", "after"):
    got = encode(
      model, images, reductions=(Reduction(keep_all, (0, 1, 2), place),)
    )
    np.testing.assert_allclose(got.tokens, want.tokens, atol=1e-5)
    np.testing.assert_array_equal(got.index, want.index)


def merge_similar(num_merged):
  """Even rows but the first go to their most similar odd row, as in ToMe."""

  def one(x, keys, size):
    metric = keys.mean(0)
    metric = metric / jnp.linalg.norm(metric, axis=-1, keepdims=True)
    similar = metric[::2] @ metric[1::2].T
    similar = similar.at[0].set(-jnp.inf)
    best = jnp.argmax(similar, axis=1)
    order = jnp.argsort(-jnp.max(similar, axis=1))
    gone, stay = order[:num_merged], jnp.sort(order[num_merged:])
    slot = jnp.zeros(len(x), jnp.int32)
    slot = slot.at[2 * stay].set(jnp.arange(len(stay)))
    slot = slot.at[1::2].set(len(stay) + jnp.arange(len(x) // 2))
    slot = slot.at[2 * gone].set(len(stay) + best[gone])
    total = jnp.zeros(len(x) - num_merged).at[slot].add(size)
    index = jnp.concatenate([2 * stay, 1 + 2 * jnp.arange(len(x) // 2)])
    return plans.Merge(slot, size / total[slot]), index

  def method(layer, x, keys, size, mask):
    plan, index = jax.vmap(one)(x, keys, size)
    return types.fused(x, plan, index, size=size)

  return method


def merge64(x, keys, size, index, num_merged):
  metric = keys.mean(0)
  metric = metric / np.linalg.norm(metric, axis=1, keepdims=True)
  even, odd = list(range(2, len(x), 2)), list(range(1, len(x), 2))
  best = {i: max(odd, key=lambda j: metric[i] @ metric[j]) for i in even}  # noqa: B023
  order = sorted(even, key=lambda i: -(metric[i] @ metric[best[i]]))
  gone = order[:num_merged]
  rows, sizes, places = [], [], []
  for j in [0, *sorted(order[num_merged:]), *odd]:
    group = [j, *(i for i in gone if best[i] == j)]
    sizes.append(sum(size[i] for i in group))
    rows.append(sum(size[i] * x[i] for i in group) / sizes[-1])
    places.append(index[j])
  return np.array(rows), np.array(sizes), np.array(places)


@pytest.mark.parametrize("proportional", [True, False])
def test_merging_between_attention_and_mlp_equals_the_loop(proportional):
  model, images = tiny(), photos(3, batch=3)
  reduction = Reduction(merge_similar(2), layers=(0, 1, 2))
  got = jax.device_get(
    encode(model, images, reductions=(reduction,), proportional=proportional)
  )
  assert got.tokens.shape == (3, 4, 12)
  for b, image in enumerate(images):
    x = embed64(model, image)
    size, index = np.ones(len(x)), np.arange(len(x))
    for layer in range(3):
      block = block_of(model, layer)
      x, keys = attention64(block, x, size if proportional else None)
      x, size, index = merge64(x, keys, size, index, 2)
      x = mlp64(block, x)
    np.testing.assert_array_equal(got.size[b], size)
    np.testing.assert_array_equal(got.index[b], index)
    np.testing.assert_allclose(got.tokens[b], x, atol=3e-5)
  assert (got.size.sum(1) == 10).all()


@pytest.mark.parametrize("pool", vit_shapes.POOLS)
def test_merged_duplicates_weigh_what_they_did_apart(pool):
  """Equal patches without positions, fused before the first block."""
  model = tiny(pool=pool)
  model.positions[...] = np.zeros(model.positions.shape, np.float32)
  patches = cut(photos(4)).copy()
  patches[:, [3, 7]] = patches[:, 1:2]
  slot = np.array([0, 1, 2, 3, 2, 4, 5, 6, 2, 7])
  weight = np.where(slot == 2, np.float32(1 / 3), np.float32(1))
  index = np.array([0, 1, 2, 3, 5, 6, 7, 9])

  def method(layer, x, keys, size, mask):
    plan = plans.Merge(jnp.tile(slot, (2, 1)), jnp.tile(weight, (2, 1)))
    return types.fused(x, plan, jnp.tile(index, (2, 1)), size=size)

  once = Reduction(method, (0,), "before")
  want = np.asarray(embed(model, patches))
  got = embed(model, patches, reductions=(once,))
  np.testing.assert_allclose(got, want, atol=1e-5)
  plain = embed(model, patches, reductions=(once,), proportional=False)
  assert np.abs(plain - want).max() > 1e-2


def test_many_to_many_after_a_block_and_back():
  """A dense transform by attention, as Token Transforming needs."""
  model, images = tiny(), photos(5)

  def method(layer, x, keys, size, mask, queries):
    logits = jnp.einsum("bhnd,bhmd->bhnm", queries, keys)
    received = jax.nn.softmax(logits / 2, axis=-1).mean((1, 2))
    received = received.at[:, 0].set(jnp.inf)
    anchors = jnp.sort(jax.lax.top_k(received, 4)[1], axis=1)
    feature = jnp.take_along_axis(x, anchors[..., None], 1)
    similar = jnp.exp(jnp.einsum("bkd,bnd->bkn", feature, x) / 50)
    share = similar / similar.sum(1, keepdims=True)
    weight = similar * size[:, None]
    weight = weight / weight.sum(2, keepdims=True)
    return types.fused(x, plans.Transform(weight, share), anchors, size=size)

  reduction = Reduction(method, (1,), "after", queries=True)
  taps = Taps(hidden=(1,), reduced=(1,))
  found = encode(model, images, taps=taps, reductions=(reduction,))
  got = jax.device_get(found)
  assert got.tokens.shape == (2, 4, 12) and got.taps[1].hidden.shape[1] == 4
  np.testing.assert_allclose(got.size.sum(1), 10, rtol=1e-5)
  assert (got.index[:, 0] == 0).all()
  before = np.asarray(
    encode(model, images, taps=Taps(hidden=(1,))).taps[1].hidden
  )
  reduced = got.taps[1].reduced
  np.testing.assert_allclose(
    got.taps[1].hidden, reduced.plan.weight @ before, atol=1e-4
  )
  block, size = block_of(model, 2), got.size
  for b in range(2):
    x = got.taps[1].hidden[b].astype(np.float64)
    want = mlp64(block, attention64(block, x, size[b])[0])
    np.testing.assert_allclose(got.tokens[b], want, atol=2e-5)
  restored = jax.eval_shape(lambda r, x: r.restore(x, 10), reduced, got.tokens)
  assert restored.shape == (2, 10, 12)


def test_frames_are_joined_before_a_block():
  """Two frames become one, their class tokens averaged, as CenterCLIP."""
  model, images = tiny(), photos(6, batch=6)
  picks = np.array([1, 4, 12, 17])  # rows 1 and 4 of frame 0, 2 and 7 of 1

  def method(layer, x, keys, size, mask):
    assert x.shape == (3, 20, 12) and mask.shape == (3, 20)
    slot = jnp.full(20, 5).at[jnp.array([0, 10])].set(0)
    slot = slot.at[picks].set(jnp.arange(1, 5))
    weight = jnp.where(slot == 0, 0.5, 1.0)
    plan = plans.Merge(jnp.tile(slot, (3, 1)), jnp.tile(weight, (3, 1)))
    index = jnp.concatenate([jnp.zeros(1, jnp.int32), picks])
    return types.fused(x, plan, jnp.tile(index, (3, 1)), size=size)

  reduction = Reduction(method, (2,), "before", frames=2)
  got = jax.device_get(
    encode(model, images, reductions=(reduction,), proportional=False)
  )
  assert got.tokens.shape == (3, 5, 12)
  np.testing.assert_array_equal(got.index[0], [0, 1, 4, 12, 17])
  np.testing.assert_array_equal(got.size[0], [2, 1, 1, 1, 1])
  lower = encode(model, images, taps=Taps(hidden=(1,))).taps[1].hidden
  lower = np.asarray(lower, np.float64).reshape(3, 20, 12)
  for b in range(3):
    first = (lower[b, 0] + lower[b, 10]) / 2
    x = np.concatenate([first[None], lower[b][picks]])
    block = block_of(model, 2)
    want = mlp64(block, attention64(block, x)[0])
    np.testing.assert_allclose(got.tokens[b], want, atol=2e-5)
  assert output(model, got).shape == (3, 5)


def test_fusing_has_no_masked_form():
  reduction = Reduction(merge_similar(1), (1,), form="mask")
  with pytest.raises(ValueError, match="got 'mask' at layer 1"):
    embed(tiny(), photos(), reductions=(reduction,))


def test_gradient_flows_through_kept_rows_only():
  model, images = tiny(num_layers=1), photos(batch=1)

  def first_three(layer, x, keys, size, mask):
    return types.selected(x, jnp.array([[0, 1, 2]]))

  reduction = Reduction(first_three, (0,), "before")
  gradient = jax.jit(
    jax.grad(lambda x: jnp.sum(jnp.sin(model(x, reductions=(reduction,)))))
  )(cut(images))
  gradient = np.asarray(gradient)
  assert (np.abs(gradient[0, :2]).max(1) > 0).all()
  assert (gradient[0, 2:] == 0).all()
