"""Padding and memory of a block; its values are tested where blocks meet."""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.parallel import attention_blocks as blocks


def test_padding_becomes_zero():
  x = jnp.full((1, 1, 2, 3), jnp.nan).at[:, :, 0].set(1)
  ids = jnp.array([[0, -1]])

  def shard(x):
    return blocks.prepare(x, x, x, ids, axis_name="seq")

  queries, keys = jax.vmap(shard, axis_name="seq")(x[None])
  for rows in (queries.rows, keys.keys, keys.values):
    np.testing.assert_array_equal(rows[0, 0, 0, 1], 0)
  blank = blocks.blank_padding(x, ids[:, None])
  np.testing.assert_array_equal(blank, queries.rows[0])


def test_no_more_logits_than_of_a_chunk():
  rows = jnp.ones((2, 4, 24, 4))
  queries = blocks.Queries(rows, None)
  keys = blocks.Keys(rows[:, :2], rows[:, :2], None)

  def both(queries, keys):
    state = blocks.read_block(queries, keys, query_chunk=4, triangle=True)
    queries, out, lse = blocks.made_again(queries, *state)
    asking = blocks.asked(queries, out, lse, rows)
    return blocks.pull_block(asking, keys, query_chunk=4, triangle=True)

  text = str(jax.make_jaxpr(both)(queries, keys))
  assert "4,24]" in text and "24,24]" not in text
  assert "optimization_barrier" in text  # weights are not kept
