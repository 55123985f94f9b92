"""Rules about tokens against loops over pairs, and what they say of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.ops import attention_masks, item_sets, mask_rules
from tokjax.ops.mask_rules import (
  EMPTY,
  FULL,
  TEXT,
  VISUAL,
  Known,
  Span,
  apart,
  causal,
  every,
  level_causal,
  local,
  neighbours,
  no_visual_pairs,
  same_segment,
)

may_read = jax.jit(mask_rules.may_read, static_argnums=0)
block_kinds = jax.jit(
  mask_rules.block_kinds, static_argnums=0, static_argnames="block_size"
)


def some_tokens(num_tokens, seed=0, batch=()):
  """Text and two pictures, sets, levels and segments, all at random."""
  random = np.random.default_rng(seed)

  def draw(most):
    return random.integers(0, most, (*batch, num_tokens))

  fields = {
    "kind": draw(2), "level": np.sort(draw(4)), "group": np.sort(draw(9)),
    "segment": np.sort(draw(3)), "row": draw(4), "column": draw(4),
  }  # fmt: skip
  return mask_rules.tokens(
    num_tokens, **{name: jnp.asarray(x) for name, x in fields.items()}
  )


def literally(name, i, j, t):
  """The table of masks, for one pair."""
  before = t["position"][j] <= t["position"][i]
  both = t["kind"][i] == VISUAL and t["kind"][j] == VISUAL
  down = abs(t["row"][i] - t["row"][j])
  right = abs(t["column"][i] - t["column"][j])
  return {
    "causal": before,
    "local": abs(t["position"][i] - t["position"][j]) < 3,
    "segment": t["segment"][i] == t["segment"][j],
    "level": t["level"][j] <= t["level"][i],
    "apart": before and not (t["group"][i] == t["group"][j] and i != j),
    "visual": before and not (both and i != j),
    "near": max(down, right) <= 1 if both else before,
  }[name]


RULES = {
  "causal": causal,
  "local": local(3),
  "segment": same_segment,
  "level": level_causal,
  "apart": every(causal, apart),
  "visual": no_visual_pairs,
  "near": neighbours(3),
}


@pytest.mark.parametrize("name", RULES)
def test_pairs(name):
  given = some_tokens(23)
  one_by_one = {key: np.asarray(x) for key, x in given._asdict().items()}
  want = [
    [literally(name, i, j, one_by_one) for j in range(23)] for i in range(23)
  ]
  np.testing.assert_array_equal(may_read(RULES[name], given, given), want)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_blocks_are_judged_with_care(name, batch):
  seen = set()
  for seed, (readers, read) in enumerate([(40, 40), (21, 33), (8, 16)]):
    one = some_tokens(readers, seed, batch)
    two = some_tokens(read, seed + 10, batch)
    mask = np.asarray(may_read(RULES[name], one, two))
    mask = np.broadcast_to(mask, (*(batch or (1,)), readers, read))
    kinds = np.asarray(block_kinds(RULES[name], one, two, block_size=4))
    assert kinds.shape == (*batch, -(-readers // 4), -(-read // 4))
    for (b, i, j), kind in np.ndenumerate(kinds.reshape(-1, *kinds.shape[-2:])):
      block = mask[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
      assert kind != EMPTY or not block.any()
      assert kind != FULL or block.all()
    seen |= set(kinds.ravel().tolist())
  # A judge who never decides would pass: whole blocks are decided, too.
  assert EMPTY in seen or FULL in seen or name in ("near", "visual")


def test_blocks_of_two_sizes():
  given = some_tokens(24)
  found = block_kinds(causal, given, given, block_size=(4, 8))
  want = 2 * (np.arange(3)[None] < np.arange(6)[:, None] // 2)
  want[np.arange(6), np.arange(6) // 2] = 1
  np.testing.assert_array_equal(found, want)


def test_ordered_levels_are_decided_exactly():
  level = jnp.repeat(jnp.arange(4), 8)
  given = mask_rules.tokens(32, level=level)
  kinds = block_kinds(level_causal, given, given, block_size=8)
  np.testing.assert_array_equal(kinds, 2 * np.tril(np.ones((4, 4), int)))
  kinds = block_kinds(causal, given, given, block_size=8)
  np.testing.assert_array_equal(
    kinds, 2 * np.tril(np.ones((4, 4)), -1) + np.eye(4)
  )


def test_masks_that_are_constants_elsewhere():
  level = jnp.repeat(jnp.arange(3), jnp.array([1, 4, 16]))
  scales = mask_rules.tokens(21, level=level)
  found = may_read(level_causal, scales, scales)
  np.testing.assert_array_equal(found, attention_masks.scale_causal((1, 2, 4)))
  assert int(found.sum()) == 357
  # Instruction, two sets of two, response, two queries: alone by a group.
  group = jnp.array([-1, 0, 0, 1, 1, -2, 2, 2])
  sets = mask_rules.tokens(8, group=group)
  want = item_sets.set_mask(
    num_instruction=1, num_items=2, set_size=2, num_response=1, num_queries=2
  )
  np.testing.assert_array_equal(
    may_read(every(causal, apart), sets, sets), want
  )


def test_neighbours_of_a_picture_in_a_text():
  places = np.arange(9)
  kind = jnp.array([TEXT] + 9 * [VISUAL] + [TEXT])
  row, column = jnp.zeros(11, int), jnp.zeros(11, int)
  given = mask_rules.tokens(
    11,
    kind=kind,
    row=row.at[1:10].set(places // 3),
    column=column.at[1:10].set(places % 3),
  )
  counts = may_read(neighbours(3), given, given).sum(axis=1)
  inside = np.array([4, 6, 4, 6, 9, 6, 4, 6, 4])
  assert counts.tolist() == [1, *(inside + 1), 11]  # and the text before


def test_statements_about_ranges():
  a, b = Span(jnp.array(0), jnp.array(2)), Span(jnp.array(2), jnp.array(2))

  def told(known):
    return bool(known.some), bool(known.all)

  assert told(a <= b) == (True, True)
  assert told(a < b) == (True, False)
  assert told(a == b) == (True, False)
  assert told(b == 2) == (True, True)
  assert told(b != 2) == (False, False)
  assert told(a >= 3) == (False, False)
  assert told(a > -1) == (True, True)
  assert told(a - b <= 0) == (True, True)
  assert told(a + 3 > b) == (True, True)
  some = Known(True, False)
  assert told(~some) == (True, False)
  assert told(some & Known(False, False)) == (False, False)
  assert told(some | Known(True, True)) == (True, True)


def test_errors():
  with pytest.raises(ValueError, match="field must be one of"):
    mask_rules.tokens(2, colour=jnp.zeros(2))
  with pytest.raises(ValueError, match="num_tokens=2, level=3"):
    mask_rules.tokens(2, level=jnp.zeros(3))
  with pytest.raises(ValueError, match="window_minus_1"):
    neighbours(2)


def test_under_jit_from_traced_fields():
  def kinds(level):
    given = mask_rules.tokens(6, level=level)
    return block_kinds(level_causal, given, given, block_size=3)

  level = jnp.array([0, 0, 0, 1, 1, 1])
  assert jax.jit(kinds)(level).tolist() == [[2, 0], [2, 2]]


def test_tokens_are_cut_and_filled_up_with_the_last():
  given = some_tokens(5, batch=(2,))
  cut = mask_rules.cut_tokens(given, 3)
  for name, x in given._asdict().items():
    found = np.asarray(getattr(cut, name))
    assert found.shape == (*x.shape[:-1], 2, 3)
    found = found.reshape(*x.shape[:-1], 6)
    np.testing.assert_array_equal(found[..., :5], x)
    np.testing.assert_array_equal(found[..., 5], x[..., 4])
