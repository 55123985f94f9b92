"""encode, index, search and evaluate from end to end, and their errors."""

import io
import json
import pathlib

import numpy as np
import pytest

from tokjax.cli import encode, evaluate, index, main, search
from tokjax.eval import comparison, runs
from tokjax.retrieval import index_files

WORDS = ("wing", "plate")


def run(capsys, *words) -> tuple[int, str, str]:
  capsys.readouterr()
  code = main.main([str(word) for word in words])
  printed = capsys.readouterr()
  return code, printed.out, printed.err


@pytest.fixture
def built(beir, model, tmp_path, capsys) -> pathlib.Path:
  folder = tmp_path / "index"
  code, out, err = run(
    capsys, "index", beir, folder, "--model", model, "--fde", 1280, "--json"
  )
  assert code == 0, err
  assert json.loads(out)["documents"] == 12
  return folder


def test_search_gives_the_exact_order(built, beir, model, capsys):
  code, out, _ = run(capsys, "search", built, "wing", "-k", 12, "--json")
  assert code == 0
  hits = json.loads(out)["hits"]
  scores = [hit["score"] for hit in hits]
  assert scores == sorted(scores, reverse=True) and len(hits) == 12
  assert hits[0]["id"] == "d0" and hits[0]["text"] == "wing light wing"
  encoded = encode.encode_corpus(beir, model, progress=False)
  searcher = search.open_searcher(str(built))
  query = searcher.encode("wing")
  for hit in hits:
    at = encoded.ids.index(hit["id"])
    first, last = encoded.documents.offsets[at : at + 2]
    similarity = query.tokens[0] @ encoded.documents.tokens[first:last].T
    want = similarity.max(axis=1).sum()
    assert abs(want - hit["score"]) < 0.03  # int8 rows


def test_candidate_modes_over_everything_equal_exact(built):
  searcher = search.open_searcher(str(built))
  want = searcher("plate wave", k=5, mode="exact")
  for mode in ("fde", "pooled"):
    got = searcher("plate wave", k=5, mode=mode, num_candidates=12)
    assert [hit.id for hit in got] == [hit.id for hit in want]


def test_search_reads_queries_from_a_pipe(built, capsys, monkeypatch):
  monkeypatch.setattr("sys.stdin", io.StringIO("wing\n\nplate\n"))
  code, out, _ = run(capsys, "search", built, "--json", "-k", 1)
  rows = [json.loads(line) for line in out.splitlines()]
  assert code == 0 and [row["query"] for row in rows] == list(WORDS)


def test_search_shows_matched_words(built, capsys):
  code, out, _ = run(capsys, "search", built, "wing", "-k", 2)
  assert code == 0 and "wing light wing" in out and "1." in out
  matches = search.open_searcher(str(built)).matches("wing", "drag wing")
  assert [(m.start, m.query_token) for m in matches] == [(5, "wing")]


def test_adding_grows_the_index_and_needs_the_same_model(
  built, model, tmp_path, capsys
):
  more = tmp_path / "more.jsonl"
  more.write_text('{"id": "new", "text": "sound speed"}\n')
  code, out, err = run(
    capsys, "index", more, built, "--model", model, "--add", "--json"
  )
  assert code == 0, err
  assert json.loads(out)["documents"] == 13
  encoded = encode.encode_corpus(more, model, progress=False)
  with pytest.raises(ValueError, match="was made with the weights"):
    index.write(
      built, ["x"], [""], encoded.documents, "0" * 64,
      index.IndexConfig(model=model), add=True,
    )  # fmt: skip


def test_an_index_is_not_overwritten(built, beir, model, capsys):
  code, _, err = run(capsys, "index", beir, built, "--model", model)
  assert code == 2 and "already holds an index" in err
  assert index_files.open_index(built).num_documents == 12


def test_encode_then_index_equals_index(built, beir, model, tmp_path, capsys):
  file = tmp_path / "encoded.safetensors"
  code, out, _ = run(capsys, "encode", beir, file, "--model", model)
  assert code == 0 and "12 documents" in out
  folder = tmp_path / "second"
  assert run(capsys, "index", file, folder, "--fde", 0)[0] == 0
  first = index.load(index_files.open_index(built))
  second = index.load(index_files.open_index(folder))
  assert first[1:] == second[1:]
  a, b = (x[0].codec.decode(x[0].payload) for x in (first, second))
  np.testing.assert_allclose(a, b, atol=2e-2)  # float16 in between


