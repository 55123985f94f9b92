import dataclasses
import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.models import bert, bert_weights, weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIG = bert.BertConfig(
  vocab_size=30,
  width=12,
  num_layers=2,
  num_heads=3,
  mlp_width=20,
  max_positions=16,
)


@functools.cache
def tiny(config=CONFIG):
  return jax.jit(lambda: bert.Bert(config, rngs=nnx.Rngs(0)))()


@jax.jit
def encode(encoder, *inputs, **options):
  return encoder(*inputs, **options)


def texts(seed, shape, lengths):
  """Ids, and a mask of the given lengths."""
  ids = np.random.default_rng(seed).integers(0, 30, shape).astype(np.int32)
  return ids, np.arange(shape[1]) < np.array(lengths)[:, None]


def gradient_of(loss, encoder):
  return jax.device_get(jax.jit(jax.grad(loss))(encoder))


def golden_maker():
  path = GOLDEN / "make_encoders.py"
  spec = importlib.util.spec_from_file_location("make_encoders", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("name", ["bert_tiny", "distilbert_tiny"])
def test_equals_stored_transformers_activations(name):
  folder = GOLDEN / name
  encoder = bert_weights.load_encoder(
    json.loads((folder / "config.json").read_text()),
    weights.read_tensors(weights.weight_files(folder)),
  )
  want = np.load(folder / "hidden.npz")
  got = encode(encoder, want["ids"], want["mask"])
  np.testing.assert_allclose(got, want["hidden"], atol=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["bert_tiny", "distilbert_tiny"])
def test_equals_transformers_computed_now(name, seed):
  pytest.importorskip("transformers")
  maker = golden_maker()
  settings = dict(maker.KINDS[name])
  settings["num_hidden_layers" if name == "bert_tiny" else "n_layers"] = (
    1 + seed
  )
  settings["num_attention_heads" if name == "bert_tiny" else "n_heads"] = 8
  model = maker.torch_encoder(name, settings, seed)
  ids, mask = maker.example(settings, seed, batch=4, length=19)
  encoder = bert_weights.load_encoder(
    model.config.to_dict(),
    {k: v.numpy() for k, v in model.state_dict().items()},
  )
  got = encode(encoder, ids, mask)
  np.testing.assert_allclose(
    got, maker.torch_hidden(model, ids, mask), atol=1e-4
  )


def test_attention_equals_a_loop():
  q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 2, 4))
  mask = np.array([[True] * 5, [True, False, True, False, False]])
  got = run(bert.attend, *map(np.float32, (q, k, v)), mask)
  for b, i, h in np.ndindex(2, 5, 2):
    keys = np.flatnonzero(mask[b])
    weight = np.exp([q[b, i, h] @ k[b, j, h] / 2 for j in keys])
    want = (weight / weight.sum()) @ v[b, keys, h]
    np.testing.assert_allclose(got[b, i, h], want, rtol=1e-5, atol=1e-6)


def test_padding_ids_and_padding_length_do_not_matter():
  encoder = tiny()
  ids, mask = texts(0, (2, 6), [6, 4])
  want = encode(encoder, ids, mask)
  other = encode(
    encoder,
    np.pad(np.where(mask, ids, 7), ((0, 0), (0, 3)), constant_values=9),
    np.pad(mask, ((0, 0), (0, 3))),
  )
  np.testing.assert_allclose(other[0, :6], want[0], atol=1e-6)
  np.testing.assert_allclose(other[1, :4], want[1, :4], atol=1e-6)


def test_batch_equals_one_by_one():
  encoder = tiny()
  ids, mask = texts(1, (3, 7), [7, 3, 1])
  want = encode(encoder, ids, mask)
  for i in range(3):
    alone = encode(encoder, ids[i : i + 1], mask[i : i + 1])
    np.testing.assert_allclose(alone[0], want[i], atol=1e-6)


