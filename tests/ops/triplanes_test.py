"""Features of three planes, and coordinates as waves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tokjax.ops import fourier, triplanes

R, C = 4, 2


def planes(seed=0):
  random = np.random.default_rng(seed)
  return random.normal(size=(2, 3, R, R, C)).astype(np.float32)


def oracle(planes, places):
  """One place of one example, in loops."""
  out = []
  for plane, axes in zip(planes, [(0, 1), (0, 2), (1, 2)], strict=True):
    value = np.zeros(C)
    for i in range(R):
      for j in range(R):
        weight = 1.0
        for index, axis in zip((i, j), axes, strict=True):
          at = np.clip((places[axis] + 1) * R / 2 - 0.5, 0, R - 1)
          weight *= max(0, 1 - abs(at - index))
        value += weight * plane[i, j]
    out.append(value)
  return np.array(out)


@pytest.mark.parametrize("block_size", [None, 3, 5])
def test_equals_a_loop(block_size):
  x = planes()
  places = np.random.default_rng(1).uniform(-1.2, 1.2, (2, 10, 3))
  want = np.array(
    [[oracle(x[b], place) for place in places[b]] for b in range(2)]
  )
  got = run(
    triplanes.triplane_query, x, places.astype(np.float32),
    block_size=block_size,
  )  # fmt: skip
  np.testing.assert_allclose(got, want.sum(2), atol=1e-5)
  got = run(
    triplanes.triplane_query, x, places.astype(np.float32),
    block_size=block_size, combine="concatenate",
  )  # fmt: skip
  np.testing.assert_allclose(got, want.reshape(2, 10, 3 * C), atol=1e-5)


def test_centres_give_what_is_stored_and_edges_stay():
  x = planes()
  centres = (np.arange(R) + 0.5) / R * 2 - 1
  places = np.stack(np.meshgrid(centres, centres, [0.0]), -1).reshape(1, -1, 3)
  places = np.broadcast_to(places, (2, R * R, 3)).astype(np.float32)
  got = run(triplanes.triplane_query, x, places, combine="concatenate")
  stored = x[:, 0].swapaxes(1, 2).reshape(2, R * R, C)
  np.testing.assert_array_equal(got[..., :C], stored)
  corner = np.full((2, 1, 3), -0.75, np.float32)
  got, beyond = (
    run(triplanes.triplane_query, x, place) for place in (corner, 2 * corner)
  )
  np.testing.assert_array_equal(got, beyond)
  np.testing.assert_allclose(got[:, 0], x[:, :, 0, 0].sum(1), atol=1e-6)


def test_one_cell_is_everywhere():
  x = planes()[:, :, :1, :1]
  places = np.random.default_rng(1).uniform(-1, 1, (2, 3, 3))
  got = run(triplanes.triplane_query, x, places.astype(np.float32))
  want = np.broadcast_to(x[:, :, 0, 0].sum(1)[:, None], (2, 3, C))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_gradients_reach_planes_and_places():
  x, place = planes(), np.full((2, 1, 3), 0.1, np.float32)
  total = lambda x, place: jnp.sum(triplanes.triplane_query(x, place))  # noqa: E731
  of_x, of_place = jax.jit(jax.grad(total, argnums=(0, 1)))(x, place)
  # Shares of the corners of each plane sum to one.
  np.testing.assert_allclose(of_x.sum((2, 3)), 1, rtol=1e-5)
  assert np.count_nonzero(of_x[0, 0, ..., 0]) == 4
  step = 1e-2
  for axis in range(3):
    there, back = (
      run(triplanes.triplane_query, x, place + sign * step * np.eye(3)[axis])
      for sign in (1, -1)
    )
    slope = (there - back).sum((1, 2)) / (2 * step)
    np.testing.assert_allclose(
      of_place[:, 0, axis], slope, rtol=1e-2, atol=1e-3
    )


def test_waves():
  x = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
  got = run(fourier.fourier_features, x, num_frequencies=3)
  angles = np.stack([np.pi * 2**k * x for k in range(3)], -1).reshape(5, 6)
  want = np.concatenate([x, np.sin(angles), np.cos(angles)], -1)
  np.testing.assert_allclose(got, want, atol=1e-5)
  same = run(fourier.fourier_features, x, num_frequencies=0)
  np.testing.assert_array_equal(same, x)


@pytest.mark.unchecked
def test_errors():
  x, places = jnp.asarray(planes()), jnp.zeros((2, 3, 3))
  with pytest.raises(ValueError, match="combine must be one of"):
    triplanes.triplane_query(x, places, combine="max")
  with pytest.raises(ValueError, match="planes=2, three=3"):
    triplanes.triplane_query(x[:, :2], places)
  with pytest.raises(ValueError, match="num_frequencies must lie in"):
    fourier.fourier_features(places, num_frequencies=-1)
