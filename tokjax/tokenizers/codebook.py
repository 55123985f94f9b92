"""Codebooks and how they learn.

A codebook is a table of K code vectors. Three ways to learn it:

- "gradient": the table is a parameter, moved by the codebook loss.
- "ema": the table is state, each code the moving mean of the vectors it was
  the nearest to; no optimiser may touch it, so it is not a parameter.
- "simvq": a frozen random table times one learned matrix, so that all codes
  move together and none dies.

State is passed in and returned. The forward pass takes the codes as they were
before the step; `update` comes after it.

    codebook = Codebook(CodebookConfig(1024, 8, learning="ema"), rngs=rngs)
    state = codebook.init_state(key)
    index = nearest_code(x, codebook.table(state))
    state = update(state, x, index, config=codebook.config)

Sources: moving means, van den Oord, Vinyals, Kavukcuoglu, 2017, "Neural
Discrete Representation Learning", appendix A.1; "simvq", Zhu et al., 2024,
"Addressing Representation Collapse in Vector Quantized Models with One Linear
Layer"; resets from published code: from the batch and its threshold
(lucidrains/vector-quantize-pytorch), splitting the most used code
(google-research/big_vision, UViM). Ours: a reset may not be asked of a table
that an optimiser owns, and draws from the batch of all devices.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import clustering, code_usage, similarity
from tokjax.ops.rows import draw_rows, sum_rows
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = [
  "Codebook",
  "CodebookConfig",
  "CodebookState",
  "from_data",
  "update",
]

Learning = Literal["gradient", "ema", "simvq"]
Metric = Literal["euclidean", "cosine"]
Reset = Literal["none", "batch", "split"]


@dataclasses.dataclass(unsafe_hash=True)
class CodebookConfig:
  """A codebook of `num_codes` vectors of width `dim`."""

  num_codes: int  # K
  dim: int  # width d of a code
  metric: Metric = "euclidean"  # "cosine": codes and inputs of length one
  learning: Learning = "gradient"
  decay: float = 0.99  # of the moving means and counts
  epsilon: float = 1e-5  # smooths the counts that means are divided by
  reset: Reset = "none"  # how dead codes come back, for "ema" only
  reset_threshold: float = 2.0  # moving count below which a code is dead


class CodebookState(NamedTuple):
  """What a step changes without gradients.

  Attributes:
    counts: moving count of the vectors of each code in a step.
    codes: the table of "ema", the frozen table of "simvq"; None for
      "gradient".
    sums: moving sum of the vectors of each code, of "ema"; else None.
  """

  counts: Float[Array, " K"]
  codes: Float[Array, "K d"] | None = None
  sums: Float[Array, "K d"] | None = None


class Codebook(nnx.Module):
  """The learned part of a codebook: nothing for "ema", else one array.

  Attributes:
    config: its settings.
    codes: the table of "gradient".
    mix: the matrix of "simvq", [d, d], from the identity.

  Args:
    config: settings.
    rngs: source of the table of "gradient".

  Raises:
    ValueError: for unknown or contradictory settings.

  Example:
    >>> config = CodebookConfig(num_codes=4, dim=2, learning="ema")
    >>> codebook = Codebook(config, rngs=nnx.Rngs(0))
    >>> state = jax.jit(codebook.init_state)(jax.random.key(0))
    >>> codebook.table(state).shape, codebook.codes
    ((4, 2), None)
  """

  def __init__(self, config: CodebookConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    gradient = config.learning == "gradient"
    self.codes = nnx.Param(_start(rngs.params(), config)) if gradient else None
    simvq = config.learning == "simvq"
    self.mix = nnx.Param(jnp.eye(config.dim)) if simvq else None

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The state before the first step; every code counts as used once."""
    config = self.config
    counts = jnp.ones(config.num_codes)
    if config.learning == "gradient":
      return CodebookState(counts)
    codes = _start(key, config)
    ema = config.learning == "ema"
    return CodebookState(counts, codes, codes if ema else None)

  def table(self, state: CodebookState) -> Float[Array, "K d"]:
    """The code vectors, float32; of length one for "cosine".

    Gradients reach the parameters, if there are any, and never the state.
    """
    if self.codes is not None:
      codes = self.codes[...].astype(jnp.float32)
    else:
      codes = jax.lax.stop_gradient(state.codes)
      if self.mix is not None:
        codes = codes @ self.mix[...].astype(jnp.float32)
    if self.config.metric == "cosine":
      codes = similarity.safe_normalize(codes)
    return codes


