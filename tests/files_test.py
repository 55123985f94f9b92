"""A file is replaced when it is complete, and only then."""

import pytest

from tokjax import files


def test_complete_file_takes_the_place(tmp_path):
  path = tmp_path / "new" / "a.txt"
  with files.replacing(path) as aside:
    aside.write_text("one")
    assert not path.exists()
  assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


def test_failure_leaves_what_was_there(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("old")
  with pytest.raises(RuntimeError, match="disk"):
    with files.replacing(path) as aside:
      aside.write_text("half")
      raise RuntimeError("disk")
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", ["gs://bucket/run", "s3://bucket/run"])
def test_a_bucket_is_no_folder(folder):
  with pytest.raises(
    ValueError, match=f"--out must be .*, got '{folder}'.*gcs"
  ):
    files.local_folder(**{"--out": folder})
  assert files.local_folder(out="gs/run").parts == ("gs", "run")
