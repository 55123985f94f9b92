"""Hidden states of frozen lower blocks, computed once for a whole corpus.

Training the upper blocks of an encoder, or its head alone, reads the same
hidden states of the blocks below at every step. `compute` encodes each text
once, `attach` adds what a batch needs, `encode` turns them into the token
vectors of a corpus by the trained part alone.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from tokjax.models import bert
from tokjax.ops import pooling, similarity
from tokjax.retrieval import colbert, length_batches
from tokjax.train import late_interaction
from tokjax.typing import Array, Float

__all__ = ["Features", "attach", "compute", "encode"]


class Features(NamedTuple):
  """Hidden states of texts, back to back.

  Attributes:
    hidden: of every token, special tokens included, float16.
    offsets: text i owns hidden[offsets[i]:offsets[i + 1]].
  """

  hidden: np.ndarray  # [T, h]
  offsets: np.ndarray  # int64 [n + 1]


def compute(
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  lower: bert.Bert,
  *,
  length: int,
  marker: str | None = None,
  progress: bool = True,
) -> Features:
  """Encodes texts by the frozen blocks, without [MASK] padding.

  Args:
    texts: one string per row.
    tokenizer: as in `colbert.tokenize`.
    lower: from `bert.split`.
    length: most tokens of a text, as in the config of the batches.
    marker: as in the config of the batches.
    progress: show a progress bar.

  Returns:
    The hidden states, on the host.

  Raises:
    ValueError: as `colbert.tokenize`.
  """
  config = dataclasses.replace(
    colbert.ColbertConfig.zero_shot(length),
    document_marker=marker,
    normalize=False,
  )
  found = colbert.encode_documents(
    texts, tokenizer, lower, None, config, progress=progress
  )
  return Features(found.tokens.astype(np.float16), found.offsets)


def attach(
  batches: grain.MapDataset, queries: Features, documents: Features
) -> grain.MapDataset:
  """Adds `query_hidden` and `document_hidden` to the batches.

  Args:
    batches: from `tokjax.data.batches.build`, of the same texts and lengths.
    queries: of the query texts of the training set.
    documents: of its document texts.

  Returns:
    Batches with float16 hidden states, zero after the end of a text.
  """

  def add(batch):
    return {
      **batch,
      "query_hidden": _padded(
        queries, batch["query_index"], batch["query_mask"]
      ),
      "document_hidden": _padded(
        documents, batch["document_index"], batch["document_mask"]
      ),
    }

  return batches.map(add)


def encode(
  features: Features,
  model: late_interaction.LateInteraction,
  *,
  normalize: bool = True,
  bucket: int = 32,
  batch_tokens: int = 8192,
) -> colbert.Documents:
  """Token vectors of stored texts, by the trained blocks and head.

  What `colbert.encode_documents` gives for the whole encoder if every token
  is scored, up to the rounding of the hidden states.

  Args:
    features: the texts.
    model: upper blocks and head.
    normalize: scale token vectors to unit length.
    bucket: granularity of padded lengths.
    batch_tokens: padded tokens per batch.

  Returns:
    Packed token vectors; `pooled` is the mean hidden state, as there.
  """
  offsets = features.offsets
  rows = [
    np.arange(start, end, dtype=np.int32)
    for start, end in zip(offsets[:-1], offsets[1:], strict=True)
  ]
  function = functools.partial(_encode, normalize=normalize)
  tokens, pooled = None, None
  for members, result in length_batches.run(
    function,
    (model, jnp.asarray(features.hidden)),
    rows,
    bucket=bucket,
    batch_tokens=batch_tokens,
    max_length=int(np.diff(offsets).max(initial=1)),
  ):
    if tokens is None:
      width = result.tokens.shape[-1]
      tokens = np.empty((offsets[-1], width), result.tokens.dtype)
      pooled = np.empty((len(rows), result.pooled.shape[-1]), np.float32)
    for row, i in enumerate(members):
      count = len(rows[i])
      tokens[offsets[i] : offsets[i + 1]] = result.tokens[row][:count]
    pooled[members] = result.pooled
  return colbert.Documents(tokens, offsets, pooled)


@functools.partial(jax.jit, static_argnames="normalize")
def _encode(weights, rows, lengths, *, normalize):
  model, hidden = weights
  mask = jnp.arange(rows.shape[1])[None] < lengths[:, None]
  x = model.encoder(hidden[rows], mask)
  pooled = pooling.mean_pool(x.astype(jnp.float32), mask)
  return _Encoded(
    colbert.encode_head(model.head, x, mask, normalize=normalize),
    similarity.safe_normalize(pooled),
  )


class _Encoded(NamedTuple):
  tokens: Float[Array, "R N D"]
  pooled: Float[Array, "R h"]


def _padded(features: Features, rows: np.ndarray, mask: np.ndarray) -> Any:
  """Hidden states of some texts where the mask is True, [..., N, h]."""
  place = features.offsets[rows][..., None] + np.arange(mask.shape[-1])
  place = np.where(mask, place, 0)
  return np.where(mask[..., None], features.hidden[place], np.float16(0))
