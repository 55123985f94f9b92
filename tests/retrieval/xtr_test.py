"""XTR's training scores against loops, by hand, and on eight devices."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.test_util import check_grads

from tests.compiled import compiled
from tokjax.kernels.maxsim import maxsim
from tokjax.retrieval import xtr, xtr_scoring

xtr = compiled(xtr, leave=("text_config",))

KINDS = pytest.mark.parametrize(
  "kind", [AxisType.Auto, AxisType.Explicit], ids=str
)


def batch(seed=0, sizes=(5, 4, 6, 5, 3), *, whole_numbers=False):
  """Queries and documents with one of each that has no valid token."""
  random = np.random.default_rng(seed)
  num_queries, query_tokens, num_documents, num_tokens, dim = sizes
  queries = random.standard_normal((num_queries, query_tokens, dim))
  documents = random.standard_normal((num_documents, num_tokens, dim))
  if whole_numbers:  # exact products, and many ties
    queries, documents = np.round(queries), np.round(documents)
  query_mask = random.random(queries.shape[:2]) < 0.7
  document_mask = random.random(documents.shape[:2]) < 0.7
  query_mask[1] = False
  document_mask[2] = False
  return (
    queries.astype(np.float32),
    documents.astype(np.float32),
    query_mask,
    document_mask,
  )


def loop(
  queries, documents, query_mask, document_mask, k, topk="exact", z="retrieved"
):
  """The definition, one query token at a time, in float64."""
  queries, documents = np.asarray(queries, float), np.asarray(documents, float)
  num_documents, num_tokens, _ = documents.shape
  scores = np.zeros((len(queries), num_documents))
  for i, query in enumerate(queries):
    sums, counts = np.zeros(num_documents), np.zeros(num_documents)
    for a in np.flatnonzero(query_mask[i]):
      pool = sorted(
        (
          (-float(query[a] @ documents[j, b]), j, b)
          for j in range(num_documents)
          for b in range(num_tokens)
          if document_mask[j, b]
        ),
      )
      taken = pool[:k]
      if topk == "threshold":
        taken = [entry for entry in pool if entry[0] <= taken[-1][0]]
      for j in range(num_documents):
        mine = [-value for value, document, _ in taken if document == j]
        if z == "positive" and len(mine) < num_tokens:
          mine.append(0.0)
        if mine:
          sums[j] += max(mine)
          counts[j] += z == "retrieved" or max(mine) > 0
    least = 1 if z == "retrieved" else 1e-3
    scores[i] = sums / np.maximum(counts, least)
  return scores


@pytest.mark.parametrize("z", ["retrieved", "positive"])
@pytest.mark.parametrize("topk", ["exact", "threshold"])
@pytest.mark.parametrize("k", [1, 4, 11, 1000])
def test_scores_equal_the_loop(k, topk, z):
  arrays = batch()
  got = xtr.train_scores(*arrays, k_train=k, topk=topk, z=z)
  want = loop(*arrays, k, topk, z)
  # "positive" may divide a sum of negatives by 0.001.
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert got.dtype == jnp.float32


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  k=st.sampled_from([1, 3, 7]),
  topk=st.sampled_from(["exact", "threshold"]),
)
def test_ties_equal_the_loop(seed, k, topk):
  """Products of width 1 hold zeros of both signs, which tie as well."""
  arrays = batch(seed, (2, 3, 4, 3, 1), whole_numbers=True)
  got = xtr.train_scores(*arrays, k_train=k, topk=topk)
  np.testing.assert_allclose(got, loop(*arrays, k, topk), rtol=1e-6)


def by_hand(rows):
  """One query of unit vectors: `rows` [Q, C * 2] are the similarities."""
  rows = np.asarray(rows, np.float32)
  queries = np.eye(len(rows), dtype=np.float32)[None]
  return queries, rows.T.reshape(-1, 2, len(rows))


WORKED = [[0.9, 0.2, 0.8, 0.1], [0.3, 0.7, 0.6, 0.5]]


@pytest.mark.parametrize("k, want", [(2, [0.8, 0.7]), (1, [0.8, 0.0])])
def test_worked_example(k, want):
  scores = xtr.train_scores(*by_hand(WORKED), k_train=k)
  np.testing.assert_allclose(scores, [want], rtol=1e-6)
  if k == 1:
    assert scores[0, 1] == 0


def test_the_whole_pool_gives_the_mean_of_maxsim():
  queries, documents, query_mask, document_mask = batch()
  documents, document_mask = documents[:2], document_mask[:2]
  arrays = (queries, documents, query_mask, document_mask)
  want = maxsim(*arrays, mean=True)
  for k in (10, 10_000):
    got = xtr.train_scores(*arrays, k_train=k)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_retrieved_negatives_are_kept():
  queries, documents = by_hand([[-0.5, -0.9, -0.6, -0.7]])
  found = xtr.train_scores(queries, documents, k_train=2)
  np.testing.assert_allclose(found, [[-0.5, -0.6]], rtol=1e-6)
  # The other normaliser: a token that was not retrieved counts as 0 ...
  found = xtr.train_scores(queries, documents, k_train=2, z="positive")
  np.testing.assert_allclose(found, [[0, 0]])
  # ... and where all were, the negative maxima are divided by 0.001.
  found = xtr.train_scores(queries, documents, k_train=4, z="positive")
  np.testing.assert_allclose(found, [[-500, -600]], rtol=1e-6)


def test_pads_never_enter_the_pool():
  queries, documents = by_hand([[-0.5, 9.0, -0.6, 9.0]])
  mask = np.array([[True, False], [True, False]])
  for k in (2, 3, 4, 50):
    found = xtr.train_scores(queries, documents, document_mask=mask, k_train=k)
    np.testing.assert_allclose(found, [[-0.5, -0.6]], rtol=1e-6)


def test_ties_at_the_last_place():
  arrays = by_hand([[0.9, 0.5, 0.5, 0.5]])
  exact = xtr.train_scores(*arrays, k_train=2)
  np.testing.assert_allclose(exact, [[0.9, 0]], rtol=1e-6)
  exact = xtr.train_scores(*arrays, k_train=3)
  np.testing.assert_allclose(exact, [[0.9, 0.5]], rtol=1e-6)
  twins = by_hand([[0.5, 0.2, 0.5, 0.2]])
  exact = xtr.train_scores(*twins, k_train=1)
  np.testing.assert_allclose(exact, [[0.5, 0]], rtol=1e-6)
  alike = xtr.train_scores(*twins, k_train=1, topk="threshold")
  np.testing.assert_allclose(alike, [[0.5, 0.5]], rtol=1e-6)


def test_scores_depend_on_the_pool():
  queries, documents, query_mask, document_mask = batch()
  all_of_them = xtr.train_scores(
    queries, documents, query_mask, document_mask, k_train=4
  )
  some = xtr.train_scores(
    queries, documents[:2], query_mask, document_mask[:2], k_train=4
  )
  assert np.abs(all_of_them[:, :2] - some).max() > 0.01


def cross_entropy(scores):
  return -jnp.sum(jax.nn.log_softmax(scores, axis=1)[:, 0])


@pytest.mark.parametrize("k", [2, 3])
def test_gradients_are_those_of_the_paper(k):
  """dL/dP = -(1 - p+) / Z+ at the positive's maxima, p- / Z- elsewhere."""
  rows = [[0.9, 0.2, 0.8, 0.1], [0.3, 0.7, 0.6, 0.5], [0.1, 0.0, -0.3, -0.1]]
  queries, documents = by_hand(rows)
  score = functools.partial(xtr.train_scores, k_train=k)
  gradient = jax.jit(jax.grad(lambda d: cross_entropy(score(queries, d))))
  # Queries are unit vectors: coordinate a of a token is its P[a, t].
  gradient = np.asarray(gradient(documents)).reshape(4, 3).T  # [Q, C * N]
  maxima = {  # of the retrieved tokens, for documents 0 and 1
    2: ([(0, 0), (1, 1), (2, 0)], [(0, 2), (1, 2)]),
    3: ([(0, 0), (1, 1), (2, 0)], [(0, 2), (1, 2), (2, 3)]),
  }[k]
  p = np.exp(score(queries, documents)[0])
  p /= p.sum()
  want = np.zeros((3, 4))
  for a, t in maxima[0]:
    want[a, t] = -(1 - p[0]) / len(maxima[0])
  for a, t in maxima[1]:
    want[a, t] = p[1] / len(maxima[1])
  np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("z", ["retrieved", "positive"])
