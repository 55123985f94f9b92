"""One mesh for two layouts: that of attention and that of experts.

    folded = make_folded_mesh(dict(dp=2, cp=2, tp=2), dict(ep=8))
    folded.mesh.shape          # {'pp': 1, 'dp': 2, 'cp': 2, 'tp': 2}
    folded.tp, folded.ep       # ('tp',), ('dp', 'cp', 'tp')
    jax.P(folded.dp, folded.sequence)       # how tokens [B, S, D] are cut

Attention is laid out over tp x cp x dp devices, the experts of the same layers
over etp x ep x edp; of both the first is the fastest, whose devices are the
closest. The mesh has the axes into which both can be cut; every axis of a
layout is a tuple of them, which collectives take like one. So nothing moves
between attention and experts but what a token sends to its experts.

Source: Liu et al. (2025), "MoE Parallel Folding"; the ranks are those of
Megatron-LM in its order "tp-cp-ep-dp-pp". One mesh of common axes is ours.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from tokjax import checks
from tokjax.parallel import meshes

__all__ = ["FoldedMesh", "Refined", "make_folded_mesh", "refine_axes"]

_ATTENTION = ("pp", "dp", "cp", "tp")  # the last is the fastest
_EXPERTS = ("pp", "edp", "ep", "etp")


class Refined(NamedTuple):
  """Two factorisations of the same devices, and the one that refines both.

  Attributes:
    sizes: of the finest axes, the last the fastest.
    one: for each axis of the first, the finest ones that it consists of.
    two: for each axis of the second, those of them larger than 1.
  """

  sizes: dict[str, int]
  one: dict[str, tuple[str, ...]]
  two: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class FoldedMesh:
  """A mesh, and what each axis of both layouts is on it.

  An axis is a tuple of mesh axes, the slowest first, as `jax.P` and
  collectives take it; empty for an axis of the experts of size 1.
  """

  mesh: Mesh | AbstractMesh
  dp: tuple[str, ...]  # other sequences
  cp: tuple[str, ...]  # other parts of the same sequences
  tp: tuple[str, ...]  # other heads; between layers, parts of parts
  pp: tuple[str, ...]  # other layers
  edp: tuple[str, ...]  # copies of the same experts
  ep: tuple[str, ...]  # other experts
  etp: tuple[str, ...]  # parts of the hidden width of the same experts

  @property
  def sequence(self) -> tuple[str, ...]:
    """Axes over which a sequence is cut between attention and experts."""
    return self.cp + self.tp

  @property
  def tokens(self) -> tuple[str, ...]:
    """Axes whose devices hold other tokens between attention and experts."""
    return self.dp + self.sequence

  def size(self, axes: tuple[str, ...]) -> int:
    """Devices along a tuple of mesh axes."""
    return math.prod(self.mesh.shape[name] for name in axes)


def refine_axes(one: Mapping[str, int], two: Mapping[str, int]) -> Refined:
  """The coarsest axes of which the axes of two factorisations consist.

  Counted from the fastest axis, the products of sizes are where a
  factorisation can be cut. A common refinement has the cuts of both, and
  exists if of any two cuts one divides the other.

  Args:
    one: sizes by name, the last the fastest. A piece of "cp" is called so if
      there is but one, otherwise "cp1", "cp0".
    two: another factorisation of the same number of devices.

  Returns:
    The finest axes; those of `one` of size 1 are among them.

  Raises:
    ValueError: if the numbers of devices differ, or a cut does not divide the
      next.

  Example:
    >>> found = refine_axes(dict(dp=1, cp=8, tp=2), dict(edp=4, ep=4))
    >>> found.sizes
    {'dp': 1, 'cp1': 4, 'cp0': 2, 'tp': 2}
    >>> found.two
    {'edp': ('cp1',), 'ep': ('cp0', 'tp')}
  """
  for sizes in (one, two):
    checks.in_range(1, math.inf, **sizes)
  products = math.prod(one.values()), math.prod(two.values())
  if products[0] != products[1]:
    raise ValueError(
      f"{_text(one)} are {products[0]} devices, {_text(two)} are {products[1]}"
    )
  cuts = sorted({end for sizes in (one, two) for _, end in _spans(sizes)})
  for low, high in zip(cuts, cuts[1:], strict=False):
    if high % low:
      raise ValueError(
        f"{_text(one)} and {_text(two)} have no common refinement: groups of "
        f"{high} consecutive devices do not consist of groups of {low}"
      )
  spans_of_two = dict(zip(two, _spans(two), strict=True))
  sizes: dict[str, int] = {}
  pieces: dict[str, tuple[str, ...]] = {}
  parts: dict[str, tuple[str, ...]] = dict.fromkeys(two, ())
  for name, (start, end) in zip(one, _spans(one), strict=True):
    ends = [cut for cut in cuts if start < cut <= end] or [end]
    starts = [start, *ends[:-1]]
    several = len(ends) > 1
    names = []
    for i in reversed(range(len(ends))):
      piece = f"{name}{i}" if several else name
      sizes[piece] = ends[i] // starts[i]
      names.append(piece)
      for other, (low, high) in spans_of_two.items():
        if low <= starts[i] < ends[i] <= high:
          parts[other] += (piece,)
    pieces[name] = tuple(names)
  return Refined(sizes, pieces, parts)


def make_folded_mesh(
  attention: Mapping[str, int],
  experts: Mapping[str, int],
  *,
  devices: Sequence[jax.Device] | None = None,
  axis_types: AxisType = AxisType.Auto,
) -> FoldedMesh:
  """Lays devices out for attention and for experts at once.

  Args:
    attention: sizes of "dp", "cp", "tp" and "pp"; those left out are 1.
    experts: sizes of "ep" and "etp", likewise; "edp" takes what is left, and
      "pp" is that of attention, if they are left out.
    devices: which ones; None for all of `jax.devices()`.
    axis_types: of all axes of the mesh.

  Returns:
    The mesh, and the axes of both layouts on it.

  Raises:
    ValueError: for unknown axes, sizes that do not fit the devices or each
      other, or other pipeline stages in one than in the other.

  Example:
    >>> folded = make_folded_mesh({}, {}, devices=jax.devices()[:1])
    >>> folded.tokens, folded.ep
    (('dp', 'cp', 'tp'), ())
  """
  devices = jax.devices() if devices is None else list(devices)
  for name in attention:
    checks.one_of(_ATTENTION, axis_of_attention=name)
  for name in experts:
    checks.one_of(_EXPERTS, axis_of_experts=name)
  one = {name: attention.get(name, 1) for name in _ATTENTION}
  two = {name: experts.get(name, 1) for name in _EXPERTS}
  checks.in_range(1, math.inf, **one)
  checks.in_range(1, math.inf, **two)
  two["pp"] = experts.get("pp", one["pp"])
  if one["pp"] != two["pp"]:
    raise ValueError(
      "pipeline stages must be those of attention, got "
      f"pp={one['pp']} and pp={two['pp']}"
    )
  wanted = math.prod(one.values())
  if wanted != len(devices):
    raise ValueError(f"{_text(one)} needs {wanted} devices, got {len(devices)}")
  if "edp" not in experts:
    named = two["pp"] * two["ep"] * two["etp"]
    checks.divisible(named, **{f"devices_of_{_text(one)}": wanted})
    two["edp"] = wanted // named
  refined = refine_axes(one, two)
  mesh = meshes.lay_out(refined.sizes, devices, axis_types)
  parts = {name: refined.two[name] for name in _EXPERTS if name != "pp"}
  return FoldedMesh(mesh, **refined.one, **parts)


def _spans(sizes):
  """Of each axis the products of sizes before and after it, fastest first."""
  spans, start = [], 1
  for size in reversed(sizes.values()):
    spans.append((start, start * size))
    start *= size
  return spans[::-1]


def _text(sizes):
  return " x ".join(f"{name}={size}" for name, size in sizes.items())
