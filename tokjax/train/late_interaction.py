"""Training of late interaction: ColBERT, XTR, CRISP and ColBERTer.

A model is an encoder and a head; the method decides what their token vectors
are compared by. `make_loss` gives the loss that `tokjax.train.loop` takes:

    model = LateInteraction(checkpoint.encoder, head)
    loss_fn = make_loss(Objective(method="crisp", clusters=crisp_config), rules)
    loop.train(model, loss_fn, iter(batches.build(...)), config, key=key)

The loss is written for the whole batch; on a mesh every device scores its own
queries against the documents of all (`shard_map`), in parts where there are
many, and value and gradient are those of one device.

Where the lower blocks of the encoder are frozen, their hidden states are
computed once (`tokjax.train.features`), come with the batch, and the encoder
of the model is `bert.Layers`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx

from tokjax import checks
from tokjax.kernels import maxsim
from tokjax.parallel import meshes
from tokjax.retrieval import colbert, colberter, crisp, losses, masks, xtr
from tokjax.train import step as steps
from tokjax.typing import Array, Bool, Float, Key

__all__ = [
  "METHODS",
  "LateInteraction",
  "Objective",
  "TextRules",
  "TokenSets",
  "make_loss",
  "text_rules",
]

METHODS = ("colbert", "xtr", "crisp", "colberter")

Batch = Mapping[str, Any]

# Token vectors of other devices that one holds at a time while it scores.
_GATHERED_BYTES = 512 << 20


@dataclasses.dataclass(unsafe_hash=True)
class Objective:
  """What a batch is trained by.

  The loss is in-batch cross-entropy of scores / temperature, plus
  `distill_weight` times the divergence from the teacher's scores where the
  batch has them. ColBERTer with a teacher has Margin-MSE instead, as
  published; without one its two scores share the cross-entropy (ours).
  """

  method: Literal["colbert", "xtr", "crisp", "colberter"] = "colbert"
  # Divides scores. Sums over 32 cosines are ColBERT's logits as they are, while
  # the means of XTR lie in -1..1: the paper names no temperature.
  temperature: float = 1.0
  own_negatives: bool = True  # see `losses.in_batch_cross_entropy`
  k_train: int = 256  # XTR: tokens each query token retrieves from the batch
  clusters: crisp.CrispConfig | None = None  # CRISP: how many means
  distill_weight: float = 1.0  # of the teacher's list, for batches with one
  distill_temperature: float = 1.0  # of both lists
  # What each encoder block keeps for the backward pass, of `step.REMAT`; it
  # computes the rest once more. None keeps all.
  remat_encoder: str | None = None
  # Parts that the documents of each query are encoded in, one after the other,
  # where `remat_encoder` needs too much for one block. Gradients of the parts
  # are added in the dtype of the computation.
  encode_parts: int = 1


class TextRules(NamedTuple):
  """What of a `ColbertConfig` matters once texts are ids; hashable.

  Attributes:
    mask_id: what queries are padded with; None for no padding.
    attend: whether tokens attend to that padding.
    skip: ids of document tokens that are not scored.
    normalize: whether token vectors have unit length.
  """

  mask_id: int | None
  attend: bool
  skip: tuple[int, ...]
  normalize: bool


class TokenSets(NamedTuple):
  """Token vectors of the texts of a batch.

  Attributes:
    tokens: zero where the mask is False.
    mask: True where a token is scored.
  """

  tokens: Float[Array, "*batch N D"]
  mask: Bool[Array, "*batch N"]


class LateInteraction(nnx.Module):
  """An encoder and a head, the parameters that are trained together.

  Attributes:
    encoder: `bert.Bert`, or `bert.Layers` for batches with hidden states.
    head: what `colbert.encode_head` takes, or a `colberter.ColberterHead`.
  """

  def __init__(self, encoder: nnx.Module, head: nnx.Module):
    self.encoder = encoder
    self.head = head


def text_rules(
  config: colbert.ColbertConfig, tokenizer: tokenizers.Tokenizer
) -> TextRules:
  """Looks up the words of a config.

  Args:
    config: how texts become scored tokens; special tokens must be scored.
    tokenizer: has the vocabulary.

  Returns:
    The rules.

  Raises:
    ValueError: if the mask token is not in the vocabulary, or special tokens
      are not scored.

  Example:
    >>> model = tokenizers.models.WordLevel({"[UNK]": 0, ".": 1}, "[UNK]")
    >>> config = dataclasses.replace(
    ...   colbert.ColbertConfig.zero_shot(), skip_words=(".",))
    >>> text_rules(config, tokenizers.Tokenizer(model)).skip
    (1,)
  """
  checks.one_of((True,), score_specials=config.score_specials)
  mask_id = None
  if config.expand_queries:
    mask_id = tokenizer.token_to_id(config.mask_token)
    if mask_id is None:
      raise ValueError(
        f"mask_token {config.mask_token!r} is not in the vocabulary"
      )
  skip = masks.skip_ids(tokenizer, config.skip_words)
  return TextRules(
    mask_id, config.attend_to_expansion, tuple(skip.tolist()), config.normalize
  )


def make_loss(
  objective: Objective, rules: TextRules
) -> Callable[
  [LateInteraction, Batch, Key[Array, ""] | None],
  tuple[Array, dict[str, Array]],
]:
  """The loss of a batch of `tokjax.data.batches`.

  The batch holds `query_ids`, `query_mask` [B, Q], `document_ids`,
  `document_mask` [B, n, N] with the positive first, `false_negative`
  [B, B n], maybe `teacher` [B, n], for ColBERTer `query_words` and
  `document_words`, and for `bert.Layers` also `query_hidden` [B, Q, h] and
  `document_hidden` [B, n, N, h].

  Args:
    objective: method and settings.
    rules: from `text_rules`.

  Returns:
    `loss_fn(model, batch, key) -> (loss, metrics)`: float32 scalars, means
    over the queries of the batch; `accuracy` is the share of queries whose
    positive scores highest. A key turns dropout on.

    The loss raises ValueError when it is traced for a microbatch
    (`step.make_step`), as most of its negatives would be missing.

  Raises:
    ValueError: if CRISP has no config, or settings are out of range.
  """
  checks.one_of(METHODS, method=objective.method)
  checks.in_range(1, 1 << 31, k_train=objective.k_train)
  checks.in_range(1e-6, 1e6, temperature=objective.temperature)
  checks.in_range(1, 1 << 31, encode_parts=objective.encode_parts)
  steps.remat_policy(objective.remat_encoder)
  if objective.method == "crisp" and objective.clusters is None:
    raise ValueError("clusters must be given for method 'crisp', got None")
  loss = _colberter_loss if objective.method == "colberter" else _token_loss

  def loss_fn(model, batch, key=None):
    _check_whole(batch)
    return loss(objective, rules, model, batch, key)

  return loss_fn


def _check_whole(batch):
  """Raises unless the documents of all queries are there."""
  num_queries, num_documents = batch["document_ids"].shape[:2]
  want = (num_queries, num_queries * num_documents)
  if batch["false_negative"].shape != want:
    raise ValueError(
      f"false_negative must have shape {want}, got "
      f"{batch['false_negative'].shape}: the documents of the whole batch are "
      "negatives of each query, and a microbatch has few of them. Set "
      "num_microbatches to 1 and save memory by objective.remat_encoder, or "
      "by tokjax.train.gradient_cache in a loss of your own"
    )


def _token_loss(objective, rules, model, batch, key):
  queries, documents = _encode(objective, rules, model, batch, key)
  if objective.method == "crisp":  # each device its own, before any exchange
    queries = _means(crisp.cluster_queries(*queries, objective.clusters))
    documents = _means(crisp.cluster_documents(*documents, objective.clusters))

  def score(queries, documents):
    arrays = (queries.tokens, documents.tokens, queries.mask, documents.mask)
    if objective.method == "xtr":
      return xtr.train_scores(*arrays, k_train=objective.k_train)
    return maxsim.maxsim(*arrays)

  # XTR retrieves from the documents of the whole batch together.
  score = _over_devices(score, by_document=objective.method != "xtr")
  scores = score(queries, documents) / objective.temperature
  loss = _contrastive(objective, scores, batch)
  metrics = {"accuracy": _accuracy(scores, batch)}
  if "teacher" in batch:
    distilled = losses.kl_distillation(
      _own(scores, batch) * objective.temperature,
      batch["teacher"],
      temperature=objective.distill_temperature,
    )
    metrics |= {"contrastive": loss, "distilled": distilled}
    loss = loss + objective.distill_weight * distilled
  return loss, metrics


def _colberter_loss(objective, rules, model, batch, key):
  head = model.head
  num_documents = batch["document_ids"].shape[1]  # n
  query_key, document_key = _keys(key)
  ids, attention, words = (
    _flat(batch[name])
    for name in ("document_ids", "document_mask", "document_words")
  )
  hidden = _hidden(objective, model, batch, "document", ids, attention,
                   document_key)  # fmt: skip
  documents = head.passages(hidden, attention, words, _unique(words))
  hidden = _hidden(objective, model, batch, "query", batch["query_ids"],
                   batch["query_mask"], query_key)  # fmt: skip
  words = batch["query_words"]
  queries = head.queries(hidden, batch["query_mask"], words, _unique(words))

  def score(queries, documents, fusion):
    ids = ()
    if head.config.exact_match:
      ids = (queries.word_ids, documents.word_ids)
    return colberter.score(
      queries.cls, queries.words, queries.mask, documents.cls, documents.words,
      documents.mask, fusion, *ids,
    )  # fmt: skip

  found = _over_devices(score)(queries, documents, head.fusion[...])
  sparsity = jnp.zeros(())
  by_list = [  # [B, n, W]
    x.reshape(-1, num_documents, x.shape[-1])
    for x in (documents.gates, documents.mask)
  ]
  if head.config.gates:
    gates, mask = by_list
    sparsity = colberter.gate_sparsity(gates[:, :1], mask[:, :1])
    sparsity += colberter.gate_sparsity(gates[:, 1:], mask[:, 1:])
  if "teacher" in batch:
    pairs = colberter.Scores(*(_own(x, batch) for x in found))
    parts = colberter.loss(
      pairs, batch["teacher"], *by_list,
      cls_weight=head.config.cls_weight,
      sparsity_weight=head.config.sparsity_weight,
    )  # fmt: skip
    loss, fused, cls = parts.total, parts.fused, parts.cls
  else:
    fused, cls = (
      _contrastive(objective, x / objective.temperature, batch)
      for x in (found.scores, found.cls_scores)
    )
    loss = fused + head.config.cls_weight * cls
    loss += head.config.sparsity_weight * sparsity
  return loss, {
    "accuracy": _accuracy(found.scores, batch),
    "fused": fused,
    "cls": cls,
    "gates": sparsity,
  }


def _encode(objective, rules, model, batch, key):
  """Token sets of the queries [B] and of all documents [B n]."""
  query_key, document_key = _keys(key)
  ids, attention = batch["query_ids"], batch["query_mask"]
  scored = attention
  if rules.mask_id is not None:
    if "query_hidden" in batch:
      raise ValueError(
        "query_hidden holds no [MASK] padding: rules.mask_id must be None, got "
        f"{rules.mask_id}"
      )
    ids, attention, scored = masks.expand_queries(
      ids, attention, mask_id=rules.mask_id, length=ids.shape[1],
      attend=rules.attend,
    )  # fmt: skip
  hidden = _hidden(objective, model, batch, "query", ids, attention, query_key)
  queries = _tokens(rules, model, hidden, scored)
  ids, attention = _flat(batch["document_ids"]), _flat(batch["document_mask"])
  skip = jnp.asarray(rules.skip, jnp.int32)
  scored = masks.scoring_mask_document(ids, attention, skip)
  hidden = _hidden(
    objective, model, batch, "document", ids, attention, document_key
  )
  return queries, _tokens(rules, model, hidden, scored)


def _hidden(objective, model, batch, side, ids, attention, key):
  given = batch.get(f"{side}_hidden")
  inputs = ids if given is None else given.reshape(*ids.shape, -1)
  policy = steps.remat_policy(objective.remat_encoder)

  def encode(inputs, attention, key):
    return model.encoder(inputs, attention, key=key, remat=policy)

  parts = objective.encode_parts if side == "document" else 1
  if parts == 1:
    return encode(inputs, attention, key)
  num_queries, num_documents = batch["document_ids"].shape[:2]
  checks.divisible(parts, documents_of_a_query=num_documents)

  def cut(x):  # [B n, ...] -> [parts, B n / parts, ...]
    x = x.reshape(num_queries, parts, -1, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0).reshape(parts, -1, *x.shape[3:])

  def join(x):  # the inverse
    x = x.reshape(parts, num_queries, -1, *x.shape[2:])
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])

  keys = None if key is None else jax.random.split(key, parts)
  rows = (cut(inputs), cut(attention), keys)
  return join(jax.lax.map(lambda row: encode(*row), rows))


def _tokens(rules, model, hidden, scored):
  tokens = colbert.encode_head(
    model.head, hidden, scored, normalize=rules.normalize
  )
  return TokenSets(tokens, scored)


def _over_devices(score, *, by_document=True):
  """Local queries against the documents of all devices, on any mesh.

  Where a score is of its document alone, more documents than fit into
  `_GATHERED_BYTES` come in parts, one after the other, and in the backward pass
  once more. Further arguments are whole on every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(a for a in meshes.BATCH_AXES if mesh.shape.get(a, 1) > 1)
  if not axes:
    return score
  num_devices = math.prod(mesh.shape[axis] for axis in axes)

  def local(queries, documents, *rest):
    def score_part(part):
      def gather(x):
        return jax.lax.all_gather(x, axes, tiled=True)

      return score(queries, jax.tree.map(gather, part), *rest)

    num_parts = _num_parts(documents, num_devices) if by_document else 1
    if num_parts == 1:
      return score_part(documents)

    def join(x):  # [parts, b, devices m / parts] -> [b, devices m]
      x = x.reshape(*x.shape[:2], num_devices, -1).transpose(1, 2, 0, 3)
      return x.reshape(x.shape[0], -1)

    parts = jax.tree.map(
      lambda x: x.reshape(num_parts, -1, *x.shape[1:]), documents
    )
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(score_part), parts))

  def over_devices(queries, documents, *rest):
    rows, whole = jax.P(axes), jax.P()
    specs = (rows, rows, *[whole] * len(rest))
    function = jax.shard_map(local, in_specs=specs, out_specs=rows)
    return function(queries, documents, *rest)

  return over_devices


