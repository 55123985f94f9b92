"""A user's own files: what is read, and errors that name file and line."""

import json

import pytest

from tokjax.data import corpus


def write_lines(path, *rows):
  path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
  return path


def test_json_lines_with_either_id_and_maybe_a_title(tmp_path):
  path = write_lines(
    tmp_path / "mine.jsonl",
    {"_id": "a", "title": "Lift", "text": "of a wing "},
    {"id": "b", "text": "drag"},
  )
  found = corpus.load(path)
  assert list(found.ids) == ["a", "b"]
  assert found.texts == ["Lift of a wing", "drag"]
  assert corpus.read_json_lines(path) == found
  with pytest.raises(ValueError, match=r"mine\.jsonl:2.*_id"):
    corpus.read_json_lines(path, id_fields=("_id",))


def test_full_texts_join_title_and_body():
  assert corpus.full_texts(["T", ""], ["body", " b "]) == ["T body", "b"]


def test_beir_folder_is_its_corpus(tmp_path):
  write_lines(tmp_path / "corpus.jsonl", {"_id": "x", "text": "t"})
  (tmp_path / "note.txt").write_text("not a document")
  assert list(corpus.load(tmp_path).ids) == ["x"]


def test_folder_of_text_files_sorted_by_path(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "two.md").write_text("zwei", encoding="utf-8")
  (tmp_path / "a.txt").write_text("ä", encoding="utf-8")
  (tmp_path / "c.png").write_bytes(b"\x89PNG")
  found = corpus.load(str(tmp_path))
  assert list(found.ids) == ["a.txt", "b/two.md"]
  assert found.texts == ["ä", "zwei"]


@pytest.mark.parametrize(
  "content, text",
  [
    (b"", "no documents"),
    (b'{"id": "a"}\n', r"c\.jsonl:1.*text"),
    (b'{"id": "a", "text": "x"}\n{"text"\n', r"c\.jsonl:2"),
    (b'{"id": "a", "text": "x"}\n[1]\n', r"c\.jsonl:2"),
    (b'{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n', r":2.*'a'.*:1"),
    (b'{"id": "a", "text": "\xff"}\n', r"c\.jsonl:1.*UTF-8"),
  ],
)
def test_bad_lines_are_named(tmp_path, content, text):
  path = tmp_path / "c.jsonl"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=text):
    corpus.load(path)


def test_missing_or_other_files_are_named(tmp_path):
  with pytest.raises(ValueError, match="no such file or folder"):
    corpus.load(tmp_path / "nothing.jsonl")
  (tmp_path / "x.csv").write_text("a,b")
  with pytest.raises(ValueError, match="expected a .jsonl file"):
    corpus.load(tmp_path / "x.csv")
  with pytest.raises(ValueError, match="no corpus.jsonl"):
    corpus.load(tmp_path)