def test_unattended_position_still_sees_the_attended_ones():
  """What ColBERT's [MASK] tokens need."""
  encoder = tiny()
  mask = np.array([[True, True, False]])
  one, two = (
    np.asarray(encode(encoder, np.array([[3, middle, 9]]), mask))
    for middle in (4, 5)
  )
  assert np.abs(one[0, 2] - two[0, 2]).max() > 1e-3


def test_row_without_tokens_is_finite_in_value_and_gradient():
  encoder, ids = tiny(), np.zeros((1, 4), np.int32)
  mask = np.zeros((1, 4), bool)
  gradient = gradient_of(lambda e: jnp.sum(jnp.sin(e(ids, mask))), encoder)
  assert np.isfinite(encode(encoder, ids, mask)).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_gradient_reaches_every_parameter_but_unused_rows():
  ids = np.array([[1, 2, 3]])
  weight = np.float32(np.random.default_rng(3).normal(size=(1, 3, 12)))
  gradient = gradient_of(lambda e: jnp.sum(e(ids) * weight), tiny())
  words = np.abs(gradient.words.embedding[...]).max(axis=1)
  assert (words[1:4] > 0).all() and (words[4:] == 0).all()
  blocks = gradient.blocks
  for part in (blocks.out, blocks.up, blocks.down, blocks.qkv):
    assert (np.abs(part.kernel[...]).max(axis=(1, 2)) > 0).all()


def test_dropout_only_with_a_key():
  encoder, ids = tiny(), np.array([[1, 2, 3, 4]])
  dropped, again = (
    np.asarray(encode(encoder, ids, key=jax.random.key(0))) for _ in range(2)
  )
  np.testing.assert_array_equal(dropped, again)
  assert np.abs(dropped - encode(encoder, ids)).max() > 1e-2
  still = tiny(
    dataclasses.replace(CONFIG, dropout_rate=0.0, attention_dropout_rate=0.0)
  )
  np.testing.assert_allclose(
    encode(still, ids, key=jax.random.key(0)), encode(still, ids), atol=1e-6
  )


split = jax.jit(bert.split, static_argnums=1)
POLICIES = jax.checkpoint_policies


@functools.cache
def gradients_with(part, policy=None):
  """Without and with dropout."""
  encoder = tiny()
  ids, mask = texts(0, (3, 7), [7, 3, 5])
  if part == "layers":
    ids, encoder = encode(encoder, ids, mask), split(encoder, 1)[1]
  remat = getattr(POLICIES, policy) if policy else None

  @jax.jit
  @jax.grad
  def gradient(encoder, key):
    return jnp.sum(jnp.sin(encoder(ids, mask, key=key, remat=remat)))

  with jax.debug_key_reuse(False):  # the same dropout twice is the point
    return gradient(encoder, None), gradient(encoder, jax.random.key(1))


@pytest.mark.parametrize("part", ["whole", "layers"])
@pytest.mark.parametrize(
  "policy", ["nothing_saveable", "dots_with_no_batch_dims_saveable"]
)
def test_remat_gives_the_same_gradient(policy, part):
  pairs = gradients_with(part, policy), gradients_with(part)
  for got, want in zip(*pairs, strict=True):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_remat_of_blocks_holds_one_block_at_a_time():
  """Encoding all again holds all twelve at once when the way back begins."""
  config = dataclasses.replace(CONFIG, num_layers=12, max_positions=64)
  ids = jnp.zeros((16, 64), jnp.int32)

  def scratch(remat=None, whole=False):
    def encode(encoder):
      return encoder(ids, remat=remat)

    if whole:
      encode = jax.checkpoint(encode, policy=POLICIES.nothing_saveable)
    gradient = jax.grad(lambda encoder: jnp.sum(encode(encoder) ** 2))
    encoder = jax.eval_shape(lambda: bert.Bert(config, rngs=nnx.Rngs(0)))
    compiled = jax.jit(gradient).lower(encoder).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  plain = scratch()
  assert scratch(POLICIES.nothing_saveable) < plain / 4
  assert scratch(whole=True) > plain / 2


