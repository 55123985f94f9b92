"""SEED: tokens in an order, two stages, and who gets which gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compiled import run
from tests.tokenizers.filled_module import filled
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.q_former import QFormerConfig
from tokjax.tokenizers.seed import SIZES, Seed, SeedConfig

B, N, C, D, Q, K, E, G = 8, 5, 6, 8, 3, 7, 10, 4
FORMER = QFormerConfig(
  D, 2, 2, num_queries=Q, context_dim=C, dropout_rate=0.1, init_scale=0.5
)
CONFIG = SeedConfig(
  FORMER, CodebookConfig(K, 4), num_decoder_layers=1, num_embed_layers=1,
  reverse=dataclasses.replace(FORMER, num_queries=2, context_dim=D),
  embed_dim=G, other_dim=E, projection_dim=5,
)  # fmt: skip
IN_STAGE_1 = ("q_former", "project", "project_other", "log_temperature")


@functools.cache
def build(stage="tokenizer", legacy=True):
  config = dataclasses.replace(CONFIG, stage=stage, legacy=legacy)
  model = filled(lambda: config.build(nnx.Rngs(0)))
  model = jax.tree.map(jnp.asarray, model)
  model.log_temperature = nnx.Param(jnp.log(0.07))
  return model, model.init_state(jax.random.key(2))


def inputs():
  random = np.random.default_rng(0)
  shapes = (B, N, C), (B, E), (B, 2, G)
  return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@jax.jit
def learn(model, state, x, given):
  """((loss, (found, state)), gradients) of one step."""

  def loss(model):
    found, after = model(x, state, train=True, **given)
    return sum(found.losses.values()), (found, after)

  return jax.value_and_grad(loss, has_aux=True)(model)


@jax.jit
def codes(model, state, x, mask=None):
  """Everything on the way there and back."""
  found = model.encode(x, state, mask)
  return {
    "queries": model.queries(x, mask),
    "indices": found.indices,
    "decoded": model.decode(found.indices, state),
    "embedded": model.embed(found.indices, state),
  }


def parts(tree):
  """Largest gradient by attribute."""
  names = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    assert np.isfinite(x).all()
    name = jax.tree_util.keystr(path[:1], simple=True)
    names[name] = max(names.get(name, 0), float(np.abs(x).max()))
  return names


def unit(x):
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def dense(x, layer):
  return x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])


def test_a_token_depends_on_no_later_one():
  model, state = build()
  x = inputs()[0]
  model = jax.tree.map(lambda x: x, model)
  queries = np.float64(codes(model, state, x)["queries"])
  hidden = np.tanh(dense(queries, model.task_in[0]))
  narrow = dense(hidden, model.task_in[1]).reshape(-1, 4)
  some = jnp.asarray(narrow[::3][:K], jnp.float32)
  model.quantizer.codebook.codes = nnx.Param(some)
  want = codes(model, state, x)["indices"]
  other = jax.tree.map(lambda x: x, model)
  later = other.q_former.queries[...].at[1:].add(jnp.arange(D) - 3.0)
  other.q_former.queries = nnx.Param(later)
  got = codes(other, state, x)["indices"]
  assert want.shape == (B, Q) and len(np.unique(want)) > 2
  np.testing.assert_array_equal(got[:, 0], want[:, 0])
  assert np.any(got[:, 1:] != want[:, 1:])


def test_contrast_is_that_of_the_last_query():
  """Also who learns from it, and that what is masked may hold NaN."""
  model, state = build("contrastive")
  x, other, _ = inputs()
  mask = np.random.default_rng(1).random((B, N)) < 0.8
  mask[2] = False
  clean = np.where(mask[..., None], x, 0)
  queries = np.float64(codes(model, state, clean, mask)["queries"])
  x, other[2] = np.where(mask[..., None], x, np.nan), np.nan
  (_, (found, after)), gradients = learn(
    model, state, x, {"other": other, "mask": mask}
  )
  keep = np.arange(B) != 2
  np.testing.assert_allclose(found.output[keep], queries[keep], atol=1e-4)
  one = unit(dense(queries[keep, -1], model.project))
  got = np.asarray(run(model.projected, found.output))[keep]
  np.testing.assert_allclose(got, one, atol=1e-4)
  two = unit(dense(np.float64(other[keep]), model.project_other))
  want = 0
  for logits in (one @ two.T / 0.07, two @ one.T / 0.07):
    target = 0.9 * np.eye(B - 1) + 0.1 / (B - 1)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want -= (target * log_p).sum(-1).mean() / 2
  assert float(found.losses["contrastive"]) == pytest.approx(want, rel=1e-3)
  assert float(found.stats["temperature"]) == pytest.approx(0.07)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  for name, largest in parts(gradients).items():
    assert (largest > 0) == (name in IN_STAGE_1), name


def test_losses_of_stage_2():
  """Also that the queries learn exactly nothing."""
  model, state = build()
  x, _, embedding = inputs()
  mask = np.ones((B, N), bool)
  (_, (found, _)), gradients = learn(
    model, state, x, {"embedding": embedding, "mask": mask}
  )
  way = codes(model, state, x)
  np.testing.assert_allclose(way["decoded"], found.output, atol=1e-4)
  cosine = (unit(way["queries"]) * unit(found.output)).sum(-1).mean()
  assert float(found.stats["cosine"]) == pytest.approx(cosine, rel=1e-4)
  made = np.float64(way["embedded"])
  assert made.shape == (B, 2, G)
  hidden = np.tanh(dense(np.float64(way["queries"]), model.task_in[0]))
  narrow = dense(hidden, model.task_in[1])
  table = np.float64(model.quantizer.codebook.codes[...])
  index = ((narrow[..., None, :] - table) ** 2).sum(-1).argmin(-1)
  np.testing.assert_array_equal(way["indices"], index)
  error = ((narrow - table[index]) ** 2).mean()
  want = {
    "commitment": 5 * error,
    "codebook": 5 * 0.25 * error,
    "restore": 2 * (1 - cosine),
    "embed": 0.5 * ((made - embedding) ** 2).mean(),
  }
  assert found.losses.keys() == want.keys()
  for name, value in want.items():
    assert float(found.losses[name]) == pytest.approx(float(value), rel=1e-3)
  for name, largest in parts(gradients).items():
    assert (largest > 0) == (name not in IN_STAGE_1), name
  plain, _ = build(legacy=False)
  losses = jax.jit(lambda m: m(x, state)[0].losses)(plain)
  assert float(losses["commitment"]) == pytest.approx(5 * 0.25 * error, 1e-3)
  assert float(losses["codebook"]) == pytest.approx(5 * error, rel=1e-3)


def test_restored_at_an_angle():
  """C = (1, 0), C' = (.6, .8): twice one minus the cosine is .8."""
  model, state = build()
  model = jax.tree.map(lambda x: x, model)
  # Layers that give the same vector whatever comes in.
  last = model.q_former.others.norm_mlp
  last.scale = nnx.Param(0 * last.scale[...])
  last.bias = nnx.Param(jnp.zeros_like(last.bias[...]).at[..., 0].set(1.0))
  second = model.task_out[1]
  second.kernel = nnx.Param(0 * second.kernel[...])
  second.bias = nnx.Param(jnp.zeros(D).at[:2].set(jnp.array([0.6, 0.8])))
  model.positions = nnx.Param(0 * model.positions[...])
  block = model.blocks.blocks
  for layer in (block.attention.out, block.mlp.down):
    layer.kernel = nnx.Param(0 * layer.kernel[...])
    layer.bias = nnx.Param(0 * layer.bias[...])
  given = {"embedding": inputs()[2], "mask": np.ones((B, N), bool)}
  (_, (found, _)), _ = learn(model, state, inputs()[0], given)
  assert float(found.losses["restore"]) == pytest.approx(0.8, rel=1e-5)


