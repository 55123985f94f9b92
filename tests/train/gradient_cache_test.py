import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.compiled import run
from tokjax.kernels.maxsim import maxsim
from tokjax.retrieval import losses
from tokjax.train.gradient_cache import cached_value_and_grad

kinds = pytest.mark.parametrize(
  "kind", [AxisType.Auto, AxisType.Explicit], ids=str
)
WIDTH = 8


def make_params(seed=0, depth=3, width=WIDTH, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  scale = np.sqrt(width)
  return {
    "layers": [
      jnp.asarray(rng.normal(size=(width, width)) / scale, dtype)
      for _ in range(depth)
    ],
    "bias": jnp.asarray(rng.normal(size=(width,)), dtype),
  }


def make_inputs(seed=0, num_queries=16, num_per_query=3, width=WIDTH):
  rng = np.random.default_rng(seed)

  def side(rows, tokens, share):
    x = jnp.asarray(rng.normal(size=(rows, tokens, width)), jnp.float32)
    return {"x": x, "mask": jnp.asarray(rng.random((rows, tokens)) < share)}

  return {
    "queries": side(num_queries, 4, 0.8),
    "documents": side(num_queries * num_per_query, 5, 0.7),
  }


def encode(params, side, key):
  """A toy encoder; its tokens mix, and dropout is drawn if there is a key."""
  x = side["x"]
  for layer in params["layers"]:
    x = jnp.tanh(x @ layer + params["bias"][None, None, :])
    x = x + jnp.mean(x, axis=1, keepdims=True)
  if key is not None:
    x = jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x, 0)
  return {"tokens": x, "mask": side["mask"]}  # the mask gets no gradient


def scores_of(embeddings):
  queries, documents = embeddings["queries"], embeddings["documents"]
  return maxsim(
    queries["tokens"], documents["tokens"], queries["mask"], documents["mask"]
  )


def loss(embeddings):
  return losses.in_batch_cross_entropy(scores_of(embeddings))


@jax.jit
def plain(params, inputs):
  def whole(params):
    return loss({k: encode(params, v, None) for k, v in inputs.items()})

  return jax.value_and_grad(whole)(params)


cached = functools.partial(run, cached_value_and_grad)  # as one program


def assert_close(got, want, atol=1e-5):
  for one, other in zip(
    jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
  "chunk_size", [1, 8, 16, {"queries": 2, "documents": 12}], ids=str
)
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_equals_the_plain_gradient(chunk_size, wrap):
  params, inputs = make_params(), make_inputs()
  got = wrap(
    lambda params, inputs: cached_value_and_grad(
      encode, loss, params, inputs, chunk_size=chunk_size
    )
  )(params, inputs)
  want = plain(params, inputs)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert np.abs(want[1]["bias"]).max() > 1e-2
  assert_close(got, want)


def test_an_encoder_for_each_side():
  params, inputs = make_params(), make_inputs()

  def half(params, side, key):
    out = encode(params, side, key)
    return {"tokens": out["tokens"] / 2, "mask": out["mask"]}

  encoders = {"queries": encode, "documents": half}
  got = cached(encoders, loss, params, inputs, chunk_size=4)
  want = jax.jit(
    jax.value_and_grad(
      lambda p: loss(
        {
          "queries": encode(p, inputs["queries"], None),
          "documents": half(p, inputs["documents"], None),
        }
      )
    )
  )(params)
  assert_close(got, want)


def test_one_side_and_a_parameter_it_does_not_use():
  inputs = {"tokens": make_inputs()["queries"]}
  params = make_params() | {"unused": jnp.ones(3)}

  def total(embeddings):
    return jnp.sum(jnp.sin(embeddings["tokens"]["tokens"]))

  got = cached(encode, total, params, inputs, chunk_size=4)
  want = jax.jit(
    jax.value_and_grad(
      lambda p: total({"tokens": encode(p, inputs["tokens"], None)})
    )
  )(params)
  assert_close(got, want)
  np.testing.assert_array_equal(got[1]["unused"], 0)


