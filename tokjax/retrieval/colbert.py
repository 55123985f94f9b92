"""ColBERT's text side: texts in, the token vectors that MaxSim compares out.

A text becomes ids with a marker after [CLS]; the encoder gives a hidden state
for each; a head projects it; masked rows are zeroed and the rest scaled to
unit length. Documents come back packed, back to back without padding; queries
padded with their scoring mask. Every step can be switched off, down to plain
token vectors of a sentence encoder (`ColbertConfig.zero_shot`).
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from tokjax import checks
from tokjax.ops import pooling, similarity
from tokjax.retrieval import length_batches, masks
from tokjax.typing import Array, Bool, Float

__all__ = [
  "ColbertConfig",
  "Documents",
  "Queries",
  "encode_documents",
  "encode_head",
  "encode_queries",
  "tokenize",
]

# ids[B, N], attention_mask[B, N] -> hidden[B, N, h]; a pytree of arrays.
Encoder = Callable[[Array, Array], Array]


@dataclasses.dataclass(unsafe_hash=True)
class ColbertConfig:
  """How texts become scored tokens; the defaults are ColBERTv2's."""

  query_length: int = 32  # tokens of a query, [MASK]s included
  document_length: int = 180  # most tokens of a document, specials included
  query_marker: str | None = "[unused0]"  # token after [CLS]; None for none
  document_marker: str | None = "[unused1]"  # the same for documents
  expand_queries: bool = True  # pad queries with [MASK] to query_length
  attend_to_expansion: bool = False  # may tokens attend to those [MASK]s
  mask_token: str = "[MASK]"  # what queries are padded with
  # Document tokens that are read but not scored.
  skip_words: tuple[str, ...] = tuple(string.punctuation)
  score_specials: bool = True  # are [CLS], [SEP] and the marker scored
  normalize: bool = True  # scale each token vector to unit length

  @classmethod
  def zero_shot(cls, length: int = 256) -> "ColbertConfig":
    """Every token of a sentence encoder, as it is: no markers, no [MASK]s.

    Args:
      length: most tokens of a query or document, [CLS] and [SEP] included.
    """
    return cls(
      query_length=length,
      document_length=length,
      query_marker=None,
      document_marker=None,
      expand_queries=False,
      skip_words=(),
    )


class Documents(NamedTuple):
  """Encoded documents, back to back.

  Attributes:
    tokens: scored token vectors of all documents.
    offsets: document i owns tokens[offsets[i]:offsets[i + 1]].
    pooled: mean hidden state of all its tokens (scored or not), unit length,
      before the head, float32: the vector of a dense retriever.
    word_ids: which word each row stands for, where only equal words match
      (ColBERTer); None elsewhere.
  """

  tokens: np.ndarray  # [T, D]
  offsets: np.ndarray  # int64 [Nd + 1]
  pooled: np.ndarray  # [Nd, h]
  word_ids: np.ndarray | None = None  # uint32 [T]


class Queries(NamedTuple):
  """Encoded queries, padded to one length.

  Attributes:
    tokens: token vectors; zero where the mask is False.
    mask: True where a token is scored.
    pooled: as in `Documents`; [MASK] padding that is not attended to does not
      count.
    word_ids: as in `Documents`; 0 where the mask is False.
  """

  tokens: np.ndarray  # [Nq, Q, D]
  mask: np.ndarray  # bool [Nq, Q]
  pooled: np.ndarray  # [Nq, h]
  word_ids: np.ndarray | None = None  # uint32 [Nq, Q]


def tokenize(
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  *,
  length: int,
  marker: str | None = None,
) -> list[np.ndarray]:
  """Token ids of each text: [CLS] marker words [SEP], at most `length`.

  Words are cut so that the marker and the closing special token always fit.

  Args:
    texts: one string per row; may be empty strings.
    tokenizer: adds the special tokens; must not cut or pad by itself.
    length: most ids of a row, specials and marker included.
    marker: vocabulary entry put after the opening special tokens; None for
      none.

  Returns:
    One int32 array per text.

  Raises:
    ValueError: if the marker is not in the vocabulary, `length` has no room
      for one word, or the tokenizer cuts or pads.
  """
  if tokenizer.truncation is not None or tokenizer.padding is not None:
    raise ValueError(
      "tokenizer must not truncate or pad: call no_truncation() and "
      "no_padding() on it"
    )
  opening, closing = _special_ids(tokenizer)
  if marker is not None:
    opening = [*opening, _token_id(tokenizer, "marker", marker)]
  room = length - len(opening) - len(closing)
  if room < 1:
    raise ValueError(
      f"length must exceed the {length - room} special tokens, got {length}"
    )
  return [
    np.array([*opening, *encoding.ids[:room], *closing], np.int32)
    for encoding in tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
  ]


