"""What sparse attention finds in the queries and keys of a trained encoder.

MiniLM, a BERT, reads long documents; queries and keys of all its blocks and
heads are taken as they are and read causally, which the encoder was not trained
to do. Every choice of keys is set, once for all heads, so that as many pairs
are read, and is judged by the share of the mass of causal attention on them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.benchmarks import attention_choices
from tokjax.benchmarks.trained_vit import Row
from tokjax.data import beir
from tokjax.models import bert, checkpoints
from tokjax.models.bert import Bert
from tokjax.sparse.anchor_attention import (
  AnchorConfig,
  anchor_attention,
  recall,
)
from tokjax.typing import Array, Float, Int

__all__ = ["EncoderAttentionRun", "claimed", "lead", "queries_and_keys"]


@dataclasses.dataclass(frozen=True)
class EncoderAttentionRun:
  """One share of the pairs to be read."""

  dataset: str  # folder of documents
  kept: float  # share of the pairs of causal attention
  checkpoint: str = "all-MiniLM-L6-v2"
  num_documents: int = 8  # the first that are long enough
  num_tokens: int = 512  # of each, from its start
  block: int = 8  # of rows and keys
  step: int = 4  # blocks that AnchorAttention lets choose together


def queries_and_keys(
  encoder: Bert, ids: Int[Array, "B N"]
) -> tuple[Float[Array, "B L H N d"], Float[Array, "B L H N d"]]:
  """Of all blocks and heads of an encoder that reads whole documents.

  Args:
    encoder: any BERT.
    ids: tokens, none of them padding.

  Returns:
    Queries and keys, as the blocks have them.

  Example:
    >>> from flax import nnx
    >>> config = bert.BertConfig(vocab_size=9, width=8, num_layers=2,
    ...                          num_heads=2, mlp_width=8, max_positions=4)
    >>> encoder = jax.jit(lambda: Bert(config, rngs=nnx.Rngs(0)))()
    >>> q, k = jax.jit(queries_and_keys)(encoder, jnp.array([[3, 1, 4]]))
    >>> q.shape, k.shape
    ((1, 2, 2, 3, 4), (1, 2, 2, 3, 4))
  """
  config = encoder.config
  found = []
  for number in range(config.num_layers):
    lower, upper = bert.split(encoder, number)
    block = jax.tree.map(lambda x: x[0], upper.blocks)
    qkv = block.qkv(lower(ids))
    qkv = qkv.reshape(*ids.shape, 3, config.num_heads, -1)
    found.append(jnp.moveaxis(qkv[:, :, :2], (2, 3), (0, 2)))  # [2, B, H, N, d]
  q, k = jnp.stack(found, axis=2)
  return q, k


def claimed(
  run: EncoderAttentionRun, *, progress: bool = True
) -> dict[str, Row]:
  """Recall of each choice at the same number of pairs.

  Args:
    run: the settings.
    progress: print a row when it is there.

  Returns:
    Rows "anchor", "streaming", "block top-k" and "vertical-slash": mean
    "recall" over heads, that of the "worst tenth" of heads, the share of the
    pairs "kept", and the "setting" that was searched for, theta or the share
    asked for.

  Raises:
    ValueError: if there are fewer documents of that length.
  """
  checkpoint = checkpoints.load(run.checkpoint)
  ids = _long(run, checkpoint.tokenizer)
  q, k = jax.jit(queries_and_keys)(checkpoint.encoder, ids)
  q, k = (x.reshape(-1, *x.shape[2:]) for x in (q, k))  # [B L, H, N, d]
  rows = {}
  for name, (choose, low, high) in _choices(run).items():
    choose = jax.jit(choose)
    setting = attention_choices.setting_of(
      lambda x, choose=choose: choose(x, q, k)[1],
      run.kept,
      low,
      high,
      halvings=10,
    )
    mass, pairs = (np.ravel(x) for x in choose(setting, q, k))
    tenth = np.sort(mass)[: max(1, len(mass) // 10)]
    rows[name] = Row({
      "recall": float(mass.mean()),
      "worst tenth": float(tenth.mean()),
      "kept": float(pairs.mean()),
      "setting": setting,
    })  # fmt: skip
    if progress:
      print(name, rows[name].metrics, flush=True)
  return rows


def lead(rows: Mapping[str, Row]) -> float:
  """How far the recall of AnchorAttention is above that of the best other.

  Args:
    rows: of `claimed`.

  Example:
    >>> recalls = {"anchor": 0.75, "streaming": 0.5}
    >>> lead({name: Row({"recall": x}) for name, x in recalls.items()})
    0.25
  """
  best = max(row.metrics["recall"] for x, row in rows.items() if x != "anchor")
  return rows["anchor"].metrics["recall"] - best


def _long(run, tokenizer) -> Int[Array, "B N"]:
  """The first tokens of documents that have as many, [CLS] in front."""
  texts: Sequence[str] = beir.load(run.dataset).document_texts
  found = []
  for start in range(0, len(texts), 1000):
    encoded = tokenizer.encode_batch_fast(texts[start : start + 1000])
    found += [x.ids for x in encoded if len(x.ids) > run.num_tokens]
    if len(found) >= run.num_documents:
      break
  checks.in_range(0, len(found), num_documents=run.num_documents)
  found = [ids[: run.num_tokens] for ids in found[: run.num_documents]]
  return jnp.asarray(found, jnp.int32)


def _choices(run):
  """By name: mass and pairs of heads from (setting, q, k); range of settings.

  A larger setting reads more.
  """

  def anchor(theta, q, k):
    config = AnchorConfig(run.block, run.step, theta, run.num_tokens)
    read, stats = anchor_attention(q, k, k, config)
    return recall(read.lse, q, k), stats.kept_fraction

  def each(make: Callable, kept, q, k):
    def head(arrays):
      choose = make(*arrays, kept, run.block)
      return attention_choices.recall_of(choose, *arrays, run.block)

    return jax.lax.map(head, [x.reshape(-1, *x.shape[2:]) for x in (q, k)])

  def streaming(q, k, kept, block):
    del k
    return attention_choices.streaming(kept, q.shape[0], block)

  others = {
    "streaming": streaming,
    "block top-k": attention_choices.block_top_k,
    "vertical-slash": attention_choices.vertical_slash,
  }
  return {"anchor": (anchor, -20.0, 40.0)} | {
    name: (functools.partial(each, make), 0.0, 1.0)
    for name, make in others.items()
  }
