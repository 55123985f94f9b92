import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.test_util import check_grads

from tests.compiled import compiled
from tokjax.kernels.maxsim import EMPTY_SCORE, maxsim
from tokjax.retrieval import losses

losses = compiled(losses)

kinds = pytest.mark.parametrize(
  "kind", [AxisType.Auto, AxisType.Explicit], ids=str
)

# name -> loss of scores, teacher, mask, query_weight
LOSSES = {
  "nway": lambda s, t, m, w: losses.nway_cross_entropy(s, m, w),
  "in_batch": lambda s, t, m, w: losses.in_batch_cross_entropy(
    s, m, w, num_per_query=2, own_negatives=False
  ),
  "kl": lambda s, t, m, w: losses.kl_distillation(
    s, t, m, w, temperature=0.5, teacher_scale=1.5
  ),
  "kl-min_max": lambda s, t, m, w: losses.kl_distillation(
    s, t, m, w, temperature=0.25, normalize="min_max"
  ),
  "margin": losses.margin_mse,
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def lists(seed=0, num_queries=5, width=10):
  """Scores, teacher, mask with holes (one query loses its positive), weight."""
  rng = np.random.default_rng(seed)
  scores, teacher = rng.normal(size=(2, num_queries, width)) * 2
  mask = rng.random((num_queries, width)) < 0.8
  mask[:, 0] = True
  for i in range(num_queries):
    mask[i, 2 * i % width] = True  # the positive of the in-batch loss too
  mask[1, [0, 2]] = False
  weight = rng.random(num_queries) + 0.5
  weight[-1] = 0
  arrays = (scores, teacher)
  return *(jnp.asarray(x, jnp.float32) for x in arrays), *map(
    jnp.asarray, (mask, np.float32(weight))
  )


def softmax(x):
  e = np.exp(x - np.max(x))
  return e / e.sum()


def loop(name, scores, teacher, mask, weight):
  """Weighted mean over queries, each from the list of its candidates."""
  total, count = 0.0, 0.0
  for i, row in enumerate(np.asarray(scores, np.float64)):
    here = [j for j in range(len(row)) if mask[i, j]]
    target = np.asarray(teacher[i], np.float64)
    first = 0
    if name == "in_batch":
      first = 2 * i
      here = [j for j in here if j == first or j // 2 != i]
    if name.startswith("kl"):
      if not here:
        continue
      s, scale, temperature = row[here], 1.5, 0.5
      if name == "kl-min_max":
        scale, temperature = 1.0, 0.25
        s = (s - min(s)) / (max(s) - min(s) + 1e-8)
      p_s = softmax(s / temperature)
      p_t = softmax(target[here] * scale / temperature)
      loss = sum(p * np.log(p / q) for p, q in zip(p_t, p_s, strict=True))
    else:
      if first not in here:
        continue
      if name == "margin":
        others = [j for j in here if j != first]
        loss = np.mean(
          [((row[0] - row[j]) - (target[0] - target[j])) ** 2 for j in others]
        )
      else:
        loss = -np.log(softmax(row[here])[here.index(first)])
    total, count = total + weight[i] * loss, count + weight[i]
  return total / count


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop(name, seed):
  scores, teacher, mask, weight = lists(seed)
  got = LOSSES[name](scores, teacher, mask, weight)
  want = loop(name, scores, teacher, np.asarray(mask), np.asarray(weight))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert got.shape == () and got.dtype == jnp.float32


@every_loss
def test_mask_and_weight_default_to_all(name):
  scores, teacher, mask, weight = lists()
  got = LOSSES[name](scores, teacher, None, None)
  ones = np.ones_like(mask), np.ones_like(weight)
  np.testing.assert_allclose(got, loop(name, scores, teacher, *ones), rtol=1e-5)
  as_bool = LOSSES[name](scores, teacher, mask, weight > 0)
  as_float = LOSSES[name](scores, teacher, mask, jnp.sign(weight))
  np.testing.assert_array_equal(as_bool, as_float)


def test_worked_examples():
  one = jnp.array([[np.log(3.0), 0.0]])
  np.testing.assert_allclose(
    losses.nway_cross_entropy(one), np.log(4 / 3), rtol=1e-6
  )
  # Teacher 3/4, 1/4 and student 1/2, 1/2; alpha 0 makes them equal.
  for scale, want in (
    (1.0, 0.75 * np.log(1.5) + 0.25 * np.log(0.5)),
    (0.0, 0.0),
  ):
    got = losses.kl_distillation(jnp.zeros((1, 2)), one, teacher_scale=scale)
    np.testing.assert_allclose(got, want, atol=1e-6)
  # Margins 2, 1 against 1, 4.
  got = losses.margin_mse(
    jnp.array([[3.0, 1.0, 2.0]]), jnp.array([[5.0, 4.0, 1.0]])
  )
  np.testing.assert_allclose(got, 5.0)


def test_in_batch_columns_by_hand():
  # log of 1, 2, 3, ... so that a softmax is a ratio of integers; n = 2.
  scores = jnp.log(jnp.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
  with_own = np.mean([np.log(10 / 1), np.log(26 / 7)])
  without = np.mean([np.log(8 / 1), np.log(18 / 7)])
  np.testing.assert_allclose(
    losses.in_batch_cross_entropy(scores), with_own, rtol=1e-6
  )
  np.testing.assert_allclose(
    losses.in_batch_cross_entropy(scores, own_negatives=False),
    without,
    rtol=1e-6,
  )
  # The second query alone: its positive is column 2 of all documents.
  for first, own, want in ((2, True, 26 / 7), (2, False, 18 / 7)):
    for column in (first, jnp.asarray(first)):
      got = losses.in_batch_cross_entropy(
        scores[1:], num_per_query=2, first_column=column, own_negatives=own
      )
      np.testing.assert_allclose(got, np.log(want), rtol=1e-6)


@every_loss
def test_absent_candidates_have_no_influence(name):
  scores, teacher, mask, weight = lists()
  dead = ~mask | (weight == 0)[:, None]
  function = jax.value_and_grad(LOSSES[name], (0, 1))
  value, gradients = function(scores, teacher, mask, weight)
  for fill in (jnp.nan, jnp.inf, -jnp.inf, EMPTY_SCORE, EMPTY_SCORE / 100):
    got, again = function(
      *(jnp.where(dead, fill, x) for x in (scores, teacher)), mask, weight
    )
    np.testing.assert_array_equal(got, value)
    for one, other in zip(again, gradients, strict=True):
      np.testing.assert_array_equal(one, other)
  assert not np.asarray(gradients[0])[np.asarray(dead)].any()
  assert np.asarray(gradients[0])[0].any()
  assert not np.asarray(gradients[1]).any()  # the teacher


@every_loss
def test_an_empty_document_is_no_candidate(name):
  scores, teacher, mask, weight = lists()
  empty = jnp.where(mask, scores, EMPTY_SCORE)
  value, gradient = jax.value_and_grad(LOSSES[name])(
    empty, teacher, None, weight
  )
  want = LOSSES[name](scores, teacher, mask, weight)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert np.isfinite(gradient).all()
  assert not np.asarray(gradient)[~np.asarray(mask)].any()


@every_loss
def test_nan_of_a_real_candidate_shows(name):
  scores, teacher, mask, weight = lists()
  scores = scores.at[0, 0].set(jnp.nan)
  assert np.isnan(LOSSES[name](scores, teacher, mask, weight))


@every_loss
def test_nothing_that_counts_is_zero(name):
  scores, teacher, mask, weight = lists()
  for m, w in ((mask & False, weight), (mask, 0 * weight)):
    value, gradient = jax.value_and_grad(LOSSES[name])(scores, teacher, m, w)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


@every_loss
def test_padding_rows_change_nothing(name):
  scores, teacher, mask, weight = lists()
  want = LOSSES[name](scores, teacher, mask, weight)
  columns = 4 if name == "in_batch" else 0  # the documents of those rows

  def pad(x, fill):
    widths = ((0, 2), (0, columns))[: x.ndim]
    return jnp.pad(x, widths, constant_values=fill)

  got = LOSSES[name](
    pad(scores, jnp.nan),
    pad(teacher, jnp.nan),
    pad(mask, False),
    pad(weight, 1),
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)
  got = LOSSES[name](
    pad(jnp.where(mask, scores, EMPTY_SCORE), EMPTY_SCORE),
    pad(teacher, jnp.nan),
    None,
    pad(weight, 0),
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)


@every_loss
def test_a_constant_per_query_changes_nothing(name):
  scores, teacher, mask, weight = lists()
  shift = jnp.arange(5.0)[:, None]
  want = LOSSES[name](scores, teacher, mask, weight)
  got = LOSSES[name](scores + shift, teacher - 2 * shift, mask, weight)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@every_loss
def test_gradient_equals_finite_differences(name):
  scores, teacher, mask, weight = lists()
  function = jax.jit(lambda s: LOSSES[name](s, teacher, mask, weight))
  check_grads(function, (scores,), order=1, modes=["rev"], eps=1e-3)


@every_loss
def test_bfloat16_scores_are_widened_first(name):
  scores, teacher, mask, weight = lists()
  low = [x.astype(jnp.bfloat16) for x in (scores, teacher)]
  got = LOSSES[name](*low, mask, weight)
  want = LOSSES[name](*(x.astype(jnp.float32) for x in low), mask, weight)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


def test_kl_gradient_is_the_difference_of_the_distributions():
  scores, teacher, _, _ = lists()
  temperature, alpha = 0.7, 2.0
  gradient = jax.grad(losses.kl_distillation)(
    scores, teacher, temperature=temperature, teacher_scale=alpha
  )
  p_s = jax.nn.softmax(scores / temperature, axis=1)
  p_t = jax.nn.softmax(alpha * teacher / temperature, axis=1)
  np.testing.assert_allclose(
    gradient, (p_s - p_t) / temperature / len(scores), atol=1e-6
  )


def test_kl_is_zero_for_the_teacher_itself_and_positive_else():
  scores, teacher, _, _ = lists()
  np.testing.assert_allclose(
    losses.kl_distillation(teacher, teacher), 0, atol=1e-6
  )
  assert losses.kl_distillation(scores, teacher) > 0.1
  # A student of another scale ranks the same: min_max takes the scale out.
  unit = (teacher - teacher.min(1, keepdims=True)) / np.ptp(
    teacher, axis=1, keepdims=True
  )
  got = losses.kl_distillation(30 * teacher + 7, unit, normalize="min_max")
  np.testing.assert_allclose(got, 0, atol=1e-6)
  assert losses.kl_distillation(30 * teacher + 7, unit) > 0.1


def test_min_max_of_equal_scores_has_a_small_gradient():
  equal = jnp.ones((1, 3))
  teacher = jnp.array([[1.0, 0.0, 0.0]])
  value, gradient = jax.value_and_grad(losses.kl_distillation)(
    equal, teacher, normalize="min_max"
  )
  want = losses.kl_distillation(jnp.zeros((1, 3)), teacher)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  np.testing.assert_array_equal(gradient, 0)


def test_min_max_of_nearly_equal_scores_and_a_masked_one():
  scores = jnp.array([[0.0, 1e-9, jnp.nan]])
  teacher = jnp.array([[1.0, 0.0, jnp.nan]])
  mask = jnp.array([[True, True, False]])
  value, gradient = jax.value_and_grad(losses.kl_distillation)(
    scores, teacher, mask, normalize="min_max"
  )
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_traced_temperature():
  scores, teacher, _, _ = lists()
  got = jax.jit(
    lambda t: losses.kl_distillation(scores, teacher, temperature=t)
  )(0.3)
  want = losses.kl_distillation(scores, teacher, temperature=0.3)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def token_sets(seed=0, num_queries=16, num_per_query=3):
  rng = np.random.default_rng(seed)
  queries = rng.normal(size=(num_queries, 4, 6)) / 2
  documents = rng.normal(size=(num_queries * num_per_query, 5, 6)) / 2
  query_mask = rng.random(queries.shape[:2]) < 0.8
  document_mask = rng.random(documents.shape[:2]) < 0.7
  document_mask[[3, 7]] = False  # a positive and a negative without tokens
  weight = np.float32(rng.random(num_queries) + 0.5)
  weight[[0, 5, 6]] = 0
  arrays = (queries, documents)
  return *(jnp.asarray(x, jnp.float32) for x in arrays), *map(
    jnp.asarray, (query_mask, document_mask, weight)
  )


@pytest.mark.parametrize("own_negatives", [True, False])
def test_empty_documents_of_maxsim(own_negatives):
  queries, documents, query_mask, document_mask, weight = token_sets()

  def loss(queries, documents):
    scores = maxsim(queries, documents, query_mask, document_mask)
    return losses.in_batch_cross_entropy(
      scores, None, weight, own_negatives=own_negatives
    )

  value, gradients = jax.value_and_grad(loss, (0, 1))(queries, documents)
  assert 0 < value < 100
  for gradient in gradients:
    assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradients[1][jnp.array([3, 7])], 0)
  np.testing.assert_array_equal(gradients[0][1], 0)  # its positive is empty
  assert np.asarray(gradients[0][2]).any()


def spread(mesh, function, num_arrays):
  shards = (jax.P(mesh.axis_names),) * num_arrays
  return jax.shard_map(function, mesh=mesh, in_specs=shards, out_specs=jax.P())


@kinds
@pytest.mark.parametrize("own_negatives", [True, False])
@pytest.mark.parametrize("shape", [(8,), (4, 2)], ids=str)
def test_global_loss_is_that_of_one_device(kind, own_negatives, shape):
  arrays = token_sets()

  def one_device(queries, documents, query_mask, document_mask, weight):
    scores = maxsim(queries, documents, query_mask, document_mask)
    return losses.in_batch_cross_entropy(
      scores, None, weight, own_negatives=own_negatives
    )

  want = jax.jit(jax.value_and_grad(one_device, (0, 1)))(*arrays)
  names = ("data", "more")[: len(shape)]
  mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
  everywhere = spread(
    mesh,
    lambda *local: losses.global_in_batch_loss(
      maxsim,
      *local,
      axis_name=names if len(names) > 1 else names[0],
      own_negatives=own_negatives,
    ),
    5,
  )
  with jax.set_mesh(mesh):
    got = jax.jit(jax.value_and_grad(everywhere, (0, 1)))(
      *jax.device_put(arrays, jax.P(names))
    )
  got = jax.device_get(got)
  assert np.abs(want[1][0]).max() > 1e-2 < np.abs(want[1][1]).max()
  for one, other in zip(
    jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@kinds
def test_gradient_inside_shard_map_is_the_whole_one(kind):
  queries, documents, query_mask, document_mask, weight = token_sets()
  matrix = jnp.asarray(np.random.default_rng(1).normal(size=(6, 6)) / 3)
  matrix = matrix.astype(jnp.float32)

  def one_device(matrix):
    return losses.in_batch_cross_entropy(
      maxsim(queries @ matrix, documents @ matrix, query_mask, document_mask),
      None,
      weight,
    )

  def local(matrix, queries, documents, *rest):
    def loss(matrix):
      return losses.global_in_batch_loss(
        maxsim, queries @ matrix, documents @ matrix, *rest, axis_name="data"
      )

    return jax.value_and_grad(loss)(matrix)

  want = jax.value_and_grad(one_device)(matrix)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  function = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(jax.P(), *(jax.P("data"),) * 5),
    out_specs=jax.P(),
  )
  with jax.set_mesh(mesh):
    rest = (queries, documents, query_mask, document_mask, weight)
    got = jax.jit(function)(
      jax.device_put(matrix, jax.P()), *jax.device_put(rest, jax.P("data"))
    )
  for one, other in zip(jax.device_get(got), want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@kinds
def test_global_scores_are_rows_of_the_whole(kind):
  queries, documents, query_mask, document_mask, _ = token_sets()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  spec = jax.P("data")

  def scores(*arrays):
    return jax.jit(
      jax.shard_map(
        functools.partial(
          losses.global_in_batch_scores, maxsim, axis_name="data"
        ),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
      )
    )(*arrays)

  arrays = (queries, documents, query_mask, document_mask)
  with jax.set_mesh(mesh):
    shards = jax.device_put(arrays, spec)
    got, unmasked = scores(*shards), scores(*shards[:2])
  np.testing.assert_allclose(
    jax.device_get(got), maxsim(*arrays), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
    jax.device_get(unmasked), maxsim(*arrays[:2]), rtol=1e-5, atol=1e-5
  )


@kinds
@pytest.mark.parametrize(
  "function",
  [
    lambda s, t, m, w, **axis: losses.nway_cross_entropy(s, m, w, **axis),
    losses.kl_distillation,
    losses.margin_mse,
  ],
  ids=["nway", "kl", "margin"],
)
def test_mean_over_a_mesh_axis_is_the_mean_of_all(function, kind):
  """Devices hold queries of unequal weight, the first none that counts."""
  scores, teacher, mask, weight = lists(1, 16, 4)
  arrays = scores, teacher, mask, weight.at[:2].set(0)
  want = jax.value_and_grad(function)(*arrays)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  everywhere = spread(mesh, functools.partial(function, axis_name="data"), 4)
  with jax.set_mesh(mesh):
    shards = jax.device_put(arrays, jax.P("data"))
    got = jax.device_get(jax.jit(jax.value_and_grad(everywhere))(*shards))
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.unchecked
def test_errors():
  scores, teacher, mask, weight = lists()
  with pytest.raises(ValueError, match=r"mask must have shape \(5, 10\)"):
    losses.nway_cross_entropy(scores, mask[:, 1:])
  with pytest.raises(ValueError, match=r"teacher must have shape \(5, 10\)"):
    losses.margin_mse(scores, teacher[:4])
  with pytest.raises(ValueError, match="scores_queries=5, query_weight=4"):
    losses.kl_distillation(scores, teacher, mask, weight[:4])
  with pytest.raises(ValueError, match="normalize must be one of 'none', "):
    losses.kl_distillation(scores, teacher, normalize="softmax")
  with pytest.raises(ValueError, match="documents must be a multiple of 5"):
    losses.in_batch_cross_entropy(scores[:, :9])
  with pytest.raises(ValueError, match="first_column needs num_per_query"):
    losses.in_batch_cross_entropy(scores, first_column=jnp.asarray(2))
  with pytest.raises(ValueError, match="first_column must lie in 0..5, got 6"):
    losses.in_batch_cross_entropy(scores, num_per_query=1, first_column=6)
  with pytest.raises(ValueError, match="first_column must be a multiple of 2"):
    losses.in_batch_cross_entropy(scores[:2], num_per_query=2, first_column=3)
  with pytest.raises(ValueError, match="documents must lie in 15.*got 12"):
    losses.in_batch_cross_entropy(
      jnp.zeros((5, 12)), num_per_query=3, first_column=jnp.asarray(0)
    )
  with pytest.raises(ValueError, match="documents_of_a_query must lie in 2"):
    losses.margin_mse(scores[:, :1], teacher[:, :1])
  with pytest.raises(ValueError, match="scores must have 2 axes"):
    losses.nway_cross_entropy(scores[0])
  queries, documents, *_ = token_sets()
  with pytest.raises(ValueError, match="documents must be a multiple of 16"):
    losses.global_in_batch_loss(
      maxsim, queries, documents[:-1], axis_name="data"
    )
