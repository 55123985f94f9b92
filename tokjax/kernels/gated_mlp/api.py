"""Public gated MLP over active rows: checks, choice of implementation."""

import functools
import importlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks, compat
from tokjax.kernels import hopper
from tokjax.kernels.gated_mlp import reference, sharding, xla
from tokjax.ops import packing
from tokjax.typing import Array, Float, Implementation, Int32

__all__ = ["GatedRows", "gated_rows"]

# With more tokens than this nearly all units are active for one of them.
_FEW_TOKENS = 8


class GatedRows(NamedTuple):
  """Output of a gated MLP, and what it took.

  Attributes:
    output: one vector per token, in the dtype of the tokens.
    active: units whose gate is not zero for at least one token.
    overflow: how many of those found no room and were left out.
  """

  output: Float[Array, "*batch D"]
  active: Int32[Array, ""]
  overflow: Int32[Array, ""]


def gated_rows(
  x: Float[Array, "*batch D"],
  gate: Float[Array, "*batch F"],
  w_up: Float[Array, "F D"],
  w_down: Float[Array, "F D"],
  *,
  capacity: int | None = None,
  implementation: Implementation | None = None,
) -> GatedRows:
  """sum_f gate[f] <x, w_up[f]> w_down[f] over the units whose gate is not zero.

  The second half of a gated MLP (SwiGLU), for a gate with many zeros. At decode
  the bytes of the weights are the time: rows of units whose gate is zero for
  all tokens are not read. The union over tokens grows fast, b tokens that keep
  a share s of the units each at random need 1 - (1 - s)^b of them.

  Both weights lie as one row per unit, [F, D], so that what is skipped is
  contiguous: the up projection is the transpose of the usual kernel, the down
  projection is the usual one.

  Gradients reach tokens, weights and the gates that are not zero; a gate of
  zero gets none. The backward pass is dense.

  Args:
    x: tokens, float32 or bfloat16.
    gate: activated gate of each token, same dtype. Zero drops the unit.
    w_up: row f is what unit f multiplies with the token.
    w_down: row f is what unit f adds to the output.
    capacity: most units that are taken, static, at most F; None for all. With
      more active units those of the highest |gate| of any token stay, of equal
      ones the first. It bounds the rows read, and its sort of F values.
    implementation: "reference" multiplies with all rows, "xla" and "pallas_gpu"
      read active ones alone, "pallas_tpu" in bfloat16 aligned pairs of which
      one is active. A named one runs or raises. None chooses when the program
      is lowered: for up to 8 tokens "xla" on CPU, where it was measured, and
      where they take the arguments the kernel on TPU, and that for GPU if the
      mesh of `jax.set_mesh` says that its devices are Hopper GPUs; "reference"
      otherwise.

  Returns:
    The output and two counts over all tokens of the call. Sums are float32.

  Raises:
    ValueError: if sizes disagree, dtypes differ, `capacity` is not in 1..F, or
      on an Explicit mesh anything but tokens is sharded.
    NotImplementedError: if the named implementation cannot take the arguments.

  Example:
    >>> gate = jnp.array([[1.0, 0.0, 2.0]])
    >>> w = jnp.array([[1.0, 0.0], [9.0, 9.0], [0.0, 1.0]])
    >>> found = jax.jit(gated_rows)(jnp.array([[3.0, 4.0]]), gate, w, w)
    >>> found.output.tolist(), int(found.active)
    ([[3.0, 8.0]], 2)

  Cost: 4 A D FLOPs a token and 2 A D weights read for A active units, of 2 F D
  (on TPU in bfloat16 for the units of active pairs, at most twice as many).
  Times are given at `tokjax.sparse.cats.gated_mlp`.

  Source: Lee, Lee, Zhang, Tiwari and Mirhoseini (2024), "CATS", whose kernels
    skip rows of both weights; blocks, capacity and its count are ours.
  """
  _check(x, gate, w_up, w_down, capacity, implementation)
  if implementation is None and math.prod(x.shape[:-1]) > _FEW_TOKENS:
    implementation = "reference"
  return _gated_rows(
    x, gate, w_up, w_down, capacity=capacity, implementation=implementation
  )