def test_dropout_is_the_same_in_both_passes():
  """Equal to the plain gradient of chunks that were given those keys."""
  params, inputs = make_params(), make_inputs()
  sizes, key = {"queries": 4, "documents": 16}, jax.random.key(7)

  def chunked(params):
    embeddings = {}
    for number, name in enumerate(("documents", "queries")):
      rows = len(inputs[name]["x"])
      steps = rows // sizes[name]
      parts = [
        encode(
          params,
          jax.tree.map(lambda x, j=j, s=steps: x[j::s], inputs[name]),
          jax.random.fold_in(jax.random.fold_in(key, number), j),
        )
        for j in range(steps)
      ]
      embeddings[name] = jax.tree.map(
        lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *parts
      )
    return loss(embeddings)

  @jax.jit
  def with_key(key):
    return cached_value_and_grad(
      encode, loss, params, inputs, chunk_size=sizes, key=key
    )

  got = with_key(key)
  assert_close(got, jax.jit(jax.value_and_grad(chunked))(params))
  assert abs(got[0] - plain(params, inputs)[0]) > 1e-3
  assert abs(got[0] - with_key(jax.random.key(8))[0]) > 1e-3


def test_rows_stay_in_order():
  inputs = {"rows": np.arange(12, dtype=np.float32)}
  weights = np.random.default_rng(0).normal(size=12).astype(np.float32)
  value, _ = cached(
    lambda factor, x, key: x * factor,
    lambda embeddings: jnp.sum(embeddings["rows"] * weights),
    jnp.ones(()),
    inputs,
    chunk_size=4,
  )
  want = np.arange(12.0) @ weights
  np.testing.assert_allclose(value, want, rtol=1e-5)


@kinds
def test_sharded_batch(kind):
  params, inputs = make_params(), make_inputs()
  want = plain(params, inputs)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    got = jax.jit(
      lambda params, inputs: cached_value_and_grad(
        encode,
        loss,
        params,
        inputs,
        chunk_size={"queries": 8, "documents": 16},
      )
    )(jax.device_put(params, jax.P()), jax.device_put(inputs, jax.P("data")))
  assert_close(got, want)


def global_loss(embeddings):
  queries, documents = embeddings["queries"], embeddings["documents"]
  return losses.global_in_batch_loss(
    maxsim,
    queries["tokens"],
    documents["tokens"],
    queries["mask"],
    documents["mask"],
    axis_name="data",
  )


def over_devices(mesh, chunk_size):
  return jax.shard_map(
    lambda params, inputs: cached_value_and_grad(
      encode, global_loss, params, inputs, chunk_size=chunk_size
    ),
    mesh=mesh,
    in_specs=(jax.P(), jax.P("data")),
    out_specs=jax.P(),
  )


@kinds
def test_inside_shard_map_with_the_global_loss(kind):
  params, inputs = make_params(), make_inputs()
  want = plain(params, inputs)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    got = jax.jit(over_devices(mesh, {"queries": 1, "documents": 2}))(
      jax.device_put(params, jax.P()), jax.device_put(inputs, jax.P("data"))
    )
  assert_close(got, want)


def sums_over_devices(jaxpr, inside=False):
  """Numbers of psums outside and inside of loops."""
  counts = np.zeros(2, int)
  for equation in jaxpr.eqns:
    if equation.primitive.name.startswith("psum"):
      counts[int(inside)] += 1
    loop = inside or equation.primitive.name == "scan"
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        counts += sums_over_devices(inner, loop)
  return counts


def test_shard_map_sums_the_gradient_over_devices_once():
  params, inputs = make_params(), make_inputs()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  traced = jax.make_jaxpr(over_devices(mesh, 1))(params, inputs)
  outside, inside = sums_over_devices(traced.jaxpr)
  assert outside >= len(jax.tree.leaves(params)) and inside == 0


def temporary_bytes(function, *arrays):
  compiled = jax.jit(function).lower(*arrays).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def total_of_side(embeddings):
  return jnp.sum(jnp.sin(embeddings["side"]["tokens"]))


