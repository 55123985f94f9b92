"""Public MaxSim functions: checks, choice of implementation, gradients."""

import functools
import importlib
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from tokjax import checks, compat
from tokjax.kernels import hopper
from tokjax.kernels.maxsim import reference, sharding, xla
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = [
  "DEFAULT_BUDGET_BYTES",
  "EMPTY_SCORE",
  "Alignment",
  "maxsim",
  "maxsim_alignment",
  "maxsim_pairs",
  "mean_over_query",
]

EMPTY_SCORE = reference.EMPTY_SCORE

# Scratch of the plain-JAX version off CPU (on CPU a block is smaller still);
# large enough that the matrix products fill an accelerator.
DEFAULT_BUDGET_BYTES = 64 << 20


class Alignment(NamedTuple):
  """Which document token each query token met, and how well.

  Attributes:
    scores: the MaxSim scores.
    index: document token with the largest inner product, lowest index among
      ties; 0 where the query token is masked or the document is empty.
    similarity: that inner product; 0 where `index` means nothing. Summed over
      the query tokens it is the score of a document that is not empty.
  """

  scores: Float[Array, "*batch Nq Nd"]
  index: Int32[Array, "*batch Nq Nd Q"]
  similarity: Float[Array, "*batch Nq Nd Q"]


def maxsim(
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"] | None = None,
  document_mask: Bool[Array, "Nd N"] | None = None,
  *,
  mean: bool = False,
  memory_budget_bytes: int = DEFAULT_BUDGET_BYTES,
  implementation: Implementation | None = None,
) -> Float[Array, "Nq Nd"]:
  """Scores every query against every document by late interaction.

  Each query token takes the inner product with the document token that suits
  it best; a score is the sum of those:

      scores[i, j] = sum_a max_b <queries[i, a], documents[j, b]>

  over valid a and b. A document without a valid token scores `EMPTY_SCORE`
  (finite, zero gradient), a query without one scores 0. What masked rows hold,
  NaN included, has no influence. The gradient of each maximum goes to one
  document token, the lowest index among ties, as in the fused kernels and in
  PyTorch; `jnp.max` would share it out.

  Args:
    queries: query token vectors, float32 or bfloat16.
    documents: document token vectors, same dtype.
    query_mask: True where the query token counts; None for all.
    document_mask: True where the document token counts; None for all.
    mean: divide by the number of valid query tokens (at least 1), static.
      Empty documents keep `EMPTY_SCORE`.
    memory_budget_bytes: bound on scratch of "xla", static; the kernels hold
      their tiles on chip and "reference" holds everything, so neither uses it.
    implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu" runs that
      one or raises. None chooses when the program is lowered: the TPU kernel
      on TPU, "xla" elsewhere. The GPU kernel is chosen only where the mesh of
      `jax.set_mesh` says that its devices are Hopper GPUs, since lowering for
      CUDA alone does not tell the generation.

  Returns:
    float32 scores, computed with float32 sums (and, for float32 inputs, float32
    products on every platform).

  Raises:
    ValueError: if ranks or sizes disagree, or dtypes differ.
    NotImplementedError: if the named implementation cannot take the arguments.

  Example:
    >>> import jax.numpy as jnp
    >>> query = jnp.array([[[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]])
    >>> document = jnp.array([[[0.8, 0.6], [-0.6, -0.8], [0.0, 1.0]]])
    >>> print(round(float(maxsim(query, document)[0, 0]), 4))
    2.56

  Cost: 2 * Nq * Nd * Q * N * D FLOPs; reads the documents once. For one query
  of 32 tokens that is 16 FLOPs per byte of float32 documents.

  On an Explicit mesh queries and documents may be sharded over their first
  axis, and every device scores what it holds; where both use the same mesh
  axis the queries are gathered. On an Auto mesh the documents may be gathered
  by the compiler: for a corpus on many devices use an Explicit mesh or
  `jax.shard_map`.

  Source: Khattab and Zaharia, 2020, "ColBERT: Efficient and Effective Passage
  Search via Contextualized Late Interaction over BERT". The mask before the
  maximum, the score of empty documents and the tie rule are ours; widely used
  code multiplies masked similarities by 0 instead, which lets a masked token
  win over negative ones.
  """
  _check(queries, documents, query_mask, document_mask, implementation)
  checks.in_range(1, 1 << 62, memory_budget_bytes=memory_budget_bytes)
  return _maxsim(
    queries,
    documents,
    query_mask,
    document_mask,
    mean=mean,
    memory_budget_bytes=memory_budget_bytes,
    implementation=implementation,
  )


