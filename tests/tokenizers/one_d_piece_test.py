"""TiTok and One-D-Piece: lengths, order of tokens, who learns from what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import compiled, run
from tests.tokenizers.tiny_tokenizer import (
  TRUNK,
  built,
  gradients,
  parts,
  pictures,
  quantizer,
)
from tokjax.tokenizers import one_d_piece, titok
from tokjax.tokenizers.one_d_piece import OneDPieceConfig
from tokjax.tokenizers.titok import SIZES, TiTokConfig

pieces = compiled(one_d_piece)
CONFIG = OneDPieceConfig(8, 4, 6, TRUNK, TRUNK, quantizer())


@functools.cache
def encoded():
  tokenizer, state = built(CONFIG)
  return run(type(tokenizer).encode, tokenizer, pictures(), state)


def decode(indices, length=None, config=CONFIG):
  tokenizer, state = built(config)
  return np.asarray(
    run(type(tokenizer).decode, tokenizer, indices, state, length)
  )


@pytest.mark.parametrize("length", [1, 4, 6])
def test_masking_a_tail_equals_cutting_it(length):
  indices = encoded().indices
  masked = decode(indices, jnp.int32(length))
  np.testing.assert_allclose(masked, decode(indices[:, :length]), atol=1e-5)


def test_each_image_may_have_its_own_length():
  indices = encoded().indices
  got = decode(indices, jnp.array([1, 4, 6]))
  for i, length in enumerate([1, 4, 6]):
    want = decode(indices, jnp.int32(length))
    np.testing.assert_allclose(got[i], want[i], atol=1e-6)


def test_the_tail_has_no_influence_and_the_head_has():
  indices = np.asarray(encoded().indices)
  changed = indices.copy()
  changed[:, 3:] = (changed[:, 3:] + 1) % 16
  got = decode(changed, jnp.int32(3))
  np.testing.assert_array_equal(got, decode(indices, jnp.int32(3)))
  changed[:, 2] = (changed[:, 2] + 1) % 16
  assert np.abs(decode(changed, jnp.int32(3)) - got).max() > 1e-4


def test_all_tokens_are_those_of_titok():
  indices = encoded().indices
  whole = decode(indices)
  np.testing.assert_allclose(decode(indices, jnp.int32(6)), whole, atol=1e-6)
  tokenizer, state = built(CONFIG)
  found, same = run(type(tokenizer).__call__, tokenizer, pictures(), state)
  np.testing.assert_allclose(found.output, whole, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, same, state)
  want = np.mean((pictures() - whole) ** 2)
  np.testing.assert_allclose(found.losses["pixels"], want, rtol=1e-5)


def test_tokens_have_an_order():
  indices = np.asarray(encoded().indices)
  indices = np.tile(np.arange(6, dtype=np.int32)[None], (3, 1))
  swapped = indices[:, [1, 0, 2, 3, 4, 5]]
  assert np.abs(decode(swapped) - decode(indices)).max() > 1e-4


def test_training_drops_tails_at_random():
  tokenizer, state = built(CONFIG)

  @jax.jit
  def once(key):
    found, _ = tokenizer(pictures(), state, train=True, key=key)
    return found.output, found.stats["length"]

  quantized = run(type(tokenizer).encode, tokenizer, pictures(), state).indices
  lengths = set()
  for seed in range(8):
    output, length = once(jax.random.key(seed))
    lengths.add(int(length))
    want = decode(quantized, jnp.int32(length))
    np.testing.assert_allclose(output, want, atol=1e-5)
  assert len(lengths) > 2
  with pytest.raises(ValueError, match="key must be given"):
    tokenizer(pictures(), state, train=True)


def test_gradients_reach_every_part():
  tokenizer, state = built(CONFIG)
  everything = {
    "patches", "encoder", "queries", "to_code", "from_code", "mask_token",
    "decoder", "pixels",
  }  # fmt: skip
  key = jax.random.key(0)
  found = gradients(tokenizer, state, (pictures(),), ["pixels"], key)
  assert parts(found) == everything
  found = gradients(tokenizer, state, (pictures(),), ["commitment"], key)
  assert parts(found) == {"patches", "encoder", "queries", "to_code"}
  found = gradients(tokenizer, state, (pictures(),), ["codebook"], key)
  assert parts(found) == {"quantizer"}


def test_lengths_are_uniform_or_even_over_octaves():
  draws = pieces.tail_drop_length(jax.random.key(0), 4, (20_000,))
  used = [(np.asarray(draws) >= i).mean() for i in (1, 2, 3, 4)]
  np.testing.assert_allclose(used, [1, 0.75, 0.5, 0.25], atol=0.02)
  draws = pieces.tail_drop_length(
    jax.random.key(0), 63, (20_000,), lengths="log_uniform"
  )
  octaves = np.bincount(np.log2(np.asarray(draws)).astype(int), minlength=6)
  assert np.asarray(draws).min() == 1 and np.asarray(draws).max() == 63
  np.testing.assert_allclose(octaves / 20_000, 1 / 6, atol=0.02)
  with pytest.raises(ValueError, match="lengths must be one of"):
    one_d_piece.tail_drop_length(jax.random.key(0), 4, lengths="all")


def test_a_length_of_each_image_is_told_by_its_mean():
  stats = one_d_piece.length_stats(jnp.array([1, 4, 6]))
  assert stats["length"] == pytest.approx(11 / 3)
  assert one_d_piece.length_stats(None) == {}


def test_the_shortest_good_length_is_chosen():
  tokenizer, state = built(CONFIG)
  indices = encoded().indices

  def quality(images, output):
    return -jnp.mean(jnp.square(images - output), axis=(1, 2, 3))

  ladder = [
    np.asarray(quality(pictures(), decode(indices, jnp.int32(k))))
    for k in (1, 2, 6)
  ]
  for target in (-9.0, float(np.median(ladder[0])), 9.0):
    got = pieces.choose_length(
      tokenizer, pictures(), state, target, lengths=(1, 2, 6), quality=quality
    )
    for i, length in enumerate(got.tolist()):
      good = [
        k for k, q in zip((1, 2, 6), ladder, strict=True) if q[i] >= target
      ]
      assert length == (good[0] if good else 6)
  with pytest.raises(ValueError, match="lengths must ascend"):
    one_d_piece.choose_length(
      tokenizer, pictures(), state, 0.0, lengths=(2, 1), quality=quality
    )


def test_sizes_and_errors():
  big = TiTokConfig()
  assert big.num_patches == 256 and big.encoder == SIZES["base"]
  tokenizer, state = built(CONFIG)
  with pytest.raises(ValueError, match=r"images must be \[B, 8, 8, C\], got"):
    tokenizer.encode(pictures(side=4), state)
  with pytest.raises(ValueError, match="num_codes must lie in 1..6, got 7"):
    tokenizer.decode(jnp.zeros((1, 7), jnp.int32), state)
  with pytest.raises(ValueError, match="image_size must be a multiple of 3"):
    jax.eval_shape(lambda: TiTokConfig(8, 3, 6, TRUNK, TRUNK).build(None))
  assert isinstance(tokenizer, titok.TiTok)
