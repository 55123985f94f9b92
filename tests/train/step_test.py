"""The compiled step: its arithmetic, its guard, its layouts."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests.compiled import run as call
from tokjax.parallel import meshes, rules
from tokjax.train import gradient_cache
from tokjax.train import step as steps


class Mlp(nnx.Module):
  """Two layers, computed in the dtype of the parameters."""

  def __init__(self, rngs):
    self.up = nnx.Linear(4, 16, rngs=rngs)
    self.down = nnx.Linear(16, 1, rngs=rngs)

  def __call__(self, x):
    hidden = jax.nn.tanh(self.up(x.astype(self.up.kernel.dtype)))
    return self.down(hidden)[:, 0].astype(jnp.float32)


def squared(model, batch, key):
  error = model(batch["x"]) - batch["y"]
  return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error))}


@functools.cache
def mlp():
  return jax.jit(lambda: Mlp(nnx.Rngs(0)))()


def first_state(model, optimizer, seed=0):
  init = jax.jit(steps.init_state, static_argnums=2)
  return init(jax.random.key(seed), model, optimizer)


def batch_of(seed, rows=16):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, 4)).astype(np.float32)
  return {"x": x, "y": np.sin(x.sum(axis=1))}


def run(step, optimizer, num_steps=3, model=None):
  state = first_state(mlp() if model is None else model, optimizer)
  rows = []
  for i in range(num_steps):
    state, metrics = step(state, batch_of(i))
    rows.append(jax.device_get(metrics))
  return state, rows


def assert_close(got, want, tolerance=1e-6):
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def test_step_is_gradient_descent():
  """y = w x, loss mean (w x - y)^2: dL/dw = mean 2 x (w x - y)."""

  def loss_fn(model, batch, key):
    return jnp.mean((model["w"] * batch["x"] - batch["y"]) ** 2), {}

  optimizer = optax.sgd(0.1)
  step = steps.make_step(loss_fn, optimizer)
  state = first_state({"w": np.float32(1)}, optimizer)
  batch = {"x": np.array([1.0, 2.0]), "y": np.array([0.0, 0.0])}
  state, metrics = step(state, batch)
  # loss (1 + 4) / 2, gradient (2 + 8) / 2
  assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (2.5, 5.0)
  assert bool(metrics["finite"]) and int(state.step) == 1
  assert float(state.model["w"]) == 0.5


SGD, ADAM = optax.sgd(0.5), optax.adamw(0.01)


@functools.cache
def run_on_one_device(optimizer, num_microbatches=1):
  settings = {"num_microbatches": num_microbatches}
  return run(steps.make_step(squared, optimizer, **settings), optimizer)


@pytest.mark.parametrize("num_microbatches", [2, 4, 16])
def test_accumulated_gradient_is_that_of_the_big_batch(num_microbatches):
  optimizer = SGD
  want, want_rows = run_on_one_device(optimizer)
  got, rows = run(
    steps.make_step(squared, optimizer, num_microbatches=num_microbatches),
    optimizer,
  )
  assert_close(got.model, want.model)
  for row, want_row in zip(rows, want_rows, strict=True):
    np.testing.assert_allclose(row["loss"], want_row["loss"], rtol=1e-6)
    np.testing.assert_allclose(
      row["grad_norm"], want_row["grad_norm"], rtol=1e-5
    )


def test_microbatch_takes_every_mth_row_and_metrics_are_means():
  def loss_fn(model, batch, key):  # compares rows: not a mean over rows
    mean = jnp.mean(batch)
    return model["w"] * mean**2, {"mean_squared": mean**2}

  optimizer = optax.sgd(1.0)
  step = steps.make_step(loss_fn, optimizer, num_microbatches=3)
  state = first_state({"w": np.float32(1)}, optimizer)
  rows = np.arange(12.0, dtype=np.float32) ** 1.5
  state, metrics = step(state, rows)
  want = np.mean([rows[m::3].mean() ** 2 for m in range(3)])
  for name in ("loss", "grad_norm", "mean_squared"):
    np.testing.assert_allclose(metrics[name], want, rtol=1e-6)
  np.testing.assert_allclose(state.model["w"], 1 - want, rtol=1e-6)


def counted(model, buffers, batch, key):
  """w^2 mean(x); buffers: rows seen, and the last w, as integers and floats."""
  found = {
    "rows": buffers["rows"] + len(batch),
    "last": jax.lax.stop_gradient(model["w"]),
  }
  return model["w"] ** 2 * jnp.mean(batch), {}, found


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_buffers_are_handed_on_and_averages_follow(num_microbatches):
  optimizer = optax.sgd(0.25)
  step = steps.make_step(
    counted, optimizer, num_microbatches=num_microbatches,
    has_buffers=True, average_decay=0.75,
  )  # fmt: skip
  state = call(
    lambda w: steps.init_state(
      jax.random.key(0),
      {"w": w},
      optimizer,
      {"rows": jnp.int32(0), "last": jnp.float32(0)},
      average=True,
    ),
    np.float32(1),
  )
  w, average = 1.0, 1.0
  for i in range(3):
    state, _ = step(state, np.ones(4, np.float32))
    assert int(state.buffers["rows"]) == 4 * (i + 1)
    assert float(state.buffers["last"]) == w
    w = w - 0.25 * 2 * w
    average = 0.75 * average + 0.25 * w
    np.testing.assert_allclose(state.model["w"], w, rtol=1e-6)
    np.testing.assert_allclose(state.average["w"], average, rtol=1e-6)
  before = jax.device_get((state.model, state.buffers, state.average))
  state, metrics = step(state, np.array([1, np.nan, 1, 1], np.float32))
  assert not metrics["finite"]
  after = jax.device_get((state.model, state.buffers, state.average))
  assert before == after


RULES = (("up/kernel$", ("fsdp", "tensor")), ("down/kernel$", ("tensor",)))


# Cut over `tensor`, an Explicit model must say itself how its parts meet.
@pytest.mark.parametrize(
  ("kind", "sizes"),
  [
    (AxisType.Auto, {}),
    (AxisType.Auto, {"fsdp": 4}),
    (AxisType.Auto, {"fsdp": 2, "tensor": 2}),
    (AxisType.Explicit, {}),
    (AxisType.Explicit, {"fsdp": 4}),
  ],
  ids=str,
)
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_sharded_equals_one_device(kind, sizes, num_microbatches):
  optimizer = ADAM
  want, want_rows = run_on_one_device(optimizer, num_microbatches)
  mesh = meshes.make_mesh(**sizes, axis_types=kind)
  with jax.set_mesh(mesh):
    state = first_state(mlp(), optimizer)
    layout = rules.shardings(state, mesh, RULES)
    state = rules.shard(state, mesh, RULES)
    step = steps.make_step(
      squared,
      optimizer,
      state_shardings=layout,
      num_microbatches=num_microbatches,
    )
    for i in range(3):
      # 32 rows fill 8 devices x 4 microbatches; the same rows twice.
      rows = jax.tree.map(lambda x: np.concatenate([x, x]), batch_of(i))
      state, metrics = step(state, meshes.shard_batch(rows, mesh))
  assert [x.sharding for x in jax.tree.leaves(state)] == jax.tree.leaves(layout)
  assert_close(state.model, want.model, 1e-5)
  np.testing.assert_allclose(metrics["loss"], want_rows[-1]["loss"], rtol=1e-5)


def test_compiles_once_over_steps(caplog):
  optimizer = ADAM
  mesh = meshes.make_mesh(fsdp=2)
  with jax.set_mesh(mesh):
    state = first_state(mlp(), optimizer)
    layout = rules.shardings(state, mesh, RULES)
    state = rules.shard(state, mesh, RULES)
    step = steps.make_step(squared, optimizer, state_shardings=layout)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      for i in range(4):
        state, _ = step(state, meshes.shard_batch(batch_of(i), mesh))
  compiled = [
    record.getMessage()
    for record in caplog.records
    if record.getMessage().startswith("Compiling jit(step)")
  ]
  assert len(compiled) == 1, [r.getMessage() for r in caplog.records]


def test_key_depends_on_run_and_step_only():
  def loss_fn(model, batch, key):
    return model["w"] ** 2, {"draw": jax.random.uniform(key)}

  optimizer = optax.sgd(0.1)
  step = steps.make_step(loss_fn, optimizer)
  state = first_state({"w": np.float32(1)}, optimizer, seed=5)
  draws = []
  for _ in range(3):
    state, metrics = step(state, np.zeros(4))
    draws.append(float(metrics["draw"]))
  key = jax.random.key(5)
  want = [
    float(
      call(
        lambda k, i: jax.random.uniform(jax.random.fold_in(k, i)),
        key,
        np.int32(i),
      )
    )
    for i in range(3)
  ]
  assert draws == want and len(set(draws)) == 3


def test_bfloat16_computes_on_float32_masters():
  seen = []

  def loss_fn(model, batch, key):
    seen.append({x.dtype for x in jax.tree.leaves(model)})
    return squared(model, batch, key)

  optimizer = optax.sgd(1e-3)
  step = steps.make_step(loss_fn, optimizer, compute_dtype="bfloat16")
  state, _ = run(step, optimizer, num_steps=1)
  assert seen == [{jnp.dtype(jnp.bfloat16)}]
  assert {x.dtype for x in jax.tree.leaves(state.model)} == {
    jnp.dtype(jnp.float32)
  }
  # The gradient at the rounded parameters, applied to the exact ones.
  start = mlp()
  rounded = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), start)
  gradient = jax.jit(jax.grad(lambda m: squared(m, batch_of(0), None)[0]))(
    rounded
  )
  want = jax.tree.map(
    lambda p, g: np.asarray(p) - np.float32(1e-3) * np.asarray(g, np.float32),
    start,
    gradient,
  )
  # one bfloat16 rounding of the gradient, times the learning rate
  assert_close(state.model, want, 1e-3 * 2**-7)
  moved = jax.tree.map(np.subtract, *jax.device_get((state.model, start)))
  # Such small moves would vanish in bfloat16 parameters.
  assert max(np.abs(x).max() for x in jax.tree.leaves(moved)) < 2e-3


def test_masters_of_a_bfloat16_model_are_float32():
  low = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), mlp())
  state = first_state(low, optax.adam(1e-3))
  for x in jax.tree.leaves((state.model, state.optimizer_state[0].mu)):
    assert x.dtype == jnp.float32


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_state_refuses_what_is_not_finite(what):
  def loss_fn(model, batch, key):
    x = jnp.min(batch)
    if what == "loss":
      return jnp.sum(model["w"]) / x, {}
    return jnp.sum(model["w"] * jnp.sqrt(x * model["w"])), {}  # 0 * inf

  optimizer = optax.adam(0.1)
  step = steps.make_step(loss_fn, optimizer)
  state = first_state({"w": np.ones(2, np.float32)}, optimizer)
  state, metrics = step(state, np.ones(4))
  before = jax.device_get(state._replace(key=0))
  assert before.finite and before.step == 1
  state, metrics = step(state, np.zeros(4))
  assert not metrics["finite"]
  assert bool(np.isfinite(metrics["loss"])) == (what == "gradient")
  for batch in (np.ones(4), np.ones(4)):  # good batches move nothing any more
    state, _ = step(state, batch)
    after = jax.device_get(state._replace(key=0))
    assert not after.finite
    for b, a in zip(
      jax.tree.leaves(before[:3]), jax.tree.leaves(after[:3]), strict=True
    ):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("jitted", [True, False])
def test_state_is_donated_and_the_model_is_not(jitted):
  optimizer, model = optax.sgd(0.1), mlp()
  init = lambda k, m: steps.init_state(k, m, optimizer)  # noqa: E731
  key = jax.random.key(0)
  state = (jax.jit(init) if jitted else init)(key, model)
  kernel = state.model.up.kernel[...]
  steps.make_step(squared, optimizer)(state, batch_of(0))
  assert kernel.is_deleted()
  assert not any(x.is_deleted() for x in jax.tree.leaves(model))
  assert float(jax.random.uniform(key)) >= 0  # still there


@pytest.mark.parametrize("remat", steps.REMAT)
def test_remat_changes_the_work_and_not_the_result(remat):
  optimizer = SGD
  plain = steps.make_step(squared, optimizer)
  again = steps.make_step(squared, optimizer, remat=remat)
  want, _ = run_on_one_device(optimizer)
  got, _ = run(again, optimizer)
  assert_close(got.model, want.model)
  state = first_state(mlp(), optimizer)
  count = lambda step, name: str(  # noqa: E731
    jax.make_jaxpr(step)(state, batch_of(0))
  ).count(f" {name}")
  assert count(again, "tanh") > count(plain, "tanh")  # never kept
  more = count(again, "dot_general") > count(plain, "dot_general")
  assert more == (remat == "nothing_saveable")


def test_policies_go_by_their_names():
  for name in steps.REMAT:
    assert steps.remat_policy(name) is getattr(jax.checkpoint_policies, name)
  assert steps.remat_policy(None) is None
  with pytest.raises(ValueError, match="remat must be one of .*, got 'all'"):
    steps.remat_policy("all")


def test_cached_gradient_is_a_loss_with_a_gradient_of_its_own():
  """A contrastive loss in pieces, through `jax.custom_vjp`."""

  def encode(model, x, key):
    return jax.nn.tanh(model.up(x))

  def contrast(embeddings):
    scores = embeddings["a"] @ embeddings["b"].T
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(scores)))

  @jax.custom_vjp
  def cached(model, inputs):
    return contrast(
      {side: encode(model, x, None) for side, x in inputs.items()}
    )

  def forward(model, inputs):
    return gradient_cache.cached_value_and_grad(
      encode, contrast, model, inputs, chunk_size=4
    )

  def backward(gradient, g):
    return jax.tree.map(lambda x: x * g, gradient), None

  cached.defvjp(forward, backward)
  both = lambda x: {"a": x, "b": x[:, ::-1]}  # noqa: E731
  optimizer = optax.sgd(1.0)
  results = [
    run(
      steps.make_step(
        lambda m, batch, key, f=f: (f(m, both(batch["x"])), {}), optimizer
      ),
      optimizer,
    )[0].model
    for f in (cached, cached.__wrapped__)
  ]
  assert_close(results[0], results[1], 1e-5)
  up, start = (np.asarray(m.up.kernel[...]) for m in (results[0], mlp()))
  assert np.abs(up - start).max()


@pytest.mark.parametrize(
  ("loss_fn", "settings", "message"),
  [
    (squared, {"remat": "everything"}, "remat must be one of 'nothing"),
    (squared, {"num_microbatches": 0}, "num_microbatches must lie in 1"),
    (squared, {"num_microbatches": 3}, "rows of x must be a multiple of 3"),
    (lambda m, b, k: (b["y"], {}), {}, r"loss must be a scalar.*\(16,\)"),
    (
      lambda m, b, k: (b["y"][0], {"loss": b["y"][0]}),
      {},
      r"metrics must not be named \['loss'\]",
    ),
    (
      lambda m, b, k: (b["y"][0], {"all": b["y"]}),
      {},
      r"metric 'all' must be a scalar, got shape \(16,\)",
    ),
  ],
)
def test_errors_name_what_is_wrong(loss_fn, settings, message):
  optimizer = optax.sgd(0.1)
  with pytest.raises(ValueError, match=message):
    run(steps.make_step(loss_fn, optimizer, **settings), optimizer, 1)
