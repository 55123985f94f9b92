"""Attention over a whole sequence, float64, and by rings of devices.

want = dense(inputs, causal=True)
got = on_devices(token_ring, inputs, mesh, causal=True)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.benchmarks import compiled_bytes
from tokjax.ops import attention
from tokjax.parallel import processes, zigzag

__all__ = [
  "Inputs",
  "Program",
  "dense",
  "dense_as_given",
  "example",
  "on_devices",
  "permutes",
  "program",
  "ring_mesh",
  "sent",
]


class Inputs(NamedTuple):
  """Of one attention in the order of the sequence, with a cotangent."""

  queries: np.ndarray
  keys: np.ndarray
  values: np.ndarray
  d_out: np.ndarray
  segment_ids: np.ndarray | None


def example(
  *, length=48, key_heads=1, value_width=6, segments=True, poison=False
):
  """Two, of 2 heads; the first packs two sequences and ends with 5 pads.

  With `poison` what pads hold is not a number.
  """
  rng = np.random.default_rng(0)

  def normal(num_heads, width):
    return rng.normal(size=(2, num_heads, length, width)).astype(np.float32)

  arrays = [
    normal(2, 4),
    normal(key_heads, 4),
    normal(key_heads, value_width),
    normal(2, value_width),
  ]
  if not segments:
    return Inputs(*arrays, None)
  ids = np.zeros((2, length), np.int32)
  ids[0, 20:] = 3
  ids[0, -5:] = -1
  if poison:
    for x in arrays:
      x[0, :, -5:] = np.nan
  return Inputs(*arrays, ids)


def dense(inputs: Inputs, *, causal: bool):
  """The result and the gradients of queries, keys and values, by loops."""
  q, k, v, d_out = (np.asarray(x, np.float64) for x in inputs[:4])
  batch, heads, length, width = q.shape
  shared = heads // k.shape[1]
  ids = inputs.segment_ids
  ids = np.zeros((batch, length), int) if ids is None else ids
  out = np.zeros((batch, heads, length, v.shape[-1]))
  d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b, h, i in np.ndindex(batch, heads, length):
    near = np.arange(length) <= (i if causal else length)
    read = np.flatnonzero(near & (ids[b] == ids[b, i]) & (ids[b, i] >= 0))
    if not read.size:
      continue
    keys, values = k[b, h // shared, read], v[b, h // shared, read]
    weights = np.exp(keys @ q[b, h, i] / np.sqrt(width))
    weights /= weights.sum()
    out[b, h, i] = weights @ values
    d_weights = values @ d_out[b, h, i]
    d_logits = weights * (d_weights - weights @ d_weights) / np.sqrt(width)
    d_q[b, h, i] = d_logits @ keys
    np.add.at(d_k[b, h // shared], read, d_logits[:, None] * q[b, h, i])
    np.add.at(d_v[b, h // shared], read, weights[:, None] * d_out[b, h, i])
  return out, d_q, d_k, d_v


def dense_as_given(inputs: Inputs):
  """As `dense`, causal, by `attend` in the dtype of the inputs."""
  length = inputs.queries.shape[2]
  mask = jnp.tril(jnp.ones((length, length), bool))

  @jax.jit
  def both(queries, keys, values, d_out):
    out, back = jax.vjp(
      lambda q, k, v: attention.attend(q, k, v, mask), queries, keys, values
    )
    return out, *back(d_out)

  return both(*inputs[:4])


class Program(NamedTuple):
  """A ring as functions of whole arrays, whose order is that of the devices.

  Attributes:
    both: (queries, keys, values, d_out[, ids]) to the result and gradients.
    forward: (queries, keys, values) to the result and its transpose.
    shard: puts inputs where they belong.
  """

  both: Callable
  forward: Callable
  shard: Callable


def program(ring, mesh, *, with_ids, batch=None, heads=None, **settings):
  """A ring over the mesh axis "seq".

  Examples, and heads of queries, are cut over the axes `batch` and `heads`.
  """
  rows = jax.P(batch, heads, "seq")
  shared = jax.P(batch, None, "seq")
  specs = (rows, shared, shared)
  ids_specs = (jax.P(batch, "seq"),) if with_ids else ()

  def local(queries, keys, values, *ids):
    segment_ids = dict(segment_ids=ids[0]) if ids else {}
    return ring(
      queries, keys, values, axis_name="seq", **segment_ids, **settings
    )

  over = jax.shard_map(
    local, mesh=mesh, in_specs=specs + ids_specs, out_specs=rows
  )

  def forward(queries, keys, values, *ids):
    return jax.vjp(lambda *x: over(*x, *ids), queries, keys, values)

  def both(queries, keys, values, d_out, *ids):
    out, back = forward(queries, keys, values, *ids)
    return out, *back(d_out)

  def shard(inputs):
    arrays = inputs if with_ids else inputs[:4]
    placed = (*specs, rows, *ids_specs)
    return [
      jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
      for x, spec in zip(arrays, placed, strict=True)
    ]

  return Program(jax.jit(both), jax.jit(forward), shard)


def on_devices(ring, inputs: Inputs, mesh, *, in_zigzag=True, **settings):
  """What `dense` gives, by a ring; in the order of the sequence."""
  size = mesh.shape["seq"]

  def reorder(x, order):
    if x is None or not in_zigzag:
      return x
    return order(x, size, axis=2 if x.ndim == 4 else 1)

  with_ids = inputs.segment_ids is not None
  run = program(ring, mesh, with_ids=with_ids, **settings)
  inputs = [reorder(x, zigzag.to_zigzag) for x in inputs]
  found = jax.device_get(processes.whole(run.both(*run.shard(inputs))))
  return [reorder(x, zigzag.from_zigzag) for x in found]


def sent(ring, mesh, **settings):
  """`permutes` of a causal pass forward and of one back, of `example`.

  Values are as wide as keys, 4; two programs, as the compiler for CPU finds
  that keys travel twice in one.
  """
  inputs = example(value_width=4, segments=False)
  run = program(ring, mesh, with_ids=False, causal=True, **settings)
  *arrays, d_out = run.shard(inputs)
  forward = run.forward.lower(*arrays).compile()
  _, back = forward(*arrays)
  backward = jax.jit(lambda back, d_out: back(d_out)).lower(back, d_out)
  return tuple(permutes(p.as_text()) for p in (forward, backward.compile()))


def ring_mesh(kind=jax.sharding.AxisType.Auto, **axes):
  """A mesh of as many devices as its axes need, "seq" among them."""
  count = int(np.prod(list(axes.values())))
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    (kind,) * len(axes),
    devices=jax.devices()[:count],
  )


def permutes(text: str) -> list[tuple[int, int]]:
  """(distance, bytes) of each collective-permute; others must not be there."""
  for other in ("all-gather(", "all-reduce(", "all-to-all("):
    assert other not in text
  return compiled_bytes.sends(text)
