"""The methods side by side: what each makes of texts, and how it searches.

    name       a document is              a query is     documents rank by
    colbert    its token vectors          token vectors  MaxSim
    xtr        its token vectors          token vectors  retrieved tokens
    crisp      means of its tokens        means          MaxSim
    colberter  vectors of needed words,   word vectors,  both scores, among
               and one of the text        one of it      the best texts

All four share one index (`tokjax.retrieval.token_index`): rows of vectors for
every document, and one vector per document for candidates. Where only equal
words of ColBERTer match, each row has the id of its word as well.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from tokjax import checks
from tokjax.retrieval import (
  colbert,
  colberter,
  colberter_texts,
  crisp,
  xtr,
)
from tokjax.retrieval import (
  search as maxsim_search,
)
from tokjax.retrieval.crisp import CrispConfig
from tokjax.retrieval.index_scoring import Ranking
from tokjax.retrieval.token_index import TokenIndex

__all__ = [
  "NAMES",
  "Method",
  "Name",
  "TextModel",
  "check_head",
  "encode_documents",
  "encode_queries",
  "reduce_documents",
  "search",
]

Name = Literal["colbert", "xtr", "crisp", "colberter"]

NAMES: tuple[Name, ...] = get_args(Name)


@dataclasses.dataclass(frozen=True)
class Method:
  """What a model was trained for, or is to be searched by.

  ColBERTer's settings stand on its head, `colberter.ColberterHead.config`.

  Raises:
    ValueError: for an unknown name, a `crisp` that is missing or without
      meaning, or a `k_prime` below 1.

  Example:
    >>> Method("crisp", CrispConfig(**crisp.PRESETS["C8x32"])).vectors
    'pooled'
  """

  name: Name = "colbert"
  crisp: CrispConfig | None = None  # of "crisp": how many means
  k_prime: int = 1000  # of "xtr": tokens that a query token retrieves

  def __post_init__(self):
    checks.one_of(NAMES, method=self.name)
    checks.in_range(1, 1 << 31, k_prime=self.k_prime)
    if (self.name == "crisp") != (self.crisp is not None):
      raise ValueError(
        "crisp must be given for method 'crisp', and for no other, got "
        f"{self.crisp} for {self.name!r}"
      )

  @property
  def vectors(self) -> str:
    """Name, in an index, of the vectors `colbert.Documents.pooled`."""
    return "cls" if self.name == "colberter" else "pooled"


@runtime_checkable
class TextModel(Protocol):
  """What encodes texts; `tokjax.models.checkpoints.Checkpoint` is one.

  Attributes:
    tokenizer: neither cuts nor pads.
    encoder: `encoder(ids, attention_mask) -> hidden[B, N, h]`.
    head: what `colbert.encode_head` takes, or a `colberter.ColberterHead`.
    config: how texts become tokens; without meaning for ColBERTer.
    method: what is made of the tokens.
  """

  @property
  def tokenizer(self) -> tokenizers.Tokenizer: ...

  @property
  def encoder(self) -> Callable[..., Any]: ...

  @property
  def head(self) -> Any: ...

  @property
  def config(self) -> colbert.ColbertConfig: ...

  @property
  def method(self) -> Method: ...


def check_head(head: Any, method: Method) -> None:
  """Raises ValueError unless the head gives what the method compares.

  Args:
    head: of a model.
    method: that it shall be used by.

  Raises:
    ValueError: for a ColBERTer head with another method, or the reverse.

  Example:
    >>> check_head(None, Method("xtr"))
  """
  words = isinstance(head, colberter.ColberterHead)
  if words != (method.name == "colberter"):
    raise ValueError(
      "method must be 'colberter' for a ColBERTer head, and for no other "
      f"head, got {method.name!r} for {type(head).__name__}"
    )


def encode_documents(
  texts: Sequence[str], model: TextModel, **settings: Any
) -> colbert.Documents:
  """Encodes a corpus as the model's method wants it in an index.

  Args:
    texts: the documents, in any order; the result keeps it.
    model: tokenizer, encoder, head, config, method.
    **settings: dtype, bucket, batch_tokens, progress and devices, as in
      `colbert.encode_documents`.

  Returns:
    Packed vectors: of tokens, of their means (CRISP) or of words (ColBERTer,
    with the vectors of the texts in `pooled` and, for exact match, `word_ids`).

  Raises:
    ValueError: if head and method do not belong together, or a marker is not
      in the vocabulary.
  """
  check_head(model.head, model.method)
  if model.method.name == "colberter":
    documents, word_ids = colberter_texts.encode_documents(
      texts, model.tokenizer, model.encoder, model.head, **settings
    )
    exact_match = model.head.config.exact_match
    return documents._replace(word_ids=word_ids if exact_match else None)
  documents = colbert.encode_documents(
    texts, model.tokenizer, model.encoder, model.head, model.config, **settings
  )
  return reduce_documents(documents, model.method)


def reduce_documents(
  documents: colbert.Documents, method: Method
) -> colbert.Documents:
  """What a method keeps of documents that are encoded as token vectors.

  Args:
    documents: every token; for CRISP on a model that was not trained for it
      this is post-hoc clustering.
    method: "crisp" clusters each document, the others keep it.

  Returns:
    The documents, with fewer rows or as they were.

  Raises:
    ValueError: as `crisp.cluster_packed`.

  Example:
    >>> tokens = np.array([[1.0], [3.0], [7.0]], np.float32)
    >>> documents = colbert.Documents(tokens, np.array([0, 2, 3]), np.eye(2))
    >>> one = CrispConfig(query_clusters=1, document_clusters=1)
    >>> reduce_documents(documents, Method("crisp", one)).tokens.tolist()
    [[2.0], [7.0]]
  """
  if method.name != "crisp":
    return documents
  tokens, offsets = crisp.cluster_packed(
    documents.tokens, documents.offsets, method.crisp
  )
  return documents._replace(tokens=tokens, offsets=offsets)


def encode_queries(
  texts: Sequence[str], model: TextModel, **settings: Any
) -> colbert.Queries:
  """Encodes queries as `search` takes them.

  Args:
    texts: the queries; the result keeps their order.
    model: as in `encode_documents`.
    **settings: as in `encode_documents`.

  Returns:
    Padded vectors with their mask: of tokens, of their means, or of words,
    which have `word_ids` as those of documents.

  Raises:
    ValueError: as `encode_documents`.
  """
  check_head(model.head, model.method)
  if model.method.name == "colberter":
    queries, word_ids = colberter_texts.encode_queries(
      texts, model.tokenizer, model.encoder, model.head, **settings
    )
    exact_match = model.head.config.exact_match
    return queries._replace(word_ids=word_ids if exact_match else None)
  queries = colbert.encode_queries(
    texts, model.tokenizer, model.encoder, model.head, model.config, **settings
  )
  if model.method.name != "crisp":
    return queries
  queries = _in_few_lengths(queries)
  found = crisp.cluster_queries(
    jnp.asarray(queries.tokens), jnp.asarray(queries.mask), model.method.crisp
  )
  return queries._replace(
    tokens=np.asarray(found.means), mask=np.asarray(found.mask)
  )


def search(
  index: TokenIndex,
  queries: colbert.Queries,
  model: TextModel,
  *,
  mode: str | None = None,
  k: int = 10,
  num_candidates: int = 256,
  batch_size: int = 16,
) -> Ranking:
  """The k best documents of each query, by the score of the model's method.

  Args:
    index: made of `encode_documents`, word ids included where there are some;
      its vector per document is named `model.method.vectors`.
    queries: from `encode_queries`.
    model: as in `encode_documents`.
    mode: None for the method's own. "exact" for all documents by MaxSim, or
      both scores (ColBERTer). A name in `index.candidates` for MaxSim of the
      best by those vectors; "cls" is ColBERTer's own. "xtr", XTR's own, ranks
      by the tokens retrieved and knows no candidates.
    k: results per query, 1..Nd.
    num_candidates: documents that are scored in full per query, at least k.
    batch_size: queries searched at a time.

  Returns:
    NumPy arrays, in the order of the queries. Scores of "xtr" are means over
    query tokens, others are sums.

  Raises:
    ValueError: for a mode that the method does not have, word ids of the index
      or of the queries only, or as the searches.

  Source: `search.search_batches`, `xtr.search`, `colberter_texts.search_fused`.
  """
  method = model.method
  check_head(model.head, method)
  modes = {
    "xtr": ("xtr", "exact", *index.candidates),
    "colberter": ("cls", "exact"),
  }.get(method.name, ("exact", *index.candidates))
  mode = modes[0] if mode is None else mode
  checks.one_of(modes, mode=mode)
  if mode == "xtr":
    find = functools.partial(_search_xtr, index, k=k, k_prime=method.k_prime)
    return _over_batches(find, queries, batch_size)
  if method.name == "colberter":
    find = functools.partial(
      _search_fused,
      index,
      fusion=model.head.fusion[...],
      k=k,
      num_candidates=index.num_documents if mode == "exact" else num_candidates,
    )
    return _over_batches(find, queries, batch_size)
  return maxsim_search.search_batches(
    index,
    queries.tokens,
    queries.mask,
    mode=mode,
    k=k,
    num_candidates=num_candidates,
    query_vectors=queries.pooled if mode == method.vectors else None,
    batch_size=batch_size,
  )


@functools.partial(jax.jit, static_argnames=("k", "k_prime"))
def _search_xtr(index, tokens, mask, pooled, word_ids, *, k, k_prime):
  del pooled, word_ids  # a vector of the whole query, and of ColBERTer
  return xtr.search(index, tokens, mask, k=k, k_prime=k_prime)


@functools.partial(jax.jit, static_argnames=("k", "num_candidates"))
def _search_fused(
  index, tokens, mask, pooled, word_ids, *, fusion, k, num_candidates
):
  return colberter_texts.search_fused(
    index,
    tokens,
    mask,
    pooled,
    fusion,
    word_ids,
    k=k,
    num_candidates=num_candidates,
  )


def _over_batches(find, queries, batch_size):
  """Applies a search to a few queries at a time, all batches of one shape."""
  checks.in_range(1, 1 << 20, batch_size=batch_size)
  queries, total = _in_few_lengths(queries), len(queries.tokens)
  parts = []
  for start in range(0, total, batch_size):
    # A last, smaller batch repeats a query, to run the same program.
    rows = np.minimum(np.arange(start, start + batch_size), total - 1)
    found = find(*(None if x is None else x[rows] for x in queries))
    parts.append(Ranking(*(x[: total - start] for x in found)))
  return jax.tree.map(
    lambda *arrays: np.concatenate([np.asarray(x) for x in arrays]), *parts
  )


def _in_few_lengths(queries, multiple=8):
  """Queries with masked rows at the end, up to a multiple, to compile less."""
  more = -queries.mask.shape[1] % multiple

  def padded(x):
    return np.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))

  fields = ("tokens", "mask", "word_ids")
  changed = jax.tree.map(padded, {x: getattr(queries, x) for x in fields})
  return queries._replace(**changed)
