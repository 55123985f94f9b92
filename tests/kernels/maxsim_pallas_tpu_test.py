"""The TPU kernel of MaxSim against the reference, in interpret mode on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.kernels.maxsim import block_sizes, pallas_tpu, reference, tpu_tiles

BlockSizes = block_sizes.BlockSizes

# One program each: eager interpretation compiles every operation by itself.
_STATIC = ("return_index", "block_sizes", "interpret")
forward = jax.jit(pallas_tpu.maxsim_forward, static_argnames=_STATIC)
backward = jax.jit(pallas_tpu.maxsim_backward, static_argnames=_STATIC[1:])

# Nq, Nd, Q, N, D and tile sizes; None takes the rule. Sizes are odd on
# purpose: every axis has an edge block.
CASES = {
  "one query": ((1, 9, 5, 37, 48), None),
  "edges": ((5, 9, 3, 300, 32), BlockSizes(2, 3, 8, 128)),
  "token blocks": ((3, 11, 4, 150, 64), BlockSizes(3, 4, 8, 128)),
  "query in parts": ((2, 3, 20, 40, 16), BlockSizes(1, 8, 8, 48)),
  "long query": ((1, 2, 600, 130, 16), None),
  "one token": ((2, 1, 1, 1, 8), None),
}


def example(sizes, dtype=jnp.float32, seed=0, poison=False):
  """Vectors on a coarse grid, so that ties are common; masks with holes."""
  num_queries, num_documents, query_tokens, document_tokens, width = sizes
  keys = jax.random.split(jax.random.key(seed), 4)
  draw = functools.partial(jax.random.randint, minval=-3, maxval=4)
  queries = draw(keys[0], (num_queries, query_tokens, width)).astype(dtype)
  documents = draw(keys[1], (num_documents, document_tokens, width))
  documents = documents.astype(dtype)
  query_mask = jax.random.bernoulli(keys[2], 0.8, queries.shape[:2])
  document_mask = jax.random.bernoulli(keys[3], 0.6, documents.shape[:2])
  if num_documents > 1:
    document_mask = document_mask.at[0].set(False)  # empty
    document_mask = document_mask.at[-1, document_tokens // 2 :].set(False)
  if poison:
    queries = jnp.where(query_mask[..., None], queries, jnp.nan)
    documents = jnp.where(document_mask[..., None], documents, jnp.nan)
  return queries, documents, query_mask, document_mask


def meaningful(query_mask, document_mask):
  """Where the winner means something: a valid token and a document."""
  return query_mask[:, None, :] & document_mask.any(axis=1)[None, :, None]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_reference(case, dtype):
  sizes, blocks = CASES[case]
  args = example(sizes, dtype, poison=True)
  want, want_index = reference.maxsim_forward(*args, return_index=True)
  got, index = forward(
    *args, return_index=True, block_sizes=blocks, interpret=True
  )
  # Small integers: products and sums are exact in either dtype.
  np.testing.assert_array_equal(got, want)
  assert got.dtype == jnp.float32 and index.dtype == jnp.int32
  where = meaningful(*args[2:])
  np.testing.assert_array_equal(
    jnp.where(where, index, 0), jnp.where(where, want_index, 0)
  )


@pytest.mark.parametrize("case", ["one query", "query in parts"])
def test_index_does_not_change_scores(case):
  sizes, blocks = CASES[case]
  run = functools.partial(
    forward,
    *example(sizes),
    block_sizes=blocks,
    interpret=True,
  )
  np.testing.assert_array_equal(
    run(return_index=False), run(return_index=True)[0]
  )


@pytest.mark.parametrize("case", CASES)
def test_backward_is_the_reference(case):
  sizes, blocks = CASES[case]
  args = example(sizes, poison=True)
  scores, index = reference.maxsim_forward(*args, return_index=True)
  g = jax.random.normal(jax.random.key(7), scores.shape)
  want = reference.maxsim_backward(g, *args, index)
  got = backward(g, *args, index, block_sizes=blocks, interpret=True)
  for mine, theirs in zip(got, want, strict=True):
    # Sums in another order: float32 rounding of the largest term.
    scale = float(jnp.abs(theirs).max()) + 1
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6 * scale)


def test_bfloat16_backward_keeps_sixteen_bits_of_the_gradient():
  args = example((3, 11, 4, 150, 64), jnp.bfloat16, poison=True)
  scores, index = reference.maxsim_forward(*args, return_index=True)
  g = jax.random.normal(jax.random.key(7), scores.shape)
  wide = [x.astype(jnp.float32) for x in args[:2]]
  want = reference.maxsim_backward(g, *wide, *args[2:], index)
  got = backward(g, *args, index, interpret=True)
  for mine, theirs in zip(got, want, strict=True):
    assert mine.dtype == jnp.bfloat16
    # One rounding to the 8 significant bits of bfloat16 at the end (2^-8
    # relative at most), and nothing like it before: g itself rounded to
    # bfloat16 would double the error.
    scale = float(jnp.abs(theirs).max())
    np.testing.assert_allclose(
      mine.astype(jnp.float32), theirs, rtol=2**-8, atol=2**-15 * scale
    )


def test_ties_go_to_the_lower_token_across_blocks():
  queries, documents = jnp.ones((1, 2, 8)), jnp.ones((1, 300, 8))
  document_mask = jnp.arange(300)[None] >= 5
  _, index = forward(
    queries,
    documents,
    jnp.ones((1, 2), bool),
    document_mask,
    return_index=True,
    block_sizes=BlockSizes(1, 2, 8, 128),
    interpret=True,
  )
  np.testing.assert_array_equal(index, [[[5, 5]]])


def test_nan_in_a_valid_token_stays_with_its_query():
  queries, documents, *_ = example((3, 4, 2, 20, 8))
  masks = jnp.ones((3, 2), bool), jnp.ones((4, 20), bool)
  queries = queries.at[1].set(jnp.nan)
  scores = forward(
    queries, documents, *masks, return_index=False, interpret=True
  )
  assert np.isnan(scores[1]).all()
  assert np.isfinite(scores[0]).all() and np.isfinite(scores[2]).all()


def test_vmap_equals_one_by_one():
  rows = [example((1, 3, 4, 20, 8), seed=seed) for seed in range(2)]
  batch = [jnp.stack(column) for column in zip(*rows, strict=True)]
  score = functools.partial(
    pallas_tpu.maxsim_forward, return_index=False, interpret=True
  )
  one = jax.jit(score)
  want = jnp.stack([one(*row) for row in rows])
  np.testing.assert_array_equal(jax.jit(jax.vmap(score))(*batch), want)


@pytest.mark.parametrize(
  "dtypes, shapes, reason",
  [
    (("float16", "float16"), ((1, 2, 8), (1, 3, 8)), "float16"),
    (("float32", "bfloat16"), ((1, 2, 8), (1, 3, 8)), "dtypes differ"),
    (("float32", "float32"), ((1, 2, 8), (0, 3, 8)), "empty"),
    (("float32", "float32"), ((1, 2, 2048), (1, 3, 2048)), "width 2048"),
    (("float32", "float32"), ((1, 2, 8), (1, 3, 8)), None),
  ],
)
def test_unsupported_says_why(dtypes, shapes, reason):
  arrays = map(jax.ShapeDtypeStruct, shapes, dtypes)
  found = pallas_tpu.unsupported(*arrays)
  assert found is None if reason is None else reason in found


def test_whole_queries_or_parts_of_one():
  args = example((2, 3, 20, 40, 16))
  with pytest.raises(ValueError, match="queries=2 and query_tokens=8 of 20"):
    forward(
      *args,
      return_index=False,
      block_sizes=BlockSizes(2, 8, 8, 48),
      interpret=True,
    )


@pytest.mark.parametrize("case", CASES)
def test_index_tiles_round_trip(case):
  (num_queries, num_documents, query_tokens, num_tokens, width), blocks = CASES[
    case
  ]
  queries = (num_queries, query_tokens, width)
  documents = (num_documents, num_tokens, width)
  blocks = blocks or block_sizes.default_block_sizes(
    *queries[:2], *documents[:2]
  )
  tiles = tpu_tiles.Tiles(blocks, queries, documents)
  index = np.arange(num_queries * num_documents * query_tokens)
  index = jnp.asarray(index.reshape(num_queries, num_documents, query_tokens))
  there = tiles.index_to_tiles(index)
  assert there.shape[-1] == blocks.rows
  np.testing.assert_array_equal(tiles.index_from_tiles(there), index)


@pytest.mark.parametrize(
  "sizes, name",
  [
    ((0, 32, 8, 128), "queries"),
    ((1, 0, 8, 128), "query_tokens"),
    ((1, 32, 12, 128), "documents"),
    ((1, 32, 8, 24), "document_tokens"),
    ((1, 32, 8, 144), "document_tokens"),
  ],
)
def test_block_sizes_name_what_is_wrong(sizes, name):
  with pytest.raises(ValueError, match=name):
    BlockSizes(*sizes)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("num_queries", [1, 7, 128])
@pytest.mark.parametrize("query_tokens", [1, 32, 300, 1024])
@pytest.mark.parametrize("num_documents", [1, 1000])
@pytest.mark.parametrize("document_tokens", [1, 20, 127, 300, 8192])
def test_default_block_sizes_fit(
  num_queries,
  query_tokens,
  num_documents,
  document_tokens,
  itemsize,
  backward,
):
  sizes = block_sizes.default_block_sizes(
    num_queries,
    query_tokens,
    num_documents,
    document_tokens,
    itemsize=itemsize,
    backward=backward,
  )
  lanes = -(-sizes.rows // 128) * 128
  # Similarities, their masked copy and positions, in float32 or int32.
  assert 12 * lanes * sizes.tokens <= 8 << 20
  # A long query is cut into no more parts than 256 rows each would need.
  assert -(-query_tokens // sizes.query_tokens) <= -(-query_tokens // 256)
  assert sizes.rows <= 512
  assert sizes.queries == 1 or sizes.query_tokens == query_tokens
