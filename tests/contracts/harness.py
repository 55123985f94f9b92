"""What every public array function promises, as checks over a table of rows.

A row is a `Case`: a function of arrays only, and how to make its inputs.
`*_test.py` files beside this one hold the tables, one per area.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

__all__ = ["Case", "all_checks", "assert_same"]


@dataclasses.dataclass(frozen=True)
class Case:
  """One public function under contract.

  Attributes:
    name: what the test report shows.
    function: takes the arrays of `inputs`, returns a pytree of arrays.
    inputs: `inputs(seed)` makes the arrays; axis 0 of those named in `batched`
      has size 8, so that eight devices can share it.
    batched: which inputs are sharded over their first axis.
    differentiable: which inputs get a gradient; empty for none.
    tolerance: absolute difference allowed between float results computed in
      another order (jit, shards).
    bfloat16_tolerance: absolute difference to float32 on the same rounded
      inputs; None where bfloat16 has no meaning.
    weights: `weights()` makes a pytree that the function takes before the
      inputs, such as a module and its state. It is made once and is in all
      checks the same: whole on every device, not mapped over, not cast.
  """

  name: str
  function: Callable[..., Any]
  inputs: Callable[[int], tuple]
  batched: tuple[int, ...] = (0,)
  differentiable: tuple[int, ...] = ()
  tolerance: float = 1e-5
  bfloat16_tolerance: float | None = 0.05
  weights: Callable[[], Any] | None = None


def assert_same(got, want, tolerance: float) -> None:
  """Floats within the tolerance, the rest equal, shapes and dtypes too."""
  got_leaves, got_tree = jax.tree.flatten(got)
  want_leaves, want_tree = jax.tree.flatten(want)
  assert got_tree == want_tree
  for g, w in zip(got_leaves, want_leaves, strict=True):
    assert (g.shape, g.dtype) == (w.shape, w.dtype)
    if jnp.issubdtype(g.dtype, jnp.floating):
      g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
      np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)
    else:
      np.testing.assert_array_equal(np.asarray(g), np.asarray(w))


@functools.cache
def _weights(case: Case) -> tuple:
  """What the function takes before the inputs."""
  if case.weights is None:
    return ()
  return (jax.device_get(jax.jit(case.weights)()),)


def one_device(case: Case, *inputs):
  """The result that others are compared with; compiled once for all checks.

  Tests of values call the functions without `jit`, one operation at a time.
  """
  return jax.jit(case.function)(*_weights(case), *inputs)


def check_shapes(case: Case) -> None:
  """The abstract shapes and dtypes are the real ones."""
  inputs = case.inputs(0)
  for got, real in zip(
    jax.tree.leaves(jax.eval_shape(case.function, *_weights(case), *inputs)),
    jax.tree.leaves(one_device(case, *inputs)),
    strict=True,
  ):
    assert (got.shape, got.dtype) == (real.shape, real.dtype)


def check_compiles_once(case: Case) -> None:
  """New values of the same shapes find the program of the first."""
  one, two = (
    jax.jit(case.function).trace(*_weights(case), *case.inputs(seed))
    for seed in (0, 1)
  )
  assert one.jaxpr is two.jaxpr


def check_sharded(case: Case, kind: AxisType) -> None:
  """Inputs sharded over eight devices give the single-device result."""
  inputs = case.inputs(0)
  want = one_device(case, *inputs)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    if case.weights is not None and kind == AxisType.Explicit:
      jax.eval_shape(case.weights)  # can be made on a mesh, whose types differ
    shards = [
      jax.device_put(x, jax.P("data") if i in case.batched else jax.P())
      for i, x in enumerate(inputs)
    ]
    weights = jax.device_put(_weights(case), jax.P())
    got = jax.jit(case.function)(*weights, *shards)
  assert_same(jax.device_get(got), jax.device_get(want), case.tolerance)


def check_vmap(case: Case) -> None:
  """Mapping over a new leading axis equals calling one by one."""
  one, two = case.inputs(0), case.inputs(1)
  stacked = _stacked(one, two)
  weights = _weights(case)
  axes = (None,) * len(weights) + (0,) * len(stacked)
  got = jax.jit(jax.vmap(case.function, axes))(*weights, *stacked)
  want = _stacked(one_device(case, *one), one_device(case, *two))
  assert_same(got, want, case.tolerance)


def _stacked(*trees):
  """Leaves on a new first axis, by NumPy, which compiles nothing."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def check_bfloat16(case: Case) -> None:
  """bfloat16 inputs agree with float32 on the same rounded values."""
  if case.bfloat16_tolerance is None:
    return

  def cast(x, dtype):
    x = np.asarray(x)
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  low = [cast(x, jnp.bfloat16) for x in case.inputs(0)]
  high = [cast(x, jnp.float32) for x in low]
  for got, want in zip(
    jax.tree.leaves(one_device(case, *low)),
    jax.tree.leaves(one_device(case, *high)),
    strict=True,
  ):
    if not jnp.issubdtype(want.dtype, jnp.floating):
      continue
    np.testing.assert_allclose(
      np.asarray(got, np.float32),
      np.asarray(want, np.float32),
      atol=case.bfloat16_tolerance,
      rtol=0.02,
    )


def check_finite_grad(case: Case) -> None:
  """Gradients exist, are finite, and at least one is not zero."""
  if not case.differentiable:
    return
  weights, inputs = _weights(case), case.inputs(0)

  def total(*inputs):
    leaves = jax.tree.leaves(case.function(*inputs))
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in floats)

  arguments = [len(weights) + i for i in case.differentiable]
  gradients = jax.jit(jax.grad(total, arguments))(*weights, *inputs)
  for gradient in gradients:
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
    assert np.abs(np.asarray(gradient, np.float32)).max() > 0


_CHECKS = {
  "shapes": check_shapes,
  "compiles_once": check_compiles_once,
  "sharded_auto": functools.partial(check_sharded, kind=AxisType.Auto),
  "sharded_explicit": functools.partial(check_sharded, kind=AxisType.Explicit),
  "vmap": check_vmap,
  "bfloat16": check_bfloat16,
  "finite_grad": check_finite_grad,
}


def all_checks(cases: list[Case]):
  """Decorates `test(check, case)` so that it runs every check on every row."""

  def decorate(test):
    rows = pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
    checks = pytest.mark.parametrize(
      "check", _CHECKS.values(), ids=list(_CHECKS)
    )
    return rows(checks(test))

  return decorate
