"""Layers in stages on devices of their own, and micro-batches through them.

    micro = cut_batch(x, num_micro)                 # [M, B / M, ...]
    y, told = pipeline(stage, layers, micro, cut_batch(mask, num_micro),
                       folded=folded)
    y = join_batch(y)                               # [B, ...]

Four micro-batches through two stages take five ticks:

    tick       0  1  2  3  4
    stage 0    0  1  2  3  -
    stage 1    -  0  1  2  3

In a bubble (-) a device works too, on rows of which nothing is kept: neither
output, nor what layers tell, nor gradient.

The backward pass is that of `jax.lax.scan`, the ticks in reverse: GPipe. So a
stage keeps what it needs for the gradients of all micro-batches, bubbles
included; less, if `stage` is a `jax.checkpoint`. With bubbles as many, "1F1B"
turns back after each micro-batch, and keeps those of at most as many
micro-batches as there are stages. "Interleaved" gives a device v stages of
fewer layers, which cuts bubbles by v for v times as many hand-overs. Neither
is here: both need a backward pass written by hand.

Source: Huang et al. (2019), "GPipe"; Narayanan et al. (2021), "Efficient
Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", for the
other schedules.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.parallel.moe_mesh import FoldedMesh
from tokjax.typing import Array

__all__ = [
  "bubble_fraction",
  "cut_batch",
  "join_batch",
  "pipeline",
  "schedule",
]

_Stage = Callable[[Any, Array, Any, FoldedMesh], tuple[Array, Any]]


def pipeline(
  stage: _Stage,
  layers: Any,
  micro: Array,
  held: Any = (),
  *,
  folded: FoldedMesh,
) -> tuple[Array, Any]:
  """Runs every micro-batch through all stages; for use inside of `jax.jit`.

  Devices along pp hold other layers each. What a stage made of a micro-batch
  goes to the next one by one collective permute a tick; the other axes of the
  mesh are laid out inside of a stage as they are without stages.

  Args:
    stage: maps (layers, x, held, folded) to (x, told): some of the layers, a
      micro-batch, what is held for it, and the mesh on which it runs, in which
      pp is spent. Leaves of `told` have the axis of those layers first. A
      function of one micro-batch at a time, whose rows it may mix.
    layers: pytree of arrays with a first axis of L layers, cut over pp.
    micro: [M, ...], the micro-batches, the same on all stages.
    held: pytree of [M, ...] arrays that every stage needs, such as masks.
    folded: the mesh.

  Returns:
    The micro-batches behind the last layer, cut over pp if the stages divide M,
    and what the layers told of each, leaves [M, L, ...] of which L is cut.

  Raises:
    ValueError: if the stages do not divide the layers, or something is not
      held for each micro-batch.

  Cost: M + stages - 1 ticks, of which `bubble_fraction` is lost. A device sends
    one micro-batch a tick, and takes part in handing out the last stage's, by
    one all-to-all. In the backward pass gradients of layers are summed over
    dp in every tick, unless the compiler moves that behind the last one.

  Example:
    >>> from tokjax.parallel.moe_mesh import make_folded_mesh
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> def stage(layers, x, held, folded):
    ...   def layer(x, w):
    ...     return w * x, jnp.sum(x)
    ...   return jax.lax.scan(layer, x, layers)
    >>> y, told = pipeline(
    ...   stage, jnp.array([2.0, 3.0]), jnp.ones((4, 5)), folded=folded)
    >>> y[0].tolist(), told[0].tolist()
    ([6.0, 6.0, 6.0, 6.0, 6.0], [5.0, 10.0])
  """
  num_stages = folded.size(folded.pp)
  for leaf in jax.tree.leaves(layers):
    checks.divisible(num_stages, layers=leaf.shape[0])
  for leaf in jax.tree.leaves(held):
    checks.same_size(micro=micro.shape[0], held=leaf.shape[0])
  if num_stages == 1:
    return jax.lax.map(lambda each: stage(layers, *each, folded), (micro, held))
  # Types that vary over pp do not survive the gradient of a `shard_map` inside
  # of this one, such as that of spread experts: they are not checked here.
  run = jax.shard_map(
    functools.partial(_ticks, stage, folded),
    mesh=folded.mesh,
    in_specs=jax.P(folded.pp),
    out_specs=(jax.P(folded.pp), jax.P(None, folded.pp)),
    axis_names=set(folded.pp),
    check_vma=False,
  )
  # All that goes in and out is cut over pp, so that no sum over pp is inside,
  # which XLA for CPU cannot do in bfloat16.
  copies = jax.tree.map(
    lambda a: jnp.broadcast_to(a[None], (num_stages, *a.shape)), (micro, held)
  )
  y, told = run(layers, *copies)  # y [stages, M, ...]
  if micro.shape[0] % num_stages == 0:
    # One all-to-all, by which the last stage hands out as many to each.
    free = (jax.P.UNCONSTRAINED,) * (micro.ndim - 1)
    spec = jax.P(None, folded.pp, *free)
    sharding = jax.sharding.NamedSharding(folded.mesh, spec)
    y = jax.lax.with_sharding_constraint(y, sharding)
  return y[-1], told


def schedule(num_stages: int, num_micro: int) -> tuple[tuple[int, ...], ...]:
  """Which micro-batch is where, tick by tick.

  Args:
    num_stages: P.
    num_micro: M.

  Returns:
    M + P - 1 rows of P numbers of micro-batches; -1 in a bubble.

  Raises:
    ValueError: if a number is not positive.

  Example:
    >>> schedule(2, 3)
    ((0, -1), (1, 0), (2, 1), (-1, 2))
  """
  checks.in_range(1, math.inf, num_stages=num_stages, num_micro=num_micro)

  def at(tick, stage):
    return tick - stage if 0 <= tick - stage < num_micro else -1

  return tuple(
    tuple(at(tick, stage) for stage in range(num_stages))
    for tick in range(num_micro + num_stages - 1)
  )


def bubble_fraction(num_stages: int, num_micro: int) -> float:
  """The part of a stage's ticks in which its work is lost.

  Args:
    num_stages: P.
    num_micro: M.

  Returns:
    (P - 1) / (M + P - 1).

  Raises:
    ValueError: if a number is not positive.

  Example:
    >>> bubble_fraction(2, 4), bubble_fraction(4, 12)
    (0.2, 0.2)
  """
  checks.in_range(1, math.inf, num_stages=num_stages, num_micro=num_micro)
  return (num_stages - 1) / (num_micro + num_stages - 1)


def cut_batch(x: Array, num_micro: int) -> Array:
  """A batch as micro-batches; micro-batch m has rows m, m + M, m + 2 M...

  So each device has its part of every micro-batch already, if the batch is cut
  over devices: nothing moves.

  Args:
    x: [B, ...].
    num_micro: M.

  Returns:
    [M, B / M, ...].

  Raises:
    ValueError: if M does not divide B.

  Example:
    >>> cut_batch(jnp.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
  """
  checks.in_range(1, math.inf, num_micro=num_micro)
  checks.divisible(num_micro, batch=x.shape[0])
  return jnp.moveaxis(x.reshape(-1, num_micro, *x.shape[1:]), 1, 0)


def join_batch(x: Array) -> Array:
  """The batch of `cut_batch`.

  Args:
    x: [M, B / M, ...].

  Returns:
    [B, ...].

  Example:
    >>> join_batch(cut_batch(jnp.arange(6), 2)).tolist()
    [0, 1, 2, 3, 4, 5]
  """
  return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _ticks(stage, folded, layers, micro, held):
  """All ticks of the devices of one stage."""
  micro, held = jax.tree.map(lambda a: a[0], (micro, held))
  num_stages, num_micro = folded.size(folded.pp), micro.shape[0]
  inside = dataclasses.replace(folded, mesh=jax.sharding.get_abstract_mesh())
  me = jax.lax.axis_index(folded.pp)
  following = [(i, i + 1) for i in range(num_stages - 1)]

  def tick(x, now):
    mine = jnp.maximum(now[me], 0)  # in a bubble some rows, kept by nobody
    x = jnp.where(me == 0, micro[mine], x)
    y, told = stage(layers, x, jax.tree.map(lambda a: a[mine], held), inside)
    return jax.lax.ppermute(y, folded.pp, following), (y, told)

  plan = jnp.asarray(schedule(num_stages, num_micro))
  # Bubbles before the first micro-batch arrives must not meet zeros or worse,
  # whose gradients may not be finite.
  _, (y, told) = jax.lax.scan(tick, micro[0], plan)

  def of_real_ticks(a):
    return jax.lax.dynamic_slice_in_dim(a, me, num_micro)

  return y[None, num_stages - 1 :], jax.tree.map(of_real_ticks, told)