def _check(config):
  checks.one_of(get_args(Learning), learning=config.learning)
  checks.one_of(get_args(Metric), metric=config.metric)
  checks.one_of(get_args(Reset), reset=config.reset)
  checks.in_range(1, 1 << 30, num_codes=config.num_codes, dim=config.dim)
  checks.in_range(0, 1, decay=config.decay)
  if config.reset != "none" and config.learning != "ema":
    raise ValueError(
      f'reset {config.reset!r} needs learning "ema", got {config.learning!r}:'
      " a table that an optimiser owns is not replaced, and one that moves as"
      " a whole has no dead codes"
    )


def _start(key, config):
  """Uniform in +-1/K, or on the sphere; normal of length one for "simvq"."""
  shape = config.num_codes, config.dim
  if config.learning == "simvq":
    return jax.random.normal(key, shape) / math.sqrt(config.dim)
  if config.metric == "cosine":
    return similarity.safe_normalize(jax.random.normal(key, shape))
  bound = 1 / config.num_codes
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def from_data(
  key: Key[Array, ""],
  x: Float[Array, "*batch d"],
  mask: Bool[Array, "*batch"] | None = None,
  *,
  config: CodebookConfig,
  num_iterations: int = 10,
) -> CodebookState:
  """State whose codes are the k-means of data, against collapse.

  Args:
    key: for the first means.
    x: vectors as they come to the codebook, at least K.
    mask: True where a vector counts; None means all.
    config: settings; `learning` is "ema".
    num_iterations: of Lloyd's algorithm.

  Returns:
    Means, their cluster sizes as counts, and the sums of their members.

  Raises:
    ValueError: if `learning` is another, or there are fewer vectors than
      codes.

  Example:
    >>> x = jnp.array([[0.0], [2.0], [8.0], [10.0]])
    >>> config = CodebookConfig(num_codes=2, dim=1, learning="ema")
    >>> state = from_data(jax.random.key(1), x, config=config)
    >>> sorted(state.codes.tolist()), state.counts.tolist()
    ([[1.0], [9.0]], [2.0, 2.0])
  """
  if config.learning != "ema":
    raise ValueError(f'learning must be "ema", got {config.learning!r}')
  rows, mask = _rows(x, mask)
  if config.metric == "cosine":
    rows = similarity.safe_normalize(rows)
  found = clustering.kmeans(
    key,
    rows,
    num_clusters=config.num_codes,
    num_iterations=num_iterations,
    mask=mask,
    spherical=config.metric == "cosine",
  )
  counts = found.counts.astype(jnp.float32)
  return CodebookState(
    counts, found.centroids, found.centroids * counts[:, None]
  )


def update(
  state: CodebookState,
  x: Float[Array, "*batch d"],
  index: Int[Array, "*batch"],
  *,
  config: CodebookConfig,
  key: Key[Array, ""] | None = None,
  axis_name: str | None = None,
) -> CodebookState:
  """The state after a step in which `x` got the codes `index`.

  Costs 2 N d additions for N vectors, and K d of moving means.

  Args:
    state: before the step.
    x: the vectors that were quantised.
    index: of their codes; -1 for what does not count.
    config: settings.
    key: for `reset`.
    axis_name: mesh axis over which a `shard_map` cuts the vectors; sums are
      taken over it. Under jit alone sums are over all devices anyway.

  Returns:
    The new state; "gradient" and "simvq" change counts only. No gradient
    flows.

  Raises:
    ValueError: if `reset` needs a key and has none.

  Example:
    >>> config = CodebookConfig(2, 2, learning="ema", decay=0.9)
    >>> codes = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    >>> state = CodebookState(jnp.ones(2), codes, codes)
    >>> x = jnp.array([[0.2, 0.0], [0.9, 0.1], [1.1, 0.3]])
    >>> state = update(state, x, jnp.array([0, 1, 1]), config=config)
    >>> state.counts.round(2).tolist()
    [1.0, 1.100000023841858]
  """
  if config.reset != "none" and key is None:
    raise ValueError(f"key must be given for reset {config.reset!r}, got None")
  state, x = jax.lax.stop_gradient((state, x))
  hits = code_usage.code_histogram(index, num_codes=config.num_codes)
  if axis_name is not None:
    hits = jax.lax.psum(hits, axis_name)
  counts = config.decay * state.counts + (1 - config.decay) * hits
  if config.learning != "ema":
    return state._replace(counts=counts)
  x = x.astype(jnp.float32)
  if config.metric == "cosine":
    x = similarity.safe_normalize(x)
  x = jnp.where((index >= 0)[..., None], x, 0)
  seen = sum_rows(x, index, num_rows=config.num_codes)
  if axis_name is not None:
    seen = jax.lax.psum(seen, axis_name)
  sums = config.decay * state.sums + (1 - config.decay) * seen
  total = jnp.sum(counts)
  smooth = (counts + config.epsilon) / (
    total + config.num_codes * config.epsilon
  )
  codes = sums / (smooth * total)[:, None]
  if config.metric == "cosine":
    codes = similarity.safe_normalize(codes)
  state = CodebookState(counts, codes, sums)
  if config.reset == "batch":
    rows, mask = _of_all_devices(x, index >= 0, axis_name)
    return _reset_from_batch(state, rows, mask, key, config)
  if config.reset == "split":
    return _split_most_used(state, key, config)
  return state


