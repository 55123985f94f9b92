"""CRISP: each text's token vectors replaced by a few cluster means.

Every query and document is clustered by k-means on its own, at every training
step as well as before indexing, and MaxSim compares the means. A model trained
so learns token vectors that cluster well; on frozen vectors the same operator
is "post-hoc" clustering. The paper reports 3 times fewer vectors without loss.

    config = crisp.CrispConfig(**crisp.PRESETS["C8x32"])
    scores = crisp.score(queries, documents, query_mask, document_mask, config)

    tokens, offsets = crisp.cluster_packed(docs.tokens, docs.offsets, config)
    index = token_index.build(tokens, offsets)   # docs: a colbert.Documents
    found = crisp.cluster_queries(queries, query_mask, config)

What it is compared with stands in `tokjax.retrieval.token_pruning`.

Source: Veneroso, Jayaram, Rao, Hernández Ábrego, Hadian, Cer, 2025, "CRISP:
Clustering Multi-Vector Representations for Denoising and Pruning". From the
paper: k-means on each side inside training, the presets, MaxSim on the means
without weights. Not published, so ours: 10 iterations from evenly spaced
tokens, Euclidean distance, how a share is rounded, means left at their own
length, a gradient through the means only.
"""

import dataclasses
import fractions
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.kernels import maxsim
from tokjax.ops import clustering, similarity
from tokjax.ops.clustering import Clusters
from tokjax.retrieval import length_batches, token_pruning
from tokjax.typing import Array, Bool, Float, Key

__all__ = [
  "PRESETS",
  "Clusters",
  "CrispConfig",
  "cluster",
  "cluster_documents",
  "cluster_packed",
  "cluster_queries",
  "score",
]

Rounding = Literal["floor", "round", "ceil"]

_ROUND = {"floor": math.floor, "round": round, "ceil": math.ceil}

# The paper's settings: CQxD has Q means of a query and D of a document, CP is P
# percent of the tokens of each.
PRESETS = {
  "C4x8": dict(query_clusters=4, document_clusters=8),
  "C8x32": dict(query_clusters=8, document_clusters=32),
  "C25": dict(query_ratio=0.25, document_ratio=0.25),
  "C50": dict(query_ratio=0.5, document_ratio=0.5),
}


@dataclasses.dataclass(unsafe_hash=True)
class CrispConfig:
  """How many means each side has; one of number and ratio per side.

  A ratio of 1.0 leaves a side's tokens as they are, so that documents can be
  clustered alone.
  """

  query_clusters: int | None = None  # most means of a query
  query_ratio: float | None = None  # or the share of its valid tokens
  document_clusters: int | None = None  # most means of a document
  document_ratio: float | None = None  # or the share of its valid tokens
  rounding: Rounding = "floor"  # of a share; at least 1 mean (ours)
  num_iterations: int = 10  # Lloyd steps (ours)
  renormalize: bool = False  # scale means to unit length (ours: no)


@functools.partial(
  jax.jit,
  static_argnames=(
    "num_clusters",
    "ratio",
    "rounding",
    "num_iterations",
    "renormalize",
  ),
)
def cluster(
  x: Float[Array, "B N D"],
  mask: Bool[Array, "B N"],
  *,
  num_clusters: int | None = None,
  ratio: float | None = None,
  rounding: Rounding = "floor",
  num_iterations: int = 10,
  key: Key[Array, ""] | None = None,
  renormalize: bool = False,
) -> Clusters:
  """Cluster means of every text, each clustered on its own.

  A text with n valid tokens gets k means: `num_clusters`, or the rounded
  `ratio` n but at least 1; never more than n. With n <= k every token is its
  own cluster, in order. Masked tokens neither count in n nor move a mean.

  Gradients flow through the means only: d means[k] / d x[n] is 1 / counts[k]
  for the members of k and 0 otherwise, so a mean that wins a maximum teaches
  all its members. Costs 4 `num_iterations` B N K D FLOPs.

  Args:
    x: token vectors; masked rows may hold anything.
    mask: True where the token is real.
    num_clusters: means of a text; this or `ratio`, static.
    ratio: means as a share of the text's valid tokens, in (0, 1], taken as the
      decimal number it is written as: 0.29 of 100 is 29; static.
    rounding: of the share; "round" sends halves to the even number.
    num_iterations: Lloyd steps, static.
    key: draws the first tokens of the clusters; None spaces them evenly.
    renormalize: scale each mean to unit length.

  Returns:
    Means, mask, counts and assignment (see `tokjax.ops.clustering.Clusters`).
    K is min(num_clusters, N) or ceil(ratio N). A cluster that ends without
    members has mask False: take the mask along, a zero vector would win over
    negative inner products.

  Raises:
    ValueError: if sizes disagree, not just one of `num_clusters` and `ratio` is
      given, or one is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]])
    >>> found = cluster(x, jnp.ones((1, 4), bool), ratio=0.5)
    >>> [[round(float(v), 2) for v in mean] for mean in found.means[0]]
    [[0.9, 0.3], [-0.3, 0.9]]

  Source: see the module.
  """
  checks.has_rank(3, x=x)
  checks.has_rank(2, mask=mask)
  checks.same_size(x_batch=x.shape[0], mask_batch=mask.shape[0])
  checks.same_size(x_tokens=x.shape[1], mask_tokens=mask.shape[1])
  checks.one_of(tuple(_ROUND), rounding=rounding)
  _check_budget(num_clusters=num_clusters, ratio=ratio)
  num_tokens, limit = x.shape[1], None
  if ratio is None:
    size = min(num_clusters, num_tokens)
  else:
    size = math.ceil(_exact(ratio) * num_tokens)
    limit = _share(mask, ratio, rounding, size)
  # Where every token is a cluster of its own, steps would change nothing.
  whole = size == num_tokens and ratio in (None, 1)
  found = clustering.masked_kmeans(
    x,
    mask,
    limit,
    num_clusters=size,
    num_iterations=0 if whole else num_iterations,
    key=key,
  )
  if renormalize:
    found = found._replace(means=similarity.safe_normalize(found.means))
  return found


