import string

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from tokjax.retrieval import masks


def test_document_mask_equals_a_loop():
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 9, (4, 7))
  attention = rng.random((4, 7)) < 0.7
  skip = [2, 5, 8]
  got = masks.scoring_mask_document(
    jnp.asarray(ids), jnp.asarray(attention), jnp.array(skip)
  )
  for i, j in np.ndindex(4, 7):
    assert got[i, j] == (attention[i, j] and ids[i, j] not in skip)


def test_nothing_is_skipped_without_a_table():
  ids = jnp.array([[1, 2]])
  attention = jnp.array([[True, False]])
  for skip in (None, jnp.zeros(0, jnp.int32)):
    np.testing.assert_array_equal(
      masks.scoring_mask_document(ids, attention, skip), attention
    )
  np.testing.assert_array_equal(
    masks.scoring_mask_query(ids, attention), attention
  )


@pytest.mark.parametrize("attend", [False, True])
def test_expansion_worked_example(attend):
  ids = jnp.array([[4, 1, 7, 8, 5], [4, 1, 9, 5, 77]])
  attention = jnp.array([[True] * 5, [True] * 4 + [False]])
  got = masks.expand_queries(
    ids, attention, mask_id=103, length=7, attend=attend
  )
  np.testing.assert_array_equal(
    got.ids, [[4, 1, 7, 8, 5, 103, 103], [4, 1, 9, 5, 103, 103, 103]]
  )
  lengths = [7, 7] if attend else [5, 4]
  np.testing.assert_array_equal(got.attention_mask.sum(1), lengths)
  assert got.scoring_mask.all()


def test_expansion_of_a_full_query_changes_nothing():
  ids = jnp.array([[4, 1, 5]])
  got = masks.expand_queries(ids, ids > 0, mask_id=103, length=3)
  np.testing.assert_array_equal(got.ids, ids)
  assert got.attention_mask.all() and got.scoring_mask.all()


def test_skip_ids_never_hold_unknown():
  """A symbol outside the vocabulary must not silently drop every [UNK]."""
  vocabulary = {"[UNK]": 0, "a": 1, ".": 2, "!": 7}
  model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
  tokenizer = tokenizers.Tokenizer(model)
  words = [*string.punctuation, "[UNK]", "."]
  got = masks.skip_ids(tokenizer, words)
  np.testing.assert_array_equal(got, [2, 7])
  assert got.dtype == np.int32
  assert masks.skip_ids(tokenizer, ()).shape == (0,)


@pytest.mark.unchecked
def test_errors_name_the_argument():
  ids = jnp.zeros((2, 5), jnp.int32)
  with pytest.raises(ValueError, match="length must lie in 5..inf, got 4"):
    masks.expand_queries(ids, ids == 0, mask_id=1, length=4)
  with pytest.raises(ValueError, match="ids_tokens=5, mask_tokens=4"):
    masks.scoring_mask_document(ids, jnp.ones((2, 4), bool))
