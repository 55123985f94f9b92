"""Training losses of late interaction, on score arrays and on token sets.

Scores come from `tokjax.kernels.maxsim`; every loss here is a float32 scalar,
the mean over the queries that count. A query counts if its weight is above 0
and its positive document is there; a masked candidate, or one that scores
`EMPTY_SCORE` (a document without tokens, possibly divided by a temperature),
is no candidate at all: it adds nothing, gets no gradient, and may hold NaN if
it is masked. Without any query that counts the loss is 0.

Inside `jax.shard_map` (with its `check_vma`, the default) each loss takes
`axis_name`: the mean is then over the queries of all devices of that mesh
axis, equal on each of them, and its gradient is that of the one mean. Do not
average losses or gradients over devices once more.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from tokjax import checks, compat
from tokjax.kernels.maxsim import EMPTY_SCORE
from tokjax.typing import Array, Bool, Float, Int

__all__ = [
  "global_in_batch_loss",
  "global_in_batch_scores",
  "in_batch_cross_entropy",
  "kl_distillation",
  "margin_mse",
  "nway_cross_entropy",
]

# queries, documents, query_mask, document_mask -> scores[Nq, Nd]
ScoreFunction = Callable[..., Array]
# Weight of each query; False or 0 for a row that only pads the batch.
Weight = Float[Array, " B"] | Bool[Array, " B"]
AxisName = str | tuple[str, ...]

# No score of real tokens is as low, and EMPTY_SCORE divided by a temperature
# up to 1000 is lower.
_ABSENT = EMPTY_SCORE / 1000
# Logit of an absent candidate: exp of it is 0, and it is finite, so that a row
# without candidates has no NaN in its gradient.
_NEVER = -1e30


def nway_cross_entropy(
  scores: Float[Array, "B n"],
  mask: Bool[Array, "B n"] | None = None,
  query_weight: Weight | None = None,
  *,
  axis_name: AxisName | None = None,
) -> Float[Array, ""]:
  """Cross-entropy of each query's list of documents, the positive first.

      loss[i] = log(sum_j exp(scores[i, j])) - scores[i, 0]

  Divide the scores by a temperature before, if there is one.

  Args:
    scores: one list per query, column 0 the positive, any float dtype.
    mask: True where the list has a document; None for everywhere.
    query_weight: weight of each query in the mean; None for equal ones.
    axis_name: mesh axis to average over, inside `jax.shard_map`.

  Returns:
    float32 mean over the queries that count.

  Raises:
    ValueError: if ranks or sizes disagree.

  Example:
    >>> scores = jnp.array([[2.0, 0.0], [0.0, 0.0]])
    >>> print(f"{nway_cross_entropy(scores):.4f}")  # log(1 + 1/e^2), log 2
    0.4100

  Source: Khattab and Zaharia, 2020, "ColBERT", with n = 2; Santhanam et al.,
  2021, "ColBERTv2" has longer lists.
  """
  _check(scores, mask, query_weight)
  present = _present(scores, mask, query_weight)
  positive = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) == 0
  return _cross_entropy(scores, positive, present, query_weight, axis_name)


def in_batch_cross_entropy(
  scores: Float[Array, "B M"],
  mask: Bool[Array, "B M"] | None = None,
  query_weight: Weight | None = None,
  *,
  num_per_query: int | None = None,
  first_column: int | Int[Array, ""] = 0,
  own_negatives: bool = True,
  axis_name: AxisName | None = None,
) -> Float[Array, ""]:
  """Cross-entropy of each query against the documents of the whole batch.

  Documents stand in the order of their queries, n for each, its positive
  first: the positive of query i is column `first_column + i * n`.

  Args:
    scores: every query against every document.
    mask: True where the document is a candidate of the query; a way to leave
      out false negatives, such as the query's positive listed twice. None for
      everywhere.
    query_weight: weight of each query in the mean; None for equal ones.
    num_per_query: n, static; None takes the documents to be those of these
      queries, M / B for each.
    first_column: column of the positive of query 0, for queries that are part
      of a batch; may be traced.
    own_negatives: whether the candidates include the query's own n - 1
      negatives (PyLate's loss). False leaves them out and keeps the documents
      of the other queries, as Stanford's `compute_ib_loss` does, where they
      are already in the n-way loss that it is added to.
    axis_name: mesh axis to average over, inside `jax.shard_map`.

  Returns:
    float32 mean over the queries that count.

  Raises:
    ValueError: if ranks or sizes disagree, documents do not divide by
      `num_per_query` or are fewer than those of the queries, or a
      `first_column` is given without it or out of range.

  Example:
    >>> scores = jnp.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    >>> loss = jax.jit(in_batch_cross_entropy, static_argnames="own_negatives")
    >>> print(f"{loss(scores):.4f}, {loss(scores, own_negatives=False):.4f}")
    1.0064, 0.5514

  Source: Santhanam et al., 2021, "ColBERTv2", for negatives of the batch; the
  two sets of candidates are those of the PyLate and ColBERT code, which
  average over all queries without weights.
  """
  _check(scores, mask, query_weight)
  num_queries, num_documents = scores.shape
  if num_per_query is None:
    if not isinstance(first_column, int) or first_column != 0:
      raise ValueError("first_column needs num_per_query, got None")
    checks.divisible(num_queries, documents=num_documents)
    num_per_query = num_documents // num_queries
  checks.in_range(1, num_documents, num_per_query=num_per_query)
  checks.divisible(num_per_query, documents=num_documents)
  own = num_queries * num_per_query  # documents of these queries
  checks.in_range(own, 1 << 31, documents=num_documents)
  if isinstance(first_column, int):
    checks.divisible(num_per_query, first_column=first_column)
    checks.in_range(0, num_documents - own, first_column=first_column)

  column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
  query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
  column = column - first_column  # [B, M]
  positive = column == query * num_per_query
  present = _present(scores, mask, query_weight)
  if not own_negatives:
    own = column // num_per_query == query
    present = present & (positive | ~own)
  return _cross_entropy(scores, positive, present, query_weight, axis_name)


def kl_distillation(
  scores: Float[Array, "B n"],
  teacher: Float[Array, "B n"],
  mask: Bool[Array, "B n"] | None = None,
  query_weight: Weight | None = None,
  *,
  temperature: float | Float[Array, ""] = 1.0,
  teacher_scale: float | Float[Array, ""] = 1.0,
  normalize: Literal["none", "min_max"] = "none",
  axis_name: AxisName | None = None,
) -> Float[Array, ""]:
  """Divergence of the student's ranking of a list from the teacher's.

      p_s = softmax(scores / temperature)
      p_t = softmax(teacher * teacher_scale / temperature)
      loss[i] = sum_j p_t[i, j] (log p_t[i, j] - log p_s[i, j])

  "min_max" first maps each query's student scores to 0..1,

      scores[i] <- (scores[i] - min) / (max - min + 1e-8)

  over its candidates, for teacher scores that were mapped so; the teacher's
  are taken as they come. The loss is not multiplied by temperature**2, which
  would keep gradients of one size when it changes.

  The defaults are those of the ColBERT code (its `distillation_alpha`, 1, is
  `teacher_scale`). PyLate has "min_max" by default. sentence-transformers
  multiplies by temperature**2 and advises 0.25 for lists of many documents.

  Args:
    scores: the student's, one list per query.
    teacher: the teacher's for the same documents; gets no gradient.
    mask: True where the list has a document; None for everywhere. No column
      is special here: a query counts if it has any candidate.
    query_weight: weight of each query in the mean; None for equal ones.
    temperature: divides both sides; below 1 sharpens.
    teacher_scale: multiplies the teacher's scores.
    normalize: "none" or "min_max".
    axis_name: mesh axis to average over, inside `jax.shard_map`.

  Returns:
    float32 mean over the queries that count.

  Raises:
    ValueError: if ranks or sizes disagree, or for an unknown `normalize`.

  Example:
    >>> loss = jax.jit(kl_distillation, static_argnames="normalize")
    >>> teacher = jnp.array([[1.0, 0.0]])
    >>> print(f"{loss(jnp.zeros((1, 2)), teacher):.4f}")
    0.1109
    >>> student = jnp.array([[30.0, 20.0]])
    >>> print(f"{loss(student, teacher, normalize='min_max'):.4f}")
    0.0000

  Source: Santhanam et al., 2021, "ColBERTv2". Equal scores under "min_max"
  give a zero gradient here; the plain formula has one of 1e8.
  """
  checks.one_of(("none", "min_max"), normalize=normalize)
  _check(scores, mask, query_weight, teacher)
  present = _present(scores, mask, query_weight) & ~(teacher <= _ABSENT)
  student = jnp.where(present, scores.astype(jnp.float32), 0)
  if normalize == "min_max":
    student = _min_max(student, present)
  teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32) * teacher_scale
  log_student, log_teacher = (
    jax.nn.log_softmax(jnp.where(present, x / temperature, _NEVER), axis=1)
    for x in (student, teacher)
  )
  difference = jnp.where(present, log_teacher - log_student, 0)
  loss = jnp.sum(jnp.exp(log_teacher) * difference, axis=1)  # [B]
  return _mean(loss, jnp.any(present, axis=1), query_weight, axis_name)


def margin_mse(
  scores: Float[Array, "B n"],
  teacher: Float[Array, "B n"],
  mask: Bool[Array, "B n"] | None = None,
  query_weight: Weight | None = None,
  *,
  axis_name: AxisName | None = None,
) -> Float[Array, ""]:
  """Squared error of the margins between the positive and each negative.

      loss[i] = mean_j ((scores[i, 0] - scores[i, j])
                        - (teacher[i, 0] - teacher[i, j]))**2,  j = 1..n-1

  The mean is over the negatives of a query, then over the queries that have
  one: the mean of all margins where every query has as many.

  Args:
    scores: the student's, one list per query, column 0 the positive.
    teacher: the teacher's for the same documents; gets no gradient.
    mask: True where the list has a document; None for everywhere.
    query_weight: weight of each query in the mean; None for equal ones.
    axis_name: mesh axis to average over, inside `jax.shard_map`.

  Returns:
    float32 mean over the queries that count.

  Raises:
    ValueError: if ranks or sizes disagree, or there is no negative.

  Example:
    >>> scores = jnp.array([[3.0, 1.0, 2.0]])
    >>> teacher = jnp.array([[5.0, 4.0, 1.0]])
    >>> print(margin_mse(scores, teacher))  # (1 + 9) / 2
    5.0

  Source: Hofstaetter et al., 2020, "Improving Efficient Neural Ranking Models
  with Cross-Architecture Knowledge Distillation", with one negative; more as
  in sentence-transformers. Masks and weights are ours.
  """
  _check(scores, mask, query_weight, teacher)
  checks.in_range(2, 1 << 31, documents_of_a_query=scores.shape[1])
  present = _present(scores, mask, query_weight) & ~(teacher <= _ABSENT)
  teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
  error = jnp.where(present, scores.astype(jnp.float32) - teacher, 0)
  # The difference of the margins is the difference of the errors.
  square = jnp.square(error[:, :1] - error[:, 1:])  # [B, n - 1]
  negative = present[:, :1] & present[:, 1:]
  count = jnp.sum(negative, axis=1)  # [B]
  square = jnp.where(negative, square, 0)
  loss = jnp.sum(square, axis=1) / jnp.maximum(1, count)
  return _mean(loss, count > 0, query_weight, axis_name)


def global_in_batch_scores(
  score_fn: ScoreFunction,
  queries: Float[Array, "b Q D"],
  documents: Float[Array, "m N D"],
  query_mask: Bool[Array, "b Q"] | None = None,
  document_mask: Bool[Array, "m N"] | None = None,
  *,
  axis_name: AxisName,
) -> Float[Array, "b M"]:
  """Scores this device's queries against the documents of all devices.

  To be called inside `jax.shard_map`. Documents and their mask are gathered
  over the mesh axis, queries stay where they are, so the work is shared out;
  the gradient of a document is summed over the devices that scored it (in the
  dtype of the documents).

  Args:
    score_fn: takes queries, documents, query_mask and document_mask, returns
      scores [b, M]; `tokjax.kernels.maxsim.maxsim`, or another function of
      its form.
    queries: of this device.
    documents: of this device; as many on every device.
    query_mask: True where a query token counts; None for all.
    document_mask: True where a document token counts; None for all.
    axis_name: mesh axis, or axes, that the batch is spread over.

  Returns:
    Scores of b queries and M = m * devices documents; column m * r is the
    first document of device r = `jax.lax.axis_index(axis_name)`.

  Raises:
    ValueError: if ranks disagree.

  Example:
    >>> from tokjax.kernels.maxsim import maxsim
    >>> def local(queries, documents):
    ...   return global_in_batch_scores(
    ...     maxsim, queries, documents, axis_name="data"
    ...   )
    >>> with jax.set_mesh(jax.make_mesh((1,), ("data",))):
    ...   tokens = jnp.ones((2, 3, 4)), jnp.ones((6, 5, 4))
    ...   tokens = jax.device_put(tokens, jax.P("data"))
    ...   scores = jax.shard_map(local, out_specs=jax.P("data"))(*tokens)
    >>> scores.shape
    (2, 6)

  Cost: receives the documents of all devices, M N D elements, and sends as
  much back in the gradient; holds them while it scores.

  Source: gathering documents and leaving queries is also what PyLate does;
  its loss is multiplied by the number of devices to undo an average of
  gradients, of which there is none here.
  """
  checks.has_rank(3, queries=queries, documents=documents)
  checks.has_rank(2, query_mask=query_mask, document_mask=document_mask)

  def gather(x):
    return jax.lax.all_gather(x, axis_name, tiled=True)

  documents, document_mask = jax.tree.map(gather, (documents, document_mask))
  return score_fn(queries, documents, query_mask, document_mask)


def global_in_batch_loss(
  score_fn: ScoreFunction,
  queries: Float[Array, "b Q D"],
  documents: Float[Array, "m N D"],
  query_mask: Bool[Array, "b Q"] | None = None,
  document_mask: Bool[Array, "m N"] | None = None,
  query_weight: Weight | None = None,
  *,
  axis_name: AxisName,
  own_negatives: bool = True,
) -> Float[Array, ""]:
  """`in_batch_cross_entropy` of a batch that is spread over devices.

  To be called inside `jax.shard_map`. Value and gradient are those of one
  device holding the whole batch:

      in_batch_cross_entropy(score_fn(queries, documents, ...), ...)

  Args:
    score_fn: as in `global_in_batch_scores`.
    queries: of this device.
    documents: of these queries, n = m / b for each in their order, the
      positive first.
    query_mask: True where a query token counts; None for all.
    document_mask: True where a document token counts; None for all. A
      document without tokens is no candidate.
    query_weight: weight of each query in the mean; None for equal ones.
    axis_name: mesh axis, or axes, that the batch is spread over.
    own_negatives: as in `in_batch_cross_entropy`.

  Returns:
    float32, the mean over the queries of all devices, equal on every device
    (`out_specs=jax.P()`).

  Raises:
    ValueError: if ranks disagree or documents do not divide by queries.

  Example:
    >>> from tokjax.kernels.maxsim import maxsim
    >>> def local(queries, documents):
    ...   return global_in_batch_loss(
    ...     maxsim, queries, documents, axis_name="data"
    ...   )
    >>> with jax.set_mesh(jax.make_mesh((1,), ("data",))):
    ...   tokens = jax.device_put(jnp.eye(2)[:, None, :], jax.P("data"))
    ...   loss_fn = jax.jit(jax.shard_map(local, out_specs=jax.P()))
    ...   loss = loss_fn(tokens, tokens)
    >>> print(f"{loss:.4f}")  # log(1 + 1/e)
    0.3133

  Source: as `in_batch_cross_entropy` and `global_in_batch_scores`.
  """
  checks.divisible(queries.shape[0], documents=documents.shape[0])
  scores = global_in_batch_scores(
    score_fn,
    queries,
    documents,
    query_mask,
    document_mask,
    axis_name=axis_name,
  )
  return in_batch_cross_entropy(
    scores,
    None,
    query_weight,
    num_per_query=documents.shape[0] // queries.shape[0],
    first_column=jax.lax.axis_index(axis_name) * documents.shape[0],
    own_negatives=own_negatives,
    axis_name=axis_name,
  )


def _check(scores, mask, query_weight, teacher=None):
  checks.has_rank(2, scores=scores, teacher=teacher, mask=mask)
  checks.has_rank(1, query_weight=query_weight)
  for name, array in (("teacher", teacher), ("mask", mask)):
    if array is not None and array.shape != scores.shape:
      raise ValueError(
        f"{name} must have shape {scores.shape}, got {array.shape}"
      )
  if query_weight is not None:
    checks.same_size(
      scores_queries=scores.shape[0], query_weight=query_weight.shape[0]
    )


def _present(scores, mask, query_weight):
  """bool[B, n], the candidates: all that is not masked, empty or padding."""
  # "Not at most": a NaN that is no padding stays, and shows in the loss.
  present = ~(scores <= _ABSENT)
  if mask is not None:
    present = present & mask
  if query_weight is not None:
    present = present & (query_weight > 0)[:, None]
  return present


def _cross_entropy(scores, positive, present, query_weight, axis_name):
  """Mean of log sum exp over `present` less the score at `positive`."""
  scores = jnp.where(present, scores.astype(jnp.float32), _NEVER)
  chosen = positive & present  # at most one a row
  target = jnp.sum(jnp.where(chosen, scores, 0), axis=1)  # [B]
  loss = jax.nn.logsumexp(scores, axis=1) - target
  return _mean(loss, jnp.any(chosen, axis=1), query_weight, axis_name)


def _min_max(scores, present):
  """Scores of each row mapped to 0..1 by its present ones."""
  low = jnp.min(jnp.where(present, scores, jnp.inf), axis=1, keepdims=True)
  high = jnp.max(jnp.where(present, scores, -jnp.inf), axis=1, keepdims=True)
  # Equal scores, or none at all, are 0. "Not at most": NaN shows.
  above = jnp.where(~(high <= low), scores - low, 0)
  return above / (high - low + 1e-8)


def _mean(loss, counts, query_weight, axis_name):
  """Weighted mean of loss[B] over the rows that count; 0 without any."""
  weight = counts.astype(jnp.float32)
  if query_weight is not None:
    weight = jnp.where(counts, query_weight.astype(jnp.float32), 0)
  total = jnp.sum(weight * jnp.where(counts, loss, 0))
  count = jnp.sum(weight)
  if axis_name is not None:
    total, count = jax.lax.psum(
      compat.varying_together(total, count), axis_name
    )
  return total / jnp.where(count > 0, count, 1)
