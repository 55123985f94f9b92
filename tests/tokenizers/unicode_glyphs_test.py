"""Frozen rows of glyphs, against NumPy in float64 and cosines of bitmaps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import font_manager

from tests.compiled import compiled
from tokjax.ops import quantize
from tokjax.tokenizers import unicode_glyphs
from tokjax.tokenizers.unicode_glyphs import Augmentation, GlyphEmbedding

FONT = font_manager.findfont("DejaVu Sans")
TOKENS = [*map(chr, range(33, 127)), *"АБВГДЕЖЗ", "ab", "Th", "the", "<pad>"]

glyphs = compiled(unicode_glyphs, leave=("glyph_bitmaps", "collisions"))


@functools.cache
def bits():
  return unicode_glyphs.glyph_bitmaps(TOKENS, FONT, size=8)


def centred():
  x = bits().astype(float)
  return x - x.mean(axis=0)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_glyphs_are_ink_in_the_middle_of_a_cell():
  one, two, blank = unicode_glyphs.glyph_bitmaps(["I", "II", " "], FONT)
  picture = one.reshape(32, 32)
  assert set(np.unique(picture)) == {0, 1} and not blank.any()
  columns, lines = (
    np.flatnonzero(picture.any(0)),
    np.flatnonzero(picture.any(1)),
  )
  assert abs(columns.mean() - 15.5) <= 1 and abs(lines.mean() - 15.5) <= 1
  assert len(columns) < 8 and len(lines) > 16
  # Two cells in the room of one: of each every second column.
  wide = two.reshape(32, 32)
  for half in (wide[:, :16], wide[:, 16:]):
    np.testing.assert_array_equal(half, picture[:, 1::2])


def test_augmentation_has_a_seed_and_spares_complex_scripts():
  draw = functools.partial(unicode_glyphs.glyph_bitmaps, font=FONT)
  tokens = ["R", "ر", "A", "\u0391"]  # Latin R, Arabic reh, A, Alpha
  plain = draw(tokens)
  same = [draw(tokens, augmentation=Augmentation()) for _ in range(2)]
  np.testing.assert_array_equal(*same)
  other = draw(tokens, augmentation=Augmentation(seed=7))
  assert (same[0][0] != other[0]).sum() > 20  # turned and moved
  assert (same[0][1] != plain[1]).sum() < 6  # speckled only
  # All tokens share their draws: what looks alike stays alike, but for this.
  assert unicode_glyphs.collisions(same[0]) == [[2, 3]]
  apart = draw(tokens, augmentation=Augmentation(per_token=True))
  assert unicode_glyphs.collisions(apart) == []
  # A token looks the same in every vocabulary.
  alone = draw(tokens[2:3], augmentation=Augmentation(per_token=True))
  np.testing.assert_array_equal(apart[2:3], alone)


def test_squeezing_before_or_after_the_cut():
  near, soft = (
    unicode_glyphs.glyph_bitmaps(["mn"], FONT, resample=way)
    for way in ("nearest", "bilinear")
  )
  assert (near != soft).any() and (near != soft).mean() < 0.2


def test_at_full_width_rows_have_the_cosines_of_centred_bitmaps():
  rows = np.asarray(glyphs.frozen_embedding(bits(), 64), float)
  want = unit(centred())
  np.testing.assert_allclose(rows @ rows.T, want @ want.T, atol=5e-5)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_narrow_rows_equal_principal_components_in_float64():
  rows = glyphs.frozen_embedding(bits(), 6)
  x = centred()
  values, axes = np.linalg.eigh(x.T @ x / len(x))
  assert np.min(np.diff(values[-7:])) > 0.02  # apart: the axes are certain
  axes = axes[:, ::-1][:, :6]
  axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(6)])
  projected = x @ axes
  np.testing.assert_allclose(rows, unit(projected), atol=2e-3)
  # Before the rows are scaled, the components are not correlated, and what
  # the Gram matrix lacks is the variance left out.
  gram = projected.T @ projected / len(x)
  np.testing.assert_allclose(gram, np.diag(values[::-1][:6]), atol=1e-9)
  lost = np.trace(x @ x.T - projected @ projected.T) / len(x)
  np.testing.assert_allclose(lost, values[:-6].sum(), atol=1e-9)


def test_worked_example_of_equal_variances():
  four = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.uint8)
  r = 0.70711
  want = [[r, -r], [-r, r], [r, r], [-r, -r]]
  np.testing.assert_allclose(glyphs.frozen_embedding(four, 2), want, atol=1e-5)
  # Equal variances of any dimension: earlier pixels first.
  every = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
  got = glyphs.frozen_embedding(every, 3)
  want = unit(every[:, :3] - 0.5)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_same_bits_same_rows():
  one, two = (np.asarray(glyphs.frozen_embedding(bits(), 16)) for _ in range(2))
  np.testing.assert_array_equal(one, two)
  key, other = jax.random.key(3), jax.random.key(4)
  make = functools.partial(
    glyphs.frozen_embedding, bits(), 16, method="random_projection"
  )
  np.testing.assert_array_equal(make(key=key), make(key=key))
  assert np.abs(make(key=key) - make(key=other)).max() > 0.1


def test_random_projection_keeps_cosines_about():
  rows = glyphs.frozen_embedding(
    bits(), 64, method="random_projection", key=jax.random.key(0)
  )
  projection = jax.random.normal(jax.random.key(0), (64, 64)) / 8
  want = unit(centred() @ np.asarray(projection, float))
  np.testing.assert_allclose(rows, want, atol=1e-5)


def test_equal_glyphs_and_the_mean():
  table = np.array([[1, 1], [0, 0], [1, 1], [1, 0], [0, 1]], np.uint8)
  assert unicode_glyphs.collisions(table) == [[0, 2]]
  same = np.ones((3, 8), np.uint8)  # all are the mean
  assert not np.asarray(glyphs.frozen_embedding(same, 8)).any()
  assert unicode_glyphs.collisions(same) == [[0, 1, 2]]


def test_packed_rows_are_the_rows():
  ids = np.array([[3, 0, 105], [-1, 5, 5]])
  for settings in ({}, {"method": "random_projection",
                        "key": jax.random.key(1)}):  # fmt: skip
    table = glyphs.frozen_embedding(bits(), 16, **settings)
    packed = glyphs.packed_embedding(bits(), 16, **settings)
    assert packed.packed.nbytes == len(TOKENS) * 8
    np.testing.assert_array_equal(packed.packed, np.packbits(bits(), axis=1))
    got, want = glyphs.embed(packed, ids), glyphs.embed(table, ids)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert not np.asarray(got[1, 0]).any()
    np.testing.assert_array_equal(want[0], np.asarray(table)[ids[0]])
  back = quantize.unpack_bits(packed.packed, num_bits=1)
  np.testing.assert_array_equal(back, bits())


def test_no_gradient_reaches_a_table():
  ids = jnp.array([1, 2])

  def loss(table, projection):
    packed = GlyphEmbedding(
      jnp.ones((3, 1), jnp.uint8), projection, jnp.ones(4)
    )
    return jnp.sum(glyphs.embed(table, ids) * glyphs.embed(packed, ids))

  found = jax.jit(jax.grad(loss, (0, 1)))(jnp.ones((3, 4)), jnp.ones((8, 4)))
  assert not any(np.asarray(x).any() for x in found)


def test_errors_name_the_argument():
  make = functools.partial(unicode_glyphs.frozen_embedding, bits())
  with pytest.raises(ValueError, match="dim must lie in 1..64, got 65"):
    make(65)
  with pytest.raises(ValueError, match="method must be one of 'pca'"):
    make(4, method="svd")
  with pytest.raises(ValueError, match="key must come exactly with"):
    make(4, method="random_projection")
  draw = functools.partial(unicode_glyphs.glyph_bitmaps, ["a"])
  with pytest.raises(ValueError, match="resample must be one of"):
    draw(FONT, resample="cubic")
  with pytest.raises(ValueError, match="noise must lie in 0..1, got 2"):
    draw(FONT, augmentation=Augmentation(noise=2))
  with pytest.raises(OSError):
    draw("no such font")
