import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.retrieval import length_batches


def rows(seed=0, count=50, longest=40):
  rng = np.random.default_rng(seed)
  return [
    rng.integers(1, 99, n).astype(np.int32)
    for n in rng.integers(0, longest + 1, count)
  ]


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_every_row_once_and_padded_to_the_bucket(multiple, batch_tokens):
  texts, seen = rows(), []
  for batch in length_batches.length_batches(
    texts,
    bucket=16,
    batch_tokens=batch_tokens,
    max_length=40,
    multiple=multiple,
  ):
    size, padded = batch.ids.shape
    assert size % multiple == 0 and padded in (16, 32, 40)
    assert size * padded <= max(batch_tokens, multiple * padded)
    assert (batch.lengths[len(batch.members) :] == 0).all()
    for i, member in enumerate(batch.members):
      length = batch.lengths[i]
      np.testing.assert_array_equal(batch.ids[i, :length], texts[member])
      assert (batch.ids[i, length:] == 0).all()
    seen += batch.members.tolist()
  assert sorted(seen) == list(range(len(texts)))


def test_few_shapes():
  shapes = {
    batch.ids.shape
    for batch in length_batches.length_batches(
      rows(count=500), bucket=16, batch_tokens=64, max_length=48
    )
  }
  assert len(shapes) <= 4  # one per padded length, and one rest


def test_no_rows():
  assert not list(
    length_batches.length_batches([], bucket=8, batch_tokens=8, max_length=8)
  )


@pytest.mark.parametrize("devices", [1, 4])
def test_run_gives_each_row_its_result_on_any_number_of_devices(devices):
  texts = rows(seed=1)

  @jax.jit
  def function(weight, ids, lengths):
    valid = jnp.arange(ids.shape[1])[None] < lengths[:, None]
    return {"sum": weight * jnp.sum(ids * valid, axis=1)}

  seen = {}
  for members, result in length_batches.run(
    function,
    jnp.int32(3),
    texts,
    bucket=8,
    batch_tokens=64,
    max_length=40,
    devices=jax.local_devices()[:devices],
  ):
    seen |= dict(zip(members.tolist(), result["sum"].tolist(), strict=True))
  assert seen == {i: 3 * int(row.sum()) for i, row in enumerate(texts)}
