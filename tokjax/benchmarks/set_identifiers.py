"""Sets of vectors against single vectors and sequences of codes, trained here.

SETRec with both kinds of tokens, with the collaborative one only, with the
semantic ones only, and codes emitted one after the other by a transformer of
the same sizes, on the same histories. Text is there in `pyapi`, embedded by
all-MiniLM-L6-v2; where there are only ids, the features are co-occurrences
(`tokjax.data.cooccurrence`), which know nothing of a cold item.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.benchmarks import sequential_identifiers as sequential
from tokjax.benchmarks import timing
from tokjax.benchmarks.trained_vit import Row
from tokjax.data import cooccurrence, interactions, pyapi
from tokjax.eval import ranking
from tokjax.models import checkpoints
from tokjax.ops import item_sets
from tokjax.retrieval import colbert
from tokjax.tokenizers import sasrec, setrec
from tokjax.train import loop
from tokjax.train.optimizer import OptimizerConfig

__all__ = ["METHODS", "SetRun", "claimed", "lead"]

METHODS = ("setrec", "cf_only", "semantic_only", "sequential")
_BETAS = tuple(i / 10 for i in range(11))
_K = 10
_READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class SetRun:
  """One data set and how long all are trained on it."""

  dataset: str  # "pyapi", or a folder of sequences
  seed: int = 0
  cold_ratio: float = 0.1  # share of items held out of training
  num_users: int = 0  # only the first so many; 0: all
  history: int = 10  # items read
  num_semantic: int = 3
  hidden: tuple[int, ...] = (128,)  # of the auto-encoder
  width: int = 64
  num_layers: int = 2
  batch_size: int = 128
  sasrec_steps: int = 400
  num_steps: int = 500  # of each of the four
  learning_rate: float = 2e-3
  num_codes: int = 32  # of each table of the sequential identifiers
  beam_size: int = 10
  timed_users: int = 64  # in one call


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
  """Everything the four are given."""

  split: interactions.Split
  known: np.ndarray  # bool [m], stands in the training part
  cf: jax.Array
  features: jax.Array


def claimed(run: SetRun, *, progress: bool = True) -> dict[str, Row]:
  """Trains and tests the four.

  Args:
    run: the settings.
    progress: print each training's lines.

  Returns:
    {method: Row}: recall and nDCG at 10 over all test users among all items,
    over those whose target is warm among warm items, and cold among cold, as
    the published code has it; milliseconds for a user.
  """
  task = _task(run, progress)
  rows, timed = {}, {}
  for name in METHODS:
    train = _sequential if name == "sequential" else _setrec
    rank, notes = train(run, task, name, progress)
    metrics = _metrics(rank, task)
    timed[name] = functools.partial(
      rank, task.split.history, slice(run.timed_users), None
    )
    rows[name] = Row({**metrics, **notes})
  for name, times in timing.compare(timed, repeats=10).items():
    rows[name].metrics["ms/user"] = 1e3 * times["median_s"] / run.timed_users
  return rows


def lead(rows: Mapping[str, Row], *, metrics: tuple[str, ...]) -> float:
  """How far SETRec is ahead of the best other, where it is least ahead.

  Args:
    rows: of `claimed`.
    metrics: what is compared.

  Example:
    >>> rows = {"setrec": Row({"R": 0.5}), "cf_only": Row({"R": 0.25})}
    >>> lead(rows, metrics=("R",))
    0.25
  """
  others = [row for name, row in rows.items() if name != "setrec"]
  return min(
    rows["setrec"].metrics[x] - max(row.metrics[x] for row in others)
    for x in metrics
  )


def _task(run, progress):
  if run.dataset == "pyapi":
    data = pyapi.load(min_files=3)
  else:
    data = interactions.load(run.dataset)
  if run.num_users:
    data = _first(data, run.num_users)
  split = interactions.leave_one_out(
    data, cold_ratio=run.cold_ratio, seed=run.seed
  )
  known = np.bincount(split.train.items, minlength=data.num_items) > 0
  if data.texts is None:
    features = cooccurrence.features(split.train, dim=64)
  else:
    features = _embedded(data.texts)
  features = (features - features.mean(0)) / features.std()
  config = sasrec.SasrecConfig(data.num_items, history=run.history)
  batches = interactions.next_items(
    split.train, batch_size=run.batch_size, seed=run.seed, length=run.history
  )

  def loss_fn(model, batch, key):
    loss = sasrec.next_item_loss(
      model, batch["history"], batch["target"], jnp.asarray(known), key=key
    )
    return loss, {}

  model = _trained(run, config, batches, loss_fn, run.sasrec_steps, progress)
  cf = model.item_embeddings(jnp.asarray(known))
  return _Task(split, known, cf / jnp.std(cf[known]), jnp.asarray(features))


def _first(data, num_users):
  """The first users, and only the items that they chose."""
  sequences = [
    data.items[data.starts[user] : data.starts[user + 1]]
    for user in range(min(num_users, data.num_users))
  ]
  used = np.unique(np.concatenate(sequences))
  texts = data.texts and [data.texts[item] for item in used]
  return interactions.from_sequences(
    [np.searchsorted(used, items) for items in sequences],
    num_items=len(used),
    texts=texts,
  )


def _embedded(texts):
  """Mean MiniLM states of the texts, of length one."""
  checkpoint = checkpoints.load("all-MiniLM-L6-v2")
  found = colbert.encode_documents(
    texts,
    checkpoint.tokenizer,
    checkpoint.encoder,
    None,
    dataclasses.replace(checkpoint.config, document_length=64),
    progress=False,
  ).pooled
  return found / np.linalg.norm(found, axis=1, keepdims=True)


def _trained(run, config, batches, loss_fn, num_steps, progress):
  optimizer = OptimizerConfig(
    learning_rate=run.learning_rate,
    warmup_steps=min(50, num_steps // 10),
    weight_decay=0.01,
  )
  model_key, key = jax.random.split(jax.random.key(run.seed))
  trained = loop.train(
    jax.jit(lambda: config.build(nnx.Rngs(model_key)))(),
    loss_fn,
    iter(batches.to_iter_dataset(_READING)),
    loop.TrainConfig(
      num_steps, optimizer, log_every=num_steps // 4 if progress else 0
    ),
    key=key,
  )
  return trained.state.model


def _batches(run, task):
  return interactions.targets(
    task.split.train,
    batch_size=run.batch_size,
    seed=run.seed,
    length=run.history,
  )


def _setrec(run, task, name, progress):
  """A ranking function of a trained model, and the beta it found."""
  config = setrec.SetRecConfig(
    cf_dim=0 if name == "semantic_only" else task.cf.shape[1],
    feature_dim=task.features.shape[1],
    num_semantic=0 if name == "cf_only" else run.num_semantic,
    hidden=run.hidden,
    width=run.width,
    num_layers=run.num_layers,
    history=run.history,
  )
  cf = task.cf if config.cf_dim else None
  features = task.features if config.num_semantic else None
  known = jnp.asarray(task.known)

  def loss_fn(model, batch, key):
    del key
    losses = model.losses(
      cf, features, batch["history"], batch["target"], known
    )
    return sum(losses), losses._asdict()

  model = _trained(
    run, config, _batches(run, task), loss_fn, run.num_steps, progress
  )
  catalogue = jax.jit(lambda model: model.catalogue(cf, features))(model)

  @jax.jit
  def search(history, mask, weights):
    answers = model(model.histories(catalogue, history), history >= 0)
    return item_sets.set_top_k(
      answers, catalogue, weights, k=_K, mask=mask
    ).index

  def rank(beta, data, users, mask):
    mask = np.ones(data.num_items, bool) if mask is None else mask
    history = interactions.last_items(data, length=run.history)[users]
    weights = setrec.set_weights(config, beta)
    return _in_parts(
      lambda part: search(part, mask, weights), history, run.timed_users
    )

  if name != "setrec":
    return functools.partial(rank, 0.5), {}
  recalls = [
    _recall(functools.partial(rank, beta), task.split) for beta in _BETAS
  ]
  beta = _BETAS[int(np.argmax(recalls))]
  return functools.partial(rank, beta), {"beta": beta}


def _sequential(run, task, name, progress):
  """A ranking function of the trained baseline."""
  del name
  codes = sequential.item_codes(
    np.asarray(task.features),
    num_codes=run.num_codes,
    num_places=run.num_semantic + 1,  # as many as SETRec has tokens
    seed=run.seed,
  )
  config = sequential.SequentialConfig(
    max(run.num_codes, int(codes.max()) + 1),
    codes.shape[1],
    run.width,
    run.num_layers,
    history=run.history,
  )
  table = jnp.asarray(codes)

  def loss_fn(model, batch, key):
    del key
    return model.loss(table, batch["history"], batch["target"]), {}

  model = _trained(
    run, config, _batches(run, task), loss_fn, run.num_steps, progress
  )

  @jax.jit
  def search(history, tree):
    return model.generate(table, history, tree, beam_size=run.beam_size)

  @functools.cache
  def tree_of(mask):
    mask = np.frombuffer(mask, bool)
    return sequential.trie(codes, mask, num_codes=config.num_codes)

  def rank(data, users, mask):
    mask = np.ones(data.num_items, bool) if mask is None else mask
    history = interactions.last_items(data, length=run.history)[users]
    tree = tree_of(mask.tobytes())
    return _in_parts(lambda part: search(part, tree), history, run.timed_users)

  return rank, {}


def _in_parts(search, history, size):
  """Of rows of one number each, so that one program serves all."""
  found = []
  for start in range(0, len(history), size):
    part = history[start : start + size]
    padded = np.pad(part, ((0, size - len(part)), (0, 0)), constant_values=-1)
    found.append(np.asarray(search(padded))[: len(part), :_K])
  return np.concatenate(found)


def _recall(rank, split):
  users = np.flatnonzero(split.validation >= 0)
  found = rank(split.train, users, None)
  return float(np.mean((found == split.validation[users][:, None]).any(1)))


def _metrics(rank, task):
  split, metrics = task.split, {}
  asked = split.test >= 0
  cold = asked & split.cold[np.maximum(split.test, 0)]
  parts: dict[str, tuple[Any, Any]] = {
    "all": (asked, None),
    "warm": (asked & ~cold, ~split.cold),
    "cold": (cold, split.cold),
  }
  for name, (users, mask) in parts.items():
    if not users.any():
      continue
    users = np.flatnonzero(users)
    found = rank(split.history, users, mask)
    hits = jnp.asarray(found == split.test[users][:, None], jnp.float32)
    one = jnp.ones(len(users), jnp.int32)
    recall = ranking.recall(hits, one, k=_K)
    ndcg = ranking.ndcg(hits, one[:, None].astype(jnp.float32), k=_K)
    metrics[f"R@10 {name}"] = float(jnp.mean(recall))
    metrics[f"nDCG@10 {name}"] = float(jnp.mean(ndcg))
  return metrics
