"""Fewer tokens per text, without training: what CRISP is compared with.

Tail pruning keeps one end of a text, k-spacing every k-th token, and Ward
pooling joins tokens that are alike. The first two exist for padded batches (in
a model) and, `_packed`, for a corpus on the host (`colbert.Documents`); Ward
pooling is a tree built on the host and has no form for an accelerator.

Source: the comparisons of Veneroso, Jayaram, Rao, Hernández Ábrego, Hadian,
Cer, 2025, "CRISP: Clustering Multi-Vector Representations for Denoising and
Pruning" (tail pruning and k-spacing; which end that paper keeps we could not
verify, so it is an argument), and published retrieval code (Ward pooling).
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.cluster import hierarchy

from tokjax import checks
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "Kept",
  "document_lengths",
  "keep_every",
  "keep_every_packed",
  "keep_tokens",
  "keep_tokens_packed",
  "ward_pool_packed",
]


class Kept(NamedTuple):
  """Tokens that survived, in their order.

  Attributes:
    tokens: kept vectors in the dtype of the input; zero where `mask` is False.
    mask: True where the row holds a token; those come first.
    index: position of each kept token in the input, ascending, int32; 0 where
      `mask` is False.
  """

  tokens: Float[Array, "*batch K D"]
  mask: Bool[Array, "*batch K"]
  index: Int[Array, "*batch K"]


def keep_tokens(
  x: Float[Array, "B N D"],
  mask: Bool[Array, "B N"],
  *,
  num_keep: int,
  keep: Literal["first", "last"] = "first",
) -> Kept:
  """Tail pruning: the first, or the last, valid tokens of every text.

  Gradients flow to the kept tokens.

  Args:
    x: token vectors; masked rows may hold anything.
    mask: True where the token is real.
    num_keep: how many to keep at most, static.
    keep: which end stays.

  Returns:
    K = min(num_keep, N) rows per text; a text with fewer valid tokens keeps
    them all.

  Raises:
    ValueError: if sizes disagree, or for another end or a number below 1.

  Example:
    >>> x = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])
    >>> mask = jnp.array([[True, False, True, True]])
    >>> keep_tokens(x, mask, num_keep=2, keep="last").tokens.tolist()
    [[[3.0], [4.0]]]
  """
  _check(x, mask)
  checks.in_range(1, float("inf"), num_keep=num_keep)
  checks.one_of(("first", "last"), keep=keep)
  size = min(num_keep, x.shape[1])
  ranks = jnp.arange(size, dtype=jnp.int32)[None, :]
  if keep == "last":
    left_out = jnp.sum(mask, axis=1, dtype=jnp.int32) - size
    ranks = ranks + jnp.maximum(left_out, 0)[:, None]
  return _take_ranks(x, mask, ranks)


def keep_every(
  x: Float[Array, "B N D"], mask: Bool[Array, "B N"], *, step: int
) -> Kept:
  """k-spacing: the valid tokens of rank 0, step, 2 step, ... of every text.

  Ranks count valid tokens only. Gradients flow to the kept tokens.

  Args:
    x: token vectors; masked rows may hold anything.
    mask: True where the token is real.
    step: distance in rank, static; 1 keeps all.

  Returns:
    K = ceil(N / step) rows per text.

  Raises:
    ValueError: if sizes disagree or `step` is below 1.

  Example:
    >>> x = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])
    >>> mask = jnp.array([[True, False, True, True]])
    >>> keep_every(x, mask, step=2).tokens.tolist()
    [[[1.0], [4.0]]]
  """
  _check(x, mask)
  checks.in_range(1, float("inf"), step=step)
  ranks = jnp.arange(0, x.shape[1], step, dtype=jnp.int32)[None, :]
  return _take_ranks(x, mask, ranks)


def keep_tokens_packed(
  tokens: Any,
  offsets: np.ndarray,
  *,
  num_keep: int,
  keep: Literal["first", "last"] = "first",
) -> tuple[np.ndarray, np.ndarray]:
  """`keep_tokens` for documents back to back, on the host.

  Args:
    tokens: rows [T, D] of all documents, a NumPy array or memory map.
    offsets: document i owns tokens[offsets[i]:offsets[i + 1]].
    num_keep: how many to keep at most.
    keep: which end stays.

  Returns:
    The kept rows and their int64 offsets.

  Raises:
    ValueError: for damaged offsets, another end or a number below 1.

  Example:
    >>> tokens, offsets = np.arange(5.0)[:, None], np.array([0, 3, 5])
    >>> kept, offsets = keep_tokens_packed(tokens, offsets, num_keep=1)
    >>> kept.tolist(), offsets.tolist()
    ([[0.0], [3.0]], [0, 1, 2])
  """
  checks.in_range(1, float("inf"), num_keep=num_keep)
  checks.one_of(("first", "last"), keep=keep)
  lengths = document_lengths(tokens, offsets)
  ranks = _ranks(lengths)
  if keep == "last":
    ranks = np.repeat(lengths, lengths) - 1 - ranks
  return _take_rows(tokens, lengths, ranks < num_keep)


def keep_every_packed(
  tokens: Any, offsets: np.ndarray, *, step: int
) -> tuple[np.ndarray, np.ndarray]:
  """`keep_every` for documents back to back, on the host.

  Args:
    tokens: rows [T, D] of all documents, a NumPy array or memory map.
    offsets: document i owns tokens[offsets[i]:offsets[i + 1]].
    step: distance in rank; 1 keeps all.

  Returns:
    The kept rows and their int64 offsets.

  Raises:
    ValueError: for damaged offsets or a step below 1.

  Example:
    >>> tokens, offsets = np.arange(5.0)[:, None], np.array([0, 3, 5])
    >>> kept, offsets = keep_every_packed(tokens, offsets, step=2)
    >>> kept.tolist(), offsets.tolist()
    ([[0.0], [2.0], [3.0]], [0, 2, 3])
  """
  checks.in_range(1, float("inf"), step=step)
  lengths = document_lengths(tokens, offsets)
  return _take_rows(tokens, lengths, _ranks(lengths) % step == 0)


def ward_pool_packed(
  tokens: Any,
  offsets: np.ndarray,
  *,
  factor: float,
  num_protected: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
  """Joins the tokens of each document that are alike, by Ward's tree.

  The first `num_protected` tokens stay as they are. The other n are clustered
  bottom-up: Ward's rule over cosine distances 1 - cos, cut where at most
  max(1, floor(n / factor)) clusters are left, each replaced by its mean. Host
  only, one document at a time, O(n^2) time and memory for each: a reference of
  quality for what runs on an accelerator.

  Args:
    tokens: rows [T, D] of all documents, a NumPy array or memory map.
    offsets: document i owns tokens[offsets[i]:offsets[i + 1]].
    factor: tokens per cluster, at least 1; 1 keeps all.
    num_protected: tokens at the front that are not pooled ([CLS], say).

  Returns:
    Rows in the dtype of `tokens`, means summed in float32, not scaled to unit
    length; each document's clusters in the order of their first token; and the
    int64 offsets.

  Raises:
    ValueError: for damaged offsets or an argument out of range.

  Example:
    >>> tokens = np.array([[9.0, 9], [1, 0], [0, 1], [1, 0], [0, 1]])
    >>> pooled, offsets = ward_pool_packed(tokens, np.array([0, 5]), factor=2.0)
    >>> pooled.tolist(), offsets.tolist()
    ([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]], [0, 3])

  Source: Clavié, Chaffin, Adams, 2024, "Reducing the Footprint of Multi-Vector
  Retrieval with Minimal Performance Impact via Token Pooling", and its
  published code (lightonai/pylate), which takes inner products for cosines and
  orders clusters by their label. Ward's rule is meant for Euclidean distances,
  of which 1 - cos is half the square; we follow the practice.
  """
  checks.in_range(1, float("inf"), factor=factor)
  checks.in_range(0, float("inf"), num_protected=num_protected)
  lengths = document_lengths(tokens, offsets)
  ends = np.cumsum(lengths)
  parts = [
    _ward_pool(np.asarray(tokens[end - n : end]), factor, num_protected)
    for n, end in zip(lengths, ends, strict=True)
  ]
  counts = [len(part) for part in parts]
  rows = np.concatenate([np.asarray(tokens[:0]), *parts])
  return rows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def document_lengths(tokens: Any, offsets: np.ndarray) -> np.ndarray:
  """Number of tokens of each packed document, int64, after checking them.

  Args:
    tokens: rows [T, D] of all documents.
    offsets: document i owns tokens[offsets[i]:offsets[i + 1]].

  Returns:
    One number per document.

  Raises:
    ValueError: unless `tokens` has two axes and the offsets ascend from 0 to
      T.

  Example:
    >>> document_lengths(np.zeros((5, 2)), np.array([0, 3, 3, 5])).tolist()
    [3, 0, 2]
  """
  checks.has_rank(2, tokens=tokens)
  checks.has_rank(1, offsets=offsets)
  lengths = np.diff(np.asarray(offsets, np.int64))
  if (
    not len(offsets)
    or offsets[0] != 0
    or offsets[-1] != tokens.shape[0]
    or (lengths < 0).any()
  ):
    raise ValueError(
      f"offsets must ascend from 0 to the number of tokens {tokens.shape[0]}, "
      f"got {offsets[:1]}..{offsets[-1:]}"
    )
  return lengths


def _take_ranks(x, mask, ranks):
  """Rows of the valid tokens of these ranks, [1 or B, K]."""
  num_tokens = x.shape[1]
  position = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
  order = jnp.sort(jnp.where(mask, position, num_tokens), axis=1)
  order = jnp.minimum(order, num_tokens - 1)  # valid positions first
  kept = ranks < jnp.sum(mask, axis=1, dtype=jnp.int32)[:, None]
  # Only ranks that are not kept may lie beyond the last token.
  ranks = jnp.where(kept, ranks, 0)
  index = jnp.where(kept, jnp.take_along_axis(order, ranks, axis=1), 0)
  tokens = jnp.take_along_axis(x, index[:, :, None], axis=1)
  return Kept(jnp.where(kept[:, :, None], tokens, 0), kept, index)


def _check(x, mask):
  checks.has_rank(3, x=x)
  checks.has_rank(2, mask=mask)
  checks.same_size(x_batch=x.shape[0], mask_batch=mask.shape[0])
  checks.same_size(x_tokens=x.shape[1], mask_tokens=mask.shape[1])


def _ranks(lengths):
  """Position of each token within its document."""
  starts = np.cumsum(lengths) - lengths
  return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _take_rows(tokens, lengths, kept):
  owner = np.repeat(np.arange(len(lengths)), lengths)
  counts = np.bincount(owner[kept], minlength=len(lengths))
  offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
  return np.asarray(tokens[kept]), offsets


def _ward_pool(rows, factor, num_protected):
  protected, rest = rows[:num_protected], rows[num_protected:]
  num_clusters = max(1, int(len(rest) // factor))
  if num_clusters >= len(rest):
    return rows
  wide = rest.astype(np.float32)
  length = np.linalg.norm(wide, axis=1, keepdims=True)
  unit = wide / np.where(length > 0, length, 1)
  above = np.triu_indices(len(rest), k=1)
  distance = np.maximum(1 - (unit @ unit.T)[above], 0)  # rounding goes below 0
  tree = hierarchy.linkage(distance, method="ward")
  labels = hierarchy.fcluster(tree, num_clusters, criterion="maxclust")
  _, first, member = np.unique(labels, return_index=True, return_inverse=True)
  sums = np.zeros((len(first), rows.shape[1]), np.float32)
  np.add.at(sums, member, wide)
  means = sums / np.bincount(member)[:, None]
  return np.concatenate(
    [protected, means[np.argsort(first)].astype(rows.dtype)]
  )
