"""Word ids on disk: they follow their rows, and old readers refuse them."""

import numpy as np
import pytest

from tests.retrieval.index_files_test import DIM, documents, files_of, flip
from tokjax.retrieval import codecs, index_files, index_storage


def with_words(folder):
  """An index of two segments whose rows have word ids; returns the ids."""
  index_files.create(folder, codecs.FloatCodec(DIM))
  word_ids = np.uint32(2**32 - 9) + np.arange(9, dtype=np.uint32)
  index_files.add(folder, *documents(0, [3, 0, 4]), word_ids=word_ids[:7])
  more = documents(1, [2], prefix="x")
  index_files.add(folder, *more, word_ids=word_ids[7:])
  return word_ids


def without_words(folder):
  index_files.create(folder, codecs.FloatCodec(DIM))
  index_files.add(folder, *documents(0, [3, 0, 5]))
  return folder


def test_word_ids_follow_their_rows(tmp_path):
  word_ids = with_words(tmp_path)
  found = index_files.open_index(tmp_path).load().word_ids
  np.testing.assert_array_equal(found, word_ids)
  assert found.dtype == np.uint32
  index_files.delete(tmp_path, ["d0-Ü"])
  for index in (
    index_files.open_index(tmp_path),
    index_files.compact(tmp_path),
  ):
    index.verify()
    found = index.load()
    np.testing.assert_array_equal(found.word_ids, word_ids[3:])
    assert len(found.word_ids) == len(found.payload["values"])
  index_files.vacuum(tmp_path)
  # All deleted, there still are words: what is added must have some.
  index_files.delete(tmp_path, found.ids)
  assert index_files.compact(tmp_path).load().word_ids.shape == (0,)
  with pytest.raises(ValueError, match="has_word_ids must be one of True, got"):
    index_files.add(tmp_path, *documents(2, [1]))


@pytest.mark.unchecked
def test_word_ids_that_do_not_fit_are_named(tmp_path):
  folder = without_words(tmp_path / "plain")
  more = documents(1, [2], prefix="x")
  word_ids = np.array([7, 8], np.uint32)
  with pytest.raises(ValueError, match="has_word_ids must be one of False"):
    index_files.add(folder, *more, word_ids=word_ids)
  with_words(tmp_path / "words")
  for given, error, message in (
    (word_ids[:1], ValueError, "offsets_last=2, word_ids=1"),
    (word_ids.astype(int), TypeError, "word_ids must be uint32, got int64"),
  ):
    with pytest.raises(error, match=message):
      index_files.add(
        tmp_path / "words", ["y"], more[1], more[2], word_ids=given
      )
  assert index_files.open_index(tmp_path / "words").version == 3


def test_changed_word_ids_are_named_when_opened(tmp_path):
  with_words(tmp_path)
  flip(files_of(tmp_path, "/word_ids/c/")[0], 5)
  with pytest.raises(index_files.DamagedIndexError, match="word_ids.*sha256"):
    index_files.open_index(tmp_path)


def test_only_indexes_with_words_have_the_second_format(tmp_path):
  folder = without_words(tmp_path / "plain")
  plain = index_files.compact(folder).manifest
  assert plain["format_version"] == 1
  assert set(plain["segments"][0]) == {
    "name", "num_documents", "payload", "vectors", "texts", "deleted",
  }  # fmt: skip
  assert not files_of(folder, "word_ids")
  with_words(tmp_path / "words")
  first, newest = (
    index_files.open_index(tmp_path / "words", version) for version in (1, None)
  )
  assert first.manifest["format_version"] == 1  # nothing in it
  assert newest.manifest["format_version"] == 2
  assert [x["word_ids"] for x in newest.manifest["segments"]] == [True, True]
  later = {**newest.manifest, "format_version": 3, "version": 4}
  index_storage.commit(str(tmp_path / "words"), later)
  with pytest.raises(ValueError, match="format_version 1 or 2, got 3"):
    index_files.open_index(tmp_path / "words")
