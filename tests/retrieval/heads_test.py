import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads

from tests.compiled import compiled
from tokjax.kernels import maxsim
from tokjax.retrieval import colbert, heads

H, D = 6, 4
ERF = np.vectorize(math.erf)
ACTIVATIONS = {
  "identity": lambda x: x,
  "tanh": np.tanh,
  "relu": lambda x: np.maximum(x, 0),
  "gelu": lambda x: x * (1 + ERF(x / 2**0.5)) / 2,
  "silu": lambda x: x / (1 + np.exp(-x)),
}


def make(seed=0, **settings):
  config = heads.HeadConfig(input_dim=H, output_dim=D, **settings)
  return jax.tree.map(lambda x: x, made(config, seed))  # to be changed


@functools.cache
def made(config, seed=0):
  return jax.jit(lambda: heads.ProjectionHead(config, rngs=nnx.Rngs(seed)))()


@jax.jit
def project(head, x):
  return head(x)


encode_head = jax.jit(colbert.encode_head)
fold = jax.jit(heads.fold)
maxsim = compiled(maxsim)


def states(seed=0, shape=(2, 5), dim=H):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(*shape, dim)).astype(np.float32)


def numbers(param):
  return np.asarray(param[...], np.float64)


def affine(layer, x):
  y = x @ numbers(layer.kernel)
  return y if layer.bias is None else y + numbers(layer.bias)


def run(head, config, x):
  """The variants as their formulas say, from the weights of `head`."""
  f = ACTIVATIONS[config.activation]
  x = np.asarray(x, np.float64)
  last = len(head.layers) - 1
  for i, layer in enumerate(head.layers):
    if i == last:
      y = affine(layer, x)
    elif config.kind == "ffn":
      y = f(affine(layer, x))
    else:
      y = affine(layer.value, x) * f(affine(layer.gate, x))
    if config.residual == "all" or (config.residual == "first" and i == 0):
      same = x.shape[-1] == y.shape[-1]
      skip = x if same else x @ numbers(layer.residual)
      if config.learned_scale:
        skip = skip * numbers(layer.scale)
      y = y + skip
    else:
      assert layer.residual is None and not layer.identity_residual
    x = y
  return x


