"""Slot-MLLM: slots, their codes by depth, and who gets which gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tokenizers.filled_module import filled
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.q_former import QFormerConfig
from tokjax.tokenizers.residual_quantizer import RVQConfig
from tokjax.tokenizers.slot_attention import SlotAttentionConfig
from tokjax.tokenizers.slot_mllm import SIZES, SlotMLLM, SlotMLLMConfig

B, N, C, D, S, M, K = 8, 6, 5, 8, 3, 2, 7
CONFIG = SlotMLLMConfig(
  QFormerConfig(
    D, 2, 2, num_queries=S, context_dim=C, init_scale=0.5,
    slots=SlotAttentionConfig(D, C, 2, 2, compete="heads_slots"),
  ),
  RVQConfig(CodebookConfig(K, 4), num_stages=M),
  num_features=N, feature_dim=C, num_decoder_layers=1, num_feature_layers=1,
  num_decoder_heads=2,
)  # fmt: skip
EVERYWHERE = np.ones((B, N), bool)
OF_SLOTS = ("norm_features", "features_in", "q_former")
OF_FEATURES = ("feature_positions", "feature_decoder", "feature_out")


@functools.cache
def build(**settings):
  config = dataclasses.replace(CONFIG, **settings)
  model = filled(lambda: config.build(nnx.Rngs(0)))
  model = jax.tree.map(jnp.asarray, model)
  return model, model.init_state(jax.random.key(2))


def features():
  random = np.random.default_rng(0)
  return random.normal(size=(B, N, C)).astype(np.float32)


@jax.jit
def learn(model, state, x, mask):
  """((loss, (found, state)), gradients) of one step."""

  def loss(model):
    found, after = model(x, state, mask=mask, train=True)
    return sum(found.losses.values()), (found, after)

  return jax.value_and_grad(loss, has_aux=True)(model)


@jax.jit
def codes(model, state, x, mask=None):
  """Everything on the way there and back."""
  indices = model.encode(x, state, mask).indices
  slots = model.slots(x, mask)
  restored = model.decode(indices, state)
  return {
    "slots": slots.queries,
    "attention": slots.attention,
    "features": model.decode_features(slots.queries),
    "indices": indices,
    "restored": restored,
    "coarse": model.decode(indices, state, num_levels=1),
    "first": model.decode(indices.at[..., 1:].set(-1), state),
    "coded_features": model.decode_features(restored),
  }


def parts(tree):
  """Largest gradient by attribute."""
  names = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    assert np.isfinite(x).all()
    name = jax.tree_util.keystr(path[:1], simple=True)
    names[name] = max(names.get(name, 0), float(np.abs(x).max()))
  return names


def error(x, y, loss):
  x, y = np.float64(x), np.float64(y)
  if loss == "square":
    return ((x - y) ** 2).mean(-1)
  norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
  return 1 - (x * y).sum(-1) / norms


def test_stage_of_slots():
  model, state = build()
  x = features()
  (_, (found, after)), gradients = learn(model, state, x, EVERYWHERE)
  way = codes(model, state, x)
  assert way["slots"].shape == (B, S, D)
  np.testing.assert_allclose(
    way["attention"].sum(1), np.ones((B, N)), atol=1e-5
  )
  np.testing.assert_allclose(way["features"], found.output, atol=1e-4)
  want = error(found.output, x, "cosine").mean()
  assert found.losses.keys() == {"features"}
  assert float(found.losses["features"]) == pytest.approx(want, rel=1e-4)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  for name, largest in parts(gradients).items():
    assert (largest > 0) == (name in OF_SLOTS + OF_FEATURES), name


@pytest.mark.parametrize("restore, feature, freeze", [
  ("cosine", "square", True), ("square", "cosine", False),
])  # fmt: skip
def test_stage_of_codes(restore, feature, freeze):
  model, state = build(
    stage="tokenizer", restore_loss=restore, feature_loss=feature,
    freeze_slots=freeze,
  )  # fmt: skip
  x = features()
  (_, (found, _)), gradients = learn(model, state, x, EVERYWHERE)
  way = codes(model, state, x)
  assert way["indices"].shape == (B, S, M)
  np.testing.assert_allclose(way["coded_features"], found.output, atol=1e-4)
  kernel, bias = (
    np.float64(x[...]) for x in (model.code_in.kernel, model.code_in.bias)
  )
  left, square = np.float64(way["slots"]) @ kernel + bias, []
  tables = np.float64(model.quantizer.codebooks.codes[...])
  for level in range(M):
    far = ((left[..., None, :] - tables[level]) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(way["indices"][..., level], far)
    left = left - tables[level][far]
    square.append((left**2).mean())
  wants = {
    "commitment": 0.25 * np.mean(square),
    "codebook": np.mean(square),
    "restore": error(way["restored"], way["slots"], restore).mean(),
    "features": 0.1 * error(found.output, x, feature).mean(),
  }
  assert found.losses.keys() == wants.keys()
  for name, value in wants.items():
    assert float(found.losses[name]) == pytest.approx(value, rel=1e-3), name
  for name, largest in parts(gradients).items():
    assert (largest > 0) == (name not in OF_SLOTS or not freeze), name
  np.testing.assert_allclose(way["first"], way["coarse"], atol=1e-5)
  assert np.abs(way["coarse"] - way["restored"]).max() > 1e-3


def test_images_without_features_do_not_count():
  """Half of the batch NaN: the losses of the other half."""
  model, state = build(
    stage="tokenizer", restore_loss="square", feature_loss="cosine",
    freeze_slots=False,
  )  # fmt: skip
  mask = np.random.default_rng(1).random((B, N)) < 0.7
  mask[:, 0] = True
  x, mask = (np.concatenate([z[:4], z[:4]]) for z in (features(), mask))
  (_, (want, _)), _ = learn(model, state, x, mask)
  mask = mask & (np.arange(B) < 4)[:, None]
  x = np.where(mask[..., None], x, np.nan)
  (_, (got, _)), gradients = learn(model, state, x, mask)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
  jax.tree.map(close, (got.losses, got.stats), (want.losses, want.stats))
  close(got.output[:4], want.output[:4], atol=1e-5)
  assert parts(gradients)["features_in"] > 0
  indices = codes(model, state, x, mask)["indices"]
  assert np.all(indices[4:] == -1) and np.all(indices[:4] >= 0)


def test_over_eight_devices_equals_one():
  model, state = build(stage="tokenizer", freeze_slots=False)
  mesh = jax.make_mesh((8,), ("data",))
  mask = np.random.default_rng(1).random((B, N)) < 0.7
  batch = features(), mask
  parted = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))

  def losses(model, state, x, mask, axis_name=None):
    found, state = model(x, state, mask=mask, train=True, axis_name=axis_name)
    return found.losses, found.stats, state

  local = jax.shard_map(
    functools.partial(losses, axis_name="data"),
    mesh=mesh,
    in_specs=(jax.P(), jax.P(), jax.P("data"), jax.P("data")),
    out_specs=jax.P(),
  )
  both = [
    jax.device_get(jax.jit(f)(model, state, *rows))
    for f, rows in ((local, parted), (losses, batch))
  ]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *both
  )


def test_published_sizes():
  for config in SIZES.values():
    model = jax.eval_shape(lambda c=config: c.build(nnx.Rngs(0)))
    state = jax.eval_shape(model.init_state, jax.random.key(0))
    x = jnp.zeros((1, 256, 1024))
    found = jax.eval_shape(lambda m, x, s: m.encode(x, s), model, x, state)
    assert found.indices.shape == (1, 32, 4)


@pytest.mark.unchecked
def test_settings_that_cannot_be():
  for settings, message in (
    ({"stage": "both"}, "stage must be one of"),
    ({"restore_loss": "l1"}, "restore_loss must be one of"),
    ({"num_features": 0}, "num_features must lie in"),
    ({"q_former": dataclasses.replace(CONFIG.q_former, slots=None)},
     "q_former must have slots, got None"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      SlotMLLM(dataclasses.replace(CONFIG, **settings), rngs=nnx.Rngs(0))
  model, state = build()
  assert model.reads == ("features",)
  with pytest.raises(ValueError, match="features=4, num_features=6"):
    jax.eval_shape(model, jnp.ones((1, 4, C)), state)