def _rows(x, mask):
  if mask is None:
    mask = jnp.ones(x.shape[:-1], bool)
  checks.same_size(x=x[..., 0].size, mask=mask.size)
  rows = _whole(x).reshape(-1, x.shape[-1]).astype(jnp.float32)
  mask = _whole(mask).reshape(-1)
  return jnp.where(mask[:, None], rows, 0), mask


def _whole(x):
  """On every device, where an Explicit mesh has parts of it."""
  parts = any(axis is not None for axis in jax.typeof(x).sharding.spec)
  return jax.sharding.reshard(x, jax.P()) if parts else x


def _of_all_devices(x, mask, axis_name):
  """Rows of the whole batch, in order, and whether they count."""
  x, mask = _rows(x, mask)
  if axis_name is None:
    return x, mask
  size, place = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

  def gather(x):  # as a sum, which is known to be the same everywhere
    whole = jnp.zeros((size, *x.shape), x.dtype).at[place].set(x)
    return jax.lax.psum(whole, axis_name).reshape(-1, *x.shape[1:])

  return gather(x), gather(mask.astype(jnp.int32)) > 0


def _reset_from_batch(state, rows, mask, key, config):
  """Dead codes become vectors of the batch, with the count that just lives."""
  fresh = draw_rows(key, rows, mask, number=config.num_codes)
  dead = (state.counts < config.reset_threshold) & jnp.any(mask)
  codes = jnp.where(dead[:, None], fresh, state.codes)
  counts = jnp.where(dead, config.reset_threshold, state.counts)
  sums = jnp.where(dead[:, None], codes * counts[:, None], state.sums)
  return CodebookState(counts, codes, sums)


def _split_most_used(state, key, config, spread=0.01):
  """While a code is dead, the most used one gives it half of what it has."""

  def dead(carry):
    counts, _, step = carry
    low = jnp.min(counts) < config.reset_threshold
    can = jnp.max(counts) >= 2 * config.reset_threshold
    return low & can & (step < config.num_codes)

  def split(carry):
    counts, sums, step = carry
    most, least = jnp.argmax(counts), jnp.argmin(counts)
    factor = jax.random.uniform(
      jax.random.fold_in(key, step),
      (config.dim,),
      minval=1 - spread,
      maxval=1 + spread,
    )
    half, row = counts[most] / 2, sums[most] / 2
    counts = counts.at[most].set(half).at[least].set(half)
    sums = sums.at[most].set(row).at[least].set(row * factor)
    return counts, sums, step + 1

  counts, sums, _ = jax.lax.while_loop(
    dead, split, (state.counts, state.sums, jnp.int32(0))
  )
  changed = counts != state.counts
  codes = sums / jnp.where(counts > 0, counts, 1)[:, None]
  if config.metric == "cosine":
    codes = similarity.safe_normalize(codes)
  codes = jnp.where(changed[:, None], codes, state.codes)
  return CodebookState(counts, codes, sums)
