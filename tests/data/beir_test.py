import json

import grain
import pytest

from tokjax.data import beir, corpus, records
from tokjax.data.retrieval_set import RetrievalSet


@pytest.fixture
def folder(tmp_path):
  """Three documents, three queries, of which "q3" is judged nowhere."""
  root = tmp_path / "tiny-set"
  (root / "qrels").mkdir(parents=True)
  documents = [
    {"_id": "d1", "title": "Lift", "text": "of a wing"},
    {"_id": "d2", "title": "", "text": "dräg"},
    {"_id": 3, "text": "heat"},
  ]
  queries = [{"_id": f"q{i}", "text": f"question {i}"} for i in (3, 2, 1)]
  for name, rows in (("corpus", documents), ("queries", queries)):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (root / f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")
  header = "query-id\tcorpus-id\tscore\n"
  (root / "qrels/test.tsv").write_text(header + "q1\td1\t2\nq2\t3\t0\n")
  (root / "qrels/train.tsv").write_text(header + "q1\td2\t1\n")
  return root


def test_load_keeps_judged_queries_and_joins_titles(folder):
  got = beir.load(folder)
  assert got.document_ids == ["d1", "d2", "3"]
  assert got.document_texts == ["Lift of a wing", "dräg", "heat"]
  assert got.query_ids == ["q2", "q1"]  # the order of queries.jsonl
  assert got.qrels == {"q1": {"d1": 2}, "q2": {"3": 0}}
  assert beir.splits(folder) == ["test", "train"]
  assert beir.load(folder, "train").query_ids == ["q1"]


BROKEN = [
  ("corpus.jsonl", "", r"corpus\.jsonl: no documents"),
  ("corpus.jsonl", '{"_id": "d1", "text": ""}\n{oops', r"jsonl:2: not JSON"),
  ("corpus.jsonl", "[1]", r"jsonl:1: expected a JSON object, got list"),
  ("corpus.jsonl", '{"_id": "d1"}', r"jsonl:1: missing field text"),
  ("corpus.jsonl", '{"id": "d1", "text": ""}', r"jsonl:1: missing field _id"),
  ("corpus.jsonl", '{"_id": "", "text": ""}', r"_id must be a string"),
  ("corpus.jsonl", '{"_id": "a", "text": 1}', r"text must be a string, got 1"),
  (
    "corpus.jsonl",
    '{"_id": "a", "text": ""}\n\n{"_id": "a", "text": ""}',
    r"jsonl:3: id 'a' was used at .*jsonl:1",
  ),
  ("queries.jsonl", "", r"queries\.jsonl: no queries"),
  (
    "queries.jsonl",
    '{"_id": "q1", "text": ""}\n{"_id": "q1", "text": ""}',
    r"jsonl:2: query id 'q1' comes twice",
  ),
  ("queries.jsonl", '{"_id": "q1", "text": ""}', r"1 queries are .*'q2'"),
  ("qrels/test.tsv", "q1\td1\t1\n", r"tsv:1: expected the header"),
  ("qrels/test.tsv", "a\tb\tc\nq1\td1\tx\n", r"tsv:2: score .* got 'x'"),
  ("qrels/test.tsv", "a\tb\tc\nq1\t0\td1\t1\n", r"tsv:2: expected 3 columns"),
  ("qrels/test.tsv", "a\tb\tc\nq1\td1\t1\nq1\td1\t2\n", r"tsv:3: .*before"),
  ("qrels/test.tsv", "a\tb\tc\nq1\td9\t1\nq1\td1\t1\n", r"1 documents .*'d9'"),
  ("qrels/test.tsv", "a\tb\tc\n", r"test\.tsv: no judgements"),
]


@pytest.mark.parametrize("name,content,message", BROKEN)
def test_errors_name_file_and_line(folder, name, content, message):
  (folder / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    beir.load(folder)


def test_error_for_bytes_that_are_not_utf8(folder):
  with (folder / "corpus.jsonl").open("ab") as file:
    file.write(b'{"_id": "d4", "text": "\xff"}')
  with pytest.raises(ValueError, match=r"corpus\.jsonl:4: not UTF-8"):
    beir.load(folder)


def test_errors_for_what_is_not_there(folder, tmp_path):
  with pytest.raises(ValueError, match="nowhere: no such folder"):
    beir.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="splits here: test, train"):
    beir.load(folder, "dev")
  (folder / "queries.jsonl").unlink()
  with pytest.raises(ValueError, match=r"queries\.jsonl: no such file"):
    beir.load(folder)


def test_allow_missing_keeps_the_judgement(folder):
  (folder / "qrels/test.tsv").write_text("a\tb\tc\nq1\td9\t1\n")
  got = beir.load(folder, allow_missing=True)
  assert got.qrels == {"q1": {"d9": 1}}


def test_a_retrieval_set_checks_itself(folder):
  good = beir.load(folder)
  with pytest.raises(ValueError, match="document_ids=3, document_titles=1"):
    RetrievalSet("x", good.document_ids, [""], [""], [], [], {})
  with pytest.raises(ValueError, match="query_ids must be unique.*'a'"):
    RetrievalSet("x", [], [], [], ["a", "a"], ["", ""], {})
  with pytest.raises(ValueError, match="judge 1 queries .*'b'"):
    RetrievalSet("x", [], [], [], ["a"], [""], {"b": {}})


def test_tables_give_back_the_same_sets(folder, tmp_path, capsys):
  tables = beir.build(folder, tmp_path / "built")
  assert tables == tmp_path / "built" / "tiny_set"
  assert capsys.readouterr().out == ""
  for split in ("test", "train"):
    assert records.read(tables, split) == beir.load(folder, split)


def test_grain_reads_the_tables(folder, tmp_path):
  tables = beir.build(folder, tmp_path)
  source = records.data_source(tables, "queries", "test")
  rows = list(grain.MapDataset.source(source))
  assert [row["id"] for row in rows] == [b"q2", b"q1"]
  assert rows[1]["document_ids"] == [b"d1"]
  assert [int(grade) for grade in rows[1]["grades"]] == [2]


def test_building_again_needs_overwrite_only_after_a_change(folder, tmp_path):
  tables = beir.build(folder, tmp_path)
  assert beir.build(folder, tmp_path) == tables
  (folder / "qrels/train.tsv").write_text("a\tb\tc\nq2\td2\t1\n")
  with pytest.raises(ValueError, match="overwrite=True"):
    beir.build(folder, tmp_path)
  beir.build(folder, tmp_path, overwrite=True)
  assert records.read(tables, "train").query_ids == ["q2"]


def test_an_interrupted_build_leaves_nothing(folder, tmp_path, monkeypatch):
  def interrupted(retrieval_set):
    yield 0, {"id": "q1", "text": "", "document_ids": [], "grades": []}
    raise KeyboardInterrupt

  monkeypatch.setattr(records, "_query_records", interrupted)
  with pytest.raises(KeyboardInterrupt):
    beir.build(folder, tmp_path / "built")
  assert list((tmp_path / "built").iterdir()) == []


def test_errors_of_tables(folder, tmp_path):
  tables = beir.build(folder, tmp_path)
  with pytest.raises(ValueError, match="split must be one of 'test', 'train'"):
    records.read(tables, "dev")
  with pytest.raises(ValueError, match="no table queries"):
    records.read(folder, "test")
  with pytest.raises(ValueError, match="at least one split"):
    records.write({}, tmp_path, name="x", fingerprint="")


@pytest.mark.parametrize(
  "name,split,counts",
  [
    ("scifact", "test", (5183, 300, 339)),
    ("scifact", "train", (5183, 809, 919)),
    ("cranfield", "test", (1400, 225, 1612)),
    ("vaswani", "test", (11429, 93, 2083)),
  ],
)
def test_counts_of_real_sets(shared_data, name, split, counts):
  got = beir.load(shared_data / name, split)
  found = (len(got.document_ids), len(got.query_ids), got.num_judgements)
  assert found == counts


def test_corpus_of_a_beir_folder_and_of_a_file(folder, tmp_path):
  assert corpus.load(folder).texts == beir.load(folder).document_texts
  path = tmp_path / "own.jsonl"
  path.write_text('{"id": 7, "text": "a"}\n')
  assert corpus.load(path).ids == ["7"]


def test_corpus_of_text_files(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub/a.md").write_text("# A")
  (tmp_path / "b.txt").write_text("B")
  (tmp_path / "c.pdf").write_text("no text")
  got = corpus.load(tmp_path)
  assert (got.ids, got.texts) == (["b.txt", "sub/a.md"], ["B", "# A"])


def test_errors_of_a_corpus(tmp_path):
  with pytest.raises(ValueError, match="no such file or folder"):
    corpus.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="no .txt or .md files"):
    corpus.load(tmp_path)
  (tmp_path / "a.csv").write_text("")
  with pytest.raises(ValueError, match="expected a .jsonl file"):
    corpus.load(tmp_path / "a.csv")
  (tmp_path / "b.txt").write_bytes(b"one\n\xff")
  with pytest.raises(ValueError, match=r"b\.txt:2: not UTF-8"):
    corpus.load(tmp_path)