VARIANTS = {
  "linear": dict(),
  "linear-bias-residual": dict(bias=True, residual="first"),
  "ffn": dict(kind="ffn", activation="relu"),
  "ffn-best": dict(kind="ffn", residual="first"),
  "ffn-3": dict(
    kind="ffn", depth=3, activation="silu", residual="all", bias=True
  ),
  "ffn-equal-width": dict(
    kind="ffn", expand=1.0, activation="gelu", residual="all"
  ),
  "ffn-half": dict(kind="ffn", expand=0.5, activation="tanh"),
  "glu": dict(kind="glu", activation="silu", bias=True),
  "glu-3": dict(
    kind="glu", depth=3, activation="relu", residual="all", learned_scale=True
  ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_formula(name):
  head = make(**VARIANTS[name])
  if head.config.learned_scale:  # another value than the one it starts from
    for layer in head.layers:
      layer.scale[...] = jnp.float32(0.3)
  x = states()
  got = project(head, x)
  assert got.shape == (2, 5, D) and got.dtype == jnp.float32
  want = run(head, head.config, x)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_widths_of_the_hidden_layers():
  head = make(kind="ffn", depth=3, expand=1.5, residual="all")
  assert [x.kernel.shape for x in head.layers] == [(6, 9), (9, 9), (9, 4)]
  assert [x.identity_residual for x in head.layers] == [False, True, False]
  gated = make(kind="glu", expand=0.5).layers[0]
  assert gated.value.kernel.shape == gated.gate.kernel.shape == (6, 3)


def test_ffn_without_activation_is_the_product_of_its_matrices():
  head = make(kind="ffn")
  one, two = (numbers(layer.kernel) for layer in head.layers)
  x = states()
  np.testing.assert_allclose(
    project(head, x), x @ one @ two, rtol=1e-5, atol=1e-6
  )


def test_published_recipe_folds_into_one_matrix():
  head = make(kind="ffn", residual="first")
  first, last = head.layers
  want = (numbers(first.kernel) + numbers(first.residual)) @ numbers(
    last.kernel
  )
  matrix = fold(head)
  assert matrix.shape == (H, D) and matrix.dtype == jnp.float32
  np.testing.assert_allclose(matrix, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "settings",
  [
    dict(),
    dict(residual="all", learned_scale=True),
    dict(kind="ffn", depth=4, expand=1.0, residual="all"),
    dict(kind="ffn", residual="first", learned_scale=True),
  ],
)
def test_folded_head_gives_the_same_tokens(settings):
  head = make(**settings)
  x, mask = states(), np.arange(10).reshape(2, 5) % 4 > 0
  np.testing.assert_allclose(
    encode_head(fold(head), x, mask), encode_head(head, x, mask), atol=1e-5
  )
  low = jax.tree.map(lambda p: np.asarray(p, jnp.bfloat16), head)
  assert fold(low).dtype == jnp.bfloat16


def test_first_matrix_zero_leaves_the_skip():
  head = make(kind="ffn", residual="first", activation="silu")
  first, last = head.layers
  first.kernel[...] = np.zeros(first.kernel.shape, np.float32)
  x = states()
  want = x @ numbers(first.residual) @ numbers(last.kernel)
  np.testing.assert_allclose(project(head, x), want, rtol=1e-5, atol=1e-6)


def test_learned_scale_starts_at_one_and_zero_removes_the_skip():
  settings = dict(kind="glu", activation="silu", residual="first")
  x = states()
  scaled = make(**settings, learned_scale=True)
  # Not compiled as wholes, which round differently.
  np.testing.assert_array_equal(scaled(x), make(**settings)(x))
  scaled.layers[0].scale[...] = np.float32(0)
  scaled.layers[0].residual[...] = np.full((6, 12), 1e3, np.float32)
  plain = heads.Projection(
    [
      heads.GatedLayer(scaled.layers[0].value, scaled.layers[0].gate),
      scaled.layers[1],
    ]
  )
  np.testing.assert_array_equal(scaled(x), plain(x))


@pytest.mark.parametrize("kind", ["linear", "ffn", "glu"])
def test_weights_start_as_torch_linear_layers(kind):
  config = heads.HeadConfig(400, 300, kind=kind, residual="first", bias=True)
  head = made(config)
  leaves = [np.asarray(x) for x in jax.tree.leaves(head)]
  inputs = {"linear": [400] * 3}
  inputs["ffn"] = [400] * 3 + [800] * 2
  inputs["glu"] = [400] * 5 + [800] * 2
  assert len(leaves) == len(inputs[kind])
  for leaf in leaves:
    fan_in = leaf.shape[0] if leaf.ndim == 2 else None
    if fan_in is None:  # a bias: the limit of the kernel beside it
      fan_in = 800 if leaf.shape == (300,) and kind != "linear" else 400
    limit = fan_in**-0.5
    assert np.abs(leaf).max() <= limit < 1.05 * np.abs(leaf).max()
    # A uniform distribution within +-limit has variance limit^2 / 3.
    assert abs(3 * leaf.var() / limit**2 - 1) < 0.15
  assert not np.array_equal(leaves[0].ravel()[:50], leaves[1].ravel()[:50])


def test_tokens_are_unit_where_valid_and_zero_where_masked():
  head = make(kind="ffn", activation="silu", residual="first", bias=True)
  x, mask = states(), np.arange(10).reshape(2, 5) % 3 > 0
  got = encode_head(head, x, mask)
  np.testing.assert_allclose(np.linalg.norm(got, axis=-1), mask, atol=1e-6)

  def total(head, x):
    return jnp.sum(jnp.sin(colbert.encode_head(head, x, mask)))

  poisoned = np.where(mask[..., None], x, np.nan)
  np.testing.assert_array_equal(encode_head(head, poisoned, mask), got)
  gradients = jax.jit(jax.grad(total))(head, poisoned)
  for leaf in jax.tree.leaves(gradients):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_tokens_that_win_nothing_get_no_gradient():
  head = make(kind="glu", activation="gelu", residual="first")
  queries, documents = states(1, (1, 2)), states(2, (1, 7))
  ones = np.ones((1, 2), bool), np.ones((1, 7), bool)

  def tokens(x, mask):
    return encode_head(head, x, mask)

  def total(documents):
    return maxsim.maxsim(
      tokens(queries, ones[0]), tokens(documents, ones[1]), *ones
    )[0, 0]

  met = maxsim.maxsim_alignment(
    tokens(queries, ones[0]), tokens(documents, ones[1]), *ones
  ).index[0, 0]
  gradient = np.abs(jax.jit(jax.grad(total))(documents)[0]).max(axis=-1)
  winners = np.isin(np.arange(7), met)
  assert winners.any() and (gradient[winners] > 0).all()
  np.testing.assert_array_equal(gradient[~winners], 0)


def test_gradients():
  x = states(shape=(3,))
  head = make(
    kind="glu",
    activation="silu",
    residual="all",
    learned_scale=True,
    bias=True,
  )
  graph, params = nnx.split(head)
  total = jax.jit(lambda p, x: jnp.sum(jnp.sin(nnx.merge(graph, p)(x))))
  check_grads(total, (params, x), order=1, modes=["rev"], eps=1e-2, rtol=0.01)


def test_trains_as_a_plain_pytree():
  head = make(kind="ffn", residual="first", learned_scale=True)
  x, target = states(), states(9, dim=D)
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(head, state):
    loss, gradients = jax.value_and_grad(
      lambda head: jnp.mean(jnp.square(head(x) - target))
    )(head)
    updates, state = optimizer.update(gradients, state, head)
    return optax.apply_updates(head, updates), state, loss

  state, losses = optimizer.init(head), []
  for _ in range(60):
    head, state, loss = step(head, state)
    losses.append(float(loss))
  assert losses[-1] < losses[0] / 2
  assert (
    head.config == make(kind="ffn", residual="first", learned_scale=True).config
  )
  matrix = np.asarray(fold(head))
  np.testing.assert_allclose(x @ matrix, project(head, x), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_identity_start_keeps_the_encoders_tokens(bias):
  config = heads.HeadConfig(H, H, init="identity", bias=bias)
  head = made(config)
  x, mask = states(), np.ones((2, 5), bool)
  np.testing.assert_array_equal(project(head, x), x)
  np.testing.assert_array_equal(
    encode_head(head, x, mask), encode_head(None, x, mask)
  )


def test_from_matrix_starts_there_and_trains():
  rng = np.random.default_rng(0)
  # Rows in a plane: its two directions keep all inner products.
  x = rng.normal(size=(20, 2)) @ rng.normal(size=(2, H))
  directions = np.linalg.svd(x, full_matrices=False)[2][:2].T
  head = heads.from_matrix(jnp.asarray(directions, jnp.float32))
  np.testing.assert_array_equal(fold(head), directions.astype("float32"))
  short = np.asarray(project(head, np.float32(x)))
  np.testing.assert_allclose(short @ short.T, x @ x.T, rtol=1e-4, atol=1e-4)
  total = jax.jit(jax.grad(lambda head: jnp.sum(head(jnp.ones((3, H))))))
  gradient = total(head)
  np.testing.assert_allclose(gradient.layers[0].kernel[...], 3.0)


def test_layers_of_a_checkpoint():
  x, kernel = states(dim=2), jnp.array([[1.0, -1.0, 2.0], [0.5, 3.0, -1.0]])
  bias, residual = jnp.array([0.1, 0.2, 0.3]), jnp.ones((2, 3))
  first = heads.ProjectionLayer(
    kernel, bias, residual, activation="gelu", identity_residual=False
  )
  last = heads.ProjectionLayer(
    jnp.eye(3), None, None, activation="tanh", identity_residual=True
  )
  inner = np.asarray(x) @ np.asarray(kernel) + np.asarray(bias)
  inner = ACTIVATIONS["gelu"](inner) + np.asarray(x) @ np.ones((2, 3))
  want = np.tanh(inner) + inner
  got = project(heads.Projection([first, last]), x)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(kind="ffn", activation="silu"), "layer 0 has activation 'silu'"),
    (dict(kind="glu"), "layer 0 has a gate"),
    (dict(kind="ffn", bias=True), "layer 0 has a bias"),
  ],
)
def test_only_linear_heads_fold(settings, message):
  with pytest.raises(ValueError, match=message):
    heads.fold(make(**settings))


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(kind="mlp"), "kind must be one of 'linear', 'ffn', 'glu'"),
    (dict(kind="ffn", activation="elu"), "activation must be one of"),
    (dict(activation="silu"), "activation must be 'identity' for kind"),
    (dict(residual="last"), "residual must be one of"),
    (dict(kind="ffn", depth=1), "depth must lie in 2..1024, got 1"),
    (dict(kind="glu", expand=0.01), "hidden_width must lie in"),
    (dict(init="identity"), "input_dim=6, output_dim=4"),
    (dict(init="identity", kind="ffn"), "kind_for_identity_init must be one"),
    (dict(init="identity", residual="all"), "residual_for_identity_init must"),
    (dict(learned_scale=True), "learned_scale=True needs residual"),
  ],
)
def test_errors_of_the_config(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)


@pytest.mark.unchecked
def test_errors():
  with pytest.raises(ValueError, match="x_width=7, input_dim=6"):
    make()(states(dim=7))
  with pytest.raises(ValueError, match="matrix must have 2 axes"):
    heads.from_matrix(jnp.ones(3))
  with pytest.raises(ValueError, match="activation must be one of"):
    heads.ProjectionLayer(jnp.eye(2), activation="torch.nn.Identity")
  config = dataclasses.replace(make().config, output_dim=0)
  with pytest.raises(ValueError, match="output_dim must lie in"):
    heads.ProjectionHead(config, rngs=nnx.Rngs(0))