@pytest.mark.parametrize("topk", ["exact", "threshold"])
def test_gradients_equal_finite_differences(topk, z):
  queries, documents, query_mask, document_mask = batch(113, (3, 3, 4, 3, 3))
  # All positive, as "positive" is steep where maxima change sign.
  queries, documents = (
    np.abs(x) + np.float32(0.1) for x in (queries, documents)
  )
  # No small step changes what is retrieved, or which token is the best.
  pool = np.sort(queries[query_mask] @ documents[document_mask].T)
  assert pool.shape == (6, 8) and np.diff(pool[:, 2:]).min() > 0.05

  @jax.jit
  def score(queries, documents):
    return xtr.train_scores(
      queries, documents, query_mask, document_mask,
      k_train=5, topk=topk, z=z,
    )  # fmt: skip

  check_grads(
    score, (queries, documents), order=1, modes=["rev"], eps=1e-3, rtol=1e-2
  )


def test_a_tie_sends_its_gradient_to_the_lowest():
  queries, documents = by_hand([[0.5, 0.5, 0.4, 0.4]])
  for topk in ("exact", "threshold"):
    score = functools.partial(xtr.train_scores, k_train=4, topk=topk)
    total = lambda d, score=score: score(queries, d).sum()  # noqa: E731
    gradient = np.asarray(jax.jit(jax.grad(total))(documents))
    np.testing.assert_array_equal(gradient[..., 0], [[1, 0], [1, 0]])


