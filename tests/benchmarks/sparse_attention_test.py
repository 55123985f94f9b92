"""What is timed and compared with AnchorAttention is what it says."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.compiled import run
from tokjax.benchmarks import sparse_attention
from tokjax.ops import attention


def test_dense_attention_is_causal_attention():
  q, k, v = sparse_attention.made_heads(jax.random.key(0), 16, 4, 2)
  got = run(sparse_attention.dense_attention, q, k, v, tile=4)
  mask = np.tril(np.ones((16, 16), bool))
  np.testing.assert_allclose(got, attention.attend(q, k, v, mask), atol=1e-5)


def shares(choose, q, k):
  return [
    float(x)
    for x in run(lambda q, k: sparse_attention.recall_of(choose, q, k, 4), q, k)
  ]


def test_choices_keep_the_share_asked_for_and_recall_is_of_the_mass():
  q, k, _ = (x[0, 0] for x in sparse_attention.made_heads(
    jax.random.key(1), 128, 4, 1))  # fmt: skip
  every = sparse_attention.streaming(1.0, 132, 4)
  all_keys = lambda i: every(i)[:, :128]  # noqa: E731
  assert np.allclose(shares(all_keys, q, k), 1)
  choose = sparse_attention.streaming(0.4, 128, 4)
  allowed = np.concatenate(
    [np.asarray(choose(jnp.int32(i))) for i in range(32)]
  )
  causal = np.tril(np.ones((128, 128), bool))
  logits = np.where(causal, np.float64(q) @ np.float64(k).T / 2, -np.inf)
  mass = np.exp(logits - logits.max(-1, keepdims=True))
  mass /= mass.sum(-1, keepdims=True)
  recall, kept = shares(choose, q, k)
  np.testing.assert_allclose(recall, (mass * allowed).sum(-1).mean(), rtol=1e-5)
  np.testing.assert_allclose(kept, (allowed & causal).sum() / causal.sum())
  for choose in (
    sparse_attention.block_top_k(q, k, 0.4, 4),
    sparse_attention.vertical_slash(q, k, 0.4, 4),
  ):
    recall, kept = shares(choose, q, k)
    assert 0.25 < kept < 0.55 and kept < recall < 1  # better than at random


def test_the_comparison_runs(capsys):
  rows = sparse_attention.run(
    num_tokens=512, width=4, block=32, step=2, kept=(0.6,), repeats=1
  )
  names = [row["implementation"] for row in rows]
  others = ["streaming", "block top-k", "vertical-slash"]
  assert names == ["dense", "anchor", *others]
  assert rows[1]["speedup"] > 0 and 0.3 < rows[1]["kept"] <= 0.6
  assert all(0 < row["recall"] <= 1 + 1e-5 for row in rows)
