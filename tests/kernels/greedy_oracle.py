"""Greedy selection as a plain float64 loop, and cases to try it on."""

import numpy as np

__all__ = ["cases", "certify", "scores", "select"]


def scores(table, picked, objective, bonus, trade_off):
  """float64 scores of all columns, given a list of picked ones."""
  num_rows, num_tokens = table.shape
  out = np.zeros(num_tokens)
  for j in range(num_tokens):
    own = 0.0 if bonus is None else bonus[j]
    if objective == "max_min":
      if picked:
        out[j] = -max(table[c, j] for c in picked)
      else:  # against all others; the caller leaves out what is masked
        others = [table[i, j] for i in range(num_tokens) if i != j]
        others = [x for x in others if not np.isnan(x)]
        out[j] = -max(others) if others else 0.0
    elif objective == "max_sum":
      out[j] = -sum(table[c, j] for c in picked)
    elif objective == "mmr":
      near = max((table[c, j] for c in picked), default=0.0)
      out[j] = trade_off * own - (1 - trade_off) * near
    elif objective == "coverage":
      best = [
        max([0.0, *(table[i, c] for c in picked)]) for i in range(num_rows)
      ]
      more = [max(0.0, table[i, j] - best[i]) for i in range(num_rows)]
      out[j] = own + sum(more)
    elif objective == "dpp":
      kernel = table if bonus is None else bonus[:, None] * table * bonus
      left = kernel[j, j]
      if picked:
        inner, outer = kernel[np.ix_(picked, picked)], kernel[picked, j]
        left -= outer @ np.linalg.pinv(inner, rcond=1e-9) @ outer
      out[j] = left if left > 1e-6 * kernel[j, j] else 0.0
  return out


def select(table, mask, objective, bonus, first, trade_off, num_keep):
  """Picks, gains, and the gap between best and second best at each step."""
  table = np.asarray(table, np.float64).copy()
  if objective != "coverage":
    table[~mask] = np.nan  # rows of tokens that are not there
  picked, gains, gaps = [], [], []
  for step in range(num_keep):
    free = [j for j in range(table.shape[1]) if mask[j] and j not in picked]
    if not free:
      break
    of = scores(table, picked, objective, bonus, trade_off)
    if step == 0 and first is not None:
      pick, gap = (first if mask[first] else free[0]), np.inf
      gain = 0.0 if objective in ("max_min", "max_sum") else of[pick]
    else:
      pick = max(free, key=lambda j: (of[j], -j))
      rest = [of[j] for j in free if j != pick]
      gain, gap = of[pick], of[pick] - max(rest, default=-np.inf)
    picked.append(pick)
    gains.append(gain)
    gaps.append(gap)
  return picked, gains, gaps


def certify(got, table, mask, objective, bonus, first, trade_off, num_keep):
  """Fails unless the picks (index, gain, mask of one example) are greedy.

  Picks must equal the loop's while its best is ahead by more than 1e-5, and
  every pick must be within 1e-5 of the best, given those before it, with the
  gain that it has then.
  """
  args = (objective, bonus, first, trade_off, num_keep)
  index, gain, kept = (np.asarray(x) for x in got)
  want, gains, gaps = select(table, mask, *args)
  assert kept.sum() == len(want) == min(num_keep, mask.sum())
  assert not kept[len(want) :].any()
  assert (index[~kept] == table.shape[1] - 1).all() and not gain[~kept].any()
  picks = index[kept].tolist()
  assert len(set(picks)) == len(picks) and mask[picks].all()
  for step, gap in enumerate(gaps):
    if gap <= 1e-5:
      break
    assert picks[step] == want[step], (step, picks, want)
    assert abs(gain[step] - gains[step]) < 1e-5
  table = np.asarray(table, np.float64).copy()
  if objective != "coverage":
    table[~mask] = np.nan
  for step, pick in enumerate(picks):
    if step == 0 and first is not None:
      continue
    of = scores(table, picks[:step], objective, bonus, trade_off)
    free = [j for j in range(len(of)) if mask[j] and j not in picks[:step]]
    assert of[pick] >= max(of[j] for j in free) - 1e-5
    assert abs(gain[step] - of[pick]) < 1e-5, (step, gain[step], of[pick])


def cases(seed, batch, num_tokens, objective, *, grid, num_rows=None):
  """Tables [batch, M, N], masks, bonus and first picks, NumPy arrays.

  On a grid of eighths, so that ties are common and every sum is exact; else
  cosines of random vectors. The first example has no valid token, the second
  one. What is masked is NaN.
  """
  rng = np.random.default_rng(seed)
  mask = rng.random((batch, num_tokens)) < 0.75
  mask[0] = False
  mask[1] = np.arange(num_tokens) == num_tokens // 2
  mask[2:4] = True
  bonus = rng.integers(1, 8, (batch, num_tokens)) / 8.0
  first = rng.integers(0, num_tokens, batch)
  if objective == "coverage":
    rows = num_rows or num_tokens
    table = rng.integers(-2, 9, (batch, rows, num_tokens)) / 8.0
    if not grid:
      table = rng.normal(size=table.shape)
  elif grid and objective != "dpp":
    table = rng.integers(-8, 9, (batch, num_tokens, num_tokens)) / 8.0
    table = np.triu(table, 1)
    table = table + table.swapaxes(1, 2) + np.eye(num_tokens)
  else:
    x = rng.normal(size=(batch, num_tokens, 6))
    x[:, -1] = x[:, 0]  # duplicates
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    table = np.float32(x @ x.swapaxes(1, 2)).astype(np.float64)
  hidden = ~mask[:, None, :]
  if objective != "coverage":
    hidden = hidden | ~mask[:, :, None]
  table = np.where(hidden, np.nan, np.float32(table))
  bonus = np.where(mask, bonus, np.nan)
  return table, mask, bonus, first.astype(np.int32)