def maxsim_pairs(
  queries: Float[Array, "B Q D"],
  documents: Float[Array, "B n N D"],
  query_mask: Bool[Array, "B Q"] | None = None,
  document_mask: Bool[Array, "B n N"] | None = None,
  *,
  mean: bool = False,
  memory_budget_bytes: int = DEFAULT_BUDGET_BYTES,
  implementation: Implementation | None = None,
) -> Float[Array, "B n"]:
  """Scores each query against its own documents only.

  For candidates to be re-ranked and for distillation from n-way lists: row b
  equals `maxsim(queries[b:b+1], documents[b])`.

  Args:
    queries: one query per row, float32 or bfloat16.
    documents: n documents per query, same dtype.
    query_mask: True where the query token counts; None for all.
    document_mask: True where the document token counts; None for all.
    mean: as in `maxsim`.
    memory_budget_bytes: as in `maxsim`; rows are scored one after the other.
    implementation: as in `maxsim`.

  Returns:
    float32 scores, in the order of the documents.

  Raises:
    ValueError: if ranks or sizes disagree, or dtypes differ.
    NotImplementedError: if the named implementation cannot take the arguments.

  Example:
    >>> import jax.numpy as jnp
    >>> queries = jnp.eye(2)[:, None, :]
    >>> documents = jnp.ones((2, 3, 4, 2))
    >>> maxsim_pairs(queries, documents).shape
    (2, 3)

  Source: ours; the semantics are those of `maxsim`.
  """
  checks.has_rank(3, queries=queries, document_mask=document_mask)
  checks.has_rank(4, documents=documents)
  checks.same_size(
    queries_rows=queries.shape[0], documents_rows=documents.shape[0]
  )
  one = jax.tree.map(  # shapes of one row, for the checks
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
    (documents, document_mask),
  )
  _check(queries, one[0], query_mask, one[1], implementation)
  if document_mask is not None:
    checks.same_size(
      documents_rows=documents.shape[0], mask_rows=document_mask.shape[0]
    )
  return _maxsim_pairs(
    queries,
    documents,
    query_mask,
    document_mask,
    mean=mean,
    memory_budget_bytes=memory_budget_bytes,
    implementation=implementation,
  )


def maxsim_alignment(
  queries: Float[Array, "Nq Q D"],
  documents: Float[Array, "Nd N D"],
  query_mask: Bool[Array, "Nq Q"] | None = None,
  document_mask: Bool[Array, "Nd N"] | None = None,
  *,
  mean: bool = False,
  memory_budget_bytes: int = DEFAULT_BUDGET_BYTES,
  implementation: Implementation | None = None,
) -> Alignment:
  """Scores like `maxsim` and says which token met which, for pictures.

  The arg max passes no gradient; `similarity` and `scores` do, each to the two
  token vectors it was made of.

  Args:
    queries: query token vectors, float32 or bfloat16.
    documents: document token vectors, same dtype.
    query_mask: True where the query token counts; None for all.
    document_mask: True where the document token counts; None for all.
    mean: as in `maxsim`; leaves `similarity` as it is.
    memory_budget_bytes: as in `maxsim`.
    implementation: as in `maxsim`; finds the arg max.

  Returns:
    Scores, arg max and similarities.

  Raises:
    ValueError: if ranks or sizes disagree, or dtypes differ.
    NotImplementedError: if the named implementation cannot take the arguments.

  Example:
    >>> import jax.numpy as jnp
    >>> query = jnp.array([[[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]])
    >>> document = jnp.array([[[0.8, 0.6], [-0.6, -0.8], [0.0, 1.0]]])
    >>> maxsim_alignment(query, document).index.tolist()
    [[[0, 0, 1]]]

  Source: ours; the semantics are those of `maxsim`.
  """
  _check(queries, documents, query_mask, document_mask, implementation)
  return _maxsim_alignment(
    queries,
    documents,
    query_mask,
    document_mask,
    mean=mean,
    memory_budget_bytes=memory_budget_bytes,
    implementation=implementation,
  )


