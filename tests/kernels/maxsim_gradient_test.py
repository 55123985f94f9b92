"""Where the gradient of MaxSim goes, and where it does not."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.kernels.arrays import takes_numpy
from tokjax.kernels import maxsim as kernel
from tokjax.kernels.maxsim import EMPTY_SCORE

maxsim = takes_numpy(kernel.maxsim)
maxsim_pairs = takes_numpy(kernel.maxsim_pairs)

PLAIN = ["reference", "xla", None]


def random_sets(seed, num_queries=3, num_documents=7):
  random = np.random.default_rng(seed)
  queries = random.standard_normal((num_queries, 5, 6), dtype=np.float32)
  documents = random.standard_normal((num_documents, 9, 6), dtype=np.float32)
  query_mask = random.random((num_queries, 5)) < 0.7
  document_mask = random.random((num_documents, 9)) < 0.6
  return queries, documents, query_mask, document_mask


def loop_gradient(g, queries, documents, query_mask, document_mask):
  """Adds each score's gradient to the two rows of every pair that met."""
  d_queries, d_documents = np.zeros_like(queries), np.zeros_like(documents)
  for i, j in np.ndindex(g.shape):
    if not document_mask[j].any():
      continue
    for a in np.flatnonzero(query_mask[i]):
      met = np.where(document_mask[j], documents[j] @ queries[i, a], -np.inf)
      b = int(np.argmax(met))
      d_queries[i, a] += g[i, j] * documents[j, b]
      d_documents[j, b] += g[i, j] * queries[i, a]
  return d_queries, d_documents


def pull_back(g, queries, documents, *masks, **settings):
  function = functools.partial(maxsim, **settings)
  _, pull = jax.vjp(
    lambda q, d: function(q, d, *masks),
    jnp.asarray(queries),
    jnp.asarray(documents),
  )
  return pull(jnp.asarray(g))


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("budget", [1, 4_000, 1 << 20])
def test_equals_the_loop_with_nan_padding(implementation, budget):
  queries, documents, query_mask, document_mask = random_sets(0)
  document_mask[3] = False
  g = np.random.default_rng(1).standard_normal((3, 7), dtype=np.float32)
  got = pull_back(
    g,
    np.where(query_mask[..., None], queries, np.nan),
    np.where(document_mask[..., None], documents, np.nan),
    query_mask,
    document_mask,
    implementation=implementation,
    memory_budget_bytes=budget,
  )
  want = loop_gradient(g, queries, documents, query_mask, document_mask)
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", PLAIN)
def test_equals_finite_differences(implementation):
  queries, documents, query_mask, document_mask = random_sets(2, 2, 3)
  document_mask[:, 0] = True
  function = jax.jit(
    lambda q, d: maxsim(
      q, d, query_mask, document_mask, implementation=implementation
    )
  )
  jax.test_util.check_grads(
    function, (queries, documents), order=1, modes=["rev"], eps=1e-3
  )


@pytest.mark.parametrize("implementation", PLAIN)
def test_a_tie_sends_everything_to_the_lowest_index(implementation):
  query = jnp.array([[[1.0, 0.0]]])
  document = jnp.array([[[0.0, 1.0], [0.5, 2.0], [0.5, -2.0], [0.5, 2.0]]])
  d_query, d_document = pull_back(
    jnp.full((1, 1), 3.0), query, document, implementation=implementation
  )
  np.testing.assert_array_equal(d_query, [[[1.5, 6.0]]])
  want = np.zeros((1, 4, 2))
  want[0, 1] = [3, 0]
  np.testing.assert_array_equal(d_document, want)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("mean", [False, True])
def test_an_empty_document_passes_no_gradient(implementation, mean):
  queries, documents, _, document_mask = random_sets(3)
  document_mask[:] = False
  scores, pull = jax.vjp(
    lambda q, d: maxsim(
      q, d, None, document_mask, mean=mean, implementation=implementation
    ),
    jnp.asarray(queries),
    jnp.full(documents.shape, jnp.nan),
  )
  np.testing.assert_array_equal(scores, EMPTY_SCORE)
  for gradient in pull(jnp.ones_like(scores)):
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_gradient_comes_back_in_bfloat16():
  queries, documents, query_mask, document_mask = random_sets(4)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (queries, documents)]
  high = [x.astype(jnp.float32) for x in low]
  g = np.ones((3, 7), np.float32)
  got = pull_back(g, *low, query_mask, document_mask)
  want = pull_back(g, *high, query_mask, document_mask)
  for one, other in zip(got, want, strict=True):
    assert one.dtype == jnp.bfloat16
    # Sums are float32 and rounded once, to 8 bits.
    np.testing.assert_allclose(
      one.astype(jnp.float32), other, rtol=2**-8, atol=1e-6
    )


def test_pairs_gradient_equals_one_by_one():
  queries, documents, query_mask, document_mask = random_sets(5, 2, 6)
  own, mask = documents.reshape(2, 3, 9, 6), document_mask.reshape(2, 3, 9)
  got = jax.grad(
    lambda q, d: jnp.sum(jnp.sin(maxsim_pairs(q, d, query_mask, mask))),
    argnums=(0, 1),
  )(jnp.asarray(queries), jnp.asarray(own))
  for i in range(2):
    want = jax.grad(
      lambda q, d, i=i: jnp.sum(
        jnp.sin(maxsim(q, d, query_mask[i : i + 1], mask[i]))
      ),
      argnums=(0, 1),
    )(jnp.asarray(queries[i : i + 1]), jnp.asarray(own[i]))
    np.testing.assert_allclose(got[0][i], want[0][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1][i], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("sharded", [(0, 2), (1, 3), (0, 1, 2, 3)], ids=str)
def test_sharded_gradient_equals_single_device(kind, sharded):
  arrays = random_sets(6, 4, 8)

  def loss(*arrays):
    return jnp.sum(jnp.sin(maxsim(*arrays)))

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  want = gradient(*arrays)
  mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    shards = [
      jax.device_put(x, jax.P("data") if i in sharded else jax.P())
      for i, x in enumerate(arrays)
    ]
    got = jax.device_get(gradient(*shards))
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_works_inside_shard_map_with_replicated_queries():
  queries, documents, _, _ = random_sets(7, 2, 8)
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  over_mesh = jax.shard_map(
    maxsim,
    mesh=mesh,
    in_specs=(jax.P(), jax.P("data")),
    out_specs=jax.P(None, "data"),
  )

  def loss(function):
    return lambda q, d: jnp.sum(jnp.sin(function(q, d)))

  got = jax.jit(jax.grad(loss(over_mesh), argnums=(0, 1)))(queries, documents)
  want = jax.grad(loss(maxsim), argnums=(0, 1))(queries, documents)
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
