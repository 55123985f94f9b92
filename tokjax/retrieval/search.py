"""Search: exact MaxSim over a token index, or over candidates found cheaply.

Modes, all with exact MaxSim scores at the end:

- "exact" scores every document, block by block, in bounded memory;
- the name of a candidate set of the index ranks documents by one inner
  product each and scores the best of them exactly.

A batch of queries is one program without a stop at the host, and
`search_sharded` runs it on every device of a mesh, over its own documents.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.retrieval import index_scoring
from tokjax.retrieval.index_scoring import Ranking
from tokjax.retrieval.token_index import TokenIndex
from tokjax.typing import Array, Bool, Float

__all__ = ["Ranking", "search", "search_batches", "search_sharded"]


def search(
  index: TokenIndex,
  queries: Float[Array, "Nq Q D"],
  query_mask: Bool[Array, "Nq Q"] | None = None,
  *,
  mode: str = "exact",
  k: int = 10,
  num_candidates: int = 256,
  query_vectors: Float[Array, "Nq F"] | None = None,
) -> Ranking:
  """The k documents of largest MaxSim for each query.

  "exact" costs 2 Nq Q T D FLOPs for a corpus of T tokens. With candidates it
  is 2 Nq Nd F for their vectors and 2 Nq Q D for each token of the
  `num_candidates` documents that are scored. Wrap it in `jax.jit` with the
  keyword settings static.

  Args:
    index: the documents (retrieval/token_index.py).
    queries: query tokens, any float dtype; products and sums are float32.
    query_mask: True where a query token counts; None for all.
    mode: "exact" or a name in `index.candidates`.
    k: results per query, 1..Nd.
    num_candidates: documents scored exactly per query, at least k; more than
      Nd means all. Unused by "exact".
    query_vectors: query side of the candidate vectors; None encodes the
      tokens (their fixed dimensional encoding where the candidates hold one,
      else their mean).

  Returns:
    Positions int32 and float32 scores. Deleted documents never appear, and a
    document without tokens scores EMPTY_SCORE.

  Raises:
    ValueError: for an unknown mode, a k out of range, sizes that disagree, or
      an index with word ids, which is `colberter_texts.search_fused`'s.

  Example:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from tokjax.retrieval import search, token_index
    >>> tokens = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    >>> index = token_index.build(tokens, np.array([0, 2, 3]))
    >>> found = search.search(index, jnp.array([[[0.6, 0.8], [0.8, 0.6]]]), k=2)
    >>> found.index.tolist()
    [[1, 0]]

  Source: the candidate step with fixed dimensional encodings is Dhulipala et
  al., 2024, "MUVERA"; pages and block sizes are ours.
  """
  checks.one_of(("exact", *index.candidates), mode=mode)
  checks.in_range(1, index.num_documents, k=k)
  queries, query_mask = index_scoring.prepare_queries(
    index, queries, query_mask
  )
  if mode == "exact":
    return index_scoring.exact(index, queries, query_mask, k=k)
  num_candidates = min(num_candidates, index.num_documents)
  checks.in_range(k, index.num_documents, num_candidates=num_candidates)
  first = index_scoring.candidate_scores(
    index.candidates[mode], queries, query_mask, query_vectors=query_vectors
  )
  first = jnp.where(index.live[None, :], first, -jnp.inf)
  values, found = jax.lax.top_k(first, num_candidates)
  # Ascending positions: ties of the final scores go to the lower one, and
  # pages are read in the order of memory.
  found = jnp.sort(jnp.where(values > -jnp.inf, found, -1), axis=1)
  scores = index_scoring.rescore(index, queries, query_mask, found)
  scores, place = jax.lax.top_k(scores, k)
  return index_scoring.as_ranking(
    scores, jnp.take_along_axis(found, place, axis=1)
  )


def search_batches(
  index: TokenIndex,
  queries: Any,
  query_mask: Any,
  *,
  mode: str = "exact",
  k: int = 10,
  num_candidates: int = 256,
  query_vectors: Any = None,
  batch_size: int = 16,
  multiple: int = 8,
) -> Ranking:
  """`search` for many queries of different lengths, from the host.

  Queries are sorted by their number of tokens; each batch drops its masked
  tokens (their order does not matter to MaxSim) and is padded to the next
  multiple of `multiple`, so there is one program per length and short queries
  do not pay for the longest. All batches are dispatched before any is awaited.

  Args:
    index: the documents.
    queries: query tokens [Nq, Q, D].
    query_mask: True where a query token counts [Nq, Q].
    mode: see `search`.
    k: see `search`.
    num_candidates: see `search`.
    query_vectors: see `search`.
    batch_size: queries of a program.
    multiple: granularity of padded lengths.

  Returns:
    NumPy arrays, in the order of the queries.

  Raises:
    ValueError: as `search`.
  """
  queries, query_mask = np.asarray(queries), np.asarray(query_mask)
  checks.same_size(queries=len(queries), query_mask=len(query_mask))
  checks.in_range(1, 1 << 20, batch_size=batch_size, multiple=multiple)
  lengths = query_mask.sum(axis=1)
  order = np.argsort(lengths, kind="stable")
  parts = []
  for start in range(0, len(order), batch_size):
    chosen = order[start : start + batch_size]
    # A last, smaller batch repeats a query, to run the same program.
    rows = np.pad(chosen, (0, batch_size - len(chosen)), mode="edge")
    longest = max(1, int(lengths[chosen].max()))
    width = min(-(-longest // multiple) * multiple, queries.shape[1])
    valid_first = np.argsort(~query_mask[rows], axis=1, kind="stable")
    place = valid_first[:, :width]
    found = _search(
      index,
      np.take_along_axis(queries[rows], place[..., None], axis=1),
      np.take_along_axis(query_mask[rows], place, axis=1),
      mode=mode,
      k=k,
      num_candidates=num_candidates,
      query_vectors=None if query_vectors is None else query_vectors[rows],
    )
    num_real = len(chosen)
    parts.append(Ranking(*(x[:num_real] for x in found)))
  back = np.argsort(order)
  return jax.tree.map(
    lambda *arrays: np.concatenate([np.asarray(x) for x in arrays])[back],
    *parts,
  )


def search_sharded(
  index: TokenIndex,
  queries: Float[Array, "Nq Q D"],
  query_mask: Bool[Array, "Nq Q"] | None = None,
  *,
  mesh: jax.sharding.Mesh,
  axis_name: str,
  shard_sizes: tuple[int, ...],
  mode: str = "exact",
  k: int = 10,
  num_candidates: int = 256,
  query_vectors: Float[Array, "Nq F"] | None = None,
) -> Ranking:
  """`search` with the documents spread over the devices of a mesh axis.

  Every device searches its own documents and the k best of each are merged:
  8 k bytes per query and device are exchanged. "exact" gives what `search`
  gives on the whole corpus; with candidates each device contributes its own
  `num_candidates`, so recall can only rise.

  Args:
    index: the result of `stack_shards`, one shard per device of the axis.
    queries: as in `search`, replicated.
    query_mask: as in `search`.
    mesh: the devices.
    axis_name: mesh axis of the shards.
    shard_sizes: documents of each shard, before padding.
    mode: as in `search`.
    k: results per query, at most the documents of the largest shard.
    num_candidates: candidates scored per device.
    query_vectors: as in `search`.

  Returns:
    Positions in the whole corpus, and scores, replicated.

  Raises:
    ValueError: as `search`, or if shards and devices differ in number.
  """
  checks.same_size(
    devices=mesh.shape[axis_name],
    shards=index.first_page.shape[0],
    shard_sizes=len(shard_sizes),
  )
  starts = np.cumsum((0, *shard_sizes[:-1])).astype(np.int32)

  def local(index, queries, query_mask, query_vectors):
    found = search(
      jax.tree.map(lambda x: x[0], index),
      queries,
      query_mask,
      mode=mode,
      k=k,
      num_candidates=num_candidates,
      query_vectors=query_vectors,
    )
    slot = jax.lax.axis_index(axis_name)
    start = jnp.asarray(starts)[slot]
    place = jnp.where(found.index >= 0, found.index + start, -1)
    # A sum of otherwise empty slots gathers, with a result that is the same
    # on every device, which `shard_map` can check.
    slots = jax.nn.one_hot(slot, len(shard_sizes), dtype=bool)

    def gather(x):  # [Nq, k] -> [Nq, shards * k]
      mine = jnp.where(slots[None, :, None], x[:, None, :], 0)
      return jax.lax.psum(mine, axis_name).reshape(x.shape[0], -1)

    place, scores = gather(place), gather(found.scores)
    # Shards stand in the order of the documents: ties keep the lower index.
    scores, best = jax.lax.top_k(scores, k)
    return Ranking(jnp.take_along_axis(place, best, axis=1), scores)

  shard, whole = jax.P(axis_name), jax.P()
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(shard, whole, whole, whole),
    out_specs=whole,
  )(index, queries, query_mask, query_vectors)


_search = jax.jit(search, static_argnames=("mode", "k", "num_candidates"))