def mean_over_query(scores, queries, query_mask, found):
  """Divides sums by the number of valid query tokens; empties keep theirs.

  Args:
    scores: float32[Nq, Nd] sums.
    queries: the queries they belong to, for the number of tokens.
    query_mask: True where the query token counts; None for all.
    found: bool[Nd], whether a document has a valid token; None for all.

  Returns:
    float32[Nq, Nd].
  """
  if query_mask is None:
    mean = scores / queries.shape[1]
  else:
    mean = scores / jnp.maximum(1, jnp.sum(query_mask, axis=1))[:, None]
  return mean if found is None else jnp.where(found[None, :], mean, EMPTY_SCORE)


_STATIC = ("mean", "memory_budget_bytes", "implementation")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _maxsim(
  queries,
  documents,
  query_mask,
  document_mask,
  *,
  mean,
  memory_budget_bytes,
  implementation,
):
  def local(queries, documents, query_mask, document_mask):
    arrays = compat.varying_together(
      queries, documents, query_mask, document_mask
    )
    scores = _routed(*arrays, memory_budget_bytes, implementation)
    found = None if document_mask is None else jnp.any(document_mask, axis=1)
    if mean:
      scores = mean_over_query(scores, queries, query_mask, found)
    return scores

  return sharding.over_shards(
    local, queries, documents, query_mask, document_mask
  )


@functools.partial(jax.jit, static_argnames=_STATIC)
def _maxsim_pairs(
  queries,
  documents,
  query_mask,
  document_mask,
  *,
  mean,
  memory_budget_bytes,
  implementation,
):
  def one(arrays):
    query, documents, query_mask, document_mask = arrays
    return _maxsim(
      query[None],
      documents,
      None if query_mask is None else query_mask[None],
      document_mask,
      mean=mean,
      memory_budget_bytes=memory_budget_bytes,
      implementation=implementation,
    )[0]

  def local(*arrays):
    # A loop and no vmap: a kernel is not batched inside `shard_map`.
    return jax.lax.map(one, arrays)

  return sharding.over_row_shards(
    local, queries, documents, query_mask, document_mask
  )


@functools.partial(jax.jit, static_argnames=_STATIC)
def _maxsim_alignment(
  queries, documents, query_mask, document_mask, *, mean, **settings
):
  def local(*arrays):
    queries, documents, query_mask, document_mask = compat.varying_together(
      *arrays
    )
    stopped = map(jax.lax.stop_gradient, (queries, documents))
    _, index = _forward(
      *stopped, query_mask, document_mask, return_index=True, **settings
    )
    similarity = _met(queries, documents, document_mask, index)
    found = None
    if document_mask is not None:
      found = jnp.any(document_mask, axis=1)  # [Nd]
      index = jnp.where(found[None, :, None], index, 0)
    if query_mask is not None:
      index = jnp.where(query_mask[:, None, :], index, 0)
      similarity = jnp.where(query_mask[:, None, :], similarity, 0)
    scores = jnp.sum(similarity, axis=-1)  # [Nq, Nd]
    if found is not None:
      scores = jnp.where(found[None, :], scores, EMPTY_SCORE)
    if mean:
      scores = mean_over_query(scores, queries, query_mask, found)
    return Alignment(scores, index, similarity)

  return sharding.over_shards(
    local, queries, documents, query_mask, document_mask
  )


def _met(queries, documents, document_mask, index):
  """Inner products of query tokens with the tokens they met, [Nq, Nd, Q]."""
  if document_mask is not None:  # NaN padding must not spread
    documents = jnp.where(document_mask[:, :, None], documents, 0)

  def of_document(document, index):  # [N, D], [Nq, Q]
    return jnp.einsum(
      "iad,iad->ia",
      queries,
      document[index],
      precision="highest" if queries.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
    )

  # One document at a time: the gathered rows of all would be D times `index`.
  met = jax.lax.map(
    lambda pair: of_document(*pair), (documents, jnp.swapaxes(index, 0, 1))
  )
  return jnp.swapaxes(met, 0, 1)


