"""One training step: gradients, guard, update, as one compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokjax import checks
from tokjax.parallel import rules
from tokjax.typing import Array, Bool, Int, Key

__all__ = ["REMAT", "TrainState", "init_state", "make_step", "remat_policy"]

# (model, batch, key) -> (loss, metrics); with buffers see `make_step`
LossFn = Callable[..., tuple[Array, ...]]

# Names of `jax.checkpoint_policies` that need no argument.
REMAT = (
  "nothing_saveable",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
)


class TrainState(NamedTuple):
  """What a step changes, and what a checkpoint holds.

  Attributes:
    step: updates done.
    model: the parameters in float32, an nnx module or any pytree.
    optimizer_state: of the optax transform.
    key: of the whole run; the key of a step is `fold_in(key, step)`.
    finite: False once a loss or gradient was not finite; from then on
      nothing else here changes.
    buffers: what the loss hands from step to step beside the parameters, such
      as codebooks of moving means; () for nothing.
    average: moving average of the parameters; () where none is kept.
  """

  step: Int[Array, ""]
  model: Any
  optimizer_state: Any
  key: Key[Array, ""]
  finite: Bool[Array, ""]
  buffers: Any = ()
  average: Any = ()


def init_state(
  key: Key[Array, ""],
  model: Any,
  optimizer: optax.GradientTransformation,
  buffers: Any = (),
  *,
  average: bool = False,
) -> TrainState:
  """The state before the first step, the parameters copied to float32.

  Args:
    key: for everything random in the run.
    model: a pytree of arrays; floats narrower than 32 bits are widened.
    optimizer: an optax transform.
    buffers: a pytree of arrays that no optimiser touches; copied as it is.
    average: keep a moving average of the parameters too.

  Returns:
    A state that shares no buffer with `key`, `model` or `buffers`.

  Example:
    >>> model = {"w": jnp.ones(2, jnp.bfloat16)}
    >>> init_state(jax.random.key(0), model, optax.sgd(0.1)).model["w"]
    Array([1., 1.], dtype=float32)
  """

  def master(x):
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return jnp.array(x, jnp.float32 if narrow else x.dtype, copy=True)

  model = jax.tree.map(master, model)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    model=model,
    optimizer_state=optimizer.init(model),
    key=jax.random.clone(key),
    finite=jnp.ones((), bool),
    buffers=jax.tree.map(lambda x: jnp.array(x, copy=True), buffers),
    average=jax.tree.map(lambda x: jnp.array(x, copy=True), model)
    if average
    else (),
  )


def make_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  compute_dtype: Any = jnp.float32,
  num_microbatches: int = 1,
  remat: str | None = None,
  state_shardings: TrainState | None = None,
  has_buffers: bool = False,
  average_decay: float = 0.0,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
  """Compiles `step(state, batch) -> (state, metrics)`.

  The parameters are cast to `compute_dtype` inside the differentiated
  function: products run in it, gradients and updates are float32. Floats of
  the batch are not cast; a model that takes some casts them itself.

  With several microbatches the gradient is the mean of theirs, computed one
  after the other in the memory of one. Microbatch m takes the rows m,
  m + M, m + 2M, ... so that each device splits its own rows. That equals the
  whole batch for a loss that is a mean over rows. A loss that weighs rows by
  a mask weighs them within their microbatch, and one that compares rows with
  each other (in-batch negatives) sees the rows of a microbatch only.

  The key of a step depends on the run's key and the step alone: a resumed
  run draws what the uninterrupted one would have. Where loss or gradient norm
  is not finite the state keeps its values and `finite` turns False for good.

  Args:
    loss_fn: `loss_fn(model, batch, key) -> (loss, metrics)`; the loss is a
      scalar over the whole batch as if on one device, metrics a dict of
      scalars.
    optimizer: an optax transform.
    compute_dtype: dtype of the parameters that `loss_fn` sees.
    num_microbatches: M; must divide the rows of the batch.
    remat: which values the backward pass keeps, one of `REMAT`; None keeps
      all it needs. The policy covers the whole loss, scans over layers
      included, and what it does not keep is there at once when the backward
      pass begins; a model whose layers call `jax.checkpoint` needs less
      memory, and no policy here.
    state_shardings: where each array of the state lives; None leaves it to
      the compiler, fine on one device.
    has_buffers: the loss is `loss_fn(model, buffers, batch, key) -> (loss,
      metrics, buffers)`; buffers keep their dtypes, and microbatches hand
      them on one after the other.
    average_decay: of the moving average of the parameters, which follows
      every update; 0 where the state keeps none.

  Returns:
    The compiled function. The state passed in is used up (its buffers are
    donated). Metrics are float32 scalars: those of `loss_fn`, averaged over
    microbatches, and `loss`, `grad_norm` (before clipping) and `finite`.

  Raises:
    ValueError: for an unknown policy, rows that do not divide, a loss that is
      no scalar or metrics that use a taken name.

  Example:
    >>> def loss_fn(model, batch, key):
    ...   return jnp.mean((batch @ model["w"] - 1.0) ** 2), {}
    >>> step = make_step(loss_fn, optax.sgd(0.25))
    >>> state = init_state(
    ...   jax.random.key(0), {"w": jnp.zeros(1)}, optax.sgd(0.25))
    >>> state, metrics = step(state, jnp.ones((4, 1)))
    >>> float(metrics["loss"]), float(state.model["w"][0])
    (1.0, 0.5)
  """
  policy = remat_policy(remat)
  checks.in_range(1, float("inf"), num_microbatches=num_microbatches)

  checks.in_range(0, 1, average_decay=average_decay)

  def loss_of(model, buffers, batch, key):
    model = rules.gather(_cast(model, compute_dtype))
    if has_buffers:
      loss, metrics, buffers = loss_fn(model, buffers, batch, key)
    else:
      loss, metrics = loss_fn(model, batch, key)
    _check_outputs(loss, metrics)
    return loss.astype(jnp.float32), (metrics, buffers)

  if policy is not None:
    loss_of = jax.checkpoint(loss_of, policy=policy)
  gradient_of = jax.value_and_grad(loss_of, has_aux=True)

  def step(state, batch):
    key = jax.random.fold_in(state.key, state.step)
    if num_microbatches == 1:
      (loss, (metrics, buffers)), gradient = gradient_of(
        state.model, state.buffers, batch, key
      )
    else:
      loss, metrics, buffers, gradient = _accumulate(
        gradient_of, state.model, state.buffers, batch, key, num_microbatches
      )
    norm = optax.global_norm(gradient)
    finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norm)
    with jax.named_scope("update"):
      updates, optimizer_state = optimizer.update(
        gradient, state.optimizer_state, state.model
      )
      model = optax.apply_updates(state.model, updates)
      average = state.average
      if average_decay:
        average = optax.incremental_update(model, average, 1 - average_decay)
    moved = state._replace(
      step=state.step + 1,
      model=model,
      optimizer_state=optimizer_state,
      buffers=buffers,
      average=average,
    )
    moved = jax.tree.map(
      lambda new, old: new if new is old else jnp.where(finite, new, old),
      moved,
      state,
    )
    metrics = {**metrics, "loss": loss, "grad_norm": norm, "finite": finite}
    return moved._replace(finite=finite), metrics

  return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def remat_policy(remat: str | None) -> Callable[..., Any] | None:
  """The function of `jax.checkpoint_policies` of a name.

  Args:
    remat: one of `REMAT`; None gives None.

  Returns:
    What `jax.checkpoint` takes as its policy.

  Raises:
    ValueError: for another name.

  Example:
    >>> remat_policy("dots_saveable") is jax.checkpoint_policies.dots_saveable
    True
  """
  if remat is None:
    return None
  checks.one_of(REMAT, remat=remat)
  return getattr(jax.checkpoint_policies, remat)


def _accumulate(gradient_of, model, buffers, batch, key, num_microbatches):
  """Means of loss, metrics and gradient over the microbatches."""

  def split(path, x):
    rows = {f"rows of {rules.leaf_path(path) or 'batch'}": x.shape[0]}
    checks.divisible(num_microbatches, **rows)
    shape = (x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:])
    return x.reshape(shape).swapaxes(0, 1)  # [M, B / M, ...]

  def one(carry, microbatch):
    total, buffers = carry
    (loss, (metrics, buffers)), gradient = gradient_of(
      model, buffers, *microbatch
    )
    return (jax.tree.map(jnp.add, total, gradient), buffers), (loss, metrics)

  microbatches = jax.tree_util.tree_map_with_path(split, batch)
  keys = jax.random.split(key, num_microbatches)
  zeros = jax.tree.map(jnp.zeros_like, model)
  (total, buffers), outputs = jax.lax.scan(
    one, (zeros, buffers), (microbatches, keys)
  )
  loss, metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), outputs)
  gradient = jax.tree.map(lambda x: x / num_microbatches, total)
  return loss, metrics, buffers, gradient


def _cast(tree, dtype):
  def cast(x):
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(cast, tree)


def _check_outputs(loss, metrics):
  if jnp.shape(loss) != ():
    raise ValueError(f"loss must be a scalar, got shape {jnp.shape(loss)}")
  taken = {"loss", "grad_norm", "finite"} & set(metrics)
  if taken:
    raise ValueError(f"metrics must not be named {sorted(taken)}")
  for name, value in metrics.items():
    if jnp.shape(value) != ():
      raise ValueError(
        f"metric {name!r} must be a scalar, got shape {jnp.shape(value)}"
      )
