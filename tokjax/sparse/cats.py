"""CATS: zeroes the small gate activations of a gated MLP and skips their rows.

    histogram = start_histogram()
    for x in batches:                                  # of the dense model
      histogram = observe(histogram, silu_gate(x, w_gate))
    tau = find_threshold(histogram, config)            # one per layer
    out = gated_mlp(x, w_gate, w_up, w_down, tau).output

The threshold of a layer is a percentile of |silu(x w_gate)|, found by counting
the upper half of the bits of every value: exact for bfloat16, and from below
within 2**-7 of the value for float32. A second pass over the same batches makes
it exact:

    histogram = refine(histogram, config)
    for x in batches:
      histogram = observe(histogram, silu_gate(x, w_gate))
    tau = find_threshold(histogram, config)

Sparsity saves time where the bytes of weights are the time: at decode, with one
or a few tokens. `jax.vmap` makes a histogram and a threshold for each of many
layers.

Source: Lee, Lee, Zhang, Tiwari, Mirhoseini (2024), "CATS: Contextually-Aware
Thresholding for Sparsity in Large Language Models", and its code.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels.gated_mlp import gated_rows
from tokjax.ops import code_usage
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = [
  "CatsConfig",
  "GateHistogram",
  "SparseMlp",
  "find_threshold",
  "gated_mlp",
  "observe",
  "refine",
  "silu_gate",
  "sparse_gate",
  "start_histogram",
  "unit_capacity",
]

_BINS = 1 << 16
_MOST = 2**31 - 1  # values that int32 counts
_PARTS = 10_000  # sparsity is read in these


@dataclasses.dataclass(unsafe_hash=True)
class CatsConfig:
  """How much to drop; defaults are the published ones but for `slack`."""

  sparsity: float = 0.5  # share of gate values to zero; published .5, .7, .9
  slack: float = 0.25  # room for tokens above the average in `unit_capacity`
  multiple: int = 128  # capacities are rounded up to one


class GateHistogram(NamedTuple):
  """Counts of the bits of gate magnitudes; see `observe`.

  Attributes:
    counts: of upper halves of the bits in the first pass; in the second of
      the lower halves of those values whose upper half is `upper`.
    upper: -1 in the first pass.
    below: values whose upper half is less.
    total: values seen in this pass.
    refused: batches left out as int32 could not count them, of both passes.
  """

  counts: Int32[Array, "*layers 65536"]
  upper: Int32[Array, "*layers"]
  below: Int32[Array, "*layers"]
  total: Int32[Array, "*layers"]
  refused: Int32[Array, "*layers"]


class SparseMlp(NamedTuple):
  """Output of a gated MLP with a sparse gate.

  Attributes:
    output: one vector per token, in the dtype of the tokens.
    kept_share: share of the units whose gate each token keeps, float32; 0 for
      tokens that do not count.
    active_units: units that at least one token keeps, which is how many rows
      of each weight have to be read.
    overflow: how many of those exceeded the capacity and were left out.
  """

  output: Float[Array, "*batch D"]
  kept_share: Float[Array, "*batch"]
  active_units: Int32[Array, ""]
  overflow: Int32[Array, ""]


def silu_gate(
  x: Float[Array, "*batch D"], w_gate: Float[Array, "D F"]
) -> Float[Array, "*batch F"]:
  """silu(x w_gate), summed in float32 and rounded once.

  Args:
    x: tokens.
    w_gate: kernel of the gate.

  Returns:
    In the dtype of `x`: what calibration and `gated_mlp` both look at.

  Example:
    >>> float(jax.jit(silu_gate)(jnp.ones((1, 1)), jnp.ones((1, 1)))[0, 0])
    0.7310585975646973
  """
  gate = jnp.matmul(x, w_gate, preferred_element_type=jnp.float32)
  return jax.nn.silu(gate).astype(x.dtype)


def sparse_gate(
  gate: Float[Array, "*batch F"], threshold: Float[Array, ""] | float
) -> Float[Array, "*batch F"]:
  """The gate where its magnitude is above a threshold, zero elsewhere.

  The threshold looks at what comes after the activation: |silu| is not
  monotone, silu(-1) is larger in magnitude than silu(-3).

  Args:
    gate: after its activation.
    threshold: values of exactly this magnitude are dropped.

  Returns:
    In the dtype of `gate`. Gradients pass through what is kept, and nothing
    reaches the threshold.

  Example:
    >>> jax.jit(sparse_gate)(jnp.array([0.1, -0.3, 0.2]), 0.2).tolist()
    [0.0, -0.30000001192092896, 0.0]
  """
  magnitude = jnp.abs(gate).astype(jnp.float32)
  return jnp.where(magnitude > threshold, gate, 0)


def gated_mlp(
  x: Float[Array, "*batch D"],
  w_gate: Float[Array, "D F"],
  w_up: Float[Array, "F D"],
  w_down: Float[Array, "F D"],
  threshold: Float[Array, ""] | float,
  mask: Bool[Array, "*batch"] | None = None,
  *,
  capacity: int | None = None,
  implementation: Implementation | None = None,
) -> SparseMlp:
  """(sparse_gate(silu(x w_gate)) * (x w_up^T)) w_down, rows skipped if few.

  The gate is always computed in full; where rows are skipped (`gated_rows` says
  when) only those of the other two weights are read that a token keeps, so that
  of 3 units of bytes 1 + 2 s are left for a kept share s. With a threshold of
  zero it is the dense MLP.

  Args:
    x: tokens.
    w_gate: the usual kernel, [D, F].
    w_up: the transpose of the usual kernel: a unit is a contiguous row.
    w_down: the usual kernel, likewise a row per unit.
    threshold: of this layer, traced.
    mask: True where a token counts; None for all. The output of others is
      zero, and they keep no unit.
    capacity: most rows to read, static; None for no bound. Above it the units
      of the smallest gates are left out, and counted.
    implementation: as in `gated_rows`.

  Returns:
    The output, and what was kept. Gradients pass through kept gates only; the
    backward pass is dense.

  Raises:
    ValueError: if sizes disagree or dtypes differ.

  Example:
    >>> w = jnp.eye(2)
    >>> found = jax.jit(gated_mlp)(jnp.array([[4.0, 0.1]]), w, w, w, 0.1)
    >>> [round(value, 3) for value in found.output[0].tolist()]
    [15.712, 0.0]
    >>> found.kept_share.tolist(), int(found.active_units)
    ([0.5], 1)

  Cost: 2 D F + 4 D A FLOPs a token and D F + 2 D A weights read, for A active
  units. Measured by `tokjax bench gated_mlp`, 2026-11-29, two CPU cores (AMD
  EPYC, jax 0.10.2), float32, D 4,096 and F 14,336, random weights, medians of
  21 calls in turn. One token: dense 26 ms, with 0, 50, 70 and 90 % dropped 38,
  25, 20 and 14: rows that are picked are read at .7 of the rate of all in a
  row. Four tokens, whose unions are 100, 94, 76 and 34 %: dense 49, and 62, 60,
  53 and 35. In bfloat16 XLA on CPU widens all weights before it uses some: 221
  to 249 at any sparsity, dense 233. No accelerator was timed.

  Source: the kernels and `SparseSiLU` of the published code; keeping strictly
    what is above is theirs, capacity is ours.
  """
  checks.has_rank(2, w_gate=w_gate)
  checks.same_size(x_dim=x.shape[-1], w_gate_dim=w_gate.shape[0])
  if mask is not None:
    if mask.shape != x.shape[:-1]:
      raise ValueError(
        f"mask must be of the tokens {x.shape[:-1]}, got {mask.shape}"
      )
    x = jnp.where(mask[..., None], x, 0)  # a gate of exactly zero
  gate = sparse_gate(silu_gate(x, w_gate), threshold)
  found = gated_rows(
    x, gate, w_up, w_down, capacity=capacity, implementation=implementation
  )
  kept_share = jnp.mean(gate != 0, axis=-1, dtype=jnp.float32)
  return SparseMlp(found.output, kept_share, found.active, found.overflow)


def start_histogram() -> GateHistogram:
  """A histogram that has seen nothing, before its first pass.

  Example:
    >>> int(start_histogram().total)
    0
  """
  zero = jnp.zeros((), jnp.int32)
  return GateHistogram(jnp.zeros(_BINS, jnp.int32), zero - 1, zero, zero, zero)


def observe(
  histogram: GateHistogram,
  gate: Float[Array, "*batch F"],
  mask: Bool[Array, "*batch"] | None = None,
  *,
  axis_name: str | tuple[str, ...] | None = None,
) -> GateHistogram:
  """Counts the magnitudes of a batch of gates.

  How values are split into batches makes no difference. A batch that would
  take the total above 2**31 - 1 is refused, and that is counted: 149,000 tokens
  of 14,336 units fit.

  Args:
    histogram: so far, the same on all devices.
    gate: after its activation, as `silu_gate` returns it.
    mask: True where a token counts; None for all.
    axis_name: mesh axes over which the tokens are spread, inside
      `jax.shard_map`; counts are summed over them.

  Returns:
    The histogram, 256 KiB.

  Raises:
    ValueError: if the mask is not of these tokens, or one batch is too large.

  Example:
    >>> gate = jnp.array([[0.1, -0.3, 0.2]])
    >>> int(jax.jit(observe)(start_histogram(), gate).total)
    3
  """
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  checks.in_range(0, _MOST, values_of_a_batch=gate.size * devices)
  if mask is not None and mask.shape != gate.shape[:-1]:
    raise ValueError(
      f"mask must be of the tokens {gate.shape[:-1]}, got {mask.shape}"
    )
  magnitude = jnp.abs(jax.lax.stop_gradient(gate)).astype(jnp.float32)
  # Of floats that are not negative the bits are ordered as the values.
  bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
  upper = bits >> 16
  chosen = jnp.where(upper == histogram.upper, bits & 0xFFFF, -1)
  chosen = jnp.where(histogram.upper < 0, upper, chosen)
  valid = jnp.ones_like(gate, dtype=bool)
  if mask is not None:
    valid = valid & mask[..., None]
  counts = code_usage.code_histogram(chosen, valid, num_codes=_BINS)
  under = valid & (upper < histogram.upper)
  below, total = (jnp.sum(x, dtype=jnp.int32) for x in (under, valid))
  if axis_name is not None:
    counts, below, total = jax.lax.psum((counts, below, total), axis_name)
  room = histogram.total <= _MOST - total
  return GateHistogram(
    counts=histogram.counts + jnp.where(room, counts, 0),
    upper=histogram.upper,
    below=histogram.below + jnp.where(room, below, 0),
    total=histogram.total + jnp.where(room, total, 0),
    refused=histogram.refused + ~room,
  )


def refine(histogram: GateHistogram, config: CatsConfig) -> GateHistogram:
  """An empty histogram for a second pass, which looks where the first found.

  Args:
    histogram: after a first pass.
    config: says which percentile is wanted.

  Returns:
    To be given to `observe` with the same values as in the first pass.

  Raises:
    ValueError: if the sparsity is not in 0..1.

  Example:
    >>> gate = jnp.array([[0.1, -0.3, 0.2]])
    >>> first = jax.jit(observe)(start_histogram(), gate)
    >>> hex(int(refine(first, CatsConfig(0.5)).upper))  # 0.2 is 0x3e4ccccd
    '0x3e4c'
  """
  upper, _, _ = _find(histogram, config)
  zero = jnp.zeros_like(upper)
  return GateHistogram(
    counts=jnp.zeros_like(histogram.counts),
    upper=upper,
    below=zero,
    total=zero,
    refused=histogram.refused,
  )


def find_threshold(
  histogram: GateHistogram, config: CatsConfig
) -> Float[Array, ""]:
  """The magnitude that a given share of the values does not exceed.

  The ceil(sparsity * n)-th smallest of n values, `numpy.percentile` with the
  method "inverted_cdf": of the calibration data at least the given share is
  dropped, and no value more than needed. After one pass the lower half of its
  bits is cut off. (The published code takes the left edge of one of 997 bins of
  0 to 1, .002 wide, and no more than 1.)

  Args:
    histogram: after a first or a second pass.
    config: says which percentile is wanted, to 1 / 10,000.

  Returns:
    float32. 0 for a sparsity of zero, and where nothing was seen; NaN, which
    drops everything, if the second pass cannot have seen what the first saw.

  Raises:
    ValueError: if the sparsity is not in 0..1.

  Example:
    >>> gate = jnp.array([[0.125, -0.375, 0.25]])
    >>> histogram = jax.jit(observe)(start_histogram(), gate)
    >>> float(find_threshold(histogram, CatsConfig(sparsity=0.5)))
    0.25
  """
  place, rank, inside = _find(histogram, config)
  first = histogram.upper < 0
  bits = jnp.where(first, place << 16, (histogram.upper << 16) | place)
  value = jax.lax.bitcast_convert_type(bits, jnp.float32)
  value = jnp.where(inside, value, jnp.nan)
  return jnp.where(rank == 0, 0, value)


def _find(histogram, config):
  """The bin of the value of the wanted rank, that rank, and if it is there."""
  checks.in_range(0, 1, sparsity=config.sparsity)
  # ceil(sparsity * total) in integers: float32 does not hold such totals.
  parts = round(config.sparsity * _PARTS)
  whole, rest = histogram.total // _PARTS, histogram.total % _PARTS
  rank = parts * whole + (parts * rest + _PARTS - 1) // _PARTS
  cumulative = histogram.below + jnp.cumsum(histogram.counts)
  place = jnp.sum(cumulative < rank, dtype=jnp.int32)
  inside = (histogram.below < rank) & (place < _BINS)
  return jnp.minimum(place, _BINS - 1), rank, inside


def unit_capacity(num_units: int, config: CatsConfig) -> int:
  """How many units to make room for when one token is decoded.

  Args:
    num_units: F.
    config: the sparsity, and how much room to add.

  Returns:
    (1 - sparsity) (1 + slack) F, rounded up to a multiple, at most F.

  Raises:
    ValueError: if the sparsity is not in 0..1 or the slack is negative.

  Example:
    >>> unit_capacity(14_336, CatsConfig(sparsity=0.5, slack=0.25))
    8960
  """
  checks.in_range(0, 1, sparsity=config.sparsity)
  checks.in_range(0, math.inf, slack=config.slack)
  checks.in_range(1, _MOST, multiple=config.multiple)
  kept = (1 - config.sparsity) * (1 + config.slack) * num_units
  kept = max(1, math.ceil(round(kept, 6)))
  kept = -(-kept // config.multiple) * config.multiple
  return min(kept, num_units)
