"""Nodes of a graph as a few anchors and relations (NodePiece).

Instead of a row of a table each, a node has the k anchors nearest to it, how
far they are, and up to m types of the edges that leave it. Tokens are made
once, on the host, in NumPy; a small encoder makes vectors of them, trained
with whatever they are for.

    edges = with_inverses(triples, num_relations=237)  # [E, 3]
    anchors = choose_anchors(edges, num_nodes, num_anchors=1000, seed=0)
    tokens = graph_tokens(edges, num_nodes, anchors, num_nearest=20,
                          num_outgoing=15, seed=0)
    encoder = GraphEncoder(config, rngs=nnx.Rngs(0))
    vectors = encoder(jax.tree.map(lambda x: x[nodes], tokens))

Published sizes: FB15k-237 with 1,000 anchors, k = 20, m = 15, width 200;
WN18RR with 500, 50 and 4.

Sources: Galkin et al., 2022, "NodePiece: Compositional and Parameter-Efficient
Representations of Large Knowledge Graphs", and its code; random codes as
control, Li et al., 2023, "Random Entity Quantization for Parameter-Efficient
Compositional Knowledge Graph Representation". Ours: of anchors at one distance
the first in the list comes first; a missing anchor is a token of its own with
a distance of its own (the code gives it 0, as an anchor has to itself), for
each place and not only where the first anchor of the list is out of reach.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.ops.rows import take_rows
from tokjax.tokenizers import transformer
from tokjax.typing import Array, Float, Int, Key

__all__ = [
  "PAD",
  "GraphEncoder",
  "GraphEncoderConfig",
  "GraphTokens",
  "choose_anchors",
  "graph_tokens",
  "random_codes",
  "uniqueness",
  "with_inverses",
]

PAD = -1  # in place of relations that a node does not have
Direction = Literal["in", "out", "both"]
Composer = Literal["mlp", "transformer"]


class GraphTokens(NamedTuple):
  """What stands for nodes; rows of it for some of them.

  Attributes:
    anchor_index: nearest anchors by their place in the list of A anchors, the
      nearest first; A, "nothing", where there are fewer.
    distance: edges on the way to each; one more than the most hops allowed
      for "nothing".
    relations: types of the edges that leave, ascending; `PAD` at the end.
  """

  anchor_index: Int[Array, "*batch k"] | np.ndarray
  distance: Int[Array, "*batch k"] | np.ndarray
  relations: Int[Array, "*batch m"] | np.ndarray


def with_inverses(edges: np.ndarray, *, num_relations: int) -> np.ndarray:
  """Edges both ways: (h, r, t) also as (t, r + num_relations, h).

  Args:
    edges: rows of head, relation and tail.
    num_relations: R; afterwards there are twice as many.

  Returns:
    [2 E, 3].

  Example:
    >>> with_inverses(np.array([[4, 0, 5]]), num_relations=2).tolist()
    [[4, 0, 5], [5, 2, 4]]
  """
  turned = edges[:, ::-1] + np.array([0, num_relations, 0], edges.dtype)
  return np.concatenate([edges, turned])


def choose_anchors(
  edges: np.ndarray,
  num_nodes: int,
  *,
  num_anchors: int,
  seed: int,
  degree_share: float = 0.4,
  pagerank_share: float = 0.4,
  restart: np.ndarray | None = None,
) -> np.ndarray:
  """Nodes of many edges, nodes that random walks visit, and random ones.

  Args:
    edges: rows of head, relation and tail.
    num_nodes: V.
    num_anchors: A, at most V.
    seed: of the random ones.
    degree_share: share of the anchors with the most edges, in and out; .4 of
      the paper.
    pagerank_share: share with the highest PageRank among the others (damping
      .85); .4 of the paper. What is left is random.
    restart: nodes where walks start again ("personalised"); None means all,
      as in the published code.

  Returns:
    int32 [A] nodes, none twice; of equals the lower comes first.

  Raises:
    ValueError: for edges out of range, too many anchors, or shares that are
      more than 1.

  Example:
    >>> star = np.array([[0, 0, 3], [1, 0, 3], [2, 0, 3]])
    >>> choose_anchors(star, 4, num_anchors=1, seed=0, degree_share=1.0,
    ...                pagerank_share=0.0).tolist()
    [3]
  """
  _check_edges(edges, num_nodes)
  checks.in_range(1, num_nodes, num_anchors=num_anchors)
  checks.in_range(0, 1, degree_share=degree_share)
  checks.in_range(0, 1 - degree_share, pagerank_share=pagerank_share)
  degree = np.bincount(edges[:, [0, 2]].ravel(), minlength=num_nodes)
  rank = _pagerank(edges, num_nodes, restart)
  random = np.random.default_rng(seed).random(num_nodes)
  of_degree = round(degree_share * num_anchors)
  until_rank = round((degree_share + pagerank_share) * num_anchors)
  chosen = np.zeros(0, np.int64)
  for score, until in (
    (degree, of_degree), (rank, until_rank), (random, num_anchors)
  ):  # fmt: skip
    order = np.argsort(-score, kind="stable")
    order = order[~np.isin(order, chosen)]
    chosen = np.concatenate([chosen, order[: until - len(chosen)]])
  return chosen.astype(np.int32)


def graph_tokens(
  edges: np.ndarray,
  num_nodes: int,
  anchors: np.ndarray,
  *,
  num_nearest: int,
  num_outgoing: int,
  seed: int,
  max_hops: int = 50,
  direction: Direction = "in",
) -> GraphTokens:
  """The nearest anchors and the outgoing relations of every node.

  Works level by level: what nodes found at one level their neighbours may
  find at the next. Only the k nearest of each node are kept and passed on,
  which loses nothing: an anchor that is none of the k of a neighbour is
  none of the node's own, as those k come before it there, too. Costs at most
  k additions for every edge, V (2 k + m) numbers, and no V x A table.

  Args:
    edges: rows of head, relation and tail, with inverses if those count.
    num_nodes: V.
    anchors: nodes, none twice.
    num_nearest: k.
    num_outgoing: m.
    seed: of which relations stand for a node that has more than m.
    max_hops: levels; 50 in the published code.
    direction: "in" counts the edges of a path from anchor to node, as the
      published code does, "out" of one from node to anchor, "both" of either.

  Returns:
    int32 tokens of all nodes.

  Raises:
    ValueError: for edges or anchors out of range, or an anchor that is there
      twice.

  Example:
    >>> path = np.array([[0, 0, 1], [1, 0, 2], [2, 0, 3], [3, 0, 4]])
    >>> tokens = graph_tokens(path, 5, np.array([0, 4]), num_nearest=2,
    ...                       num_outgoing=2, seed=0, direction="both")
    >>> tokens.anchor_index[1].tolist(), tokens.distance[1].tolist()
    ([0, 1], [1, 3])
    >>> tokens.relations[1].tolist()
    [0, -1]
  """
  _check_edges(edges, num_nodes)
  checks.one_of(get_args(Direction), direction=direction)
  checks.in_range(1, 1 << 20, num_nearest=num_nearest, max_hops=max_hops)
  checks.in_range(0, 1 << 20, num_outgoing=num_outgoing)
  anchors = np.asarray(anchors, np.int64)
  if len(np.unique(anchors)) != len(anchors):
    raise ValueError("anchors must be different nodes, got one twice")
  if len(anchors):
    checks.in_range(
      0, num_nodes - 1, first=int(anchors.min()), last=int(anchors.max())
    )
  nearest = _nearest(
    edges, num_nodes, anchors, num_nearest, max_hops, direction
  )  # fmt: skip
  return GraphTokens(*nearest, _outgoing(edges, num_nodes, num_outgoing, seed))


def random_codes(
  num_nodes: int,
  *,
  num_anchors: int,
  num_nearest: int,
  seed: int,
  relations: np.ndarray | None = None,
) -> GraphTokens:
  """The control: each node has anchors drawn at random, at distance 0.

  Args:
    num_nodes: V.
    num_anchors: A.
    num_nearest: k different anchors a node, at most A.
    seed: of the draw.
    relations: [V, m] to keep, as of `graph_tokens`; None has none, m = 0.

  Returns:
    int32 tokens of all nodes, anchors ascending.

  Raises:
    ValueError: for more anchors a node than there are.

  Example:
    >>> random_codes(2, num_anchors=2, num_nearest=2, seed=0).anchor_index
    array([[0, 1],
           [0, 1]], dtype=int32)
  """
  checks.in_range(1, num_anchors, num_nearest=num_nearest)
  draw, block = np.random.default_rng(seed), max(1, (1 << 24) // num_anchors)
  index = np.zeros((num_nodes, num_nearest), np.int32)
  for start in range(0, num_nodes, block):
    rows = draw.random((min(block, num_nodes - start), num_anchors))
    order = np.argpartition(rows, num_nearest - 1, axis=1)
    index[start : start + block] = np.sort(order[:, :num_nearest], axis=1)
  if relations is None:
    relations = np.zeros((num_nodes, 0), np.int32)
  return GraphTokens(index, np.zeros_like(index), relations)


def uniqueness(tokens: GraphTokens) -> float:
  """Number of different codes over the number of nodes; 1 is no collision.

  Args:
    tokens: of all nodes, in NumPy.

  Example:
    >>> uniqueness(random_codes(4, num_anchors=2, num_nearest=2, seed=0))
    0.25
  """
  codes = np.concatenate([np.asarray(part) for part in tokens], axis=1)
  return len(np.unique(codes, axis=0)) / len(codes)


@dataclasses.dataclass(unsafe_hash=True)
class GraphEncoderConfig:
  """Vectors of tokens; sizes as the tokens were made with."""

  num_anchors: int  # A
  num_relations: int  # R, inverses included
  num_nearest: int  # k
  num_outgoing: int  # m
  width: int = 200  # D
  max_hops: int = 50
  composer: Composer = "mlp"
  hidden_ratio: float = 2.0  # width between the layers over D
  dropout_rate: float = 0.1  # of "mlp"
  num_layers: int = 2  # of "transformer"
  num_heads: int = 4  # of "transformer"

  def build(self, rngs: nnx.Rngs) -> "GraphEncoder":
    """The encoder of these settings."""
    return GraphEncoder(self, rngs=rngs)


class GraphEncoder(nnx.Module):
  """Adds anchor and distance, joins them with relations, mixes.

  "mlp": all tokens side by side, W2 relu(W1 t + b1) + b2, as published.
  "transformer": blocks over the tokens, their mean; norms come before the
  blocks, and `PAD` is left out, where the published code averages it.

  Attributes:
    config: its settings.
    anchors: [A + 1, D], the last for "nothing".
    distances: [max_hops + 2, D], the last for "nothing".
    relations: [R, D]; `PAD` is zero.

  Args:
    config: settings.
    rngs: seeds the parameters.

  Raises:
    ValueError: for settings out of range.

  Example:
    >>> config = GraphEncoderConfig(4, 2, 2, num_outgoing=3, width=8)
    >>> encoder = jax.jit(lambda: GraphEncoder(config, rngs=nnx.Rngs(0)))()
    >>> tokens = GraphTokens(
    ...   jnp.array([[0, 4]]), jnp.array([[1, 51]]), jnp.array([[0, 1, PAD]]))
    >>> jax.jit(encoder)(tokens).shape
    (1, 8)
  """

  def __init__(self, config: GraphEncoderConfig, *, rngs: nnx.Rngs):
    checks.one_of(get_args(Composer), composer=config.composer)
    checks.in_range(
      1, 1 << 20, width=config.width, num_nearest=config.num_nearest
    )
    checks.in_range(0, 1, dropout_rate=config.dropout_rate)
    self.config = config
    init = nnx.initializers.xavier_uniform()

    def table(rows):
      return nnx.Param(init(rngs.params(), (rows, config.width)))

    self.anchors = table(config.num_anchors + 1)
    self.distances = table(config.max_hops + 2)
    self.relations = table(config.num_relations)
    mixed = config.composer == "transformer"
    shape = transformer.TransformerConfig(
      config.width,
      config.num_layers,
      config.num_heads,
      mlp_ratio=config.hidden_ratio,
    )
    self.blocks = transformer.Transformer(shape, rngs=rngs) if mixed else None
    hidden = int(config.hidden_ratio * config.width)
    joined = (config.num_nearest + config.num_outgoing) * config.width

    def layer(inputs, outputs):
      return None if mixed else nnx.Linear(inputs, outputs, rngs=rngs)

    self.up = layer(joined, hidden)
    self.down = layer(hidden, config.width)

  def __call__(
    self, tokens: GraphTokens, *, key: Key[Array, ""] | None = None
  ) -> Float[Array, "B D"]:
    """Vectors of nodes.

    Args:
      tokens: of some nodes, [B, k] and [B, m].
      key: for dropout; None means none.

    Raises:
      ValueError: if the tokens were made with other sizes.
    """
    config = self.config
    checks.same_size(
      anchors_of_a_node=tokens.anchor_index.shape[-1],
      num_nearest=config.num_nearest,
    )
    checks.same_size(
      relations_of_a_node=tokens.relations.shape[-1],
      num_outgoing=config.num_outgoing,
    )
    index, distance, outgoing = (jnp.asarray(part) for part in tokens)
    near = take_rows(self.anchors[...], index)
    near = near + take_rows(self.distances[...], distance)
    x = jnp.concatenate(
      [near, take_rows(self.relations[...], outgoing)], axis=1
    )
    if self.blocks is not None:
      valid = jnp.concatenate([index >= 0, outgoing != PAD], axis=1)
      whole = jnp.broadcast_to(valid[:, None], (*valid.shape, valid.shape[1]))
      x = jnp.where(valid[..., None], self.blocks(x, mask=whole), 0)
      count = jnp.sum(valid, axis=1, keepdims=True)
      return (jnp.sum(x, axis=1) / count).astype(x.dtype)
    x = self.up(x.reshape(len(x), -1))
    if key is not None:
      keep = 1 - config.dropout_rate
      kept = jax.random.bernoulli(key, keep, x.shape)
      x = jnp.where(kept, x / keep, 0)
    return self.down(jax.nn.relu(x))


def _check_edges(edges, num_nodes):
  if edges.ndim != 2 or edges.shape[1] != 3:
    raise ValueError(
      f"edges must be rows of head, relation, tail, got {edges.shape}"
    )
  if len(edges):
    ends = edges[:, [0, 2]]
    checks.in_range(
      0,
      num_nodes - 1,
      lowest_node=int(ends.min()),
      highest_node=int(ends.max()),
    )


def _pagerank(edges, num_nodes, restart, damping=0.85, num_iterations=100):
  start = np.zeros(num_nodes)
  start[slice(None) if restart is None else restart] = 1
  start /= start.sum()
  heads, tails = edges[:, 0], edges[:, 2]
  leaving = np.bincount(heads, minlength=num_nodes)
  rank = start
  for _ in range(num_iterations):
    share = rank / np.maximum(leaving, 1)
    walked = np.bincount(tails, share[heads], minlength=num_nodes)
    stuck = rank[leaving == 0].sum()  # those nodes have no edge to leave by
    rank = damping * (walked + stuck * start) + (1 - damping) * start
  # Nodes that are alike shall be equal in spite of rounding.
  return np.round(rank, 12)


def _nearest(edges, num_nodes, anchors, num_nearest, max_hops, direction):
  """[V, k] places of anchors and distances."""
  heads, tails = edges[:, 0].astype(np.int64), edges[:, 2].astype(np.int64)
  if direction == "out":
    heads, tails = tails, heads
  elif direction == "both":
    heads, tails = np.append(heads, tails), np.append(tails, heads)
  order = np.argsort(heads, kind="stable")
  tails = tails[order]
  first = np.searchsorted(heads[order], np.arange(num_nodes + 1))
  total = max(1, len(anchors))  # a pair is the number node * total + place
  index = np.full((num_nodes, num_nearest), len(anchors), np.int32)
  distance = np.full((num_nodes, num_nearest), max_hops + 1, np.int32)
  found = np.zeros(num_nodes, np.int64)
  known = np.zeros(0, np.int64)
  fresh = np.sort(anchors * total + np.arange(len(anchors)))
  for hops in range(max_hops + 1):
    node, place = fresh // total, fresh % total
    # Pairs are sorted: of one node's the lowest places come first.
    begins = np.searchsorted(node, node)
    slot = found[node] + np.arange(len(node)) - begins
    kept = slot < num_nearest
    node, place, fresh = node[kept], place[kept], fresh[kept]
    index[node, slot[kept]] = place
    distance[node, slot[kept]] = hops
    found += np.bincount(node, minlength=num_nodes)
    known = np.union1d(known, fresh)
    degree = first[node + 1] - first[node]
    if not degree.sum():
      break
    ends = np.cumsum(degree)
    within = np.arange(ends[-1]) - np.repeat(ends - degree, degree)
    to = tails[np.repeat(first[node], degree) + within]
    pairs = np.unique(to * total + np.repeat(place, degree))
    pairs = pairs[found[pairs // total] < num_nearest]
    fresh = np.setdiff1d(pairs, known, assume_unique=True)
  return index, distance


def _outgoing(edges, num_nodes, number, seed):
  """[V, m] types of edges, ascending, then `PAD`."""
  pairs = np.unique(edges[:, :2].astype(np.int64), axis=0)
  draw = np.random.default_rng(seed).random(len(pairs))

  def slots(node):
    return np.arange(len(node)) - np.searchsorted(node, node)

  order = np.lexsort((draw, pairs[:, 0]))  # by node, at random within
  pairs = pairs[order[slots(pairs[order, 0]) < number]]
  pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
  result = np.full((num_nodes, number), PAD, np.int32)
  result[pairs[:, 0], slots(pairs[:, 0])] = pairs[:, 1]
  return result
