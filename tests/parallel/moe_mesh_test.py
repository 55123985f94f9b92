"""Folded meshes against the rank groups of Megatron-LM."""

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.parallel.moe_mesh import make_folded_mesh, refine_axes

ORDER = ("tp", "cp", "ep", "dp", "pp")  # the first varies fastest


def rank_groups(sizes, *names):
  """Groups of ranks that differ in the named coordinates only."""
  strides, stride = {}, 1
  for name in ORDER:
    strides[name], stride = stride, stride * sizes.get(name, 1)

  def spread(names):  # all offsets, the fastest coordinate first
    counts = [range(sizes.get(n, 1)) for n in ORDER[::-1] if n in names]
    steps = [strides[n] for n in ORDER[::-1] if n in names]
    return [
      sum(i * step for i, step in zip(at, steps, strict=True))
      for at in itertools.product(*counts)
    ]

  others = spread(set(ORDER) - set(names))
  return {tuple(base + offset for offset in spread(names)) for base in others}


def mesh_groups(sizes, axes):
  """Groups of ranks along some axes of a mesh, the slowest axis first."""
  grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
  names = tuple(sizes)
  along = [names.index(axis) for axis in axes]
  grid = np.moveaxis(grid, along, range(len(sizes) - len(along), len(sizes)))
  count = math.prod(sizes[axis] for axis in axes)
  return {tuple(group) for group in grid.reshape(-1, count).tolist()}


POWERS = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=200, deadline=None)
@given(POWERS, POWERS, POWERS, st.sampled_from([1, 3]), POWERS, POWERS)
def test_groups_are_those_of_megatron(tp, cp, dp, pp, ep, etp):
  world = tp * cp * dp * pp
  if tp * cp * dp % (ep * etp):
    return
  edp = tp * cp * dp // (ep * etp)
  one = dict(pp=pp, dp=dp, cp=cp, tp=tp)
  two = dict(pp=pp, edp=edp, ep=ep, etp=etp)
  found = refine_axes(one, two)
  assert math.prod(found.sizes.values()) == world
  for names in (("tp",), ("cp",), ("dp",), ("pp",), ("cp", "tp"), ("dp", "cp")):
    axes = sum((found.one[name] for name in names), ())
    assert mesh_groups(found.sizes, axes) == rank_groups(one, *names)
  theirs = dict(tp=etp, ep=ep, dp=edp, pp=pp)
  for ours, name in dict(etp="tp", ep="ep", edp="dp", pp="pp").items():
    groups = rank_groups(theirs, name)
    assert mesh_groups(found.sizes, found.two[ours]) == groups


def test_the_oracle_on_a_known_world():
  sizes = dict(tp=2, cp=1, dp=2, pp=2)
  assert rank_groups(sizes, "tp") == {(0, 1), (2, 3), (4, 5), (6, 7)}
  assert rank_groups(sizes, "dp") == {(0, 2), (1, 3), (4, 6), (5, 7)}
  assert rank_groups(sizes, "pp") == {(0, 4), (1, 5), (2, 6), (3, 7)}


def test_256_ranks_of_the_paper():
  """64 experts' worth of devices inside each of four pipeline stages."""
  found = refine_axes(
    dict(pp=4, dp=8, cp=2, tp=4), dict(pp=4, edp=1, ep=64, etp=1)
  )
  assert found.sizes == dict(pp=4, dp=8, cp=2, tp=4)
  assert found.two["ep"] == ("dp", "cp", "tp")
  assert found.two["etp"] == found.two["edp"] == ()


def test_a_cut_inside_of_an_axis():
  found = refine_axes(dict(cp=8, tp=2), dict(edp=2, ep=4, etp=2))
  assert found.sizes == dict(cp1=2, cp0=4, tp=2)
  assert found.one == dict(cp=("cp1", "cp0"), tp=("tp",))
  assert found.two == dict(edp=("cp1",), ep=("cp0",), etp=("tp",))


def test_mesh_of_devices():
  folded = make_folded_mesh(dict(cp=2, tp=4), dict(ep=2, etp=2))
  assert dict(folded.mesh.shape) == dict(pp=1, dp=1, cp=2, tp1=2, tp0=2)
  assert (folded.tp, folded.etp, folded.ep) == (("tp1", "tp0"), ("tp0",),
                                                ("tp1",))  # fmt: skip
  assert folded.edp == ("cp",)
  assert folded.sequence == ("cp", "tp1", "tp0")
  assert folded.tokens == ("dp", *folded.sequence)
  assert folded.size(folded.sequence) == 8
  hash(folded)  # may be static


@pytest.mark.parametrize(
  ("attention", "experts", "match"),
  [
    (dict(tp=2, ep=4), {}, "axis_of_attention must be one of"),
    (dict(tp=8), dict(dp=2), "axis_of_experts must be one of"),
    (dict(tp=4), {}, "tp=4 needs 4 devices, got 8"),
    (dict(tp=8), dict(ep=16), "must be a multiple of 16, got 8"),
    (dict(tp=8), dict(ep=4, edp=4), "are 8 devices, .* are 16"),
    (dict(tp=4, pp=2), dict(ep=4, pp=1), "got pp=2 and pp=1"),
    (dict(tp=0), {}, "tp must lie in 1..inf, got 0"),
  ],
)
def test_errors(attention, experts, match):
  with pytest.raises(ValueError, match=match):
    make_folded_mesh(attention, experts, devices=jax.devices()[:8])


def test_no_common_refinement():
  with pytest.raises(ValueError, match="groups of 3 .* groups of 2"):
    refine_axes(dict(dp=3, tp=2), dict(edp=2, ep=3))