def _check(queries, documents, query_mask, document_mask, implementation):
  checks.one_of(
    (None, *get_args(Implementation)), implementation=implementation
  )
  checks.has_rank(3, queries=queries, documents=documents)
  checks.has_rank(2, query_mask=query_mask, document_mask=document_mask)
  checks.same_size(
    queries_dim=queries.shape[2], documents_dim=documents.shape[2]
  )
  checks.in_range(
    1,
    1 << 31,
    query_tokens=queries.shape[1],
    document_tokens=documents.shape[1],
  )
  if queries.dtype != documents.dtype:
    raise ValueError(
      "queries and documents must have one dtype, "
      f"got {queries.dtype} and {documents.dtype}"
    )
  for name, mask, array in (
    ("query", query_mask, queries),
    ("document", document_mask, documents),
  ):
    if mask is not None and mask.shape != array.shape[:2]:
      raise ValueError(
        f"{name}_mask must have shape {array.shape[:2]}, got {mask.shape}"
      )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _routed(
  q, d, query_mask, document_mask, memory_budget_bytes, implementation
):
  return _forward(
    q,
    d,
    query_mask,
    document_mask,
    return_index=False,
    memory_budget_bytes=memory_budget_bytes,
    implementation=implementation,
  )


def _routed_fwd(
  q, d, query_mask, document_mask, memory_budget_bytes, implementation
):
  scores, index = _forward(
    q,
    d,
    query_mask,
    document_mask,
    return_index=True,
    memory_budget_bytes=memory_budget_bytes,
    implementation=implementation,
  )
  return scores, (q, d, query_mask, document_mask, index)


def _routed_bwd(memory_budget_bytes, implementation, saved, g):
  queries, documents, query_mask, document_mask, index = saved

  def call(module):
    settings = _budget(module, memory_budget_bytes)

    def backward(g, queries, documents, query_mask, document_mask, index):
      masks = _masks(module, queries, documents, query_mask, document_mask)
      return module.maxsim_backward(
        g, queries, documents, *masks, index, **settings
      )

    return backward

  arrays = (g, queries, documents, query_mask, document_mask, index)
  gradients = _dispatch(call, arrays, queries, documents, implementation)
  return (*gradients, None, None)


_routed.defvjp(_routed_fwd, _routed_bwd)


def _forward(
  queries,
  documents,
  query_mask,
  document_mask,
  *,
  return_index,
  memory_budget_bytes,
  implementation,
):
  def call(module):
    settings = _budget(module, memory_budget_bytes)

    def forward(queries, documents, query_mask, document_mask):
      masks = _masks(module, queries, documents, query_mask, document_mask)
      return module.maxsim_forward(
        queries, documents, *masks, return_index=return_index, **settings
      )

    return forward

  arrays = (queries, documents, query_mask, document_mask)
  return _dispatch(call, arrays, queries, documents, implementation)


def _dispatch(call, arrays, queries, documents, implementation):
  """Runs `call(module)` of the implementation named, or of the platform's."""
  if implementation is not None:
    module = _module(implementation)
    if implementation.startswith("pallas"):
      reason = module.unsupported(queries, documents)
      if reason is not None:
        raise NotImplementedError(f"{implementation}: {reason}")
    return call(module)(*arrays)
  branches = {"default": call(xla)}
  kernels = {"tpu": "pallas_tpu"}
  if hopper.on_hopper():
    kernels["cuda"] = "pallas_gpu"
  for platform, name in kernels.items():
    module = _module(name)
    if module.unsupported(queries, documents) is None:
      branches[platform] = call(module)
  return jax.lax.platform_dependent(*arrays, **branches)


def _module(name: str):
  """The module of an implementation; only its users import Pallas."""
  return importlib.import_module(f"tokjax.kernels.maxsim.{name}")


def _budget(module, memory_budget_bytes):
  if module is not xla:
    return {}
  return {"memory_budget_bytes": memory_budget_bytes}


def _masks(module, queries, documents, query_mask, document_mask):
  """The kernels always take masks; plain JAX skips the work of absent ones."""
  if module in (xla, reference):
    return query_mask, document_mask
  if query_mask is None:
    query_mask = jnp.ones_like(queries[:, :, 0], dtype=bool)
  if document_mask is None:
    document_mask = jnp.ones_like(documents[:, :, 0], dtype=bool)
  return query_mask, document_mask
