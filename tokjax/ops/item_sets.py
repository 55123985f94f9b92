"""Items that are sets of vectors: who reads whom, how they are scored.

An item of a catalogue is n vectors without an order. A sequence of tokens is
an instruction, the sets of the items of a history, a response, and one query
for each slot of the set that comes next; a score compares slot by slot.

Source: Lin et al., 2025, "Order-agnostic Identifier for Large Language
Model-based Generative Recommendation" (SETRec), and its published code.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.ops import selection
from tokjax.typing import Array, Bool, Float, Int

__all__ = ["set_loss", "set_mask", "set_positions", "set_score", "set_top_k"]


def set_positions(
  *,
  num_instruction: int,
  num_items: int,
  set_size: int,
  num_response: int,
  num_queries: int,
) -> np.ndarray:
  """Position of each token: instruction, items, response, queries.

  The tokens of an item share one, i0 + (i - i0) // set_size; the others keep
  their index, so that there is a gap behind the history.

  Args:
    num_instruction: tokens before the history.
    num_items: items of the history.
    set_size: n, tokens of an item.
    num_response: tokens behind the history.
    num_queries: queries; 0 in the encoder of an encoder-decoder.

  Returns:
    int32 [N].

  Example:
    >>> set_positions(num_instruction=1, num_items=2, set_size=2,
    ...               num_response=1, num_queries=2).tolist()
    [0, 1, 1, 2, 2, 5, 6, 7]

  Source: the published code.
  """
  start, stop, size = _layout(
    num_instruction, num_items, set_size, num_response, num_queries
  )
  place = np.arange(size, dtype=np.int32)
  inside = (place >= start) & (place < stop)
  return np.where(inside, start + (place - start) // set_size, place)


def set_mask(
  *,
  num_instruction: int,
  num_items: int,
  set_size: int,
  num_response: int,
  num_queries: int,
  causal: bool = True,
) -> np.ndarray:
  """Who reads whom: what came before, but nobody of the own item.

  Args:
    num_instruction: tokens before the history.
    num_items: items of the history.
    set_size: n, tokens of an item.
    num_response: tokens behind the history.
    num_queries: queries; each reads all before them, and itself.
    causal: False for an encoder-decoder: all but queries read all but
      queries. The rows of the queries are then its attention to the encoder
      and, the identity, to themselves.

  Returns:
    bool [N, N], True where a row reads a column.

  Example:
    >>> mask = set_mask(num_instruction=1, num_items=2, set_size=2,
    ...                 num_response=1, num_queries=2)
    >>> np.flatnonzero(mask[4]).tolist(), np.flatnonzero(mask[7]).tolist()
    ([0, 1, 2, 4], [0, 1, 2, 3, 4, 5, 7])

  Source: the published code, of the Qwen model and, not causal, of T5.
  """
  start, stop, size = _layout(
    num_instruction, num_items, set_size, num_response, num_queries
  )
  place = np.arange(size)
  inside, query = (place >= start) & (place < stop), place >= size - num_queries
  # Groups in which nobody reads another; the rest stands alone.
  group = np.where(inside, (place - start) // set_size, -1 - place)
  group = np.where(query, num_items, group)
  apart = (group[:, None] != group[None]) | np.eye(size, dtype=bool)
  if causal:
    return apart & (place[None] <= place[:, None])
  return np.where(query[:, None], apart, ~query[None])


def set_score(
  answers: Float[Array, "n B D"],
  catalogue: Float[Array, "n m D"],
  weights: Float[Array, " n"],
) -> Float[Array, "B m"]:
  """s[b, v] = sum_j w_j o_j[b] . C_j[v], as one product of matrices.

  Args:
    answers: o, what the queries became.
    catalogue: C, the tokens of all items.
    weights: w, of the slots.

  Returns:
    float32 scores, higher is better.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> answers = jnp.ones((2, 1, 1))
    >>> catalogue = jnp.array([[[1.0], [3.0]], [[4.0], [1.0]]])
    >>> set_score(answers, catalogue, jnp.array([0.5, 0.5])).tolist()
    [[2.5, 2.0]]

  Cost: 2 B m n D FLOPs.

  Source: the published grounding, neither normalised nor with a temperature.
  """
  rows, columns = _flat(answers, catalogue, weights)
  return jnp.matmul(rows, columns.T, preferred_element_type=jnp.float32)


def set_top_k(
  answers: Float[Array, "n B D"],
  catalogue: Float[Array, "n m D"],
  weights: Float[Array, " n"],
  *,
  k: int,
  block_size: int = 16_384,
  mask: Bool[Array, " m"] | None = None,
) -> selection.TopK:
  """The k items of highest `set_score`, a block of items at a time.

  Args:
    answers: as of `set_score`.
    catalogue: as of `set_score`.
    weights: as of `set_score`.
    k: how many, static, at most m.
    block_size: items scored at once.
    mask: True where an item may be found; None: all.

  Returns:
    float32 scores, descending, and items [B, k]; ties go to the lower item.
    Over a sharded catalogue see `selection.gather_top_k`.

  Raises:
    ValueError: if sizes disagree or `k` is larger than m.

  Example:
    >>> answers = jnp.ones((2, 1, 1))
    >>> catalogue = jnp.array([[[1.0], [3.0]], [[4.0], [1.0]]])
    >>> weights = jnp.array([0.9, 0.1])
    >>> set_top_k(answers, catalogue, weights, k=1).index.tolist()
    [[1]]
  """
  rows, columns = _flat(answers, catalogue, weights)
  return selection.streaming_top_k(
    rows, columns, k, block_size=block_size, mask=mask
  )


def set_loss(
  answers: Float[Array, "n B D"],
  catalogue: Float[Array, "n m D"],
  target: Int[Array, " B"],
  mask: Bool[Array, " m"] | None = None,
) -> Float[Array, ""]:
  """Each slot by itself shall find the item: mean of n B cross-entropies.

  Args:
    answers: o.
    catalogue: C; gradients flow to both.
    target: the item; -1 does not count.
    mask: True where an item may be the answer; None: all, as published. A
      target must be among them.

  Returns:
    A float32 mean. Holds the scores of all slots, 4 n B m bytes.

  Example:
    >>> answers, catalogue = jnp.ones((2, 1, 1)), jnp.ones((2, 4, 1))
    >>> loss = jax.jit(set_loss)(answers, catalogue, jnp.array([2]))
    >>> print(f"{loss:.3f}")
    1.386
  """
  scores = jnp.einsum(
    "nbd,nmd->nbm", answers, catalogue, preferred_element_type=jnp.float32
  )
  if mask is not None:
    scores = jnp.where(mask[None, None], scores, -jnp.inf)
  counts = jnp.broadcast_to((target >= 0)[None], scores.shape[:2])
  place = jnp.broadcast_to(jnp.maximum(target, 0)[None], scores.shape[:2])
  gold = jnp.take_along_axis(scores, place[..., None], axis=-1)[..., 0]
  gold = jnp.where(counts, gold, 0)
  loss = jnp.where(counts, jax.nn.logsumexp(scores, axis=-1) - gold, 0)
  return jnp.sum(loss) / jnp.maximum(jnp.sum(counts), 1)


def _layout(num_instruction, num_items, set_size, num_response, num_queries):
  """Where the history begins and ends, and the number of all tokens."""
  checks.in_range(1, 1 << 10, set_size=set_size)
  checks.in_range(
    0, 1 << 16, num_instruction=num_instruction, num_items=num_items,
    num_response=num_response, num_queries=num_queries,
  )  # fmt: skip
  stop = num_instruction + num_items * set_size
  return num_instruction, stop, stop + num_response + num_queries


def _flat(answers, catalogue, weights):
  """[B, n D] with the weights folded in, and [m, n D]."""
  checks.has_rank(3, answers=answers, catalogue=catalogue)
  checks.same_size(
    answers=answers.shape[0], catalogue=catalogue.shape[0],
    weights=weights.shape[0],
  )  # fmt: skip
  checks.same_size(
    answers_dim=answers.shape[2], catalogue_dim=catalogue.shape[2]
  )
  answers = answers * weights[:, None, None].astype(answers.dtype)

  def rows(x):
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1)

  return rows(answers), rows(catalogue)