def test_memory_is_that_of_one_chunk():
  """A deep encoder on a batch of 32 chunks; 4 MiB for each layer's output."""
  depth, width, rows, tokens = 24, 64, 256, 64
  params = jax.eval_shape(lambda: make_params(0, depth, width))
  inputs = {
    "x": jax.ShapeDtypeStruct((rows, tokens, width), jnp.float32),
    "mask": jax.ShapeDtypeStruct((rows, tokens), bool),
  }
  layer = 4 * rows * tokens * width

  def in_chunks(params, inputs):
    return cached_value_and_grad(
      encode, total_of_side, params, {"side": inputs}, chunk_size=8
    )

  def whole(params, inputs):
    return jax.value_and_grad(
      lambda p: total_of_side({"side": encode(p, inputs, None)})
    )(params)

  held = temporary_bytes(in_chunks, params, inputs)
  held_plain = temporary_bytes(whole, params, inputs)
  assert held_plain > depth * layer  # every layer's output at once
  # Inputs, embeddings and their gradients, each in two orders, and one chunk's
  # backward pass: a 32nd of the plain one.
  assert held < 6 * layer + held_plain / 32
  assert held < held_plain / 4


def test_the_first_pass_holds_one_chunk_too():
  """One wide hidden layer: 64 MiB for the batch, 2 MiB for a chunk."""
  rows, tokens, width, hidden = 256, 64, 64, 1024
  params = jax.ShapeDtypeStruct((width, hidden), jnp.float32)
  inputs = jax.ShapeDtypeStruct((rows, tokens, width), jnp.float32)

  def wide(matrix, x, key):
    return {"tokens": jnp.tanh(x @ matrix) @ matrix.T}

  held = temporary_bytes(
    lambda params, inputs: cached_value_and_grad(
      wide, total_of_side, params, {"side": inputs}, chunk_size=8
    ),
    params,
    inputs,
  )
  assert held < 4 * rows * tokens * hidden / 2


def test_parameters_in_bfloat16_are_summed_in_float32():
  """Many chunks of a gradient of 1 + 2**-7: a bfloat16 sum would stall."""
  params = jnp.ones((), jnp.bfloat16)
  step = np.float32(1 + 2**-7)  # a bfloat16 number
  inputs = {"side": jnp.full((1024, 1), step, jnp.bfloat16)}
  value, gradient = cached(
    lambda p, x, key: x * p,
    lambda e: jnp.sum(e["side"].astype(jnp.float32)),
    params,
    inputs,
    chunk_size=1,
  )
  assert gradient.dtype == jnp.bfloat16 and value.dtype == jnp.float32
  assert float(gradient) == 1024 * step  # 8 bits: exact in bfloat16


def test_compiles_once():
  traced = []

  @jax.jit
  def step(params, inputs, key):
    traced.append(None)
    return cached_value_and_grad(
      encode, loss, params, inputs, chunk_size=8, key=key
    )

  for seed in (0, 1):
    step(make_params(seed), make_inputs(seed), jax.random.key(seed))
  assert len(traced) == 1


@pytest.mark.unchecked
def test_errors():
  params, inputs = make_params(), make_inputs()

  def fail(params=params, inputs=inputs, chunk_size=8):
    return cached_value_and_grad(
      encode, loss, params, inputs, chunk_size=chunk_size
    )

  with pytest.raises(
    ValueError, match="rows of queries must be a multiple of 5, got 16"
  ):
    fail(chunk_size={"queries": 5, "documents": 4})
  with pytest.raises(
    ValueError, match="chunk_size of queries must lie in 1..16, got 24"
  ):
    fail(chunk_size=24)
  with pytest.raises(ValueError, match="chunk_size must have the sides of"):
    fail(chunk_size={"queries": 8})
  with pytest.raises(ValueError, match=r"inputs\['queries'\] must share"):
    side = {"x": inputs["queries"]["x"], "mask": jnp.ones((3, 4), bool)}
    fail(inputs=inputs | {"queries": side})
  with pytest.raises(TypeError, match="params must be float arrays, got int32"):
    fail(params | {"steps": jnp.zeros((), jnp.int32)})
