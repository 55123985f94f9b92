"""Nodes as anchors and relations: nearest anchors, ties, and the encoder."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokjax.tokenizers import graph_tokens
from tokjax.tokenizers.graph_tokens import (
  PAD,
  GraphEncoderConfig,
  GraphTokens,
)

PATH = np.array([[0, 0, 1], [1, 0, 2], [2, 0, 3], [3, 0, 4]])


def graph(seed=0, num_nodes=30, num_edges=45, num_relations=6):
  random = np.random.default_rng(seed)
  return np.stack(
    [
      random.integers(0, num_nodes, num_edges),
      random.integers(0, num_relations, num_edges),
      random.integers(0, num_nodes, num_edges),
    ],
    axis=1,
  )


def tokens_of(edges, num_nodes, anchors, **settings):
  defaults = {"num_nearest": 3, "num_outgoing": 4, "seed": 0}
  return graph_tokens.graph_tokens(
    edges, num_nodes, np.array(anchors), **(defaults | settings)
  )


def test_worked_example():
  got = tokens_of(PATH, 5, [0, 4], num_nearest=2, direction="both")
  assert got.anchor_index.tolist() == [[0, 1], [0, 1], [0, 1], [1, 0], [1, 0]]
  assert got.distance.tolist() == [[0, 4], [1, 3], [2, 2], [1, 3], [0, 4]]
  assert got.relations.tolist() == [[0, PAD, PAD, PAD]] * 4 + [[PAD] * 4]


def test_nothing_is_not_padding_and_has_its_own_distance():
  got = tokens_of(PATH, 5, [4, 2], num_nearest=2, max_hops=7)
  # Along the edges only what lies before a node reaches it.
  assert got.anchor_index.tolist() == [[2, 2], [2, 2], [1, 2], [1, 2], [0, 1]]
  assert got.distance.tolist() == [[8, 8], [8, 8], [0, 8], [1, 8], [0, 2]]
  assert got.relations[4].tolist() == [PAD] * 4
  back = tokens_of(PATH, 5, [4, 2], num_nearest=2, direction="out", max_hops=2)
  assert back.anchor_index.tolist() == [[1, 2], [1, 2], [1, 0], [0, 2], [0, 2]]
  assert back.distance.tolist() == [[2, 3], [1, 3], [0, 2], [1, 3], [0, 3]]


def search(edges, num_nodes, anchors, direction):
  """Hops from every anchor to every node, one queue an anchor."""
  steps = collections.defaultdict(set)
  for head, _, tail in edges.tolist():
    if direction in ("in", "both"):
      steps[head].add(tail)
    if direction in ("out", "both"):
      steps[tail].add(head)
  hops = np.full((len(anchors), num_nodes), np.inf)
  for place, anchor in enumerate(anchors):
    hops[place, anchor] = 0
    queue = collections.deque([anchor])
    while queue:
      node = queue.popleft()
      for other in steps[node]:
        if hops[place, other] == np.inf:
          hops[place, other] = hops[place, node] + 1
          queue.append(other)
  return hops


@pytest.mark.parametrize("direction", ["in", "out", "both"])
@pytest.mark.parametrize("max_hops", [2, 50])
def test_equals_a_search_from_every_anchor(direction, max_hops):
  for seed in range(20):
    edges = graph(seed)
    anchors = np.random.default_rng(seed).permutation(30)[:7]
    got = tokens_of(edges, 30, anchors, direction=direction, max_hops=max_hops)
    hops = search(edges, 30, anchors, direction)
    hops[hops > max_hops] = np.inf
    for node in range(30):
      order = sorted(range(7), key=lambda a: (hops[a, node], a))[:3]  # noqa: B023
      reached = [a for a in order if hops[a, node] < np.inf]
      lacking = 3 - len(reached)
      assert got.anchor_index[node].tolist() == reached + [7] * lacking
      want = [int(hops[a, node]) for a in reached] + [max_hops + 1] * lacking
      assert got.distance[node].tolist() == want


def test_relations_are_those_that_leave():
  edges = graph(num_edges=90)
  got = tokens_of(edges, 30, [0], num_outgoing=3, seed=5).relations
  cut = 0
  for node in range(30):
    have = sorted({r for h, r, _ in edges.tolist() if h == node})
    row = [r for r in got[node].tolist() if r != PAD]
    assert len(row) == min(3, len(have)) and set(row) <= set(have)
    assert row == sorted(row)
    assert got[node].tolist() == row + [PAD] * (3 - len(row))
    cut += len(have) > 3
  assert cut > 3
  again = tokens_of(edges, 30, [0], num_outgoing=3, seed=5).relations
  other = tokens_of(edges, 30, [0], num_outgoing=3, seed=6).relations
  np.testing.assert_array_equal(got, again)
  assert not np.array_equal(got, other)


def test_names_of_other_nodes_do_not_matter():
  edges, anchors = graph(), np.array([3, 17, 8])
  others = np.setdiff1d(np.arange(30), anchors)
  name = np.arange(30)
  name[others] = np.random.default_rng(1).permutation(others)
  renamed = np.stack([name[edges[:, 0]], edges[:, 1], name[edges[:, 2]]], 1)
  shuffled = renamed[np.random.default_rng(2).permutation(len(edges))]
  want = tokens_of(edges, 30, anchors, num_outgoing=6)
  got = tokens_of(shuffled, 30, anchors, num_outgoing=6)
  jax.tree.map(
    lambda g, w: np.testing.assert_array_equal(g[name], w), got, want
  )


def test_anchors_by_degree_rank_and_lot():
  edges = graph(num_edges=80)
  got = graph_tokens.choose_anchors(edges, 30, num_anchors=10, seed=0)
  assert len(set(got.tolist())) == 10
  degree = np.bincount(edges[:, [0, 2]].ravel(), minlength=30)
  assert got[:4].tolist() == np.argsort(-degree, kind="stable")[:4].tolist()
  # The stationary walk, from the eigenvector of the whole matrix.
  walk = np.zeros((30, 30))
  for head, _, tail in edges.tolist():
    walk[tail, head] += 1
  leaving = walk.sum(0)
  walk = np.where(leaving > 0, walk / np.maximum(leaving, 1), 1 / 30)
  values, vectors = np.linalg.eig(0.85 * walk + 0.15 / 30)
  rank = np.abs(vectors[:, np.argmax(values.real)].real)
  order = [n for n in np.argsort(-rank) if n not in got[:4]]
  assert got[4:8].tolist() == order[:4]
  other = graph_tokens.choose_anchors(edges, 30, num_anchors=10, seed=1)
  assert got[:8].tolist() == other[:8].tolist()
  assert got[8:].tolist() != other[8:].tolist()


def test_walks_start_again_where_they_are_told():
  got = graph_tokens.choose_anchors(
    PATH, 5, num_anchors=2, seed=0, degree_share=0.0, pagerank_share=1.0,
    restart=np.array([3]),
  )  # fmt: skip
  assert got.tolist() == [3, 4]  # nothing else is ever visited


def test_random_codes_and_collisions():
  got = graph_tokens.random_codes(
    50, num_anchors=9, num_nearest=3, seed=0, relations=np.zeros((50, 2), int)
  )
  assert got.relations.shape == (50, 2) and not np.any(got.distance)
  assert all(len(set(row)) == 3 for row in got.anchor_index.tolist())
  assert got.anchor_index.min() == 0 and got.anchor_index.max() == 8
  codes = {tuple(row) for row in got.anchor_index.tolist()}
  assert graph_tokens.uniqueness(got) == len(codes) / 50 < 1
  # In the middle of a path, both ends are as far: only order tells.
  path = tokens_of(PATH, 5, [0, 4], num_nearest=2, direction="both")
  assert graph_tokens.uniqueness(path) == 1


def test_edges_both_ways():
  got = graph_tokens.with_inverses(PATH[:2], num_relations=3)
  assert got.tolist() == [[0, 0, 1], [1, 0, 2], [1, 3, 0], [2, 3, 1]]


def encoder(composer="mlp"):
  config = GraphEncoderConfig(
    3, 6, num_nearest=2, num_outgoing=3, width=8, max_hops=4,
    composer=composer, num_layers=1, num_heads=2,
  )  # fmt: skip
  return jax.jit(lambda: config.build(nnx.Rngs(0)))()


def few_nodes():
  return GraphTokens(
    np.array([[0, 2], [1, 3], [3, 3]]),
    np.array([[0, 4], [2, 5], [5, 5]]),
    np.array([[1, 2, 5], [4, PAD, PAD], [PAD, PAD, PAD]]),
  )


@functools.partial(jax.jit, static_argnames="total")
def run(encoder, tokens, key=None, total=False):
  x = encoder(tokens, key=key)
  return jnp.sum(jnp.sin(x)) if total else x


def test_mlp_equals_a_loop():
  model, tokens = encoder(), few_nodes()
  got = run(model, tokens)
  anchors, distances, relations = (
    np.asarray(table[...], np.float64)
    for table in (model.anchors, model.distances, model.relations)
  )
  for row, (index, far, types) in enumerate(zip(*tokens, strict=True)):
    parts = [anchors[i] + distances[d] for i, d in zip(index, far, strict=True)]
    parts += [relations[r] if r != PAD else np.zeros(8) for r in types]
    hidden = np.concatenate(parts) @ model.up.kernel[...] + model.up.bias[...]
    want = np.maximum(hidden, 0) @ model.down.kernel[...]
    np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("composer", ["mlp", "transformer"])
def test_padding_gets_no_gradient_and_nothing_does(composer):
  model = encoder(composer)
  grads = jax.jit(jax.grad(functools.partial(run, total=True)))(
    model, few_nodes()
  )
  used = [0, 1, 2, 3]  # 3 is "nothing"
  assert np.all(np.abs(grads.anchors[...]).sum(1)[used] > 0)
  of_types = np.abs(grads.relations[...]).sum(1)
  np.testing.assert_array_equal(of_types > 0, [0, 1, 1, 0, 1, 1])
  assert np.abs(grads.distances[...][5]).sum() > 0


def test_the_transformer_takes_sets():
  """Order within anchors does not count, and padding is left out."""
  model, tokens = encoder("transformer"), few_nodes()
  want = run(model, tokens)
  turned = tokens._replace(
    anchor_index=tokens.anchor_index[:, ::-1],
    distance=tokens.distance[:, ::-1],
    relations=tokens.relations[:, ::-1],
  )
  np.testing.assert_allclose(run(model, turned), want, atol=1e-5)


def test_dropout_is_one_in_the_mean():
  model, tokens = encoder(), few_nodes()
  keys = jax.random.split(jax.random.key(0), 4000)
  many = jax.jit(jax.vmap(lambda key: model(tokens, key=key)))(keys)
  assert np.std(many, axis=0).min() > 0
  hidden = np.std(many, axis=0).max() / np.sqrt(4000)
  # What follows is linear but for relu, which a scale does not change.
  np.testing.assert_allclose(
    many.mean(0), run(model, tokens), atol=5 * hidden
  )  # fmt: skip


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="edges must be rows of head"):
    tokens_of(PATH[:, :2], 5, [0])
  with pytest.raises(ValueError, match="highest_node must lie in 0..3, got 4"):
    tokens_of(PATH, 4, [0])
  with pytest.raises(ValueError, match="got one twice"):
    tokens_of(PATH, 5, [0, 0])
  with pytest.raises(ValueError, match="last must lie in 0..4, got 9"):
    tokens_of(PATH, 5, [0, 9])
  with pytest.raises(ValueError, match="direction must be one of"):
    tokens_of(PATH, 5, [0], direction="up")
  with pytest.raises(ValueError, match="num_anchors must lie in 1..5"):
    graph_tokens.choose_anchors(PATH, 5, num_anchors=6, seed=0)
  with pytest.raises(ValueError, match="pagerank_share must lie in"):
    graph_tokens.choose_anchors(
      PATH, 5, num_anchors=2, seed=0, degree_share=0.8
    )
  with pytest.raises(ValueError, match="num_nearest must lie in 1..2"):
    graph_tokens.random_codes(5, num_anchors=2, num_nearest=3, seed=0)
  with pytest.raises(ValueError, match="composer must be one of"):
    GraphEncoderConfig(3, 6, 2, 3, composer="lstm").build(nnx.Rngs(0))
  tokens = few_nodes()._replace(relations=np.zeros((3, 2), int))
  with pytest.raises(ValueError, match="relations_of_a_node=2, num_outgoing=3"):
    encoder()(tokens)
