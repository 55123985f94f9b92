"""Public greedy selection over a table: checks, first pick, implementation."""

import functools
import importlib
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.kernels import hopper
from tokjax.kernels.greedy_select import picks, reference, sharding, xla
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = ["OBJECTIVES", "greedy_select"]

OBJECTIVES = ("max_min", "max_sum", "coverage", "mmr", "dpp")


def greedy_select(
  table: Float[Array, "B M N"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  objective: Literal[
    "max_min", "max_sum", "coverage", "mmr", "dpp"
  ] = "max_min",
  bonus: Float[Array, "B N"] | None = None,
  first: Int32[Array, " B"] | None = None,
  trade_off: float | None = None,
  implementation: Implementation | None = None,
) -> picks.Picks:
  """Picks columns of a similarity table, one after the other.

  Every step takes the column with the largest score given the set S picked
  before it (ties: lower index):

      max_min   -max_{c in S} table_cj                 farthest first, k-center
      max_sum   -sum_{c in S} table_cj                 max-sum diversity
      coverage  bonus_j + sum_i max(0, table_ij - best_i),
                best_i = max(0, max_{c in S} table_ic)     facility location
      mmr       trade_off bonus_j - (1 - trade_off) max_{c in S} table_cj
      dpp       L_jj - L_jS L_SS^-1 L_Sj,
                L_ij = bonus_i table_ij bonus_j        determinant of L_SS

  Rows and columns are the same tokens, and the table symmetric, except for
  "coverage", where row i is a target; a row of zeros is no target. The first
  pick of "max_min" is the column whose nearest other one is farthest, that of
  "max_sum" the first valid one; in "mmr" the maximum over nothing counts 0.
  Whatever masked columns hold (and, of a square table of tokens, their rows),
  NaN included, has no influence. No gradient passes.

  Args:
    table: similarities, float32 or bfloat16; scores are float32. The picked
      rows are read as they are, so bfloat16 halves memory and traffic.
    mask: True where a column may be picked; None for all.
    num_keep: K, static, at most N.
    objective: which score, static.
    bonus: coverage: worth of a column by itself (None: 0). mmr: importance,
      required. dpp: relevance (None: 1). The others take none.
    first: column to pick first, whatever its score; where it is masked, the
      first valid column. None starts as said above. Its gain is 0 in "max_min"
      and "max_sum".
    trade_off: weight of importance against novelty in "mmr", static, 0..1
      (None: 0.5). The others take none.
    implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu" runs that
      one or raises. None chooses when the program is lowered: the TPU kernel on
      TPU where it takes the table, "xla" elsewhere; the GPU kernel only where
      the mesh of `jax.set_mesh` says that its devices are Hopper GPUs.

  Returns:
    The picks in order, with their scores and a mask. A lone token has gain 0
    in "max_min".

  Raises:
    ValueError: if sizes disagree, `num_keep` is out of range, or an argument
      has no meaning for the objective.
    NotImplementedError: if the named implementation cannot take the table.

  Example:
    >>> import jax.numpy as jnp
    >>> angle = jnp.deg2rad(jnp.array([0.0, 10, 20, 90, 100, 180]))
    >>> cosine = jnp.cos(angle[:, None] - angle[None, :])
    >>> greedy_select(cosine[None], num_keep=4).index.tolist()
    [[5, 0, 3, 2]]

  Cost: reads K rows of the table ("coverage" all of it K times). max_min,
  max_sum, mmr: O(K N); coverage: 3 K M N; dpp: O(K^2 N).

  On an Explicit mesh the table may be sharded over its first axis and every
  device works on its own examples; on an Auto mesh wrap the kernels in
  `jax.shard_map`.

  Source: max_min: Gonzalez (1985), "Clustering to minimize the maximum
  intercluster distance"; coverage: Nemhauser, Wolsey and Fisher (1978), "An
  analysis of approximations for maximizing submodular set functions"; mmr:
  Carbonell and Goldstein (1998), "The use of MMR"; dpp: Chen, Zhang and Zhou
  (2018), "Fast greedy MAP inference for determinantal point process". The tie
  rule, masks and the treatment of linearly dependent "dpp" candidates (their
  gain is exactly 0 from a relative variance of 1e-6 down) are ours.
  """
  checks.has_rank(3, table=table)
  batch, num_rows, num_tokens = table.shape
  checks.one_of(OBJECTIVES, objective=objective)
  checks.one_of(
    (None, *get_args(Implementation)), implementation=implementation
  )
  if objective != "coverage":
    checks.same_size(table_rows=num_rows, table_columns=num_tokens)
  picks.check_settings(
    batch, num_tokens, mask, bonus, first, num_keep, objective, trade_off
  )
  return _greedy_select(
    table,
    mask,
    bonus,
    first,
    num_keep=num_keep,
    objective=objective,
    trade_off=0.5 if trade_off is None else float(trade_off),
    implementation=implementation,
  )


_STATIC = ("num_keep", "objective", "trade_off", "implementation")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _greedy_select(
  table, mask, bonus, first, *, num_keep, objective, trade_off, implementation
):
  def local(table, mask, bonus, first):
    table = jax.lax.stop_gradient(table)
    if bonus is not None:
      bonus = jax.lax.stop_gradient(bonus).astype(jnp.float32)
    if objective == "dpp" and bonus is not None:
      scaled = bonus[:, :, None] * table.astype(jnp.float32)
      table, bonus = scaled * bonus[:, None, :], None
    natural, own = _natural(table, mask, bonus, first, objective, trade_off)
    select = functools.partial(
      _dispatch,
      num_keep=num_keep,
      objective=objective,
      weight=1 - trade_off if objective == "mmr" else 1.0,
      implementation=implementation,
    )
    index, gain = select(table, picks.open_with(natural, mask, first), own)
    return picks.finish(index, gain, natural, first)

  return sharding.over_batch_shards(
    local, table=table, mask=mask, bonus=bonus, first=first
  )


def _natural(table, mask, bonus, first, objective, trade_off):
  """Scores of the first pick, and the score of each column by itself."""
  nothing = jnp.zeros_like(table[:, 0, :], dtype=jnp.float32)  # [B, N]
  if objective == "max_sum" or (objective == "max_min" and first is not None):
    return nothing, nothing
  if objective == "mmr":
    return trade_off * bonus, trade_off * bonus
  if objective == "coverage":
    own = nothing if bonus is None else bonus
    covered = jnp.maximum(table.astype(jnp.float32), 0)
    return own + jnp.sum(covered, axis=1), own
  position = jnp.arange(table.shape[2], dtype=jnp.int32)
  itself = (position[:, None] == position[None, :])[None]
  if objective == "dpp":
    diagonal = jnp.where(itself, table.astype(jnp.float32), 0).sum(axis=1)
    return diagonal, diagonal
  other = jnp.broadcast_to(~itself, table.shape)
  if mask is not None:
    other &= mask[:, :, None]
  nearest = jnp.max(
    jnp.where(other, table.astype(jnp.float32), -jnp.inf), axis=1
  )
  return jnp.where(nearest == -jnp.inf, 0, -nearest), nothing


def _dispatch(table, opening, bonus, *, implementation, **settings):
  """Runs the implementation named, or that of the platform."""
  objective = settings["objective"]
  if implementation is not None:
    module = _module(implementation)
    if implementation.startswith("pallas"):
      reason = module.unsupported(table, objective, settings["num_keep"])
      if reason is not None:
        raise NotImplementedError(f"{implementation}: {reason}")
    return module.select(table, opening, bonus, **settings)
  branches = {"default": functools.partial(xla.select, **settings)}
  kernels = {"tpu": "pallas_tpu"}
  if hopper.on_hopper():
    kernels["cuda"] = "pallas_gpu"
  for platform, name in kernels.items():
    module = _module(name)
    if module.unsupported(table, objective, settings["num_keep"]) is None:
      branches[platform] = functools.partial(module.select, **settings)
  return jax.lax.platform_dependent(table, opening, bonus, **branches)


def _module(name: str):
  """The module of an implementation; only its users import Pallas."""
  if name == "reference":
    return reference
  return importlib.import_module(f"tokjax.kernels.greedy_select.{name}")
