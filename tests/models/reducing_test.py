"""What a host keeps of its tokens between layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import reducing
from tokjax.models.reducing import Encoded, Reduction, Stream, Tap, Taps
from tokjax.ops import plans
from tokjax.reduction import types


def stream(batch=2, rows=4, **changes):
  x = jnp.arange(batch * rows * 2.0).reshape(batch, rows, 2)
  index = jnp.tile(jnp.arange(rows), (batch, 1))
  return Stream(x, index, None, None, rows)._replace(**changes)


def picking(*rows):
  picks = jnp.array([rows])
  return lambda layer, x, keys, size, mask: types.selected(
    x, jnp.tile(picks, (len(x), 1)), jnp.take(mask, picks[0], axis=1)
  )


def pairing(layer, x, keys, size, mask):
  """Rows 0, 1 into one and 2, 3 into one, by their sizes."""
  slot = jnp.tile(jnp.array([0, 0, 1, 1]), (len(x), 1))
  pair = size.reshape(len(x), 2, 2)
  weight = (pair / pair.sum(2, keepdims=True)).reshape(len(x), 4)
  plan = plans.Merge(slot, weight)
  index = jnp.tile(jnp.array([1, 2]), (len(x), 1))
  return types.fused(x, plan, index, size=size)


def test_bias_is_log_size_over_valid_keys():
  size = jnp.array([[1.0, 2.0, 0.0, 3.0]])
  mask = jnp.array([[True, True, False, True]])
  none = stream(1)
  assert reducing.key_bias(none) is None
  both = none._replace(size=size, mask=mask)
  lowest = np.finfo(np.float32).min
  np.testing.assert_allclose(
    reducing.key_bias(both), [[0, np.log(2), lowest, np.log(3)]], rtol=1e-6
  )
  np.testing.assert_allclose(
    reducing.key_bias(both, proportional=False), [[0, 0, lowest, 0]]
  )
  sized = none._replace(size=jnp.array([[1.0, 2.0, 4.0, 3.0]]))
  assert reducing.key_bias(sized, proportional=False) is None
  np.testing.assert_allclose(reducing.key_bias(sized)[0, 2], np.log(4))


def test_sizes_and_indices_of_selections_after_merges():
  merged, reduced = reducing.reduce_stream(
    Reduction(pairing, (0,)), 0, stream()
  )
  np.testing.assert_array_equal(merged.size, [[2, 2]] * 2)
  np.testing.assert_array_equal(merged.index, [[1, 2]] * 2)
  np.testing.assert_array_equal(merged.tokens[0], [[1, 2], [5, 6]])
  assert reduced.plan is not None and merged.num_rows == 4
  # A selection keeps the sizes, though it says 1 for what it kept.
  last, _ = reducing.reduce_stream(Reduction(picking(1), (0,)), 0, merged)
  np.testing.assert_array_equal(last.size, [[2]] * 2)
  np.testing.assert_array_equal(last.index, [[2]] * 2)


def test_sizes_do_not_depend_on_what_a_method_says_of_them():
  def forgetful(layer, x, keys, size, mask):
    return pairing(layer, x, keys, size, mask)._replace(
      size=jnp.full((len(x), 2), 7.0)
    )

  start = stream(size=jnp.array([[1.0, 3.0, 2.0, 2.0]] * 2))
  got, _ = reducing.reduce_stream(Reduction(forgetful, (0,)), 0, start)
  np.testing.assert_array_equal(got.size, [[4, 4]] * 2)
  np.testing.assert_allclose(got.tokens[0, 0], [1.5, 2.5])


def test_a_plan_must_be_one_of_all_tokens():
  def half(layer, x, keys, size, mask):
    plan = plans.Merge(jnp.zeros((2, 2), jnp.int32), jnp.ones((2, 2)))
    return types.fused(x[:, :2], plan, jnp.zeros((2, 1), jnp.int32))

  with pytest.raises(ValueError, match="plan_tokens=2, features_tokens=4"):
    reducing.reduce_stream(Reduction(half, (0,)), 0, stream())


def test_masked_form_leaves_rows_and_hides_them():
  mask = jnp.array([[True] * 4, [True, True, False, True]])
  got, _ = reducing.reduce_stream(
    Reduction(picking(0, 2), (0,), form="mask"), 0, stream(mask=mask)
  )
  np.testing.assert_array_equal(
    got.mask, [[True, False, True, False], [True, False, False, False]]
  )
  np.testing.assert_array_equal(got.tokens, stream().tokens)


def test_frames_count_on():
  def check(layer, x, keys, size, mask):
    assert x.shape == (1, 8, 2)
    np.testing.assert_array_equal(x[0, :, 0], np.arange(0.0, 16, 2))
    np.testing.assert_array_equal(mask[0], [True] * 7 + [False])
    return picking(1, 5)(layer, x, keys, size, mask)

  mask = jnp.ones((2, 4), bool).at[1, 3].set(False)
  joined = Reduction(check, (0,), "before", frames=2)
  got, _ = reducing.reduce_stream(joined, 0, stream(mask=mask))
  np.testing.assert_array_equal(got.index, [[1, 5]])
  assert got.num_rows == 8
  twice = Stream(*(jnp.tile(x, (2, 1, 1)[: x.ndim]) for x in got[:2]), None,
                 None, 8)  # fmt: skip
  again, _ = reducing.reduce_stream(
    Reduction(picking(0, 1, 2, 3), (0,), "before", frames=2), 0, twice
  )
  np.testing.assert_array_equal(again.index, [[1, 5, 9, 13]])


def test_queries_only_for_those_who_ask():
  seen = []

  def method(layer, x, keys, size, mask, *more):
    seen.append((layer, keys, len(more)))
    return picking(0)(layer, x, keys, size, mask)

  keys, queries = jnp.ones((2, 1, 4, 3)), jnp.zeros((2, 1, 4, 3))
  for asks in (False, True):
    reduction = Reduction(method, (5,), queries=asks)
    reducing.reduce_stream(reduction, 5, stream(), keys, queries)
  assert [(layer, more) for layer, _, more in seen] == [(5, 0), (5, 1)]
  assert seen[0][1] is keys


def test_taps_list_their_layers_once():
  taps = Taps(queries=(1,), keys=(1, 2), hidden=(-1,), reduced=(2,))
  assert taps.layers() == {1, 2, -1}
  assert Taps().layers() == set()
  assert Tap() == (None,) * 7
  assert Encoded._fields == ("tokens", "mask", "size", "index", "taps")


@pytest.mark.parametrize("field", ["form", "place"])
def test_check_names_the_setting(field):
  with pytest.raises(ValueError, match=f"{field} must be one of"):
    Reduction(picking(0), (0,), **{field: "wrong"}).check(1)
  Reduction(picking(0), (0,)).check(1)