def cluster_queries(
  x: Float[Array, "B N D"],
  mask: Bool[Array, "B N"],
  config: CrispConfig,
  *,
  key: Key[Array, ""] | None = None,
) -> Clusters:
  """`cluster` with the query side of a config.

  Args:
    x: query token vectors.
    mask: True where the token is real.
    config: static.
    key: as in `cluster`.

  Returns:
    As `cluster`.

  Raises:
    ValueError: as `cluster`; the message names the field.

  Example:
    >>> import jax.numpy as jnp
    >>> config = CrispConfig(**PRESETS["C4x8"])
    >>> x, mask = jnp.ones((2, 32, 5)), jnp.ones((2, 32), bool)
    >>> cluster_queries(x, mask, config).means.shape
    (2, 4, 5)
  """
  _check_budget(
    query_clusters=config.query_clusters, query_ratio=config.query_ratio
  )
  return cluster(
    x,
    mask,
    num_clusters=config.query_clusters,
    ratio=config.query_ratio,
    key=key,
    **_settings(config),
  )


def cluster_documents(
  x: Float[Array, "B N D"],
  mask: Bool[Array, "B N"],
  config: CrispConfig,
  *,
  key: Key[Array, ""] | None = None,
) -> Clusters:
  """`cluster` with the document side of a config.

  Args:
    x: document token vectors.
    mask: True where the token is real.
    config: static.
    key: as in `cluster`.

  Returns:
    As `cluster`.

  Raises:
    ValueError: as `cluster`; the message names the field.

  Example:
    >>> import jax.numpy as jnp
    >>> config = CrispConfig(**PRESETS["C4x8"])
    >>> x, mask = jnp.ones((2, 32, 5)), jnp.ones((2, 32), bool)
    >>> cluster_documents(x, mask, config).means.shape
    (2, 8, 5)
  """
  _check_budget(
    document_clusters=config.document_clusters,
    document_ratio=config.document_ratio,
  )
  return cluster(
    x,
    mask,
    num_clusters=config.document_clusters,
    ratio=config.document_ratio,
    key=key,
    **_settings(config),
  )


def score(
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"],
  document_mask: Bool[Array, "Nd N"],
  config: CrispConfig,
  *,
  key: Key[Array, ""] | None = None,
) -> Float[Array, "Nq Nd"]:
  """MaxSim between the cluster means of queries and documents.

      scores[i, j] = sum_a max_b <mean a of query i, mean b of document j>

  Means count once, however many tokens they stand for. Differentiable in the
  tokens of both sides: this is the score to train with.

  Args:
    queries: query token vectors.
    documents: document token vectors, same dtype.
    query_mask: True where the query token counts.
    document_mask: True where the document token counts.
    config: static.
    key: draws the first tokens of the clusters; None spaces them evenly.

  Returns:
    float32 scores; empty texts as in `tokjax.kernels.maxsim.maxsim`.

  Raises:
    ValueError: as `cluster` and `maxsim`.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]])
    >>> q = jnp.array([[[0.8, 0.6], [0.0, 1.0]]])
    >>> config = CrispConfig(query_ratio=1.0, document_clusters=2)
    >>> masks = jnp.ones((1, 2), bool), jnp.ones((1, 4), bool)
    >>> print(round(float(score(q, x, *masks, config)[0, 0]), 4))
    1.8
  """
  query_key, document_key = (
    (None, None) if key is None else jax.random.split(key)
  )
  query = cluster_queries(queries, query_mask, config, key=query_key)
  document = cluster_documents(
    documents, document_mask, config, key=document_key
  )
  return maxsim.maxsim(query.means, document.means, query.mask, document.mask)