def test_images_without_features_do_not_count():
  """Half of the batch NaN: the losses of the other half."""
  model, state = build()
  x, _, embedding = inputs()
  mask = np.random.default_rng(1).random((B, N)) < 0.8
  mask[:, 0] = True
  x, embedding, mask = (
    np.concatenate([z[:4], z[:4]]) for z in (x, embedding, mask)
  )
  (_, (want, _)), _ = learn(
    model, state, x, {"embedding": embedding, "mask": mask}
  )
  half = np.arange(B) < 4
  mask = mask & half[:, None]
  x = np.where(mask[..., None], x, np.nan)
  embedding = np.where(half[:, None, None], embedding, np.nan)
  (_, (got, _)), gradients = learn(
    model, state, x, {"embedding": embedding, "mask": mask}
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
  jax.tree.map(close, (got.losses, got.stats), (want.losses, want.stats))
  close(got.output[:4], want.output[:4], atol=1e-5)
  assert parts(gradients)["task_in"] > 0
  indices = codes(model, state, x, mask)["indices"]
  assert np.all(indices[4:] == -1) and np.all(indices[:4] >= 0)


@pytest.mark.parametrize("stage", ["contrastive", "tokenizer"])
def test_over_eight_devices_equals_one(stage):
  model, state = build(stage)
  x, other, embedding = inputs()
  name = {"contrastive": "other", "tokenizer": "embedding"}[stage]
  given = {"contrastive": other, "tokenizer": embedding}[stage]
  mesh = jax.make_mesh((8,), ("data",))
  rows, whole = jax.P("data"), jax.P()
  parted = jax.device_put((x, given), jax.NamedSharding(mesh, rows))

  def losses(model, state, x, given, axis_name=None):
    found, state = model(
      x, state, train=True, axis_name=axis_name, **{name: given}
    )
    return found.losses, found.stats, state

  local = jax.shard_map(
    functools.partial(losses, axis_name="data"),
    mesh=mesh,
    in_specs=(whole, whole, rows, rows),
    out_specs=whole,
  )
  both = [
    jax.device_get(jax.jit(f)(model, state, *batch))
    for f, batch in ((local, parted), (losses, (x, given)))
  ]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *both
  )


