"""The order in which a ring is filled, and vectors in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokjax.kernels import hopper_tiles

NUM_RINGS = 2


def events(num_tiles, num_slots, traced):
  """(ring, what was done, slot, tile) in order; a wait has no tile."""
  most = 2 * NUM_RINGS * num_tiles

  def record(num_tiles):
    log = jax.new_ref(jnp.zeros((most + 1, 4), jnp.int32))
    count = jax.new_ref(jnp.int32(0))

    def note(*what):
      log[count[...]] = jnp.stack([jnp.int32(x) for x in what])
      count[...] += 1

    def ring(i):
      return (
        lambda slot: note(i, 0, slot, -1),
        lambda tile, slot: note(i, 1, slot, tile),
      )

    rings = [ring(i) for i in range(NUM_RINGS)]
    hopper_tiles.fill_rings(num_tiles, num_slots, *rings)
    return log[...], count[...]

  if traced:
    log, count = jax.jit(record)(jnp.int32(num_tiles))
  else:
    log, count = jax.jit(lambda: record(num_tiles))()
  assert count == most
  return np.asarray(log)[:most].tolist()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("num_tiles, num_slots", [(0, 2), (2, 3), (5, 2)])
def test_a_slot_is_free_before_it_is_filled(num_tiles, num_slots, traced):
  held = {}
  asked = [[] for _ in range(NUM_RINGS)]
  for ring, fills, slot, tile in events(num_tiles, num_slots, traced):
    if fills:
      assert held.get((ring, slot)) is None and slot == tile % num_slots
      held[ring, slot] = tile
      asked[ring].append(tile)
    else:  # nobody waits for what was never asked for
      assert held.get((ring, slot)) is not None
      held[ring, slot] = None
  assert asked == [list(range(num_tiles))] * NUM_RINGS
  assert set(held.values()) <= {None}


def test_vectors_are_those_of_the_place(interpreter):
  def body(x, out):
    rows = hopper_tiles.load_vector(x, (1, 0), hopper_tiles.ROW)
    out[0] = rows + hopper_tiles.load_vector(x, (1, 1), hopper_tiles.ROW)

  x = jnp.arange(4 * 64.0).reshape(2, 2, 64)
  got = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((1, 64), jnp.float32),
    interpret=interpreter,
  )(x)
  np.testing.assert_array_equal(got[0], x[1].sum(axis=0))
