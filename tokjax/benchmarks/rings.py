"""TokenRing beside rings of keys: what is sent, how often, on which links.

Bytes are counted in programs compiled for CPU devices, at the full shapes and
in float32, and must be those of `tokjax.parallel.ring_costs`, which also says
how long a pass waits for its links where arithmetic takes no time.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tokjax.benchmarks import compiled_bytes
from tokjax.benchmarks.trained_vit import Row
from tokjax.parallel import ring_costs
from tokjax.parallel.ring_attention import ring_attention
from tokjax.parallel.ring_costs import Workload
from tokjax.parallel.token_ring import token_ring

__all__ = ["RINGS", "RingRun", "claimed", "counted", "lead"]

RINGS = {
  "ring_kv": functools.partial(ring_attention, rotate="kv"),
  "ring_both": functools.partial(ring_attention, rotate="both"),
  "token_ring": token_ring,
}
# Links of one byte a second, arithmetic that takes no time: bytes waited for.
_LINKS = dict(flops=1e30, link_rate=1.0)
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class RingRun:
  """One causal attention of a sequence over devices."""

  num_heads: int  # of queries, H
  num_key_heads: int  # K
  width: int  # of a head, d
  length: int  # of the sequence, S
  num_devices: int = 8  # P
  backward: bool = False  # the backward pass, instead of the forward one
  itemsize: int = 2  # bytes of a number in `ring_costs`

  @property
  def dataset(self) -> str:
    """What is attended to, for the title of the table."""
    way = "backward" if self.backward else "forward"
    return (
      f"H {self.num_heads}, K {self.num_key_heads}, d {self.width}, "
      f"S {self.length}, P {self.num_devices}, {way}"
    )

  def workload(self, itemsize: int) -> Workload:
    """The same for `ring_costs`, of numbers of so many bytes."""
    return Workload(
      self.length,
      self.num_devices,
      self.num_heads,
      self.num_key_heads,
      self.width,
      itemsize=itemsize,
      backward=self.backward,
    )


def counted(run: RingRun, strategy: str) -> list[tuple[int, int]]:
  """What a device sends in the compiled program of a pass, float32.

  Args:
    run: the attention.
    strategy: one of `RINGS`.

  Returns:
    See `compiled_bytes.sends`.

  Raises:
    ValueError: if there are not as many CPU devices.
  """
  devices = compiled_bytes.cpu_devices(run.num_devices)
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((run.num_devices,), ("seq",), auto, devices=devices)
  spec = jax.P(None, None, "seq")
  place = jax.sharding.NamedSharding(mesh, spec)
  attend = jax.shard_map(
    functools.partial(RINGS[strategy], axis_name="seq", causal=True),
    mesh=mesh,
    in_specs=(spec,) * 3,
    out_specs=spec,
  )

  def rows(num_heads):
    shape = 1, num_heads, run.length, run.width
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

  inputs = [rows(run.num_heads), *[rows(run.num_key_heads)] * 2]
  forward = jax.jit(lambda *x: jax.vjp(attend, *x))
  program = forward.lower(*inputs).compile()
  if run.backward:  # by itself: in one program keys need not travel twice
    _, back = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      jax.eval_shape(forward, *inputs),
      program.output_shardings,
    )
    pull = jax.jit(lambda back, d_out: back(d_out))
    program = pull.lower(back, inputs[0]).compile()
  return compiled_bytes.sends(program.as_text())


def claimed(run: RingRun, *, progress: bool = True) -> dict[str, Row]:
  """Counts and costs of each ring.

  Args:
    run: the attention.
    progress: print a ring when it is done.

  Returns:
    Rows by name of `RINGS`, in MB of 1e6 bytes that a device sends: "counted"
    in the program, whose numbers are float32, and "as modelled" for the same;
    and of numbers of `itemsize` bytes "sent", on the "busier" direction of
    links to devices ahead and behind, and what a pass waits for on links of a
    "mesh", a "ring" and a "switch". "sends" is how many transfers the program
    has.
  """
  rows = {}
  work = run.workload(run.itemsize)
  for name in RINGS:
    found = counted(run, name)
    total = ring_costs.sent(work, name)
    waits = {
      topology: ring_costs.seconds(work, name, topology=topology, **_LINKS)
      for topology in ("mesh", "ring", "switch")
    }
    amounts = {
      "counted": sum(amount for _, amount in found),
      "as modelled": sum(ring_costs.sent(run.workload(_FLOAT32), name)),
      "sent": sum(total),
      "busier": max(total),
      **waits,
    }
    metrics = {key: amount / 1e6 for key, amount in amounts.items()}
    rows[name] = Row({**metrics, "sends": float(len(found))})
    if progress:
      print(name, rows[name].metrics, flush=True)
  return rows


def lead(rows: Mapping[str, Row], *, rivals: tuple[str, ...]) -> float:
  """Share of the bytes on the busier direction that TokenRing saves.

  Args:
    rows: of `claimed`.
    rivals: the rings it is compared with.

  Returns:
    The least of: the share against each; negative if more is sent. Minus
    infinity if a program does not send what is modelled.

  Example:
    >>> def row(busier):
    ...   return Row({"busier": busier, "counted": 1.0, "as modelled": 1.0})
    >>> lead({"token_ring": row(3.0), "ring_kv": row(4.0)}, rivals=("ring_kv",))
    0.25
  """
  if any(x.metrics["counted"] != x.metrics["as modelled"]
         for x in rows.values()):  # fmt: skip
    return -float("inf")
  own = rows["token_ring"].metrics["busier"]
  return min(1 - own / rows[name].metrics["busier"] for name in rivals)
