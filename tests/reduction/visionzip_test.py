import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tests.ops import merging_test
from tokjax.reduction import visionzip

visionzip = compiled(visionzip)

zip_tokens = jax.jit(
  visionzip.visionzip,
  static_argnames=("num_keep", "num_contextual", "class_token"),
)


def arrays(seed=0, batch=3, n=20, dim=4):
  random = np.random.default_rng(seed)
  x, metric = random.normal(size=(2, batch, n, dim))
  score = random.random((batch, n))
  return tuple(jnp.asarray(a, jnp.float32) for a in (x, metric, score))


def oracle(x, metric, score, num_dominant, num_contextual):
  """The published steps for one example, in float64."""
  x, metric = np.asarray(x, np.float64), np.asarray(metric, np.float64)
  dominant = np.sort(np.argsort(-np.asarray(score))[:num_dominant])
  rest = np.setdiff1d(np.arange(len(x)), dominant)
  unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
  step = max(1, len(rest) // num_contextual)
  targets = rest[::step][:num_contextual]
  others = np.setdiff1d(rest, targets)
  near = (unit[others] @ unit[targets].T).argmax(axis=1)
  rows = [x[n] for n in dominant]
  for c, target in enumerate(targets):
    members = others[near == c]
    rows.append(x[target] + (x[members].mean(axis=0) if len(members) else 0))
  return np.stack(rows), [*dominant, *targets]


def test_equals_the_published_steps():
  x, metric, score = arrays()
  out = jax.jit(visionzip.visionzip, static_argnames=("num_keep",))(
    x, metric, score, num_keep=12
  )
  for b in range(3):  # 12 are 10 dominant ones and 2 contextual
    tokens, index = oracle(x[b], metric[b], score[b], 10, 2)
    np.testing.assert_allclose(out.tokens[b], tokens, atol=1e-5)
    assert out.index[b].tolist() == index
    assert out.size[b].sum() == 20


def check(out, x, metric, score, mask, num_dominant, num_contextual):
  """Compares with loops in float64; how many cases had no near tie."""
  checked = 0
  for b in range(len(x)):
    try:
      outputs = merging_test.oracle_dominant(
        metric[b], mask[b], score[b], num_dominant, num_contextual
      )
    except merging_test.NearTie:
      continue
    checked += 1
    assert out.index[b][out.mask[b]].tolist() == [n for n, _ in outputs]
    for k, (_, members) in enumerate(outputs):
      want = sum(w * x[b, n].astype(np.float64) for n, w in members.items())
      np.testing.assert_allclose(out.tokens[b, k], want, atol=1e-5)
      assert out.size[b, k] == len(members)
  return checked


@pytest.mark.parametrize(
  "num_keep, num_contextual", [(1, 0), (4, 2), (8, 7), (merging_test.N, 3)]
)
def test_random_cases_equal_a_loop(num_keep, num_contextual):
  metric, mask, _, score, x = merging_test.cases(num_keep, count=270)
  poisoned = [np.where(mask[..., None], a, np.nan) for a in (x, metric)]
  out = zip_tokens(
    *poisoned,
    np.where(mask, score, np.nan),
    mask,
    num_keep=num_keep,
    num_contextual=num_contextual,
  )
  given = x, metric, score, mask, num_keep - num_contextual, num_contextual
  assert check(jax.device_get(out), *given) > 250


def test_published_budgets():
  x, metric, score = arrays(batch=1, n=300)
  for num_keep, few in ((64, 10), (128, 20), (192, 30)):
    out = zip_tokens(x, metric, score, num_keep=num_keep)
    dominant = jnp.sort(jax.lax.top_k(score[0], num_keep - few)[1])
    np.testing.assert_array_equal(out.index[0, : num_keep - few], dominant)
    rest = np.setdiff1d(np.arange(300), dominant)
    targets = rest[:: len(rest) // few][:few]
    np.testing.assert_array_equal(out.index[0, num_keep - few :], targets)


def test_the_class_token_stays_first():
  x, metric, score = arrays()
  score = score.at[:, 0].set(0)
  out = zip_tokens(
    x, metric, score, num_keep=6, num_contextual=2, class_token=True
  )
  assert (out.index[:, 0] == 0).all()
  np.testing.assert_array_equal(out.tokens[:, 0], x[:, 0])
  without = zip_tokens(
    x[:, 1:], metric[:, 1:], score[:, 1:], num_keep=5, num_contextual=2
  )
  np.testing.assert_array_equal(out.tokens[:, 1:], without.tokens)
  np.testing.assert_array_equal(out.index[:, 1:], without.index + 1)


def test_without_contextual_tokens_it_is_a_selection():
  x, metric, score = arrays()
  out = zip_tokens(x, metric, score, num_keep=5, num_contextual=0)
  want = jnp.sort(jax.lax.top_k(score, 5)[1], axis=1)
  np.testing.assert_array_equal(out.index, want)
  assert (out.size == 1).all()


def test_everything_fits():
  x, metric, score = arrays()
  out = zip_tokens(x, metric, score, num_keep=20)
  np.testing.assert_array_equal(out.tokens, x)
  mask = jnp.arange(20)[None] % 3 < jnp.array([1, 2, 1])[:, None]
  out = zip_tokens(x, metric, score, mask, num_keep=15)
  for b in range(3):
    valid = np.flatnonzero(mask[b])
    count = len(valid)
    assert out.index[b, :count].tolist() == valid.tolist()
    assert out.mask[b].sum() == count
    np.testing.assert_array_equal(out.tokens[b, :count], x[b, valid])


def test_signals_are_attention_and_mean_keys():
  random = np.random.default_rng(1)
  q = random.normal(size=(2, 3, 1, 4))
  k = random.normal(size=(2, 3, 9, 4))
  mask = random.random((2, 9)) < 0.7
  logits = np.einsum("bhd,bhnd->bhn", q[:, :, 0], k) / 2
  weights = np.exp(logits) * mask[:, None]
  weights /= weights.sum(axis=2, keepdims=True)
  poisoned = np.where(mask[:, None, :, None], k, np.nan)
  signals = visionzip.visionzip_signals(
    jnp.asarray(q, jnp.float32),
    jnp.asarray(poisoned, jnp.float32),
    jnp.asarray(mask),
  )
  np.testing.assert_allclose(signals.score, weights.sum(axis=1), atol=1e-5)
  np.testing.assert_allclose(
    np.asarray(signals.metric)[mask], k.mean(axis=1)[mask], atol=1e-5
  )
  assert isinstance(signals, visionzip.Signals)


def test_gradient_reaches_all_but_not_the_signals():
  x, metric, score = arrays(batch=1)
  to_x, *others = jax.grad(
    lambda *a: jnp.sum(zip_tokens(*a, num_keep=6).tokens), (0, 1, 2)
  )(x, metric, score)
  out = zip_tokens(x, metric, score, num_keep=6)
  np.testing.assert_allclose(to_x[0, :, 0], out.plan.weight[0], atol=1e-6)
  assert not any(np.any(g) for g in others)


@pytest.mark.unchecked
def test_errors():
  x, metric, score = arrays()
  with pytest.raises(ValueError, match="num_keep must lie in 1..20, got 0"):
    visionzip.visionzip(x, metric, score, num_keep=0)
  with pytest.raises(ValueError, match="num_contextual must lie in 0..4"):
    visionzip.visionzip(x, metric, score, num_keep=5, num_contextual=5)
  with pytest.raises(ValueError, match="features=20, metric=19, score=20"):
    visionzip.visionzip(x, metric[:, 1:], score, num_keep=5)