def encode_head(
  head: Callable[[Array], Array] | Float[Array, "h D"] | None,
  hidden: Float[Array, "B N h"],
  mask: Bool[Array, "B N"],
  *,
  normalize: bool = True,
) -> Float[Array, "B N D"]:
  """Token vectors from hidden states: project, zero masked rows, normalise.

  Args:
    head: matrix without bias, or a function of hidden states; None keeps them.
    hidden: last hidden states.
    mask: True where the token is scored.
    normalize: scale rows to unit length, so that dot products are cosines.

  Returns:
    Vectors in the dtype of `hidden` (of the head, where that is wider); zero,
    with zero gradient, where masked.

  Raises:
    ValueError: if the axes disagree.

  Example:
    >>> hidden = jnp.array([[[3.0, 4.0], [1.0, 1.0]]])
    >>> encode_head(jnp.eye(2), hidden, jnp.array([[True, False]]))
    Array([[[0.6, 0.8],
            [0. , 0. ]]], dtype=float32)

  Source:
    Khattab & Zaharia 2020, ColBERT; the order is that of its published code.
  """
  checks.has_rank(3, hidden=hidden)
  checks.same_size(hidden_batch=hidden.shape[0], mask_batch=mask.shape[0])
  checks.same_size(hidden_tokens=hidden.shape[1], mask_tokens=mask.shape[1])
  # Zeroed before the head too: padding may hold NaN, and 0 * NaN is NaN in
  # the gradient of the matrix.
  x = jnp.where(mask[..., None], hidden, 0)
  if callable(head):
    x = head(x)
  elif head is not None:
    checks.same_size(hidden_width=hidden.shape[2], head_rows=head.shape[0])
    x = x @ head
  x = jnp.where(mask[..., None], x, 0)
  return similarity.safe_normalize(x) if normalize else x


def encode_documents(
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  encoder: Encoder,
  head: Callable[[Array], Array] | Float[Array, "h D"] | None,
  config: ColbertConfig,
  *,
  dtype: Any = None,
  bucket: int = 32,
  batch_tokens: int = 8192,
  progress: bool = True,
  devices: Sequence[jax.Device] | None = None,
) -> Documents:
  """Encodes a corpus into packed token vectors.

  Documents are sorted by length and cut into batches of about `batch_tokens`
  padded tokens, each padded to the next multiple of `bucket`: one compiled
  program per length. The host packs a batch while the devices work on the
  next ones.

  Args:
    texts: the documents, in any order; the result keeps it.
    tokenizer: see `tokenize`.
    encoder: `encoder(ids, attention_mask) -> hidden[B, N, h]`, a pytree of
      its weights (such as `tokjax.models.bert.Bert`) or a plain function.
    head: as in `encode_head`, a pytree as well; None keeps hidden states.
    config: how texts become scored tokens.
    dtype: casts the weights of encoder and head and is the dtype of the
      tokens; None keeps the weights' own. bfloat16 halves the memory; where
      the processor has no bfloat16 arithmetic it is storage only.
    bucket: granularity of padded lengths.
    batch_tokens: padded tokens per batch and device.
    progress: show a progress bar.
    devices: where to run, batches sharded over them; None for all local ones.

  Returns:
    NumPy arrays on the host: tokens in the compute dtype, pooled float32.

  Raises:
    ValueError: for a marker or mask token that is not in the vocabulary.
  """
  rows = tokenize(
    texts,
    tokenizer,
    length=config.document_length,
    marker=config.document_marker,
  )
  skip = masks.skip_ids(tokenizer, config.skip_words)
  if not config.score_specials:
    skip = np.union1d(
      skip, _special_table(tokenizer, config.document_marker)
    ).astype(np.int32)
  counts = [len(row) - int(np.isin(row, skip).sum()) for row in rows]
  offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
  encoder, head = _cast(encoder, head, dtype)
  width, hidden_width, out_dtype = _widths(encoder, head)
  tokens = np.empty((offsets[-1], width), out_dtype)
  pooled = np.empty((len(rows), hidden_width), np.float32)
  function = functools.partial(
    _encode_batch, normalize=config.normalize, expansion=None
  )
  for members, result in length_batches.run(
    function,
    (encoder, head, jnp.asarray(skip)),
    rows,
    bucket=bucket,
    batch_tokens=batch_tokens,
    max_length=config.document_length,
    devices=devices,
    title="Encoding documents" if progress else None,
  ):
    for row, i in enumerate(members):
      scored = result.mask[row]
      tokens[offsets[i] : offsets[i + 1]] = result.tokens[row][scored]
    pooled[members] = result.pooled
  return Documents(tokens, offsets, pooled)


