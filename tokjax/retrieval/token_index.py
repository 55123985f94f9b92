"""The in-memory index: documents of many token vectors, ready to be searched.

Documents lie back to back in pages of a few rows. The last page of a document
is filled with copies of its first token: copies change no maximum, so scoring
needs no token mask, and nothing is padded to the longest document.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.retrieval import codecs
from tokjax.typing import Float

__all__ = [
  "Candidates",
  "TokenIndex",
  "build",
  "from_payload",
  "mean_vectors",
  "stack_shards",
  "store_vectors",
]

# Pages scored at a time. 128 pages of 16 rows of width 384 are 3 MiB of
# float32, so that a decoded block stays in the cache of a CPU.
_BLOCK_PAGES = 128


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("codec", "payload", "fde_params"),
  meta_fields=("fde_config",),
)
@dataclasses.dataclass(frozen=True)
class Candidates:
  """One vector per document, to find candidates by inner product.

  Attributes:
    codec: how the vectors are stored (retrieval/codecs.py).
    payload: the stored vectors, leading axis Nd.
    fde_params: what encodes queries, if the vectors are fixed dimensional
      encodings (retrieval/muvera.py). None where the query vector is given to
      the search, or is the mean of its tokens.
    fde_config: the settings of `fde_params`.
  """

  codec: Any
  payload: dict[str, Any]
  fde_params: Any = None
  fde_config: Any = None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=(
    "codec",
    "payload",
    "first_page",
    "num_pages",
    "num_tokens",
    "page_rank",
    "live",
    "block_start",
    "candidates",
    "word_ids",
  ),
  meta_fields=("page_size", "block_pages", "max_pages", "block_documents"),
)
@dataclasses.dataclass(frozen=True)
class TokenIndex:
  """Encoded documents; made by `build` or `from_payload`.

  Stacked by `stack_shards`, all arrays have a leading axis of shards.

  Attributes:
    codec: how the rows are stored (retrieval/codecs.py).
    payload: the stored rows; the leading axis is pages times `page_size`.
    first_page: first page of each document, int32[Nd].
    num_pages: pages of each document, int32[Nd]; 0 for one without tokens.
    num_tokens: tokens of each document, int32[Nd]; later rows of its last page
      repeat the first.
    page_rank: position of each page within its document, int32[pages].
    live: False for deleted documents, which are never returned, bool[Nd].
    block_start: first document of each block of the exact scan, then Nd.
    candidates: vectors for candidate search, by name.
    page_size: rows of a page.
    block_pages: pages of a block, at least `max_pages`.
    max_pages: pages of the longest document.
    block_documents: documents of the fullest block.
    word_ids: which word each stored row stands for, uint32, where only equal
      words match (ColBERTer); None elsewhere.
  """

  codec: Any
  payload: dict[str, Any]
  first_page: Any
  num_pages: Any
  num_tokens: Any
  page_rank: Any
  live: Any
  block_start: Any
  candidates: dict[str, Candidates]
  page_size: int
  block_pages: int
  max_pages: int
  block_documents: int
  word_ids: Any = None

  @property
  def num_documents(self) -> int:
    """Documents of the index (of one shard, if shards are stacked)."""
    return self.first_page.shape[-1]

  @property
  def num_bytes(self) -> int:
    """Bytes of all arrays: tokens, word ids, tables, candidates and codec."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def build(
  tokens: Any,
  offsets: np.ndarray,
  codec: codecs.Codec | None = None,
  *,
  candidates: dict[str, Candidates] | None = None,
  word_ids: np.ndarray | None = None,
  page_size: int = 16,
) -> TokenIndex:
  """An index of packed documents. Runs on the host, encodes in blocks.

  Args:
    tokens: float rows [T, D] of all documents, back to back.
    offsets: document i owns tokens[offsets[i]:offsets[i + 1]].
    codec: how to store the rows; None for float32.
    candidates: vectors for candidate search, by the name that `search` takes
      as its mode; see `store_vectors`.
    word_ids: uint32[T], which word each row stands for; None where words of
      any kind match.
    page_size: rows of a page. Smaller pages waste less memory on short
      documents, larger ones are gathered faster.

  Returns:
    The index, on the default device.

  Raises:
    ValueError: if the offsets are not ascending from 0 to T, or sizes
      disagree.
    TypeError: if word ids are not uint32.

  Example:
    >>> import numpy as np
    >>> from tokjax.retrieval import token_index
    >>> tokens = np.eye(3, dtype=np.float32)
    >>> index = token_index.build(tokens, np.array([0, 1, 3]))
    >>> index.num_documents, index.num_pages.tolist()
    (2, [1, 1])
  """
  checks.has_rank(2, tokens=tokens)
  if codec is None:
    codec = codecs.FloatCodec(dim=tokens.shape[1])
  payload = codecs.encode_corpus(codec, tokens)
  return from_payload(
    codec,
    payload,
    offsets,
    candidates=candidates,
    word_ids=word_ids,
    page_size=page_size,
  )