def _num_parts(documents, num_devices):
  """The fewest equal parts of the documents of each device that fit."""
  leaves = jax.tree.leaves(documents)
  size, num_documents = sum(x.nbytes for x in leaves), leaves[0].shape[0]
  fits = (
    parts
    for parts in range(1, num_documents + 1)
    if num_documents % parts == 0
    and size * num_devices <= parts * _GATHERED_BYTES
  )
  return next(fits, num_documents)


def _contrastive(objective, scores, batch):
  return losses.in_batch_cross_entropy(
    scores, ~batch["false_negative"], own_negatives=objective.own_negatives
  )


def _accuracy(scores, batch):
  """Share of queries that score no candidate above their positive."""
  scores = jnp.where(batch["false_negative"], -jnp.inf, scores)
  positive = _own(scores, batch)[:, 0]
  return jnp.mean(positive >= jnp.max(scores, axis=1), dtype=jnp.float32)


def _own(scores, batch):
  """Each query's scores of its own documents: [B, B n] -> [B, n]."""
  num_queries, num_documents = batch["document_ids"].shape[:2]
  query = jnp.arange(num_queries, dtype=jnp.int32)[:, None]
  column = jnp.arange(num_documents, dtype=jnp.int32)[None, :]
  column = query * num_documents + column
  return jnp.take_along_axis(scores, column, axis=1)


def _means(clusters):
  return TokenSets(clusters.means, clusters.mask)


def _unique(words):
  """Each word of a row once, ascending, 0 in the slots that are left."""
  ordered = jnp.sort(words, axis=1)
  repeats = jnp.pad(ordered[:, 1:] == ordered[:, :-1], ((0, 0), (1, 0)))
  return jnp.where(repeats, 0, ordered)


def _flat(x):
  """[B, n, ...] -> [B n, ...]."""
  return x.reshape(-1, *x.shape[2:])


def _keys(key):
  return (None, None) if key is None else jax.random.split(key)
