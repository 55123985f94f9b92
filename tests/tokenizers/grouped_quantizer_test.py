"""Groups of channels equal quantizers of their own, one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.grouped_quantizer import GroupedConfig
from tokjax.tokenizers.lookup_free import LookupFreeConfig
from tokjax.tokenizers.residual_quantizer import RVQConfig
from tokjax.tokenizers.vector_quantizer import VQConfig

G, K, D = 3, 5, 2
BOOK = CodebookConfig(K, D, learning="ema", decay=0.5)
INNER = {
  "vq": VQConfig(BOOK),
  "heads": VQConfig(CodebookConfig(K, 1), num_heads=2),
  "rvq": RVQConfig(BOOK, num_stages=2),
  "fsq": LookupFreeConfig("fsq", levels=(5, 3)),
}


def make(inner):
  return GroupedConfig(inner, G).build(nnx.Rngs(0))


def tokens(seed=0, shape=(3, 4, G * D)):
  random = np.random.default_rng(seed)
  return random.normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="train")
def call(
  quantizer, x, state, mask=None, key=None, num_active=None, train=False
):
  return quantizer(
    x, state, mask, key=key, train=train, num_active=num_active
  )  # fmt: skip


@pytest.mark.parametrize("name", INNER)
def test_equals_one_group_after_the_other(name):
  quantizer = make(INNER[name])
  state = run(quantizer.init_state, jax.random.key(0))
  state = jax.tree.map(lambda x: 9 * x, state)  # codes that differ
  x, mask = tokens(), np.random.default_rng(2).random((3, 4)) < 0.7
  found, after = call(quantizer, x, state, mask, train=True)
  losses = []
  one = jax.jit(lambda q, x, state: q(x, state, mask, train=True))
  for g in range(G):
    part = jax.tree.map(lambda leaf, g=g: leaf[g], quantizer.quantizers)
    mine = jax.tree.map(lambda leaf, g=g: leaf[g], state)
    want, then = one(part, x[..., D * g : D * (g + 1)], mine)
    np.testing.assert_array_equal(found.indices[..., g], want.indices)
    np.testing.assert_allclose(
      found.codes[..., D * g : D * (g + 1)], want.codes, atol=1e-6
    )
    jax.tree.map(
      lambda a, b, g=g: np.testing.assert_allclose(a[g], b, rtol=1e-5),
      after,
      then,
    )
    losses.append(want.losses)
  for loss, value in found.losses.items():
    want = np.mean([float(each[loss]) for each in losses])
    assert float(value) == pytest.approx(want, rel=1e-5)
  np.testing.assert_array_equal(found.mask, mask)
  bits = {"vq": np.log2(K), "heads": 2 * np.log2(K), "rvq": 2 * np.log2(K),
          "fsq": np.log2(15)}[name]  # fmt: skip
  assert quantizer.bits_per_vector == pytest.approx(G * bits)
  assert quantizer.num_codes == (15 if name == "fsq" else K)
  again = run(quantizer.lookup, found.indices, state)
  np.testing.assert_allclose(again, found.codes, atol=1e-6)


def test_all_groups_use_as_many_stages():
  inner = RVQConfig(BOOK, num_stages=4, dropout_from=1)
  quantizer = make(inner)
  state = run(quantizer.init_state, jax.random.key(0))
  depths = set()
  for seed in range(6):
    key = jax.random.key(seed)
    found, _ = call(quantizer, tokens(), state, key=key, train=True)
    used = np.asarray(found.indices) >= 0  # [3, 4, M, G]
    assert len(np.unique(used.sum(2))) == 1
    depths.add(int(used[0, 0, :, 0].sum()))
  assert len(depths) > 1
  found, _ = call(quantizer, tokens(), state, num_active=2)
  np.testing.assert_array_equal(found.indices[..., 2:, :], -1)


def test_groups_draw_for_themselves():
  inner = VQConfig(CodebookConfig(K, D), sample_temperature=1e6)
  quantizer = make(inner)
  state = run(quantizer.init_state, jax.random.key(0))
  x, key = np.zeros((50, G * D), np.float32), jax.random.key(1)
  found, _ = call(quantizer, x, state, key=key, train=True)
  assert not np.array_equal(found.indices[:, 0], found.indices[:, 1])


def test_errors():
  quantizer = make(INNER["fsq"])
  with pytest.raises(ValueError, match="width_of_x must be a multiple of 3"):
    quantizer(jnp.ones((2, 4)), ())
  with pytest.raises(ValueError, match="quantizers of LookupFreeConfig"):
    quantizer(jnp.ones((2, 6)), (), num_active=1)
  with pytest.raises(ValueError, match="groups_of_indices=2, num_groups=3"):
    quantizer.lookup(jnp.zeros((4, 2), jnp.int32), ())
  with pytest.raises(ValueError, match="num_groups must lie in"):
    GroupedConfig(INNER["vq"], 0).build(nnx.Rngs(0))
  with pytest.raises(ValueError, match="key must be given to train"):
    dropping = make(RVQConfig(BOOK, num_stages=2, dropout_from=1))
    state = dropping.init_state(jax.random.key(0))
    dropping(jnp.ones((2, 6)), state, train=True)