def test_only_winners_get_gradients():
  arrays = batch()
  queries, documents, query_mask, document_mask = arrays
  weights = np.random.default_rng(5).standard_normal((5, 6), np.float32)

  def total(queries, documents):
    scores = xtr.train_scores(
      queries, documents, query_mask, document_mask, k_train=4
    )
    return jnp.sum(weights * scores)

  gradient = jax.jit(jax.grad(total, (0, 1)))
  d_queries, d_documents = gradient(queries, documents)
  want_queries, want_documents = np.zeros((5, 4, 3)), np.zeros((6, 5, 3))
  q, d = np.asarray(queries, float), np.asarray(documents, float)
  for i in range(5):
    winners = {}
    for a in np.flatnonzero(query_mask[i]):
      pool = [(q[i, a] @ d[j, b], j, b) for j, b in np.argwhere(document_mask)]
      for _, j, b in sorted(pool, reverse=True)[:4]:
        winners.setdefault(j, {}).setdefault(a, b)  # the best comes first
    for j, mine in winners.items():
      for a, b in mine.items():
        want_queries[i, a] += weights[i, j] / len(mine) * d[j, b]
        want_documents[j, b] += weights[i, j] / len(mine) * q[i, a]
  np.testing.assert_allclose(d_queries, want_queries, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(d_documents, want_documents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("z", ["retrieved", "positive"])
def test_padding_has_no_influence(z):
  queries, documents, query_mask, document_mask = batch()
  nan_queries = np.where(query_mask[..., None], queries, np.nan)
  nan_documents = np.where(document_mask[..., None], documents, np.nan)

  def total(queries, documents):
    scores = xtr.train_scores(
      queries, documents, query_mask, document_mask, k_train=1000, z=z
    )
    return jnp.sum(jnp.sin(scores))

  value_and_grad = jax.jit(jax.value_and_grad(total, (0, 1)))
  want = value_and_grad(queries, documents)
  got = value_and_grad(nan_queries, nan_documents)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  _, (d_queries, d_documents) = got
  assert not np.asarray(d_queries)[~query_mask].any()
  assert not np.asarray(d_documents)[~document_mask].any()


def test_nan_in_a_valid_token_shows():
  queries, documents = by_hand(WORKED)
  spoilt = documents.copy()
  spoilt[1, 0, 0] = np.nan
  assert np.isnan(xtr.train_scores(queries, spoilt, k_train=2)).all()


@functools.cache
def in_blocks(budget):
  queries, documents, query_mask, document_mask = batch()

  def total(queries, documents):
    scores = xtr.train_scores(
      queries, documents, query_mask, document_mask,
      k_train=4, memory_budget_bytes=budget,
    )  # fmt: skip
    return jnp.sum(jnp.sin(scores)), scores

  call = jax.value_and_grad(total, (0, 1), has_aux=True)
  return jax.jit(call)(queries, documents)


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_blocks_equal_all_at_once(block):
  """Blocks of 2 and 3 of 5 queries: the last is moved back over the others."""
  per_query = 4 * xtr_scoring._COPIES * 4 * 30
  got, want = in_blocks(per_query * block), in_blocks(1 << 30)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got,
    want,
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scratch_stays_below_the_budget(dtype):
  """32 queries of 32 tokens against 128 documents of 128: 64 MiB at once."""
  num_queries, num_documents, tokens, dim = 32, 128, 128, 64
  budget = 8 << 20  # one query takes all of it
  settings = xtr_scoring.Settings(64, "exact", "retrieved", budget)
  shapes = (
    jax.ShapeDtypeStruct((num_queries, 32, dim), dtype),
    jax.ShapeDtypeStruct((num_documents, tokens, dim), dtype),
    jax.ShapeDtypeStruct((num_queries, 32), bool),
    jax.ShapeDtypeStruct((num_documents, tokens), bool),
  )

  def loss(*arrays):
    return cross_entropy(xtr_scoring.pool_scores(*arrays, settings))

  compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
  held = compiled.memory_analysis().temp_size_in_bytes
  full = 4 * num_queries * 32 * num_documents * tokens
  winners = 4 * num_queries * 32 * num_documents
  documents = 4 * num_documents * tokens * dim
  # Documents: without padding, in float32, and their gradient in and out of
  # the loop.
  assert held < budget + winners + 4 * documents + (1 << 20) < full / 2


def test_bfloat16_sums_gradients_in_float32():
  """256 and 63 ones are 319, rounded to 320; in bfloat16, 256 + 1 is 256."""
  queries = np.ones((64, 1, 1), jnp.bfloat16)
  documents = np.ones((1, 1, 1), jnp.bfloat16)
  weights = np.ones((64, 1), np.float32)
  weights[0] = 256

  def total(documents):
    per_query = 4 * xtr_scoring._COPIES
    scores = xtr.train_scores(
      queries, documents, k_train=1, memory_budget_bytes=per_query
    )
    return jnp.sum(weights * scores)

  gradient = np.asarray(jax.jit(jax.grad(total))(documents))
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient.ravel(), [320])


def sharded_inputs():
  """Values without ties: eight queries and sixteen documents."""
  queries, documents, query_mask, document_mask = batch(7, (8, 4, 16, 5, 6))
  return queries, documents, query_mask, document_mask


def loss_of(scores):
  positive = jax.nn.one_hot(2 * jnp.arange(8), 16)
  return -jnp.mean(jnp.sum(positive * jax.nn.log_softmax(scores), axis=1))


def value_and_grad(score, arrays):
  def loss(queries, documents, *masks):
    scores = score(queries, documents, *masks)
    return loss_of(scores), scores

  return jax.value_and_grad(loss, (0, 1), has_aux=True)(*arrays)


@functools.cache
def on_one_device(masks):
  score = functools.partial(xtr.train_scores, k_train=6)
  arrays = sharded_inputs()[: 4 if masks else 2]
  return jax.jit(functools.partial(value_and_grad, score))(arrays)


@KINDS
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no_masks"])
def test_local_queries_against_the_documents_of_all_devices(kind, masks):
  arrays = sharded_inputs()[: 4 if masks else 2]
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  data = jax.P("data")
  sharded = jax.shard_map(
    functools.partial(xtr.train_scores_sharded, k_train=6, axis_name="data"),
    mesh=mesh,
    in_specs=(data,) * len(arrays),
    out_specs=data,
  )

  want = on_one_device(masks)
  with jax.set_mesh(mesh):
    shards = jax.device_put(arrays, data)
    got = jax.jit(functools.partial(value_and_grad, sharded))(shards)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    jax.device_get(got),
    jax.device_get(want),
  )
  assert np.abs(want[1][1]).max() > 0.01