def test_damaged_encodings_are_named(beir, model, tmp_path, capsys):
  file = tmp_path / "encoded.safetensors"
  encode.write(file, encode.encode_corpus(beir, model, progress=False))
  file.write_bytes(file.read_bytes()[:-9])
  code, _, err = run(capsys, "index", file, tmp_path / "index")
  assert code == 2 and "encoded.safetensors is not a complete file" in err
  assert encode.EncodedCorpus._fields[0] == "ids"
  with pytest.raises(ValueError, match="not a complete file"):
    encode.read(file)


@pytest.mark.parametrize(
  "words, text",
  [
    (("search", "no_such_index", "wing"), "no index in no_such_index"),
    (("evaluate", "no_such_folder"), "no_such_folder"),
    (("index", "no_such_corpus", "out"), "no_such_corpus"),
    (("encode", "x.jsonl", "out", "--model", "no/such"), "x.jsonl"),
  ],
)
def test_missing_things_are_named(words, text, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, _, err = run(capsys, *words)
  assert code == 2 and text in err


def test_malformed_line_is_named_with_its_number(tmp_path, model, capsys):
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"id": "a", "text": "wing"}\n{"id": "b", "text": \n')
  code, _, err = run(capsys, "index", bad, tmp_path / "i", "--model", model)
  assert code == 2 and "bad.jsonl:2" in err
  bad.write_text("")
  code, _, err = run(capsys, "index", bad, tmp_path / "i", "--model", model)
  assert code == 2 and "no documents" in err


def test_another_model_is_refused(built, model, capsys):
  config = pathlib.Path(model) / "model.safetensors"
  data = bytearray(config.read_bytes())
  data[-1] ^= 1
  config.write_bytes(bytes(data))
  code, _, err = run(capsys, "search", built, "wing")
  assert code == 2 and "name the right one with --model" in err


def test_evaluate_prints_every_method(beir, model, capsys):
  code, out, err = run(
    capsys, "evaluate", beir, "--model", model, "--fde", 1280, "--json"
  )
  assert code == 0, err
  rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
  assert list(rows) == list(comparison.METHODS)
  # 12 documents, all of them candidates: re-ranking is exact MaxSim.
  for name in ("dense+maxsim", "fde+maxsim", "fde-filled+maxsim"):
    assert rows[name]["metrics"] == rows["maxsim"]["metrics"]
    assert rows[name]["exact_overlap"] == 1.0
  assert rows["bm25"]["exact_overlap"] < 1.0
  assert rows["bm25"]["metrics"]["R@100"] == 1.0
  assert rows["maxsim"]["bytes_per_document"] > 0


def test_compare_ranks_by_maxsim(beir, model):
  config = evaluate.EvaluateConfig(dataset=beir, model=model, fde=1280)
  encoded = evaluate.encode(config, progress=False)
  assert isinstance(encoded, evaluate.Encoded)
  (row,) = comparison.compare(
    encoded.dataset, encoded.documents, encoded.queries,
    methods=["maxsim"], codec="float32", k=3, repeats=1,
  )  # fmt: skip
  assert isinstance(row, comparison.Measured)
  documents, queries = encoded.documents, encoded.queries
  offsets = documents.offsets
  for i, name in enumerate(encoded.dataset.query_ids):
    query = queries.tokens[i][queries.mask[i]]
    scores = [
      (query @ documents.tokens[a:b].T).max(axis=1).sum()
      for a, b in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    best = np.argsort(scores)[::-1][:3]
    want = {encoded.dataset.document_ids[j] for j in best}
    assert set(row.run[name]) == want
  assert row.metrics == runs.evaluate(row.run, encoded.dataset.qrels)


def test_compare_names_a_wrong_method(beir, model):
  config = evaluate.EvaluateConfig(dataset=beir, model=model, methods=("bm52",))
  encoded = evaluate.encode(config, progress=False)
  with pytest.raises(ValueError, match="methods must be one of 'bm25'"):
    evaluate.measure(config, encoded)


def test_a_cut_keeps_answers_and_drops_orphans(beir):
  config = evaluate.EvaluateConfig(dataset=beir, max_documents=6)
  cut = evaluate.load(config)
  assert len(cut.document_ids) == 6
  kept = set(cut.document_ids)
  assert cut.qrels and all(set(g) <= kept for g in cut.qrels.values())
  assert set(cut.query_ids) == set(cut.qrels)