def from_payload(
  codec: codecs.Codec,
  payload: dict[str, np.ndarray],
  offsets: np.ndarray,
  *,
  live: np.ndarray | None = None,
  candidates: dict[str, Candidates] | None = None,
  word_ids: np.ndarray | None = None,
  page_size: int = 16,
) -> TokenIndex:
  """An index of rows that a codec has already encoded.

  Args:
    codec: the codec that made the payload.
    payload: its arrays, leading axis T.
    offsets: document i owns rows offsets[i]:offsets[i + 1].
    live: False for documents that must never be returned; None for all True.
    candidates: as in `build`.
    word_ids: as in `build`.
    page_size: as in `build`.

  Returns:
    The index, on the default device.

  Raises:
    ValueError: as `build`.
    TypeError: as `build`.
  """
  offsets = np.asarray(offsets, np.int64)
  checks.has_rank(1, offsets=offsets)
  checks.in_range(1, 1 << 20, page_size=page_size)
  num_rows = next(iter(payload.values())).shape[0]
  lengths = np.diff(offsets)
  if not len(lengths) or offsets[0] or offsets[-1] != num_rows:
    raise ValueError(
      f"offsets must run from 0 to the number of rows {num_rows} over at "
      f"least one document, got {offsets[:1]}..{offsets[-1:]}"
    )
  if (lengths < 0).any():
    raise ValueError("offsets must ascend")
  num_documents = len(lengths)
  candidates = candidates or {}
  for name, found in candidates.items():
    rows = next(iter(found.payload.values())).shape[0]
    checks.same_size(**{"documents": num_documents, f"{name}_rows": rows})
  if live is None:
    live = np.ones(num_documents, bool)
  checks.same_size(documents=num_documents, live=len(live))
  if word_ids is not None:
    checks.same_size(payload_rows=num_rows, word_ids=len(word_ids))
    checks.has_dtype(np.uint32, word_ids=word_ids)

  num_pages = -(-lengths // page_size)
  first_page = np.cumsum(num_pages) - num_pages
  max_pages = max(1, int(num_pages.max()))
  block_pages = max(_BLOCK_PAGES, max_pages)
  block_start = _blocks(num_pages, block_pages)
  document = np.repeat(np.arange(num_documents), num_pages)
  rank = np.arange(len(document)) - first_page[document]
  # Row of each place of each page; past the end of a document, its first row.
  place = rank[:, None] * page_size + np.arange(page_size)
  place = np.where(place < lengths[document][:, None], place, 0)
  rows = (place + offsets[document][:, None]).reshape(-1)
  # A block may start at the last page: then it reads past the end.
  rows = np.pad(rows, (0, block_pages * page_size))

  def stored(x):
    if not num_rows:  # only documents without tokens
      x = np.zeros((1, *x.shape[1:]), x.dtype)
    return jnp.asarray(np.asarray(x)[rows])

  return TokenIndex(
    codec=codec,
    payload={name: stored(x) for name, x in payload.items()},
    first_page=jnp.asarray(first_page, jnp.int32),
    num_pages=jnp.asarray(num_pages, jnp.int32),
    num_tokens=jnp.asarray(lengths, jnp.int32),
    page_rank=jnp.asarray(np.pad(rank, (0, block_pages)), jnp.int32),
    live=jnp.asarray(live, bool),
    block_start=jnp.asarray(block_start, jnp.int32),
    candidates=candidates,
    page_size=page_size,
    block_pages=block_pages,
    max_pages=max_pages,
    block_documents=int(np.diff(block_start).max()),
    word_ids=None if word_ids is None else stored(word_ids),
  )


def store_vectors(
  vectors: Any,
  *,
  name: str = "float32",
  normalize: bool = False,
  fde_params: Any = None,
  fde_config: Any = None,
) -> Candidates:
  """Vectors for candidate search, stored by a codec without training.

  Args:
    vectors: one float vector per document [Nd, F].
    name: "float32", "bfloat16", "float16" or "int8".
    normalize: scale each vector to length one. The mean of a document's unit
      tokens is longer the more alike they are, which has nothing to do with
      a query: on zero-shot tokens, recall is better without that length.
    fde_params: parameters with which `search` encodes queries the same way,
      if the vectors are fixed dimensional encodings.
    fde_config: the settings of `fde_params`.

  Returns:
    What `build` takes in its dict of candidates.

  Raises:
    ValueError: for another codec name.

  Example:
    >>> import numpy as np
    >>> store_vectors(np.eye(2, dtype=np.float32)).codec.dim
    2
  """
  checks.one_of(("float32", "bfloat16", "float16", "int8"), name=name)
  if normalize:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(length > 0, length, 1)
  codec = codecs.train(name, None, vectors)
  block_size = max(1, (1 << 24) // vectors.shape[1])
  payload = codecs.encode_corpus(codec, vectors, block_size=block_size)
  payload = {name: jnp.asarray(x) for name, x in payload.items()}
  return Candidates(
    codec=codec,
    payload=payload,
    fde_params=fde_params,
    fde_config=fde_config,
  )


def mean_vectors(
  tokens: Any, offsets: np.ndarray, *, block_documents: int = 4096
) -> Float[np.ndarray, "Nd D"]:
  """Mean token of each document, scaled to length one; zero without tokens.

  Args:
    tokens: float rows [T, D] of all documents, back to back.
    offsets: document i owns tokens[offsets[i]:offsets[i + 1]].
    block_documents: documents converted to float32 at a time.

  Returns:
    float32 NumPy array.

  Example:
    >>> import numpy as np
    >>> tokens = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], np.float32)
    >>> mean_vectors(tokens, np.array([0, 2, 3])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  offsets = np.asarray(offsets, np.int64)
  means = np.zeros((len(offsets) - 1, tokens.shape[1]), np.float32)
  for start in range(0, len(means), block_documents):
    local = offsets[start : start + block_documents + 1]
    block = np.asarray(tokens[local[0] : local[-1]]).astype(np.float32)
    full = np.flatnonzero(np.diff(local))  # reduceat cannot sum no rows
    if len(full):
      means[start + full] = np.add.reduceat(block, (local - local[0])[full])
  length = np.linalg.norm(means, axis=1, keepdims=True)
  return means / np.where(length > 0, length, 1)


def stack_shards(shards: Sequence[TokenIndex]) -> TokenIndex:
  """Indexes of parts of a corpus as one, with a leading axis of shards.

  Arrays are padded to the largest shard; documents that only pad are not
  `live`. The codec and query encoders must be those of the first shard and
  are repeated. `search_sharded` searches the result.

  Args:
    shards: one index per device, in the order of the documents.

  Returns:
    The stacked index, on the host; `jax.device_put` it with its leading axis
    over the mesh.

  Raises:
    ValueError: if there is no shard, page sizes differ, or only some shards
      have word ids.
  """
  if not shards:
    raise ValueError("shards must hold at least one index, got none")
  first = shards[0]
  for shard in shards:
    checks.same_size(first=first.page_size, shard=shard.page_size)
    if (shard.word_ids is None) != (first.word_ids is None):
      raise ValueError("word_ids must be given of all shards or of none")
  meta = {
    name: max(getattr(shard, name) for shard in shards)
    for name in ("block_pages", "max_pages", "block_documents")
  }
  # Room for the widest block past the last page of every shard.
  extra = meta["block_pages"] * first.page_size

  def stack(path, *leaves):
    names = [getattr(entry, "name", None) for entry in path]
    leaves = [np.asarray(jax.device_get(leaf)) for leaf in leaves]
    if "codec" in names or "fde_params" in names:
      return np.stack([leaves[0]] * len(leaves))
    size = max(leaf.shape[0] for leaf in leaves)
    if names[0] in ("payload", "word_ids"):
      size += extra
    elif names[0] == "page_rank":
      size += meta["block_pages"]
    # The last block of a shorter shard repeats as blocks without documents.
    mode = "edge" if names[0] == "block_start" else "constant"
    pads = [
      [(0, size - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1)
      for leaf in leaves
    ]
    return np.stack(
      [np.pad(leaf, pad, mode) for leaf, pad in zip(leaves, pads, strict=True)]
    )

  same = [dataclasses.replace(shard, **meta) for shard in shards]
  return jax.tree_util.tree_map_with_path(stack, *same)


def _blocks(num_pages, block_pages):
  """First document of each block of whole documents; the end at last."""
  starts, used = [0], 0
  # A block of documents without pages must not grow for ever either.
  for document, pages in enumerate(num_pages):
    if used + pages > block_pages or document - starts[-1] >= block_pages:
      starts.append(document)
      used = 0
    used += pages
  return np.array([*starts, len(num_pages)], np.int64)
