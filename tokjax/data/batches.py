"""Training batches of few shapes, exactly resumable, cut among processes.

A batch is a function of the step, seed and training set alone
(`tokjax.data.schedule` says which examples it holds); grain maps steps to
batches, which gives random access, iterator state and reading ahead.
"""

import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np
import tokenizers

from tokjax import checks
from tokjax.data import schedule
from tokjax.data.training_set import TrainingSet
from tokjax.retrieval import colbert

__all__ = ["build"]

# As `colbert.tokenize`, with a word id in the place of every token id.
Words = Callable[..., Sequence[np.ndarray]]


def build(
  train: TrainingSet,
  tokenizer: tokenizers.Tokenizer,
  config: colbert.ColbertConfig,
  *,
  batch_size: int,
  seed: int,
  num_negatives: int = 0,
  num_epochs: int | None = None,
  bucket: int = 32,
  words: Words | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """The batches of all steps, tokenised once, made when they are asked for.

  Item `step` is a dict of NumPy arrays, for B queries with n = 1 +
  `num_negatives` documents each, the positive first, negatives in the order
  of `train`:

  - query_ids, query_mask [B, Q]: int32 token ids, 0 after the end, and which
    are real. [MASK]s are for `masks.expand_queries`, Q is their length; for
    a config without them, that of the longest query, rounded up to `bucket`.
  - document_ids, document_mask [B, n, N]: the same. N is a multiple of
    `bucket` or `config.document_length`, so there is one program for each.
  - query_index [B], document_index [B, n]: int32 rows in `train`.
  - false_negative [B, B n]: True where the document of that column (those of
    the whole batch, in the order of their queries) answers the query, but is
    not its column i n. Such scores must be left out of a loss:
    `losses.in_batch_cross_entropy(scores, ~false_negative)`.
  - teacher [B, n]: float32, if `train` has teacher scores.
  - query_words [B, Q], document_words [B, n, N]: uint32, 0 after the end, if
    `words` is given.

  An iterator with a small buffer (grain's own default is 500 batches), whose
  `get_state` and `set_state` resume at the exact batch:

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(batches.build(...).to_iter_dataset(options))

  Args:
    train: the examples.
    tokenizer: as in `colbert.tokenize`.
    config: lengths and markers; `expand_queries` sets the length of queries.
    batch_size: queries of a batch over all processes, a multiple of
      `process_count`.
    seed: of all draws and orders.
    num_negatives: per query; no example may have fewer. Of more, each epoch
      draws other ones.
    num_epochs: length of the result in epochs of examples // batch_size
      steps; None for no end.
    bucket: granularity of padded lengths.
    words: `words(texts, tokenizer, length=, marker=)` gives one array per
      text with a number for each of the ids of `colbert.tokenize`, such as
      the whole words of `retrieval.words.tokenize_words`; None for no words.
    process_index: which process this is, `jax.process_index()`.
    process_count: how many there are. Each gets its rows of the same batches,
      of the same shape; put together in order they are the whole batch.

  Returns:
    A `grain.MapDataset` of batch_size / process_count rows per batch.

  Raises:
    ValueError: if an example has too few negatives, a setting is out of
      range, or `words` and the tokenizer disagree in length; and as
      `colbert.tokenize`.

  Example:
    >>> vocabulary = {"[UNK]": 0, "red": 1, "green": 2, "apple": 3, "pear": 4}
    >>> tokenizer = tokenizers.Tokenizer(
    ...   tokenizers.models.WordLevel(vocabulary, "[UNK]")
    ... )
    >>> train = TrainingSet(["red", "green"], ["apple", "pear"], [0, 1],
    ...                     positives=[[0], [1]], negatives=[[1], [0]])
    >>> batch = build(train, tokenizer, colbert.ColbertConfig.zero_shot(),
    ...               batch_size=2, num_negatives=1, seed=0, bucket=4)[0]
    >>> batch["document_ids"].shape, batch["false_negative"].tolist()
    ((2, 2, 4), [[False, False, False, True], [False, True, False, False]])
  """
  checks.in_range(1, train.num_examples, batch_size=batch_size)
  checks.in_range(1, config.document_length, bucket=bucket)
  checks.in_range(0, float("inf"), seed=seed, num_negatives=num_negatives)
  checks.in_range(0, process_count - 1, process_index=process_index)
  checks.divisible(process_count, batch_size=batch_size)
  few = sum(len(rows) < num_negatives for rows in train.negatives)
  if few:
    raise ValueError(
      f"negatives must be at least num_negatives={num_negatives} for every "
      f"example, but {few} examples have fewer"
    )
  per_epoch = train.num_examples // batch_size
  if num_epochs is not None:
    checks.in_range(1, sys.maxsize // per_epoch, num_epochs=num_epochs)
  batches = _Batches(
    train,
    tokenizer,
    config,
    words,
    batch_size=batch_size,
    seed=seed,
    num_negatives=num_negatives,
    bucket=bucket,
  )
  share = batch_size // process_count
  mine = slice(process_index * share, (process_index + 1) * share)
  num_steps = sys.maxsize if num_epochs is None else num_epochs * per_epoch
  return grain.MapDataset.range(num_steps).map(
    lambda step: batches.rows(*divmod(step, per_epoch), mine)
  )


class _Batches:
  """Tokens and choices of a training set, and the plans of two epochs."""

  def __init__(
    self, train, tokenizer, config, words, *, batch_size, seed, num_negatives,
    bucket,
  ):  # fmt: skip
    self._query_index = np.asarray(train.query_index, np.int32)
    self._relevant = train.relevant()
    self._queries = _Tokens(
      train.query_texts,
      self._query_index,
      tokenizer,
      words,
      length=config.query_length,
      marker=config.query_marker,
    )
    self._documents = _Tokens(
      train.document_texts,
      np.concatenate([*train.positives, *train.negatives]).astype(np.int64),
      tokenizer,
      words,
      length=config.document_length,
      marker=config.document_marker,
    )
    self._query_width = config.query_length
    if not config.expand_queries:
      longest = int(self._queries.length.max())
      rounded = -(-longest // bucket) * bucket
      self._query_width = min(rounded, config.query_length)
    choices = schedule.from_training_set(train)
    self._plan = lambda epoch: schedule.plan(
      choices,
      self._documents.length,
      batch_size=batch_size,
      num_negatives=num_negatives,
      bucket=bucket,
      max_width=config.document_length,
      seed=seed,
      epoch=epoch,
    )
    # One place each for even and odd epochs: at the border between two,
    # threads that read ahead need both. Races do no harm: same in, same out.
    self._epochs = [(-1, None), (-1, None)]

  def rows(self, epoch: int, step: int, mine: slice) -> dict[str, np.ndarray]:
    plan = self._epoch(epoch)
    members = plan.members[step]
    documents = plan.documents[members]  # [B, n]
    query_index = self._query_index[members[mine]]
    width = int(plan.width[step])
    batch = {
      **self._queries.padded("query", query_index, self._query_width),
      **self._documents.padded("document", documents[mine], width),
      "query_index": query_index,
      "document_index": documents[mine],
      "false_negative": self._false_negative(query_index, documents, mine),
    }
    if plan.teacher is not None:
      batch["teacher"] = plan.teacher[members[mine]]
    return batch

  def _epoch(self, epoch: int) -> schedule.Epoch:
    held = self._epochs[epoch % 2]
    if held[0] != epoch:
      held = (epoch, self._plan(epoch))
      self._epochs[epoch % 2] = held
    return held[1]

  def _false_negative(self, query_index, documents, mine):
    answers = np.stack(
      [np.isin(documents, self._relevant[int(query)]) for query in query_index]
    )  # [B / processes, B, n]
    row = np.arange(len(answers))
    answers[row, mine.start + row, 0] = False
    return answers.reshape(len(answers), -1)


class _Tokens:
  """Token ids of some rows of a list of texts, back to back."""

  def __init__(self, texts, rows, tokenizer, words, *, length, marker):
    used = np.unique(rows)
    kept = [texts[row] for row in used.tolist()]
    settings = {"length": length, "marker": marker}
    ids = colbert.tokenize(kept, tokenizer, **settings)
    lengths = np.array([len(row) for row in ids])
    self.length = np.zeros(len(texts), np.int64)
    self.length[used] = lengths
    self._start = np.zeros(len(texts), np.int64)
    self._start[used] = np.cumsum(lengths) - lengths
    self._columns = {"ids": np.concatenate(ids)}
    if words is not None:
      numbers = words(kept, tokenizer, **settings)
      if [len(row) for row in numbers] != lengths.tolist():
        raise ValueError("words must give one number for every token of a text")
      self._columns["words"] = np.concatenate(numbers).astype(np.uint32)

  def padded(self, name, rows, width):
    place = np.arange(width)
    mask = place < self.length[rows][..., None]  # [..., width]
    place = np.where(mask, self._start[rows][..., None] + place, 0)
    batch = {
      f"{name}_{what}": np.where(mask, column[place], column.dtype.type(0))
      for what, column in self._columns.items()
    }
    return {**batch, f"{name}_mask": mask}
