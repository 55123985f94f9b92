"""Exact gradients of a loss over a batch too large to encode at once.

A contrastive loss needs all embeddings together, yet the memory goes to what
the encoder keeps for its backward pass. So the batch is encoded in chunks that
keep nothing, the loss gives the gradient of each embedding, and each chunk is
encoded once more with that gradient pulled back to the parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tokjax import checks, compat
from tokjax.typing import Array, Float, Key

__all__ = ["cached_value_and_grad"]

# params, one chunk of one side's inputs, key or None -> embeddings
Encode = Callable[[Any, Any, Any], Any]


def cached_value_and_grad(
  encode: Encode | Mapping[str, Encode],
  loss: Callable[[dict[str, Any]], Array],
  params: Any,
  inputs: Mapping[str, Any],
  *,
  chunk_size: int | Mapping[str, int],
  key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Any]:
  """Value and gradient of `loss(encode(params, inputs))`, encoded in chunks.

  Equal to `jax.value_and_grad` of that with respect to `params`, up to the
  order of sums. What the encoder keeps for its backward pass is held for one
  chunk at a time; the loss still sees all embeddings. The encoder must treat
  the rows of a batch independently, and the loss must be a function of the
  embeddings (close over masks and weights, or let `encode` return them).

  Chunk j of B rows in chunks of c holds the rows j, j + B/c, j + 2B/c, ...:
  where the batch is spread over devices in contiguous blocks, every chunk has
  rows of each device, and `chunk_size` must be a multiple of their number.
  (Inside `jax.shard_map` sizes are those of one device, and a key that all
  devices share draws the same on each: fold in `jax.lax.axis_index` first.)

  Args:
    encode: maps params, a chunk of inputs and a key (None without `key`) to a
      pytree of arrays whose first axis is that of the chunk; one function for
      all sides, or one for each by name. Arrays that are not float, such as
      masks, reach the loss and get no gradient.
    loss: maps {side: embeddings}, rows in the order of the inputs, to a
      scalar.
    params: pytree of float arrays.
    inputs: {side: pytree of arrays that share their first axis}, such as
      {"queries": ..., "documents": ...}; sides may have other sizes.
    chunk_size: rows encoded at once, static, a divisor of the side's rows; one
      number for all sides, or one for each by name.
    key: chunk j of the s-th side, sides in alphabetical order, is encoded with
      fold_in(fold_in(key, s), j), both times. None means no randomness.

  Returns:
    The loss, and the gradient as a pytree like `params` in its dtypes. It is
    summed over chunks and devices in float32 (or wider, as the parameters).

  Raises:
    ValueError: if the sides of the arguments or the rows of a side disagree,
      or a chunk size does not divide them.
    TypeError: if a parameter is not a float array.

  Example:
    >>> def encode(weight, tokens, key):
    ...   return tokens @ weight
    >>> def loss(embeddings):
    ...   return jnp.sum(embeddings["queries"] @ embeddings["documents"].T)
    >>> inputs = {"queries": jnp.eye(2), "documents": jnp.ones((4, 2))}
    >>> value, gradient = cached_value_and_grad(
    ...   encode, loss, jnp.eye(2), inputs, chunk_size=2
    ... )
    >>> print(value, gradient.tolist())
    8.0 [[8.0, 8.0], [8.0, 8.0]]

  Cost: one more forward pass of the encoder than without; memory for all
  embeddings and their gradients, twice each, and for the backward pass of one
  chunk and of the loss.

  With the batch sharded under `jax.jit`, the gradient is summed over devices
  chunk by chunk; inside `jax.shard_map`, where the loss is one of
  `tokjax.retrieval.losses` with an `axis_name`, once at the end.

  Source: Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under
  Memory Limited Setup". The strided chunks, keys by number and the float32
  sum are ours; the published code saves and restores random states.
  """
  names = sorted(inputs)
  encoders = _by_side("encode", encode, names)
  sizes = _by_side("chunk_size", chunk_size, names)
  for leaf in jax.tree.leaves(params):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise TypeError(
        f"params must be float arrays, got {jnp.result_type(leaf)}"
      )
  params = jax.tree.map(jnp.asarray, params)
  chunks = {
    name: (
      jnp.arange(_num_chunks(name, inputs[name], sizes[name])),
      _split(inputs[name], sizes[name]),
    )
    for name in names
  }

  def run(name, params, chunk):
    number, rows = chunk
    chunk_key = None
    if key is not None:
      chunk_key = jax.random.fold_in(key, names.index(name))
      chunk_key = jax.random.fold_in(chunk_key, number)
    return encoders[name](params, rows, chunk_key)

  # Inside `shard_map` replicated parameters are marked as varying once, out
  # of the loops; the transpose of the mark is the one sum over devices.
  def varying(params):
    leaves, tree = jax.tree.flatten(params)
    marked = compat.varying_together(*leaves, *jax.tree.leaves(inputs))
    return jax.tree.unflatten(tree, marked[: len(leaves)])

  local = varying(params)

  def encode_all(name):
    return _join(
      jax.lax.map(lambda chunk: run(name, local, chunk), chunks[name])
    )

  def pull_back(name, cotangents, total):
    def step(total, chunk_and_cotangent):
      chunk, cotangent = chunk_and_cotangent
      _, pull = jax.vjp(lambda x: _partition(run(name, x, chunk))[0], local)
      (gradient,) = pull(cotangent)
      total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient)
      return total, None

    pairs = (chunks[name], _split(cotangents, sizes[name]))
    return jax.lax.scan(step, total, pairs)[0]

  with jax.named_scope("encode"):
    floats, rest = _partition({name: encode_all(name) for name in names})
  with jax.named_scope("loss"):
    value, cotangents = jax.value_and_grad(
      lambda floats: loss(_combine(floats, rest))
    )(floats)
  with jax.named_scope("pull_back"):
    wide = jax.tree.map(
      lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params
    )
    start, sum_over_devices = jax.vjp(varying, wide)
    total = jax.tree.map(jnp.zeros_like, start)
    for name in names:
      total = pull_back(name, cotangents[name], total)
    (gradient,) = sum_over_devices(total)
  return value, jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, params)


def _by_side(argument, value, names):
  """{side: value} of an argument that may be one value for all sides."""
  if not isinstance(value, Mapping):
    return dict.fromkeys(names, value)
  if sorted(value) != names:
    raise ValueError(
      f"{argument} must have the sides of inputs, {names}, got {sorted(value)}"
    )
  return dict(value)


def _num_chunks(name, tree, size):
  rows = {x.shape[0] for x in jax.tree.leaves(tree)}
  if len(rows) != 1:
    raise ValueError(
      f"arrays of inputs[{name!r}] must share their first axis, "
      f"got sizes {sorted(rows)}"
    )
  (rows,) = rows
  checks.in_range(1, rows, **{f"chunk_size of {name}": size})
  checks.divisible(size, **{f"rows of {name}": rows})
  return rows // size


def _split(tree, size):
  """[B, ...] -> [B / size, size, ...], chunk j of rows j, j + B / size, ..."""

  def one(x):
    return jnp.swapaxes(x.reshape(size, x.shape[0] // size, *x.shape[1:]), 0, 1)

  return jax.tree.map(one, tree)


def _join(tree):
  """The inverse of `_split`."""

  def one(x):
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

  return jax.tree.map(one, tree)


def _partition(tree):
  """The float leaves and the others, None in the place of the missing."""

  def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)

  return (
    jax.tree.map(lambda x: x if is_float(x) else None, tree),
    jax.tree.map(lambda x: None if is_float(x) else x, tree),
  )


def _combine(floats, rest):
  """The inverse of `_partition`."""
  return jax.tree.map(
    lambda x, other: other if x is None else x,
    floats,
    rest,
    is_leaf=lambda x: x is None,
  )