def test_text_config_scores_every_token():
  config = xtr.text_config(document_length=100)
  assert (config.query_length, config.document_length) == (32, 100)
  assert config.query_marker is config.document_marker is None
  assert not config.expand_queries and not config.skip_words
  assert config.score_specials and config.normalize


@pytest.mark.unchecked
def test_errors_name_the_argument():
  queries, documents, query_mask, document_mask = batch()
  score = functools.partial(xtr.train_scores, k_train=2)
  with pytest.raises(ValueError, match="queries_dim=2, documents_dim=3"):
    score(queries[..., :2], documents)
  with pytest.raises(ValueError, match="query_mask must have shape"):
    score(queries, documents, query_mask[:, :2], document_mask)
  with pytest.raises(ValueError, match="document_mask must have shape"):
    score(queries, documents, query_mask, document_mask[:2])
  with pytest.raises(ValueError, match="one dtype, got bfloat16 and float32"):
    score(queries.astype(jnp.bfloat16), documents)
  with pytest.raises(ValueError, match="k_train must lie in"):
    xtr.train_scores(queries, documents, k_train=0)
  with pytest.raises(ValueError, match="topk must be one of 'exact'"):
    score(queries, documents, topk="approx")
  with pytest.raises(ValueError, match="z must be one of 'retrieved'"):
    score(queries, documents, z="all")
