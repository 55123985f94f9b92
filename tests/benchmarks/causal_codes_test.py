"""Other views of an image and how often they find each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.compiled import run
from tokjax.benchmarks import causal_codes


def test_recall_equals_sorting():
  random = np.random.default_rng(0)
  one = random.normal(size=(9, 4))
  two = one + random.normal(size=(9, 4))
  order = np.argsort(-(one @ two.T), axis=1)
  for k in (1, 3, 9):
    want = np.mean([i in order[i, :k] for i in range(9)])
    assert causal_codes.recall(one, two, k=k) == want


def test_views_move_and_mirror():
  image = jnp.arange(16.0).reshape(1, 4, 4, 1) / 64
  images = jnp.tile(image, (64, 1, 1, 3))
  view = functools.partial(causal_codes.views, shift=0)
  made = np.asarray(run(view, jax.random.key(0), images))[..., 0]
  first = np.asarray(image[0, ..., 0])
  mirrored = set()
  for x in made:  # lighter or darker: a line through the pixels
    fits = []
    for y in (first, first[:, ::-1]):
      line = np.polynomial.Polynomial.fit(y.ravel(), x.ravel(), 1)
      fits.append(np.abs(line(y) - x).max() < 1e-4)
    assert sum(fits) == 1
    mirrored.add(fits[1])
  assert mirrored == {False, True}
  moved = run(functools.partial(causal_codes.views, shift=2),
              jax.random.key(0), images)  # fmt: skip
  assert moved.shape == images.shape and np.abs(moved - made[..., None]).max()
