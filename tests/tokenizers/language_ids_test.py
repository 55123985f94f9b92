"""Ids of a language model: order, offsets, and back."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.tokenizers import language_ids as module

language_ids = compiled(module)


@pytest.mark.parametrize(
  "order, shared", itertools.product(("vectors", "levels"), (True, False))
)
def test_there_and_back(order, shared):
  codes = np.random.default_rng(0).integers(0, 5, (2, 3, 4)).astype(np.int32)
  settings = {"num_codes": 5, "offset": 10, "order": order, "shared": shared}
  ids = language_ids.to_language(codes, **settings)
  want = [
    [
      10 + codes[b, s, level] + (0 if shared else 5 * level)
      for s, level in (
        itertools.product(range(3), range(4))
        if order == "vectors"
        else ((s, level) for level in range(4) for s in range(3))
      )
    ]
    for b in range(2)
  ]
  np.testing.assert_array_equal(ids, want)
  back = language_ids.from_language(ids, num_levels=4, **settings)
  np.testing.assert_array_equal(back, codes)


def test_what_is_put_around_and_what_is_no_code():
  codes = jnp.arange(3)[None, :, None]
  ids = language_ids.to_language(
    codes, num_codes=3, offset=7, begin=1, end=2
  )  # fmt: skip
  assert ids.tolist() == [[1, 7, 8, 9, 2]]
  back = language_ids.from_language(ids, num_codes=3, offset=7)
  assert back[..., 0].tolist() == [[-1, 0, 1, 2, -1]]


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="order must be one of"):
    module.to_language(
      jnp.zeros((1, 1, 1), int), num_codes=2, offset=0, order="slots"
    )
  with pytest.raises(ValueError, match="ids must have 3 axes"):
    module.to_language(jnp.zeros((1, 1), int), num_codes=2, offset=0)
  with pytest.raises(ValueError, match="ids must be a multiple of 2, got 3"):
    module.from_language(
      jnp.zeros((1, 3), int), num_codes=2, offset=0, num_levels=2
    )
