"""Codebooks and how they learn.

A codebook is a table of K code vectors. Three ways to learn it:

- "gradient": the table is a parameter, moved by the codebook loss.
- "ema": the table is state, each code the moving mean of the vectors it was
  the nearest to; no optimiser may touch it, so it is not a parameter.
- "simvq": a frozen random table times one learned matrix, so that all codes
  move together and none dies.

State is passed in and returned. The forward pass takes the codes as they were
before the step; `update` comes after it. What is done about codes that nothing
chooses any more is in `code_resets`.

    codebook = Codebook(CodebookConfig(1024, 8, learning="ema"), rngs=rngs)
    state = codebook.init_state(key)
    index = nearest_code(x, codebook.table(state))
    state = update(state, x, index, config=codebook.config)

Sources: moving means, van den Oord, Vinyals, Kavukcuoglu, 2017, "Neural
Discrete Representation Learning", appendix A.1; "simvq", Zhu et al., 2024,
"Addressing Representation Collapse in Vector Quantized Models with One Linear
Layer". Ours: no step writes to a table that an optimiser owns. Anchors, which
published code writes into the parameter, are there a shift that is added to
it: the codes are the same numbers, and the optimiser keeps its own.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.ops import clustering, code_usage, similarity
from tokjax.ops.rows import sum_rows
from tokjax.tokenizers import code_resets
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
Reset = Literal["none", "batch", "split", "anchors"]


@dataclasses.dataclass(unsafe_hash=True)
class CodebookConfig:
  """A codebook of `num_codes` vectors of width `dim`."""

  num_codes: int  # K
  dim: int  # width d of a code
  metric: Metric = "euclidean"  # "cosine": codes and inputs of length one
  learning: Learning = "gradient"
  decay: float = 0.99  # of the moving means and counts
  epsilon: float = 1e-5  # smooths the counts that means are divided by
  reset: Reset = "none"  # of dead codes, for "ema"; "anchors" for "gradient"
  reset_threshold: float = 2.0  # moving count below which a code is dead

  @property
  def needs_key(self) -> bool:
    """Whether `update` draws at random."""
    return self.reset in ("batch", "split")


class CodebookState(NamedTuple):
  """What a step changes without gradients.

  Attributes:
    counts: moving count of the vectors of each code in a step.
    codes: the table of "ema", the frozen table of "simvq"; None for
      "gradient".
    sums: moving sum of the vectors of each code, of "ema"; else None.
    usage: moving share of the vectors of each code, for "anchors"; else None.
    shift: what anchors add to the table of "gradient"; else None.
  """

  counts: Float[Array, " K"]
  codes: Float[Array, "K d"] | None = None
  sums: Float[Array, "K d"] | None = None
  usage: Float[Array, " K"] | None = None
  shift: Float[Array, "K d"] | None = None


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
    state = CodebookState(jnp.ones(config.num_codes))
    if config.reset == "anchors":
      state = state._replace(usage=jnp.zeros(config.num_codes))
    if config.learning == "gradient":
      if config.reset == "anchors":
        shape = config.num_codes, config.dim
        state = state._replace(shift=jnp.zeros(shape))
      return state
    codes = _start(key, config)
    ema = config.learning == "ema"
    return state._replace(codes=codes, sums=codes if ema else None)

  def table(self, state: CodebookState) -> Float[Array, "K d"]:
    """The code vectors, float32; of length one for "cosine".

    Gradients reach the parameters, if there are any, and never the state.
    """
    if self.codes is not None:
      codes = self.codes[...].astype(jnp.float32)
      if state.shift is not None:
        codes = codes + jax.lax.stop_gradient(state.shift)
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
  fits = {
    "none": get_args(Learning),
    "anchors": ("ema", "gradient"),
  }.get(config.reset, ("ema",))
  if config.learning not in fits:
    names = " or ".join(f'"{name}"' for name in fits)
    raise ValueError(
      f"reset {config.reset!r} needs learning {names}, got"
      f" {config.learning!r}: a table that an optimiser owns is not replaced,"
      " and one that moves as a whole has no dead codes"
    )
  if config.reset == "anchors" and config.decay == 1:
    raise ValueError('decay must be below 1 for reset "anchors", got 1')


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
  if mask is None:
    mask = jnp.ones(x.shape[:-1], bool)
  checks.same_size(x=x[..., 0].size, mask=mask.size)
  rows, mask = code_resets.rows_of_all_devices(x, mask)
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
  codes: Float[Array, "K d"] | None = None,
  key: Key[Array, ""] | None = None,
  axis_name: str | None = None,
) -> CodebookState:
  """The state after a step in which `x` got the codes `index`.

  Costs 2 N d additions for N vectors, and K d of moving means.

  Args:
    state: before the step.
    x: the vectors that were quantised, before they are normalised.
    index: of their codes; -1 for what does not count.
    config: settings.
    codes: the parameter of "gradient", which `reset` "anchors" needs.
    key: for `reset` "batch" and "split".
    axis_name: mesh axis over which a `shard_map` cuts the vectors; sums are
      taken over it. Under jit alone sums are over all devices anyway.

  Returns:
    The new state; without anchors "gradient" and "simvq" change counts only.
    No gradient flows.

  Raises:
    ValueError: if `reset` needs a key or codes and has none.

  Example:
    >>> config = CodebookConfig(2, 2, learning="ema", decay=0.9)
    >>> codes = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    >>> state = CodebookState(jnp.ones(2), codes, codes)
    >>> x = jnp.array([[0.2, 0.0], [0.9, 0.1], [1.1, 0.3]])
    >>> state = update(state, x, jnp.array([0, 1, 1]), config=config)
    >>> state.counts.round(2).tolist()
    [1.0, 1.100000023841858]
  """
  if config.needs_key and key is None:
    raise ValueError(f"key must be given for reset {config.reset!r}, got None")
  state, x, codes = jax.lax.stop_gradient((state, x, codes))
  hits = code_usage.code_histogram(index, num_codes=config.num_codes)
  if axis_name is not None:
    hits = jax.lax.psum(hits, axis_name)
  counts = config.decay * state.counts + (1 - config.decay) * hits
  x = jnp.where((index >= 0)[..., None], x.astype(jnp.float32), 0)
  state = state._replace(counts=counts)
  if config.learning == "ema":
    state = _moving_means(state, x, index, config, axis_name)
  if config.reset == "none":
    return state
  rows, mask = code_resets.rows_of_all_devices(x, index >= 0, axis_name)
  if config.reset == "anchors":
    return _anchored(state, codes, hits, rows, mask, config)
  if config.reset == "batch":
    if config.metric == "cosine":
      rows = similarity.safe_normalize(rows)
    counts, codes = code_resets.from_batch(
      key, state.counts, state.codes, rows, mask,
      threshold=config.reset_threshold,
    )  # fmt: skip
    fresh = (counts != state.counts)[:, None]
    sums = jnp.where(fresh, codes * counts[:, None], state.sums)
    return CodebookState(counts, codes, sums)
  counts, sums = code_resets.split_most_used(
    key, state.counts, state.sums, threshold=config.reset_threshold
  )
  codes = sums / jnp.where(counts > 0, counts, 1)[:, None]
  if config.metric == "cosine":
    codes = similarity.safe_normalize(codes)
  fresh = (counts != state.counts)[:, None]
  return CodebookState(counts, jnp.where(fresh, codes, state.codes), sums)


def _moving_means(state, x, index, config, axis_name):
  if config.metric == "cosine":
    x = similarity.safe_normalize(x)
  seen = sum_rows(x, index, num_rows=config.num_codes)
  if axis_name is not None:
    seen = jax.lax.psum(seen, axis_name)
  sums = config.decay * state.sums + (1 - config.decay) * seen
  codes = sums / _smooth(state.counts, config)[:, None]
  if config.metric == "cosine":
    codes = similarity.safe_normalize(codes)
  return state._replace(codes=codes, sums=sums)


def _smooth(counts, config):
  """Counts that are never zero, of the same sum."""
  total = jnp.sum(counts)
  spread = total + config.num_codes * config.epsilon
  return (counts + config.epsilon) / spread * total


def _anchored(state, parameter, hits, rows, mask, config):
  if config.learning == "ema":
    codes = state.codes
  elif parameter is None:
    raise ValueError('codes must be given for reset "anchors", got None')
  else:
    codes = parameter.astype(jnp.float32) + state.shift
  found = code_resets.toward_anchors(
    codes, state.usage, hits, rows, mask,
    decay=config.decay, cosine=config.metric == "cosine",
  )  # fmt: skip
  state = state._replace(usage=found.usage)
  if config.learning == "gradient":
    return state._replace(shift=state.shift + found.codes - codes)
  codes = found.codes
  if config.metric == "cosine":
    codes = similarity.safe_normalize(codes)
  # What the means go on from.
  sums = codes * _smooth(state.counts, config)[:, None]
  return state._replace(codes=codes, sums=sums)
