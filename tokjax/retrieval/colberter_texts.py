"""ColBERTer's text side: texts in, word vectors and rankings out.

Documents come back packed, as `tokjax.retrieval.colbert` packs tokens: their
word vectors are the tokens of an index, their text vectors its candidates.
Words whose gate is closed are left out. `search_fused` then finds candidates
by the text vectors and ranks them by both scores, with exact match where index
and queries have word ids. `select_documents` takes lists of documents out for
`colberter.score_pairs`, without an index.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import UInt32

from tokjax import checks
from tokjax.retrieval import colbert, colberter, index_scoring, length_batches
from tokjax.retrieval import words as whole_words
from tokjax.retrieval.index_scoring import Ranking
from tokjax.retrieval.token_index import TokenIndex
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "EncodedDocuments",
  "EncodedQueries",
  "SelectedDocuments",
  "encode_documents",
  "encode_queries",
  "search_fused",
  "select_documents",
]


class EncodedDocuments(NamedTuple):
  """Documents as bags of words.

  Attributes:
    documents: word vectors back to back in the order of first appearance (or
      token vectors, by a head without whole words); `pooled` holds the text
      vectors, float32.
    word_ids: hash of the word of each row; 0 for special tokens.
  """

  documents: colbert.Documents
  word_ids: np.ndarray  # uint32 [T]


class EncodedQueries(NamedTuple):
  """Queries as bags of words, padded to one length.

  Attributes:
    queries: word vectors with their mask; `pooled` holds the text vectors,
      float32.
    word_ids: hash of the word of each row; 0 for special tokens and padding.
  """

  queries: colbert.Queries
  word_ids: np.ndarray  # uint32 [Nq, Q]


class SelectedDocuments(NamedTuple):
  """Documents of several lists, padded; what `score_pairs` takes.

  Attributes:
    cls: text vectors, float32.
    words: word vectors, zero where the mask is False.
    mask: True where there is a word.
    word_ids: hash of each word, 0 where the mask is False.
  """

  cls: np.ndarray  # [B, n, C]
  words: np.ndarray  # [B, n, W, D]
  mask: np.ndarray  # bool [B, n, W]
  word_ids: np.ndarray  # uint32 [B, n, W]


def encode_documents(
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  encoder: Callable[[Array, Array], Array],
  head: colberter.ColberterHead,
  *,
  dtype: Any = None,
  bucket: int = 32,
  batch_tokens: int = 8192,
  progress: bool = True,
  devices: Sequence[jax.Device] | None = None,
) -> EncodedDocuments:
  """Encodes a corpus into packed word vectors, without stop-words.

  Documents are sorted by length and cut into batches as by
  `colbert.encode_documents`; pooling, gates and projections run on the
  device.

  Args:
    texts: the documents, in any order; the result keeps it.
    tokenizer: see `words.tokenize_words`.
    encoder: `encoder(ids, attention_mask) -> hidden[B, N, h]`, a pytree of
      its weights (such as `tokjax.models.bert.Bert`) or a plain function.
    head: its `config` also says how texts are cut.
    dtype: casts the weights of encoder and head, and the word vectors; None
      keeps what they are.
    bucket: granularity of padded lengths.
    batch_tokens: padded tokens per batch and device.
    progress: show a progress bar.
    devices: where to run, batches sharded over them; None for all local ones.

  Returns:
    NumPy arrays on the host.

  Raises:
    ValueError: as `words.tokenize_words`.

  Example:
    >>> from flax import nnx
    >>> model = tokenizers.models.WordLevel({"[UNK]": 0, "cat": 1}, "[UNK]")
    >>> tokenizer = tokenizers.Tokenizer(model)
    >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    >>> config = colberter.ColberterConfig.stage(2, hidden_dim=2, token_dim=3)
    >>> encoded = encode_documents(
    ...   ["cat, cat", "cats"], tokenizer,
    ...   lambda ids, mask: jax.nn.one_hot(ids, 2),
    ...   colberter.ColberterHead(config, rngs=nnx.Rngs(0)), progress=False)
    >>> encoded.documents.offsets.tolist(), encoded.documents.tokens.shape
    ([0, 2, 3], (3, 3))
    >>> bool(encoded.word_ids[0] == encoded.word_ids[2])  # cat, cats
    True

  Source: Hofstaetter et al., 2022, "ColBERTer".
  """
  return _encode(
    texts,
    tokenizer,
    encoder,
    head,
    passages=True,
    dtype=dtype,
    bucket=bucket,
    batch_tokens=batch_tokens,
    title="Encoding documents" if progress else None,
    devices=devices,
  )


def encode_queries(
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  encoder: Callable[[Array, Array], Array],
  head: colberter.ColberterHead,
  *,
  dtype: Any = None,
  bucket: int = 32,
  batch_tokens: int = 4096,
  progress: bool = False,
  devices: Sequence[jax.Device] | None = None,
) -> EncodedQueries:
  """Encodes queries into padded word vectors. There are no gates here.

  Args:
    texts: the queries; the result keeps their order.
    tokenizer: as in `encode_documents`.
    encoder: as in `encode_documents`.
    head: as in `encode_documents`.
    dtype: as in `encode_documents`.
    bucket: granularity of padded lengths.
    batch_tokens: padded tokens per batch and device.
    progress: show a progress bar.
    devices: where to run; None for all local ones.

  Returns:
    NumPy arrays on the host, as long as the query of the most words.

  Raises:
    ValueError: as `words.tokenize_words`.

  Source: Hofstaetter et al., 2022, "ColBERTer".
  """
  packed, packed_ids = _encode(
    texts,
    tokenizer,
    encoder,
    head,
    passages=False,
    dtype=dtype,
    bucket=bucket,
    batch_tokens=batch_tokens,
    title="Encoding queries" if progress else None,
    devices=devices,
  )
  counts = np.diff(packed.offsets)
  mask = np.arange(max(1, counts.max(initial=0)))[None] < counts[:, None]
  tokens = np.zeros((*mask.shape, packed.tokens.shape[1]), packed.tokens.dtype)
  word_ids = np.zeros(mask.shape, np.uint32)
  tokens[mask], word_ids[mask] = packed.tokens, packed_ids
  return EncodedQueries(colbert.Queries(tokens, mask, packed.pooled), word_ids)


def search_fused(
  index: TokenIndex,
  queries: Float[Array, "Nq Q D"],
  query_mask: Bool[Array, "Nq Q"],
  query_cls: Float[Array, "Nq C"],
  fusion: Float[Array, ""],
  query_word_ids: UInt32[Array, "Nq Q"] | None = None,
  *,
  mode: str = "cls",
  k: int = 10,
  num_candidates: int = 256,
) -> Ranking:
  """The k best documents by both scores, among candidates by text vectors.

  The paper's recommended workflow: the text vectors rank all documents, the
  word vectors of the best are read, and those are ranked by

      sigmoid(fusion) cls_score + (1 - sigmoid(fusion)) token_score

  as `colberter.score` gives them; with word ids on both sides only equal words
  match. Costs 2 Nq Nd C FLOPs, and 2 Nq Q D for each word of the candidates.
  Wrap it in `jax.jit` with the keyword settings static.

  Args:
    index: made of `encode_documents`: its word vectors as tokens, its text
      vectors as candidates, and for exact match its word ids.
    queries: word vectors of the queries.
    query_mask: True where a query word counts.
    query_cls: text vectors of the queries.
    fusion: of the head.
    query_word_ids: ids that exact match compares; given if the index has
      some, and only then.
    mode: name of the text vectors in `index.candidates`.
    k: results per query, 1..Nd.
    num_candidates: documents scored by both per query, at least k; more than
      Nd means all.

  Returns:
    Positions int32 and mixed float32 scores, best first; ties: lower position
    first. A document without words comes after all that have some, but with
    exact match has the token score -1000 for each query word.

  Raises:
    ValueError: for an unknown mode, a k out of range, sizes that disagree, or
      word ids of one side only.
    TypeError: if word ids are not uint32.

  Example:
    >>> from tokjax.retrieval import token_index
    >>> words, cls = np.eye(2, dtype=np.float32), np.ones((2, 1), np.float32)
    >>> index = token_index.build(
    ...   words, np.array([0, 1, 2]),
    ...   candidates={"cls": token_index.store_vectors(cls)})
    >>> found = search_fused(index, jnp.array([[[0.0, 4.0]]]),
    ...   jnp.array([[True]]), jnp.array([[6.0]]), jnp.zeros(()), k=2)
    >>> found.index.tolist(), found.scores.tolist()  # (6 + 4) / 2, (6 + 0) / 2
    ([[1, 0]], [[5.0, 3.0]])

  Source: Hofstaetter et al., 2022, "ColBERTer", retrieval workflow 2.
  """
  checks.one_of(tuple(index.candidates), mode=mode)
  num_candidates = min(num_candidates, index.num_documents)
  checks.in_range(1, index.num_documents, k=k)
  checks.in_range(k, index.num_documents, num_candidates=num_candidates)
  cls_scores = index_scoring.candidate_scores(
    index.candidates[mode], queries, query_mask, query_vectors=query_cls
  )
  cls_scores = jnp.where(index.live[None, :], cls_scores, -jnp.inf)
  cls_scores, found = jax.lax.top_k(cls_scores, num_candidates)
  # Ascending positions: ties of the mixed scores go to the lower one.
  found, cls_scores = jax.lax.sort((found, cls_scores), num_keys=1)
  found = jnp.where(cls_scores > -jnp.inf, found, -1)
  token_scores = index_scoring.rescore(
    index, queries, query_mask, found, query_word_ids
  )
  weight = jax.nn.sigmoid(fusion.astype(jnp.float32))
  scores = weight * cls_scores + (1 - weight) * token_scores
  scores = jnp.where(found >= 0, scores, -jnp.inf)
  scores, place = jax.lax.top_k(scores, k)
  return index_scoring.as_ranking(
    scores, jnp.take_along_axis(found, place, axis=1)
  )


def select_documents(
  encoded: EncodedDocuments, positions: np.ndarray
) -> SelectedDocuments:
  """Lists of documents out of a packed corpus, on the host.

  Args:
    encoded: the corpus.
    positions: int[B, n] positions of documents; -1 for none.

  Returns:
    Arrays padded to the longest document chosen; nothing but the text vector,
    which is zero, at -1.

  Raises:
    ValueError: if a position is out of range.

  Example:
    >>> packed = colbert.Documents(
    ...   np.array([[1.0], [2.0], [3.0]]), np.array([0, 1, 3]), np.eye(2))
    >>> encoded = EncodedDocuments(packed, np.array([7, 8, 9], np.uint32))
    >>> chosen = select_documents(encoded, np.array([[1, 0]]))
    >>> chosen.word_ids.tolist(), chosen.mask.tolist()
    ([[[8, 9], [7, 0]]], [[[True, True], [True, False]]])

  Source: ours.
  """
  packed = encoded.documents
  positions = np.asarray(positions)
  last = len(packed.offsets) - 2
  if positions.size and not -1 <= positions.min() <= positions.max() <= last:
    raise ValueError(
      f"positions must lie in -1..{last}, got "
      f"{positions.min()}..{positions.max()}"
    )
  chosen = positions >= 0
  first = packed.offsets[positions]  # of -1: the end, where nothing starts
  counts = np.where(chosen, np.diff(packed.offsets)[positions], 0)
  place = np.arange(max(1, counts.max(initial=0)))
  mask = place < counts[..., None]  # [B, n, W]
  rows = (first[..., None] + place)[mask]
  words = np.zeros((*mask.shape, packed.tokens.shape[1]), packed.tokens.dtype)
  word_ids = np.zeros(mask.shape, np.uint32)
  words[mask], word_ids[mask] = packed.tokens[rows], encoded.word_ids[rows]
  cls = np.where(chosen[..., None], packed.pooled[positions], 0)
  return SelectedDocuments(cls, words, mask, word_ids)


class _Encoded(NamedTuple):
  cls: Float[Array, "R C"]
  words: Float[Array, "R W D"]
  mask: Bool[Array, "R W"]
  slots: Int[Array, "R W"]


def _encode(
  texts, tokenizer, encoder, head, *, passages, dtype, bucket, batch_tokens,
  title, devices,
):  # fmt: skip
  """Bags of words, packed."""
  config = head.config
  length = config.document_length if passages else config.query_length
  rows = whole_words.tokenize_words(
    texts, tokenizer, length=length, stem=config.stem
  )
  # Every other number of a row is the slot of the word of the token before.
  pairs = [np.stack([row.ids, row.slot], axis=1).reshape(-1) for row in rows]
  weights = _as_pytree(encoder, dtype), _as_pytree(head, dtype)
  function = functools.partial(_encode_batch, passages=passages, dtype=dtype)
  shapes = jax.eval_shape(
    function,
    weights,
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
  )
  cls = np.zeros((len(rows), shapes.cls.shape[1]), np.float32)
  empty = np.zeros((0, shapes.words.shape[2]), shapes.words.dtype)
  words, word_ids = [empty] * len(rows), [np.zeros(0, np.uint32)] * len(rows)
  for members, result in length_batches.run(
    function,
    weights,
    pairs,
    bucket=2 * bucket,
    batch_tokens=2 * batch_tokens,
    max_length=2 * length,
    devices=devices,
    title=title,
  ):
    cls[members] = result.cls
    for i, row in enumerate(members):
      kept = result.mask[i]
      hashes = np.concatenate([[0], rows[row].words]).astype(np.uint32)
      words[row] = result.words[i][kept]
      word_ids[row] = hashes[result.slots[i][kept]]
  offsets = np.cumsum([0] + [len(ids) for ids in word_ids]).astype(np.int64)
  return EncodedDocuments(
    colbert.Documents(np.concatenate([empty, *words]), offsets, cls),
    np.concatenate([np.zeros(0, np.uint32), *word_ids]),
  )


@functools.partial(jax.jit, static_argnames=("passages", "dtype"))
def _encode_batch(weights, table, lengths, *, passages, dtype):
  encoder, head = weights
  ids, slots = jnp.moveaxis(table.reshape(table.shape[0], -1, 2), 2, 0)
  position = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
  attention_mask = position < lengths[:, None] // 2
  hidden = encoder(ids, attention_mask)
  # A text has at most as many words as tokens.
  unique = jnp.broadcast_to(position + 1, ids.shape).astype(jnp.uint32)
  side = head.passages if passages else head.queries
  bags = side(hidden, attention_mask, slots.astype(jnp.uint32), unique)
  if passages:
    bags = colberter.drop_stopwords(bags)
  return _Encoded(
    cls=bags.cls.astype(jnp.float32),
    words=bags.words if dtype is None else bags.words.astype(dtype),
    mask=bags.mask,
    slots=bags.word_ids.astype(jnp.int32),
  )


def _as_pytree(part, dtype):
  """A module or function as a pytree, its weights in the dtype asked for."""
  if jax.tree_util.all_leaves([part]):
    part = jax.tree_util.Partial(part)

  def cast(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(dtype) if floating and dtype is not None else x

  return jax.tree.map(cast, part)
