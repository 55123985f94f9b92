import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled
from tests.reduction import visionzip_test
from tokjax.reduction import visiondrop, visionzip

visiondrop = compiled(visiondrop)
visionzip = compiled(visionzip)

START, STOP, LENGTH = 2, 12, 15


def arrays(seed=0, batch=3, heads=4, key_heads=2, n=LENGTH, dim=4):
  random = np.random.default_rng(seed)
  x = random.normal(size=(batch, n, 5))
  q = random.normal(size=(batch, heads, n, dim))
  k = random.normal(size=(batch, key_heads, n, dim))
  return tuple(jnp.asarray(a, jnp.float32) for a in (x, q, k))


def attention_map(q, k, mask, causal):
  """[B, H, S, S] in float64; rows of masked queries included."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
  logits = np.einsum("bhrd,bhsd->bhrs", q, k) / np.sqrt(q.shape[-1])
  seen = np.broadcast_to(mask[:, None, None], logits.shape)
  if causal:
    seen = seen & np.tri(logits.shape[-1], dtype=bool)
  weights = np.where(seen, np.exp(logits), 0)
  return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_visual_attention_equals_the_dense_map(causal, debias):
  _, q, k = arrays()
  mask = np.random.default_rng(1).random((3, LENGTH)) < 0.8
  dense = attention_map(q, k, mask, causal).mean(axis=1)[:, :STOP, :STOP]
  poisoned = [
    jnp.where(mask[:, None, :, None], a, jnp.nan)[:, :, :STOP] for a in (q, k)
  ]
  if not causal:  # then the keys past the visual ones would be seen too
    dense = attention_map(
      q[:, :, :STOP], k[:, :, :STOP], mask[:, :STOP], False
    ).mean(axis=1)
  got = visiondrop.visual_attention(
    poisoned[0][:, :, START:],
    poisoned[1],
    jnp.asarray(mask[:, :STOP]),
    causal=causal,
    causal_debias=debias,
  )
  for b in range(3):
    for j in range(START, STOP):
      rows = [i for i in range(START, STOP) if mask[b, i]]
      total = sum(dense[b, i, j] for i in rows)
      count = len(rows)
      if causal and debias:
        count = len([i for i in rows if i >= j])
      want = total / count if mask[b, j] else 0
      np.testing.assert_allclose(got[b, j - START], want, atol=1e-5)


def test_uniform_causal_attention_favours_early_tokens():
  x = jnp.zeros((1, 1, 6, 4))
  plain = visiondrop.visual_attention(x, x, causal=True)[0]
  want = [0.408, 0.242, 0.158, 0.103, 0.061, 0.028]
  np.testing.assert_allclose(plain, want, atol=5e-4)
  fair = visiondrop.visual_attention(x, x, causal=True, causal_debias=True)[0]
  np.testing.assert_allclose(fair, plain * 6 / np.arange(6, 0, -1), atol=1e-6)
  # Rows spread out by 6 to 1 differ less once each is averaged on its own.
  assert fair[0] / fair[-1] < plain[0] / plain[-1]


def test_llm_stage_reduces_the_visual_span():
  x, q, k = arrays()
  mask = np.ones((3, LENGTH), bool)
  mask[1, 4], mask[2, 13:] = False, False
  out = jax.jit(
    lambda *a: visiondrop.llm_stage(
      *a, start=START, stop=STOP, num_dominant=3, num_contextual=2
    )
  )(x, q, k, mask)
  dense = attention_map(q, k, mask, causal=True).mean(axis=1)
  rows = dense * mask[:, :, None]
  score = rows[:, START:STOP, START:STOP].sum(axis=1)
  metric = np.asarray(k).mean(axis=1)[:, START:STOP]
  want = visionzip.visionzip(
    x[:, START:STOP],
    jnp.asarray(metric),
    jnp.asarray(score, jnp.float32),
    jnp.asarray(mask[:, START:STOP]),
    num_keep=5,
    num_contextual=2,
  )
  np.testing.assert_array_equal(out.index, want.index)
  np.testing.assert_allclose(out.tokens, want.tokens, atol=1e-5)
  assert out.size[0].sum() == 10 and out.size[1].sum() == 9


def test_text_after_the_image_has_no_influence():
  x, q, k = arrays()
  changed = [
    a.at[..., STOP:, :].set(jnp.nan) if a.ndim == 4 else a for a in (x, q, k)
  ]
  settings = dict(start=START, stop=STOP, num_dominant=3, num_contextual=2)
  want = visiondrop.llm_stage(x, q, k, **settings)
  got = visiondrop.llm_stage(*changed, **settings)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("class_token", [False, True])
def test_encoder_stage(class_token):
  x, q, k = arrays(key_heads=4)
  out = visiondrop.encoder_stage(
    x, q, k, num_dominant=4, num_contextual=2, class_token=class_token
  )
  dense = attention_map(q, k, np.ones((3, LENGTH), bool), causal=False)
  score = dense[:, :, 0].sum(axis=1)
  if not class_token:
    score = dense.mean(axis=(1, 2))
  want = visionzip.visionzip(
    x,
    jnp.mean(k, axis=1),
    jnp.asarray(score, jnp.float32),
    num_keep=6,
    num_contextual=2,
    class_token=class_token,
  )
  np.testing.assert_array_equal(out.index, want.index)
  np.testing.assert_allclose(out.tokens, want.tokens, atol=1e-5)
  if class_token:
    assert (out.index[:, 0] == 0).all()


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("counts", [(1, 0), (3, 2), (9, 6)])
def test_random_cases_equal_loops(counts, class_token):
  x, q, k = arrays(sum(counts), batch=180, heads=2)
  q = q.at[:30].set(0)  # ties: all attend to all alike
  mask = np.random.default_rng(1).random((180, LENGTH)) < 0.75
  mask[:, 0] = True  # the class token is there
  mask[30:33] = True
  hidden = mask[:, None, :, None]
  out = jax.jit(
    lambda x, q, k, mask: visiondrop.encoder_stage(
      x,
      q,
      k,
      mask,
      num_dominant=counts[0],
      num_contextual=counts[1],
      class_token=class_token,
    )
  )(
    jnp.where(mask[..., None], x, jnp.nan),
    jnp.where(hidden, q, jnp.nan),
    jnp.where(hidden, k, jnp.nan),
    mask,
  )
  dense = attention_map(q, k, mask, causal=False)
  if class_token:
    score = dense[:, :, 0].sum(axis=1)
    score[:, 0] = np.inf
  else:
    score = (dense * mask[:, None, :, None]).mean(axis=(1, 2))
  # Ties are exact; what rounding could turn round is left out.
  score = score.round(9)
  ordered = np.sort(score, axis=1)
  gaps = np.diff(ordered, axis=1)
  sure = np.where(gaps > 0, gaps, 1).min(axis=1) > 1e-6
  given = [np.asarray(a) for a in (x, np.mean(k, axis=1), score, mask)]
  out, given = jax.tree.map(lambda a: np.asarray(a)[sure], (out, given))
  assert visionzip_test.check(out, *given, *counts) > 150


def test_gradient_reaches_hidden_states_only():
  x, q, k = arrays(batch=1)
  gradients = jax.grad(
    lambda *a: jnp.sum(
      visiondrop.llm_stage(
        *a, start=START, stop=STOP, num_dominant=3, num_contextual=2
      ).tokens
    ),
    (0, 1, 2),
  )(x, q, k)
  inside = np.any(np.asarray(gradients[0][0]), axis=1)
  assert inside[START:STOP].all() and not inside[:START].any()
  assert not inside[STOP:].any()
  assert not np.any(gradients[1]) and not np.any(gradients[2])


@pytest.mark.unchecked
def test_errors():
  x, q, k = arrays()
  stage = dict(num_dominant=3, num_contextual=2)
  with pytest.raises(ValueError, match="stop must lie in 3..15, got 2"):
    visiondrop.llm_stage(x, q, k, start=2, stop=2, **stage)
  with pytest.raises(ValueError, match="hidden=14, queries=15, keys=15"):
    visiondrop.llm_stage(x[:, 1:], q, k, start=2, stop=9, **stage)
  with pytest.raises(ValueError, match="features=14, queries=15, keys=15"):
    visiondrop.encoder_stage(x[:, 1:], q, k, **stage)
  with pytest.raises(ValueError, match="num_keys must lie in 15.*, got 12"):
    visiondrop.visual_attention(q, k[:, :, :12], causal=True)
  with pytest.raises(ValueError, match="keys=15, mask=3"):
    visiondrop.visual_attention(q, k, jnp.ones((3, 3), bool), causal=True)
