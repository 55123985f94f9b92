"""What is timed and compared with AnchorAttention is what it says."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.compiled import run
from tokjax.benchmarks import attention, attention_choices
from tokjax.ops import mask_rules
from tokjax.ops.attention import attend


def test_dense_attention_is_causal_attention():
  q, k, v = attention_choices.made_heads(jax.random.key(0), 16, 4, 2)
  got = run(attention.dense_attention, q, k, v, tile=4)
  mask = np.tril(np.ones((16, 16), bool))
  np.testing.assert_allclose(got, attend(q, k, v, mask), atol=1e-5)


def shares(choose, q, k):
  return [
    float(x)
    for x in run(
      lambda q, k: attention_choices.recall_of(choose, q, k, 4), q, k
    )
  ]


def test_choices_keep_the_share_asked_for_and_recall_is_of_the_mass():
  q, k, _ = (x[0, 0] for x in attention_choices.made_heads(
    jax.random.key(1), 128, 4, 1))  # fmt: skip
  every = attention_choices.streaming(1.0, 132, 4)
  all_keys = lambda i: every(i)[:, :128]  # noqa: E731
  assert np.allclose(shares(all_keys, q, k), 1)
  choose = attention_choices.streaming(0.4, 128, 4)
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
    attention_choices.block_top_k(q, k, 0.4, 4),
    attention_choices.vertical_slash(q, k, 0.4, 4),
  ):
    recall, kept = shares(choose, q, k)
    assert 0.25 < kept < 0.55 and kept < recall < 1  # better than at random


def test_the_comparison_runs(capsys):
  rows = attention.run(
    num_tokens=512, width=4, block=32, step=2, kept=(0.6,), window=64,
    dense="xla", repeats=1,
  )  # fmt: skip
  names = [row["implementation"] for row in rows]
  others = ["streaming", "block top-k", "vertical-slash"]
  dense = ["dense xla", "rule causal", "rule window 64"]
  assert names == [*dense, "anchor", *others]
  assert all(row["speedup"] > 0 and row["tflops"] > 0 for row in rows[:4])
  np.testing.assert_allclose(rows[2]["kept"], (64 * 65 / 2 + 448 * 64) / 131328)
  assert 0.3 < rows[3]["kept"] <= 0.6
  assert all(0 < row["recall"] <= 1 + 1e-5 for row in rows if "recall" in row)


def test_the_rule_of_windows_is_of_so_many_keys():
  given = mask_rules.tokens(5)
  mask = mask_rules.may_read(attention._window(2), given, given)
  assert mask.sum(axis=1).tolist() == [1, 2, 2, 2, 2]