def encode_queries(
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  encoder: Encoder,
  head: Callable[[Array], Array] | Float[Array, "h D"] | None,
  config: ColbertConfig,
  *,
  dtype: Any = None,
  bucket: int = 32,
  batch_tokens: int = 4096,
  progress: bool = False,
  devices: Sequence[jax.Device] | None = None,
) -> Queries:
  """Encodes queries into padded token vectors with their scoring mask.

  With `config.expand_queries` every query has `query_length` scored tokens;
  without, the length is that of the longest query.

  Args:
    texts: the queries; the result keeps their order.
    tokenizer: see `tokenize`.
    encoder: as in `encode_documents`.
    head: as in `encode_documents`.
    config: how texts become scored tokens.
    dtype: as in `encode_documents`.
    bucket: granularity of padded lengths.
    batch_tokens: padded tokens per batch and device.
    progress: show a progress bar.
    devices: where to run; None for all local ones.

  Returns:
    NumPy arrays on the host.

  Raises:
    ValueError: for a marker or mask token that is not in the vocabulary.
  """
  rows = tokenize(
    texts,
    tokenizer,
    length=config.query_length,
    marker=config.query_marker,
  )
  skip = np.zeros(0, np.int32)
  if not config.score_specials:
    skip = _special_table(tokenizer, config.query_marker)
  length = max((len(row) for row in rows), default=1)
  expansion = None
  if config.expand_queries:
    length = config.query_length
    expansion = _Expansion(
      _token_id(tokenizer, "mask_token", config.mask_token),
      length,
      config.attend_to_expansion,
    )
  encoder, head = _cast(encoder, head, dtype)
  width, hidden_width, out_dtype = _widths(encoder, head)
  tokens = np.zeros((len(rows), length, width), out_dtype)
  mask = np.zeros((len(rows), length), bool)
  pooled = np.zeros((len(rows), hidden_width), np.float32)
  function = functools.partial(
    _encode_batch, normalize=config.normalize, expansion=expansion
  )
  for members, result in length_batches.run(
    function,
    (encoder, head, jnp.asarray(skip)),
    rows,
    bucket=length if expansion else bucket,
    batch_tokens=batch_tokens,
    max_length=length,
    devices=devices,
    title="Encoding queries" if progress else None,
  ):
    padded = result.tokens.shape[1]
    tokens[members, :padded] = result.tokens
    mask[members, :padded] = result.mask
    pooled[members] = result.pooled
  return Queries(tokens, mask, pooled)


class _Expansion(NamedTuple):
  mask_id: int
  length: int
  attend: bool


class _Encoded(NamedTuple):
  tokens: Float[Array, "B N D"]
  mask: Bool[Array, "B N"]
  pooled: Float[Array, "B h"]


@functools.partial(jax.jit, static_argnames=("normalize", "expansion"))
def _encode_batch(weights, ids, lengths, *, normalize, expansion):
  encoder, head, skip = weights
  attention_mask = jnp.arange(ids.shape[1])[None] < lengths[:, None]
  if expansion is None:
    mask = masks.scoring_mask_document(ids, attention_mask, skip)
  else:
    ids, attention_mask, mask = masks.expand_queries(
      ids,
      attention_mask,
      mask_id=expansion.mask_id,
      length=expansion.length,
      attend=expansion.attend,
    )
    mask = masks.scoring_mask_query(ids, mask, skip)
  hidden = encoder(ids, attention_mask)
  pooled = pooling.mean_pool(hidden.astype(jnp.float32), attention_mask)
  return _Encoded(
    encode_head(head, hidden, mask, normalize=normalize),
    mask,
    similarity.safe_normalize(pooled),
  )


def _widths(encoder, head):
  """Widths of a token and of a hidden state, and the dtype of tokens."""
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
  skip = jax.ShapeDtypeStruct((0,), jnp.int32)
  shapes = jax.eval_shape(
      functools.partial(_encode_batch, normalize=True, expansion=None),
      (encoder, head, skip), ids, lengths,
  )  # fmt: skip
  tokens, pooled = shapes.tokens, shapes.pooled
  return tokens.shape[-1], pooled.shape[-1], tokens.dtype


def _cast(encoder, head, dtype):
  """Makes both pytrees, with floating weights in the dtype asked for."""

  def cast(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(dtype) if floating and dtype is not None else x

  def prepare(part):
    # A plain function is not a pytree; a Partial without arguments is.
    if callable(part) and jax.tree_util.all_leaves([part]):
      part = jax.tree_util.Partial(part)
    return jax.tree.map(cast, part)

  return prepare(encoder), prepare(head)


def _special_ids(tokenizer):
  """Ids the tokenizer puts before and after a text."""
  encoding = tokenizer.encode("a")
  special = np.array(encoding.special_tokens_mask, bool)
  ids = np.array(encoding.ids)
  first, last = np.flatnonzero(~special)[[0, -1]]
  return ids[:first].tolist(), ids[last + 1 :].tolist()


def _special_table(tokenizer, marker):
  opening, closing = _special_ids(tokenizer)
  marker = [] if marker is None else [_token_id(tokenizer, "marker", marker)]
  return np.unique(np.array([*opening, *marker, *closing], np.int32))


def _token_id(tokenizer, name, token):
  found = tokenizer.token_to_id(token)
  if found is None:
    raise ValueError(f"{name} {token!r} is not in the vocabulary")
  return found