@functools.partial(jax.jit, static_argnames=("capacity", "implementation"))
def _gated_rows(x, gate, w_up, w_down, *, capacity, implementation):
  tokens = tuple(range(gate.ndim - 1))
  active = jnp.any(gate != 0, axis=tokens)  # [F]
  num_units = active.shape[0]
  if capacity is None or capacity == num_units:
    kept = packing.pack(active, num_units)
  else:
    strength = jnp.max(jnp.abs(jax.lax.stop_gradient(gate)), axis=tokens)
    kept = packing.pack(active, capacity, strength)
    place = jnp.where(kept.mask, kept.index, num_units)
    room = jnp.zeros_like(active).at[place].set(True, mode="drop")
    gate = jnp.where(room[(None,) * (gate.ndim - 1)], gate, 0)
  operands = compat.varying_together(x, gate, w_up, w_down)
  count = jnp.sum(kept.mask, dtype=jnp.int32)
  output = _output(*operands, kept.index, count, implementation)
  return GatedRows(output, jnp.sum(active, dtype=jnp.int32), kept.overflow)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _output(x, gate, w_up, w_down, index, count, implementation):
  def local(*arrays):
    return _dispatch(compat.varying_together(*arrays), implementation)

  return sharding.over_shards(local, x, gate, w_up, w_down, index, count)


def _forward(x, gate, w_up, w_down, index, count, implementation):
  output = _output(x, gate, w_up, w_down, index, count, implementation)
  return output, (x, gate, w_up, w_down)


def _backward(implementation, saved, g):
  del implementation  # training has many tokens: dense
  _, pull = jax.vjp(reference.gated_rows_forward, *saved)
  return (*pull(g), None, None)


_output.defvjp(_forward, _backward)


def _dispatch(arrays, implementation):
  """Runs the implementation named, or that of the platform."""
  x, _, w_up = arrays[:3]
  if implementation is not None:
    if implementation.startswith("pallas"):
      reason = _module(implementation).unsupported(x, w_up)
      if reason is not None:
        raise NotImplementedError(f"{implementation}: {reason}")
    return _BRANCHES[implementation](*arrays)
  branches = {"cpu": _rows, "default": _dense}
  kernels = {"tpu": "pallas_tpu"}
  if hopper.on_hopper():
    kernels["cuda"] = "pallas_gpu"
  for platform, name in kernels.items():
    if _module(name).unsupported(x, w_up) is None:
      branches[platform] = _BRANCHES[name]
  return jax.lax.platform_dependent(*arrays, **branches)


def _dense(x, gate, w_up, w_down, index, count):
  del index, count  # other gates are zero
  return reference.gated_rows_forward(x, gate, w_up, w_down)


def _rows(*arrays):
  return _over_tokens(xla, *arrays)


def _tpu(x, gate, w_up, w_down, index, count):
  del index, count  # it counts in groups of units, which the gates name
  return _over_tokens(_module("pallas_tpu"), x, gate, w_up, w_down)


def _gpu(*arrays):
  return _over_tokens(_module("pallas_gpu"), *arrays)


_BRANCHES = {
  "reference": _dense,
  "xla": _rows,
  "pallas_tpu": _tpu,
  "pallas_gpu": _gpu,
}


def _over_tokens(module, x, gate, *rest):
  tokens, gates = (y.reshape(-1, y.shape[-1]) for y in (x, gate))
  return module.gated_rows_forward(tokens, gates, *rest).reshape(x.shape)


def _module(name: str):
  """Imported here: only its users import Pallas."""
  return importlib.import_module(f"tokjax.kernels.gated_mlp.{name}")


def _check(x, gate, w_up, w_down, capacity, implementation):
  checks.one_of((None, *_BRANCHES), implementation=implementation)
  checks.has_rank(2, w_up=w_up, w_down=w_down)
  checks.has_rank(x.ndim, gate=gate)
  checks.same_size(
    x_dim=x.shape[-1], w_up_dim=w_up.shape[1], w_down_dim=w_down.shape[1]
  )
  checks.same_size(
    gate_units=gate.shape[-1],
    w_up_units=w_up.shape[0],
    w_down_units=w_down.shape[0],
  )
  if x.shape[:-1] != gate.shape[:-1]:
    raise ValueError(
      f"gate must be of the tokens {x.shape[:-1]}, got {gate.shape[:-1]}"
    )
  dtypes = {str(y.dtype) for y in (x, gate, w_up, w_down)}
  if len(dtypes) > 1:
    raise ValueError(
      f"x, gate, w_up and w_down must have one dtype, got {sorted(dtypes)}"
    )
  if capacity is not None:
    checks.in_range(1, gate.shape[-1], capacity=capacity)
