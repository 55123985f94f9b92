"""The zoo: everything is called alike, and compared by what it is."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.tokenizers import quantizers

WIDTH, BITS = 16, 8


@pytest.mark.parametrize("name", quantizers.TABLE)
def test_every_quantizer_is_called_alike(name):
  """Shapes only: what the calls give is tested where each is defined."""

  def everything(x, mask, key):
    start, key = jax.random.split(key)
    quantizer = quantizers.make(name, WIDTH, BITS, nnx.Rngs(0))
    state = quantizer.init_state(start)
    found, after = quantizer(
      x, state, mask, train=True, key=key, axis_name=None
    )  # fmt: skip
    assert quantizer.bits_per_vector == pytest.approx(BITS, abs=0.1)
    several = math.prod(found.indices.shape[2:])
    codes = math.log2(quantizer.num_codes) * several
    assert codes == pytest.approx(quantizer.bits_per_vector)
    again = quantizer.lookup(found.indices, after)
    return found, state, after, again

  x = jax.ShapeDtypeStruct((2, 3, WIDTH), jnp.bfloat16)
  mask = jax.ShapeDtypeStruct((2, 3), bool)
  found, state, after, again = jax.eval_shape(
    everything, x, mask, jax.random.key(0)
  )
  assert found.codes.shape == x.shape == again.shape
  assert found.codes.dtype == jnp.bfloat16
  assert found.indices.shape[:2] == (2, 3)
  assert found.indices.dtype == jnp.int32
  assert set(found.stats) == {"usage", "perplexity"}
  shapes = [
    jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, after)
  ]
  assert shapes[0] == shapes[1]


def test_levels_have_as_many_codes():
  for bits in range(2, 31):
    levels = quantizers.fsq_levels(bits)
    assert math.log2(math.prod(levels)) == pytest.approx(bits, abs=0.1)
    assert min(levels) >= 4 and math.prod(levels) <= 1.07 * 2**bits
  assert quantizers.fsq_levels(10) == (8, 5, 5, 5)
  assert quantizers.fsq_levels(6) == (8, 8)


def test_joint_index_counts_in_the_base_of_the_codes():
  index = np.random.default_rng(0).integers(-1, 5, (4, 3, 2, 3))
  got = run(quantizers.joint_index, index, 5, 2)
  for where in np.ndindex(4, 3):
    digits = index[where].ravel()
    want = sum(int(d) * 5**i for i, d in enumerate(digits))
    assert got[where] == (want if (digits >= 0).all() else -1)
  one = run(quantizers.joint_index, index[..., 0, 0], 5, 2)
  np.testing.assert_array_equal(one, index[..., 0, 0])


def test_comparison_of_the_survey():
  names = ["vq", "vq_ema_reset", "vq_simvq", "vq_cosine", "rvq", "fsq", "bsq"]
  rows = {row.name: row for row in quantizers.compare(WIDTH, BITS, names)}
  K, D = 2**BITS, WIDTH
  parameters = {name: rows[name].parameters for name in names}
  assert parameters == {
    "vq": K * D,
    "vq_ema_reset": K * D,
    "vq_simvq": K * D + D * D,
    "vq_cosine": K * 8,
    "rvq": 2 * 16 * D,
    "fsq": 0,
    "bsq": 0,
  }
  assert rows["rvq"].tables == (2, 16, D) and rows["fsq"].tables == ()
  codes = {name: rows[name].effective_codes for name in names}
  assert codes == pytest.approx({name: K for name in names} | {"fsq": 240})
  moves = {name: rows[name].unused_codes_move for name in names}
  assert moves == {
    "vq": False,
    "vq_ema_reset": True,
    "vq_simvq": True,
    "vq_cosine": False,
    "rvq": False,
    "fsq": None,
    "bsq": None,
  }
  needs = [name for name in names if rows[name].needs_remedy]
  assert needs == ["vq", "vq_cosine", "rvq"]
  assert sorted(rows["vq"].losses) == ["codebook", "commitment"]
  assert rows["bsq"].losses == ("entropy",) and rows["fsq"].losses == ()


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="name must be one of 'vq'"):
    quantizers.make("vqq", WIDTH, BITS, nnx.Rngs(0))
  with pytest.raises(ValueError, match="bits must be a multiple of 2"):
    quantizers.make("vq", WIDTH, 7, nnx.Rngs(0))
  with pytest.raises(ValueError, match="bits must lie in 4..20"):
    quantizers.make("vq", WIDTH, 22, nnx.Rngs(0))
  with pytest.raises(ValueError, match="bits must lie in 2..30"):
    quantizers.fsq_levels(31)
  with pytest.raises(ValueError, match="bits must lie in 0..31"):
    quantizers.joint_index(jnp.zeros((2, 4), jnp.int32), 1024, 1)