def test_published_sizes():
  for name, embeds in (("seed1", (1, 77, 768)), ("seed2", (1, 1, 1024))):
    config = SIZES[name]
    model = jax.eval_shape(lambda c=config: c.build(nnx.Rngs(0)))
    state = jax.eval_shape(model.init_state, jax.random.key(0))
    x = jnp.zeros((1, 257, 1408))
    found = jax.eval_shape(lambda m, x, s: m.encode(x, s), model, x, state)
    assert found.indices.shape == (1, 32) and found.codes.shape == (1, 32, 32)
    made = jax.eval_shape(
      lambda m, i, s: m.embed(i, s), model, found.indices, state
    )
    assert made.shape == embeds
  sizes = [x.size for x in jax.tree.leaves(model.q_former)]
  own = 4 * (768 * 768 + 768) + 2 * 768
  read = 2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + 2 * 768
  mlp = 2 * 768 * 3072 + 3072 + 768 + 2 * 768
  assert sum(sizes) == 12 * (own + mlp) + 6 * read + 32 * 768 + 2 * 768


@pytest.mark.unchecked
@pytest.mark.parametrize("settings, message", [
  ({"stage": "both"}, "stage must be one of 'contrastive', 'tokenizer'"),
  ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
  ({"label_smoothing": 2.0}, "label_smoothing must lie in"),
  ({"reverse": FORMER}, "context_dim_of_reverse=6, width_of_q_former=8"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    Seed(dataclasses.replace(CONFIG, **settings), rngs=nnx.Rngs(0))


@pytest.mark.unchecked
def test_errors():
  x, _, embedding = inputs()
  model, state = build("contrastive")
  assert model.reads == ("features",)
  with pytest.raises(ValueError, match="other must be given in stage"):
    jax.eval_shape(model, x, state)
  config = dataclasses.replace(CONFIG, stage="tokenizer", reverse=None)
  alone = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
  with pytest.raises(ValueError, match="embedding needs config.reverse"):
    jax.eval_shape(lambda m: m(x, state, embedding=embedding), alone)
  with pytest.raises(ValueError, match="embed needs config.reverse"):
    alone.embed(jnp.zeros((1, Q), int), state)