def cluster_packed(
  tokens: Any,
  offsets: np.ndarray,
  config: CrispConfig,
  *,
  bucket: int = 32,
  batch_tokens: int = 8192,
) -> tuple[np.ndarray, np.ndarray]:
  """Cluster means of a corpus of packed documents, back to back again.

  `cluster_documents` over batches of documents of about the same length: one
  compiled program per padded length. The host packs a batch while the device
  works on the next.

  Args:
    tokens: rows [T, D] of all documents, a NumPy array or memory map.
    offsets: document i owns tokens[offsets[i]:offsets[i + 1]].
    config: the document side is used.
    bucket: granularity of padded lengths.
    batch_tokens: padded tokens per batch.

  Returns:
    NumPy arrays on the host, in the order of the documents: the means in the
    dtype of `tokens`, and int64 offsets. A document without tokens keeps none.

  Raises:
    ValueError: for damaged offsets, or as `cluster_documents`.

  Example:
    >>> import numpy as np
    >>> tokens = np.array([[1.0], [3.0], [7.0]], np.float32)
    >>> config = CrispConfig(document_clusters=1)
    >>> means, offsets = cluster_packed(tokens, np.array([0, 2, 3]), config)
    >>> means.tolist(), offsets.tolist()
    ([[2.0], [7.0]], [0, 1, 2])

  Source: ours.
  """
  lengths = token_pruning.document_lengths(tokens, offsets)
  starts = np.asarray(offsets, np.int64)[:-1]
  full = np.flatnonzero(lengths)
  longest = int(lengths.max(initial=1))
  positions = np.arange(longest, dtype=np.int32)
  parts = [np.asarray(tokens[:0])] * len(lengths)
  waiting = []  # started, not yet collected: one, while the next one runs

  def collect():
    documents, found = waiting.pop(0)
    means, mask = np.asarray(found.means), np.asarray(found.mask)
    for row, document in enumerate(documents):
      parts[document] = means[row][mask[row]]

  for batch in length_batches.length_batches(
    [positions[: lengths[document]] for document in full],
    bucket=bucket,
    batch_tokens=batch_tokens,
    max_length=-(-longest // bucket) * bucket,
  ):
    documents = full[batch.members]
    first = np.zeros(len(batch.ids), np.int64)  # filler rows read token 0
    first[: len(documents)] = starts[documents]
    x = tokens[first[:, None] + batch.ids]  # [R, N, D]
    mask = np.arange(x.shape[1])[None, :] < batch.lengths[:, None]
    found = cluster_documents(jnp.asarray(x), jnp.asarray(mask), config)
    waiting.append((documents, found))
    if len(waiting) > 1:
      collect()
  while waiting:
    collect()
  counts = [len(part) for part in parts]
  rows = np.concatenate([np.asarray(tokens[:0]), *parts])
  return rows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _exact(ratio):
  """The decimal number a float is written as."""
  return fractions.Fraction(str(ratio))


def _share(mask, ratio, rounding, size):
  """Clusters of each text, [B]: the rounded share of its valid tokens."""
  exact, rounded = _exact(ratio), _ROUND[rounding]
  limits = [max(1, rounded(exact * n)) for n in range(mask.shape[1] + 1)]
  # Tokens from which on a text has k + 1 clusters; rounding is exact, as it
  # happens here and not in float32, and no table is indexed.
  needed = np.searchsorted(limits, np.arange(1, size + 1)).astype(np.int32)
  valid = jnp.sum(mask, axis=1, dtype=jnp.int32)
  return jnp.sum(valid[:, None] >= needed[None, :], axis=1, dtype=jnp.int32)


def _settings(config):
  return dict(
    rounding=config.rounding,
    num_iterations=config.num_iterations,
    renormalize=config.renormalize,
  )


def _check_budget(**budget):
  (number_name, number), (ratio_name, ratio) = budget.items()
  if (number is None) == (ratio is None):
    raise ValueError(
      f"give one of {number_name} and {ratio_name}, got {number} and {ratio}"
    )
  if number is not None:
    checks.in_range(1, float("inf"), **{number_name: number})
  elif not 0 < ratio <= 1:
    raise ValueError(f"{ratio_name} must lie in (0, 1], got {ratio}")
