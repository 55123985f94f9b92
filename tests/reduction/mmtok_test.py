"""MMTok: coverage of text and image, and the cleaning of questions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.kernels.greedy_select import greedy_select
from tokjax.reduction import mmtok as mmtok_lib
from tokjax.reduction.mmtok import (
  NO_QUESTION,
  STOP_WORDS,
  clean_question,
  mmtok,
)

mmtok_lib = compiled(mmtok_lib)

run = jax.jit(
  mmtok, static_argnames=("num_keep", "positions", "implementation")
)


def unit(x):
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def covers(x, vision, text, mask, text_mask, alpha=0.5, tau=0.02, sigma=0.2):
  """P and alpha Q below each other, float64, valid rows and columns only."""

  def shares(targets, tokens, temperature):
    logits = unit(targets) @ unit(tokens).T / temperature
    rise = np.exp(logits - logits.max(axis=1, keepdims=True))
    return rise / rise.sum(axis=1, keepdims=True) / len(targets)

  if not mask.any():
    return np.zeros((0, 0))
  x, vision, text = (
    np.asarray(part, np.float64)[keep]
    for part, keep in ((x, mask), (vision, mask), (text, text_mask))
  )
  of_image = alpha * shares(vision, vision, sigma)
  if not len(text):
    return of_image
  return np.concatenate([shares(text, x, tau), of_image])


def greedy(table, allowed, num_keep):
  """Kept columns and the smallest lead of a choice over another column."""
  best, kept, lead = np.zeros(len(table)), [], np.inf
  while len(kept) < min(num_keep, allowed.sum()):
    # Equal tokens gain the same, up to the last digits.
    gain = np.maximum(table - best[:, None], 0).sum(axis=0).round(12)
    free = [j for j in np.flatnonzero(allowed) if j not in kept]
    order = sorted(free, key=lambda j: (-gain[j], j))
    alike = np.abs(table - table[:, order[:1]]).max(axis=0) < 1e-12
    others = [j for j in free if not alike[j]]
    lead = min([lead, *(gain[order[0]] - gain[others])])
    kept.append(order[0])
    best = np.maximum(best, table[:, order[0]])
  return kept, lead


def cases(seed, batch=250, num_tokens=9, num_texts=4):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(batch, num_tokens, 5)).astype(np.float32)
  vision = rng.normal(size=(batch, num_tokens, 3)).astype(np.float32)
  text = rng.normal(size=(batch, num_texts, 5)).astype(np.float32)
  mask = rng.random((batch, num_tokens)) < 0.8
  text_mask = rng.random((batch, num_texts)) < 0.8
  candidates = rng.random((batch, num_tokens)) < 0.8
  mask[0] = False
  text_mask[1] = False
  mask[2], text_mask[2], candidates[2] = True, True, True
  return x, vision, text, mask, text_mask, candidates


def test_equals_a_loop():
  x, vision, text, mask, text_mask, candidates = cases(0, batch=400)
  twice = slice(300, None)  # the first four tokens once more
  x[twice, 5:], vision[twice, 5:] = x[twice, :4], vision[twice, :4]
  arrays = (
    np.where(mask[:, :, None], x, np.nan),
    np.where(mask[:, :, None], vision, np.nan),
    np.where(text_mask[:, :, None], text, np.nan),
    mask,
    text_mask,
    candidates,
  )
  for num_keep in (1, 3, 9):
    got = jax.device_get(run(*arrays, num_keep=num_keep))
    assert np.isfinite(got.tokens).all()
    sure = 0
    for b in range(len(x)):
      table = covers(x[b], vision[b], text[b], mask[b], text_mask[b])
      valid = np.flatnonzero(mask[b])
      want, lead = greedy(table, candidates[b][valid], num_keep)
      kept = got.mask[b]
      assert kept.sum() == len(want)
      if lead > 1e-5:
        sure += 1
        np.testing.assert_array_equal(
          got.index[b][kept], np.sort(valid[np.array(want, int)])
        )
    assert sure > (200 if num_keep < 9 else 50)


def circle(*degrees):
  angle = np.deg2rad(degrees)
  return jnp.asarray(
    np.stack([np.cos(angle), np.sin(angle)], -1)[None], jnp.float32
  )


def test_worked_example():
  x, text = circle(0, 5, 90, 100), circle(95)
  assert run(x, x, text, num_keep=2).index[0].tolist() == [0, 2]
  one, four = jnp.ones(1, bool), jnp.ones(4, bool)
  of_text = mmtok_lib._cover(text[0], x[0], one, four, 0.02)
  of_image = mmtok_lib._cover(x[0], x[0], four, four, 0.2)
  np.testing.assert_allclose(of_text, [[0, 0, 0.5, 0.5]], atol=1e-4)
  np.testing.assert_allclose(
    of_image[0], [0.1256, 0.1232, 0.0008, 0.0004], atol=1e-4
  )
  np.testing.assert_allclose(of_image[1, :2], [0.1229, 0.1253], atol=1e-4)
  np.testing.assert_allclose(of_image[2, 2:], [0.1286, 0.1192], atol=1e-4)
  np.testing.assert_allclose(of_image[3, 2:], [0.1198, 0.1293], atol=1e-4)
  table = jnp.concatenate([of_text, 0.5 * of_image])[None]
  picks = greedy_select(table, num_keep=2, objective="coverage")
  assert picks.index[0].tolist() == [2, 0]
  np.testing.assert_allclose(picks.gain[0], [0.6253, 0.1232], atol=1e-4)
  for j, gain in enumerate([0.1249, 0.1252, 0.6253, 0.6247]):
    first = greedy_select(
      table, num_keep=1, objective="coverage", first=jnp.array([j])
    )
    np.testing.assert_allclose(first.gain[0, 0], gain, atol=1e-4)


def test_alpha_0_takes_the_best_match_of_the_text_then_the_first():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(20, 8, 5)), jnp.float32)
  text = jnp.asarray(rng.normal(size=(20, 1, 5)), jnp.float32)
  got = run(x, x, text, num_keep=3, alpha=0.0, text_temperature=0.5)
  for b in range(20):
    best = int(np.argmax((unit(text[b]) @ unit(x[b]).T)[0]))
    rest = [j for j in range(8) if j != best][:2]
    assert got.index[b].tolist() == sorted([best, *rest])


def test_hot_vision_softmax_leaves_the_choice_to_the_text():
  x, vision, text, *_ = cases(2, batch=40)
  arrays = [jnp.asarray(a) for a in (x, vision, text)]
  hot = run(*arrays, num_keep=1, vision_temperature=1e9)
  none = run(*arrays, num_keep=1, alpha=0.0)
  np.testing.assert_array_equal(hot.index, none.index)


def test_duplicated_texts_change_weights_only():
  x, vision, text, *_ = cases(3, batch=40)
  arrays = [jnp.asarray(a) for a in (x, vision, text)]
  twice = jnp.concatenate([arrays[2], arrays[2]], axis=1)
  want = run(*arrays, num_keep=3)
  got = run(*arrays[:2], twice, num_keep=3)
  np.testing.assert_array_equal(got.index, want.index)


def test_at_least_1_minus_1_over_e_of_the_best():
  x, vision, text, *_ = cases(4, batch=40)
  got = run(*(jnp.asarray(a) for a in (x, vision, text)), num_keep=3)
  subsets = np.array(list(itertools.combinations(range(9), 3)))
  every, texts = np.ones(9, bool), np.ones(4, bool)
  for b in range(40):
    table = covers(x[b], vision[b], text[b], every, texts)
    best = table[:, subsets].max(axis=-1).sum(axis=0).max()
    ours = table[:, np.asarray(got.index[b])].max(axis=1).sum()
    assert ours >= (1 - 1 / np.e) * best


def test_padding_changes_nothing():
  x, vision, text, *_ = cases(5, batch=20)
  want = run(*(jnp.asarray(a) for a in (x, vision, text)), num_keep=3)

  def pad(a, by):
    hole = np.full((20, by, a.shape[2]), np.nan, np.float32)
    return jnp.asarray(np.concatenate([a, hole], axis=1))

  mask, text_mask = np.arange(14) < 9, np.arange(6) < 4
  got = run(
    pad(x, 5),
    pad(vision, 5),
    pad(text, 2),
    jnp.asarray(np.tile(mask, (20, 1))),
    jnp.asarray(np.tile(text_mask, (20, 1))),
    num_keep=3,
  )
  np.testing.assert_array_equal(got.index, want.index)


def test_identity_positions_and_gradient():
  x, vision, text, *_ = (jnp.asarray(a) for a in cases(6, batch=4))
  np.testing.assert_array_equal(run(x, vision, text, num_keep=9).tokens, x)
  got = run(x, vision, text, num_keep=3, positions="renumber")
  assert got.position_ids[0].tolist() == [0, 1, 2]

  def total(x, vision, text):
    return run(x, vision, text, num_keep=3).tokens.sum()

  gradients = jax.grad(total, (0, 1, 2))(x, vision, text)
  want = np.zeros(x.shape, np.float32)
  for b in range(4):
    want[b, np.asarray(got.index[b])] = 1
  np.testing.assert_array_equal(gradients[0], want)
  assert not np.any(gradients[1]) and not np.any(gradients[2])


def test_nothing_larger_than_one_table_is_held():
  shapes = ((1, 60, 4), (1, 60, 4), (1, 7, 4))
  program = jax.make_jaxpr(functools.partial(mmtok, num_keep=5))(
    *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  )

  def largest(jaxpr):
    sizes = [0]
    for eqn in jaxpr.eqns:
      sizes += [v.aval.size for v in eqn.outvars if hasattr(v.aval, "size")]
      for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
      ):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          sizes.append(largest(inner))
    return max(sizes)

  # The kernel of another platform may round the rows up to whole tiles.
  assert largest(program.jaxpr) <= (60 + 7 + 8) * 60


def test_questions_are_cleaned():
  assert len(STOP_WORDS) == 47
  short = "\nAnswer the question using a single word or phrase."
  letter = "\nAnswer with the option's letter from the given choices directly."
  for text, want in {
    "<image>\nWhat is the color of the cat?" + short: "color of cat",
    "Which animals are red, and which are blue?" + letter: "animals red blue",
    "<image>\n<image> A DOG or the Cat": "DOG Cat",
    "What is it?": "What is it?",
    "<image>" + short: NO_QUESTION,
    "": NO_QUESTION,
  }.items():
    assert clean_question(text) == want


@pytest.mark.unchecked
def test_errors_name_the_argument():
  def attempt(x=(2, 6, 3), vision=(2, 6, 5), text=(2, 4, 3), mask=(2, 6), k=2):
    jax.eval_shape(
      functools.partial(mmtok, num_keep=k),
      *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, vision, text)),
      jax.ShapeDtypeStruct(mask, jnp.bool_),
    )

  attempt()
  for message, wrong in {
    "features_tokens=6, vision_tokens=5": dict(vision=(2, 5, 5)),
    "features_dim=3, text_dim=4": dict(text=(2, 4, 4)),
    "features_tokens=6, mask_tokens=5": dict(mask=(2, 5)),
    "num_keep must lie in 1..6, got 7": dict(k=7),
    "text must have 3 axes": dict(text=(4, 3)),
  }.items():
    with pytest.raises(ValueError, match=message):
      attempt(**wrong)
