"""Contracts of packing, plans, merging and the methods that fuse tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts import harness
from tests.contracts.harness import Case
from tokjax.ops import budgets, merging, packing, plans
from tokjax.reduction import (
  aim,
  prumerge,
  token_transforming,
  tome,
  types,
  visiondrop,
  visionzip,
)

B, N, D, K = 8, 16, 4, 9


def tokens(seed):
  """Features, metric, score and mask; what is masked is NaN."""
  random = np.random.default_rng(seed)
  x, metric = random.normal(size=(2, B, N, D))
  score = random.exponential(size=(B, N))
  score[:, 5] = score[:, 7]  # a tie
  mask = random.random((B, N)) < 0.85
  mask[0], mask[1, 3:] = True, False
  mask[:, 0] = True
  x, metric = (np.where(mask[..., None], a, np.nan) for a in (x, metric))
  score = np.where(mask, score, np.nan)
  x, metric, score = (jnp.asarray(a, jnp.float32) for a in (x, metric, score))
  return x, metric, score, jnp.asarray(mask)


def heads(seed):
  """Hidden states, queries, keys of two heads and mask."""
  x, _, _, mask = tokens(seed)
  random = np.random.default_rng(seed + 100)
  q, k = random.normal(size=(2, B, 2, N, D))
  seen = np.asarray(mask)[:, None, :, None]
  q, k = (jnp.asarray(np.where(seen, a, np.nan), jnp.float32) for a in (q, k))
  return x, q, k, mask


# Features, metric, score and mask in, `Reduced` out.
METHODS = {
  "tome": lambda x, m, s, mask: tome.tome(x, m, mask, num_keep=K),
  "tome-class": lambda x, m, s, mask: tome.tome(
    x, m, mask, num_keep=K, class_token=True
  ),
  "tome-random": lambda x, m, s, mask: tome.tome_random(
    jax.random.key(0), x, m, mask, num_keep=K
  ),
  "visionzip": lambda x, m, s, mask: visionzip.visionzip(
    x, m, s, mask, num_keep=K, num_contextual=3
  ),
  "prumerge": lambda x, m, s, mask: prumerge.prumerge(
    x, m, s, mask, num_keep=K
  ),
  "prumerge-plus": lambda x, m, s, mask: prumerge.prumerge_plus(
    x, m, s, mask, num_keep=K, stride=2
  ),
  "aim-merge": lambda x, m, s, mask: aim.aim_merge(x, mask, num_keep=5),
  "aim-prune": lambda x, m, s, mask: aim.aim_prune(
    x, s, mask & (s > 2), mask, num_keep=K
  ),
  "token-transforming": lambda x, m, s, mask: (
    token_transforming.token_transforming(x, m, s, mask, num_keep=K)
  ),
}

# Hidden states, queries, keys and mask in, `Reduced` out.
STAGES = {
  "visiondrop-encoder": lambda x, q, k, mask: visiondrop.encoder_stage(
    x, q, k, mask, num_dominant=5, num_contextual=2
  ),
  "visiondrop-llm": lambda x, q, k, mask: visiondrop.llm_stage(
    x, q, k, mask, start=2, stop=14, num_dominant=5, num_contextual=2
  ),
}


def restored(function):
  """The result, and what comes back from it."""

  def run(x, *others):
    out = function(x, *others)
    num_tokens = x.shape[1]
    if function is STAGES["visiondrop-llm"]:
      num_tokens = 12
    return out, out.restore(out.tokens, num_tokens)

  return run


def merge_plan(metric, mask):
  return merging.bipartite_match(metric, N - K, mask)


def algebra(x, metric, mask):
  match = merge_plan(metric, mask)
  matrix = plans.to_transform(match.plan, K)
  again = plans.Merge(
    jnp.arange(K, dtype=jnp.int32)[None] // 2 + 0 * match.index,
    jnp.full_like(match.index, 0.5, dtype=jnp.float32),
  )
  both = plans.compose_plans(again, match.plan, 5)
  full = plans.compose_plans(again, matrix, 5)
  y = plans.apply_plan(both, x, 5)
  return (
    y,
    plans.apply_plan(full, x, 5),
    plans.restore_plan(both, y),
    plans.merge_sizes(full, mask.astype(jnp.float32), 5),
    tome.track_sources(match.plan.slot, again, 5),
  )


def constructors(x, score, mask):
  kept = packing.keep_top_k(score, K, mask)
  weight = jnp.where(mask, score, 0)
  pruning = token_transforming.pruning_transform(kept, N, weight)
  cell = jnp.where(mask, jnp.arange(N, dtype=jnp.int32)[None] // 4, 4)
  recycling = token_transforming.recycling_transform(kept, cell, weight, 4)
  return (
    plans.apply_plan(pruning, x, K + 1),
    plans.apply_plan(recycling, x, K + 4),
    plans.apply_plan(token_transforming.merging_transform(cell, 4), x, 4),
  )


def sampled(seed):
  x, metric, score, mask = tokens(seed)
  return score, mask


CASES = (
  [
    Case(name, restored(method), tokens, (0, 1, 2, 3), (0,))
    for name, method in METHODS.items()
  ]
  + [
    Case(name, restored(stage), heads, (0, 1, 2, 3), (0,))
    for name, stage in STAGES.items()
  ]
  + [
    Case(
      "keep_top_k",
      lambda score, mask: packing.keep_top_k(score, K, mask),
      sampled,
      (0, 1),
    ),
    Case("pack", lambda score, mask: packing.pack(mask, 5), sampled, (0, 1)),
    Case(
      "allocate",
      lambda score, mask: budgets.allocate(jnp.nan_to_num(score), 90, 10),
      sampled,
      (0, 1),
    ),
    Case(
      "plans",
      lambda x, metric, score, mask: algebra(x, metric, mask),
      tokens,
      (0, 1, 2, 3),
      (0,),
    ),
    Case(
      "constructors",
      lambda x, metric, score, mask: constructors(x, score, mask),
      tokens,
      (0, 1, 2, 3),
      (0,),
    ),
    Case(
      "visual_attention",
      lambda x, q, k, mask: visiondrop.visual_attention(
        q, k, mask, causal=True, causal_debias=True
      ),
      heads,
      (0, 1, 2, 3),
    ),
    Case(
      "visionzip_signals",
      lambda x, q, k, mask: visionzip.visionzip_signals(q[:, :, :1], k, mask)[
        0
      ],
      heads,
      (0, 1, 2, 3),
    ),
    Case(
      "prumerge_attention",
      lambda x, metric, score, mask: prumerge.prumerge_attention(
        metric[:, 0], metric, mask
      ),
      tokens,
      (0, 1, 2, 3),
    ),
    Case(
      "pagerank_importance",
      lambda x, q, k, mask: aim.pagerank_importance(q, k, mask),
      heads,
      (0, 1, 2, 3),
    ),
    Case(
      "size_bias",
      lambda score, mask: jnp.exp(tome.size_bias(jnp.nan_to_num(score), mask)),
      sampled,
      (0, 1),
    ),
  ]
)


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)


@pytest.mark.parametrize("name", [*METHODS, *STAGES])
def test_every_example_is_reduced_alone(name):
  method = METHODS.get(name) or STAGES[name]
  inputs = (tokens if name in METHODS else heads)(0)
  out = jax.jit(method)(*inputs)
  if name == "tome-random":
    pytest.skip("the draw belongs to the place in the batch")
  one = jax.jit(method)
  for b in range(0, B, 3):
    alone = one(*(a[b : b + 1] for a in inputs))
    want = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], out)
    harness.assert_same(alone, want, 1e-5)


@pytest.mark.parametrize("name", [*METHODS, *STAGES])
def test_rows_are_distinct_valid_tokens(name):
  method = METHODS.get(name) or STAGES[name]
  inputs = (tokens if name in METHODS else heads)(1)
  out = jax.jit(method)(*inputs)
  mask = np.asarray(inputs[3])
  if name == "visiondrop-llm":
    mask = mask[:, 2:14]
  for b in range(B):
    exists = np.asarray(out.mask[b])
    index = np.asarray(out.index[b])
    assert mask[b, index[exists]].all()
    assert len(set(index[exists].tolist())) == exists.sum()
    assert (index[~exists] == mask.shape[1] - 1).all()
    assert not np.any(np.asarray(out.tokens[b])[~exists])
    assert not np.any(np.asarray(out.size[b])[~exists])
    assert (np.diff(exists.astype(int)) <= 0).all()  # those that exist first
    if out.plan is not None:
      np.testing.assert_allclose(out.size[b].sum(), mask[b].sum(), rtol=1e-5)
  assert np.isfinite(out.tokens).all()


def few(method):
  """Two valid tokens, fewer than any of the methods leaves."""
  x, metric, score, _ = tokens(0)
  mask = jnp.zeros((B, N), bool).at[:, 0].set(True).at[:, 2].set(True)
  x, metric = (jnp.nan_to_num(a) for a in (x, metric))
  return x, method(x, metric, jnp.nan_to_num(score), mask)


# PruMerge keeps outliers only, Token Transforming mixes whatever there is.
LEAVE_FEW = [
  n for n in METHODS if n.split("-")[0] in ("tome", "visionzip", "aim")
]


@pytest.mark.parametrize("name", LEAVE_FEW)
def test_few_valid_tokens_all_stay(name):
  x, out = few(METHODS[name])
  assert (out.mask.sum(axis=1) == 2).all()
  assert (out.index[:, :2] == jnp.array([0, 2])[None]).all()
  np.testing.assert_array_equal(out.tokens[:, :2], x[:, jnp.array([0, 2])])
  assert isinstance(out, types.Reduced)