def test_bfloat16_weights_compute_in_bfloat16_near_float32():
  ids = np.array([[1, 2, 3, 4]])
  low = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), tiny())
  high = jax.tree.map(lambda x: np.asarray(x, np.float32), low)
  got = encode(low, ids)
  assert got.dtype == jnp.bfloat16
  # 2 layers of rounding to 8 bits, on values of size 1.
  np.testing.assert_allclose(np.float32(got), encode(high, ids), atol=0.06)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_over_the_batch_equals_one_device(kind):
  encoder = tiny()
  ids, mask = texts(2, (8, 5), [5, 4, 3, 2, 1, 5, 5, 2])
  want = encode(encoder, ids, mask)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    shards = jax.device_put((ids, mask), jax.P("data"))
    weights_ = jax.device_put(encoder, jax.P())
    got = jax.jit(lambda e, i, m: e(i, m))(weights_, *shards)
  np.testing.assert_allclose(jax.device_get(got), want, atol=1e-6)


def test_segments():
  encoder, ids = tiny(), np.array([[1, 2, 3]])
  zero = np.asarray(encode(encoder, ids, segments=np.zeros_like(ids)))
  np.testing.assert_allclose(zero, encode(encoder, ids), atol=1e-6)
  other = encode(encoder, ids, segments=np.array([[0, 1, 1]]))
  assert np.abs(other - zero).max() > 1e-3


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda e: e(jnp.zeros((1, 17), jnp.int32)), "max_positions=16"),
    (lambda e: e(jnp.zeros((3,), jnp.int32)), "ids must have 2 axes"),
    (
      lambda e: e(jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 4), bool)),
      "attention_mask must have the shape of ids",
    ),
    (
      lambda e: tiny(bert.BertConfig(**{**vars(CONFIG), "num_segments": 0}))(
        jnp.zeros((1, 3), jnp.int32), segments=jnp.zeros((1, 3), int)
      ),
      "this encoder has no segments",
    ),
    (
      lambda e: tiny(bert.BertConfig(width=10, num_heads=3)),
      "width must be a multiple of 3",
    ),
  ],
)
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call(tiny())


def test_gelu_is_the_exact_one():
  x = np.linspace(-6, 6, 401, dtype=np.float32)
  want = run(jax.nn.gelu, x, approximate=False)
  np.testing.assert_allclose(run(bert.gelu, x), want, atol=2e-6)


def test_config_from_json_reads_the_shape():
  folder = GOLDEN / "distilbert_tiny"
  read = json.loads((folder / "config.json").read_text())
  config = bert_weights.config_from_json(read)
  assert (config.width, config.num_heads) == (read["dim"], read["n_heads"])
  assert config.num_segments == 0


@pytest.mark.parametrize("num_lower", [0, 1, CONFIG.num_layers])
def test_split_and_join_are_the_whole(num_lower):
  encoder = tiny()
  lower, upper = split(encoder, num_lower)
  ids = jnp.array([[2, 7, 3, 0], [5, 4, 3, 2]])
  mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
  # Not compiled as wholes, which round differently.
  want, hidden = encoder(ids, mask), lower(ids, mask)
  np.testing.assert_array_equal(upper(hidden, mask), want)
  whole = jax.jit(bert.join)(lower, upper)
  assert jax.tree.structure(whole) == jax.tree.structure(encoder)
  np.testing.assert_array_equal(whole(ids, mask), want)
  key = jax.random.key(0)
  assert encode(upper, hidden, mask, key=key).shape == want.shape


def test_split_checks_the_number_of_blocks():
  with pytest.raises(ValueError, match="num_lower must lie in"):
    bert.split(tiny(), CONFIG.num_layers + 1)
