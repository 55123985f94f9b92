import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tokjax.reduction import prumerge

prumerge = compiled(prumerge)

N = 24


plus_tokens = jax.jit(
  prumerge.prumerge_plus,
  static_argnames=("num_keep", "stride"),
)


tokens = jax.jit(
  prumerge.prumerge,
  static_argnames=("num_keep",),
)


def arrays(seed=0, batch=40, n=N, dim=4):
  random = np.random.default_rng(seed)
  x, keys = random.normal(size=(2, batch, n, dim))
  attention = random.exponential(size=(batch, n)) ** 2  # some outliers
  mask = random.random((batch, n)) < 0.85
  mask[:5] = True
  attention = np.where(mask, attention, 0)
  attention /= attention.sum(axis=1, keepdims=True)
  # Every third with ties, in numbers whose quartiles are exact.
  tied = random.integers(1, 6, (batch, n)) ** 3 / 128
  attention[2::3] = np.where(mask, tied, 0)[2::3]
  cast = (jnp.asarray(a, jnp.float32) for a in (x, keys, attention))
  return *cast, jnp.asarray(mask)


def oracle(
  x, keys, attention, mask, num_keep, num_neighbors, plus, num_salient, stride
):
  """Kept positions (salient by attention, then spaced) and tokens."""
  x, keys, a = (np.asarray(v, np.float64) for v in (x, keys, attention))
  valid = np.flatnonzero(mask)
  best = sorted(valid, key=lambda n: (-a[n], n))
  low, high = np.quantile(a[valid], [0.25, 0.75])
  salient = [n for n in best if a[n] > high + 1.5 * (high - low)]
  if num_salient:
    salient = best[:num_salient]
  salient = salient or best[:1]
  spaced = []
  if plus:
    step = stride or max(len(valid) // len(salient) // 3, 1)
    spaced = [n for n in valid[:-1][::step] if n not in salient]
  both = sorted(salient + spaced, key=lambda n: (-a[n], n))[: num_keep - 1]
  kept = [n for n in salient + spaced if n in both]
  unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
  rows = {}
  for i in kept:
    others = [j for j in valid if j != i]
    near = sorted(others, key=lambda j: (-(unit[i] @ unit[j]), j))
    near = near[:num_neighbors]
    rows[i] = x[i] + sum(a[j] * x[j] for j in near)
  dropped = [j for j in valid if j not in kept]
  rest = sum((a[j] * x[j] for j in dropped), np.zeros(x.shape[1]))
  heaviest = max(dropped, key=lambda j: (a[j], -j)) if dropped else None
  return kept, rows, rest, heaviest


SETTINGS = {
  "prumerge": dict(num_keep=8),
  "one": dict(num_keep=2, num_neighbors=N),
  "all": dict(num_keep=N),
  "fixed": dict(num_keep=8, num_salient=5),
  "plus": dict(num_keep=20, plus=True),
  "plus-full": dict(num_keep=6, plus=True),
  "plus-fixed": dict(num_keep=16, plus=True, num_salient=4, stride=3),
}


@pytest.mark.parametrize("order", ["ascending", "attention"])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_a_loop(name, order):
  settings = dict(num_neighbors=5) | SETTINGS[name]
  plus = settings.pop("plus", False)
  x, keys, attention, mask = arrays(batch=75)
  method = prumerge.prumerge_plus if plus else prumerge.prumerge
  poisoned = [
    jnp.where(mask[..., None], a, jnp.nan) if a.ndim == 3 else a
    for a in (x, keys)
  ]
  out = jax.jit(lambda *a: method(*a, order=order, **settings))(
    *poisoned, jnp.where(mask, attention, jnp.nan), mask
  )
  out = jax.device_get(out)
  x, keys, attention, mask = jax.device_get((x, keys, attention, mask))
  full = dict(num_salient=None, stride=None) | settings
  for i in range(len(x)):
    kept, rows, rest, heaviest = oracle(
      x[i], keys[i], attention[i], mask[i], plus=plus, **full
    )
    if order == "ascending":
      kept = sorted(kept)
    count = len(kept) + (heaviest is not None)
    index = [*kept, *([] if heaviest is None else [heaviest])]
    assert out.index[i, :count].tolist() == index
    assert out.mask[i].tolist() == [
      k < count for k in range(settings["num_keep"])
    ]
    want = [rows[n] for n in kept] + ([] if heaviest is None else [rest])
    np.testing.assert_allclose(out.tokens[i, :count], want, atol=1e-4)
    np.testing.assert_allclose(out.size[i].sum(), mask[i].sum(), rtol=1e-5)


def test_one_outlier_of_eight():
  attention = jnp.array([[1, 1, 2, 2, 3, 3, 4, 20]]) / 36
  x = jnp.eye(8)[None]
  out = tokens(x, x, attention, num_keep=5)
  assert out.mask[0].tolist() == [True, True, False, False, False]
  assert out.index[0, :2].tolist() == [7, 6]
  np.testing.assert_allclose(
    out.tokens[0, 0], [*(attention[0, :7]), 1], atol=1e-6
  )
  np.testing.assert_allclose(
    out.tokens[0, 1], [*(attention[0, :7]), 0], atol=1e-6
  )


def test_flat_attention_keeps_the_first_token():
  x = jnp.ones((1, 6, 2))
  out = tokens(x, x, jnp.full((1, 6), 1 / 6), num_keep=4)
  assert out.index[0].tolist() == [0, 1, 5, 5]
  assert out.mask[0].tolist() == [True, True, False, False]


def test_an_example_does_not_depend_on_its_batch():
  x, keys, attention, mask = arrays(batch=4)
  want = plus_tokens(x, keys, attention, mask, num_keep=9)
  for i in range(4):
    one = plus_tokens(
      *(a[i : i + 1] for a in (x, keys, attention, mask)), num_keep=9
    )
    np.testing.assert_array_equal(one.index[0], want.index[i])
    np.testing.assert_allclose(one.tokens[0], want.tokens[i], atol=1e-6)


def test_padding_anywhere_equals_the_example_alone():
  x, keys, attention, _ = arrays(batch=4)
  mask = np.ones((4, N), bool)
  for i in range(4):
    mask[i, np.random.default_rng(i).permutation(N)[:5]] = False
  want = plus_tokens(x, keys, attention, mask, num_keep=9)
  for i in range(4):
    valid = np.flatnonzero(mask[i])
    one = plus_tokens(
      *(a[i : i + 1, valid] for a in (x, keys, attention)), num_keep=9
    )
    count = int(one.mask.sum())
    assert valid[one.index[0, :count]].tolist() == (
      want.index[i, :count].tolist()
    )
    np.testing.assert_allclose(one.tokens[0], want.tokens[i], atol=1e-5)


def test_attention_is_one_wide_head():
  random = np.random.default_rng(0)
  query, keys = random.normal(size=(2, 8)), random.normal(size=(2, 5, 8))
  mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], bool)
  weights = np.exp(np.einsum("bd,bnd->bn", query, keys) / np.sqrt(8)) * mask
  got = prumerge.prumerge_attention(
    jnp.asarray(query, jnp.float32),
    jnp.asarray(keys, jnp.float32),
    jnp.asarray(mask),
  )
  want = weights / weights.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_gradient_reaches_features_only():
  x, keys, attention, mask = arrays(batch=2)
  to_x, to_keys, to_attention = jax.grad(
    lambda *a: jnp.sum(tokens(*a, mask, num_keep=6).tokens),
    (0, 1, 2),
  )(x, keys, attention)
  out = tokens(x, keys, attention, mask, num_keep=6)
  np.testing.assert_allclose(
    to_x[..., 0], out.plan.weight.sum(axis=1), atol=1e-5
  )
  assert not np.any(to_keys) and not np.any(to_attention)


@pytest.mark.unchecked
def test_errors():
  x, keys, attention, mask = arrays(batch=2)
  for method in (prumerge.prumerge, prumerge.prumerge_plus):
    with pytest.raises(ValueError, match="num_keep must lie in 2..24, got 1"):
      method(x, keys, attention, num_keep=1)
    with pytest.raises(ValueError, match="num_salient must lie in 1..4"):
      method(x, keys, attention, num_keep=5, num_salient=5)
    with pytest.raises(ValueError, match="features=24, keys=23, attention=24"):
      method(x, keys[:, 1:], attention, num_keep=5)
    with pytest.raises(ValueError, match="order must be one of 'ascending'"):
      method(x, keys, attention, num_keep=5, order="raster")
    with pytest.raises(ValueError, match="num_neighbors must lie in 1"):
      method(x, keys, attention, num_keep=5, num_neighbors=0)
  with pytest.raises(ValueError, match="stride must lie in 1..24, got 0"):
    prumerge.prumerge_plus(x, keys, attention, mask, num_keep=5, stride=0)
