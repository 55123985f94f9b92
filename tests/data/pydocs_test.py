import sys

import pytest

from tokjax.data import docstrings, pydocs, records

LONG = " ".join(f"word{i}" for i in range(30))
OTHER = " ".join(f"term{i}" for i in range(30))


@pytest.fixture
def package(tmp_path, monkeypatch):
  """An installed package whose import would fail."""
  folder = tmp_path / "madeup_docs"
  (folder / "tests").mkdir(parents=True)
  (folder / "tests/inner.py").write_text(
    f'"""A test, not documentation.\n\n{LONG}"""'
  )
  (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
  (folder / "broken.py").write_text('"""a"""\ndef (')
  (folder / "one.py").write_text(f'''
def near(): 
  """Counts the words of it.

  {LONG} end.
  """

def nearly():
  """Measures how long it is.

  {LONG} stop.
  """

def equal():
  """Gives the same text again.

  {LONG} end.
  """

class Shared:
  """Closes what was opened before.

  {OTHER} of a class.
  """

  def method(self):
    """Closes what was opened before.

    A quite different text: {" ".join(OTHER.split()[::-1])}
    """

def leaks():
  """Tells its summary once more.

  {OTHER[::-1]} tells its summary once more.
  """

def short():
  """Has four words here.

  But no body to speak of.
  """

add_newdoc("place", "thing", ("attribute", """Lives in compiled code only.

  {" ".join(f"c{i}" for i in range(25))}
  """))
''')
  monkeypatch.syspath_prepend(tmp_path)
  return "madeup_docs"


def everything(package):
  sets = pydocs.load_splits([package])
  qrels, texts = {}, {}
  for one in sets.values():
    qrels.update(one.qrels)
    texts.update(zip(one.query_ids, one.query_texts, strict=True))
  named = {
    texts[key]: {name.removeprefix("madeup_docs.one.") for name in grades}
    for key, grades in qrels.items()
  }
  return sets, named


def test_what_is_relevant(package):
  sets, relevant = everything(package)
  assert relevant == {
    "Counts the words of it.": {"near", "nearly"},
    "Measures how long it is.": {"near", "nearly"},
    "Gives the same text again.": {"near", "nearly"},
    "Closes what was opened before.": {"Shared", "Shared.method"},
    "Lives in compiled code only.": {"place.thing.attribute"},
  }
  assert package not in sys.modules
  metadata = sets["test"].metadata
  assert metadata["versions"] == {package: "unknown"}
  assert metadata["verbatim_summaries_left_out"] == 1


def test_documents_hold_neither_summary_nor_name(package):
  sets, _ = everything(package)
  texts = dict(
    zip(sets["test"].document_ids, sets["test"].document_texts, strict=True)
  )
  assert len(texts) == 6  # `equal` is merged, `short` and tests are left out
  assert texts["madeup_docs.one.near"] == f"{LONG} end."


def test_linked_documents_share_a_split(package):
  sets, _ = everything(package)
  place = {}
  for split, one in sets.items():
    for grades in one.qrels.values():
      for document in grades:
        assert place.setdefault(document, split) == split


def test_tables_give_back_the_same_sets(package, tmp_path):
  tables = pydocs.build(tmp_path / "built", packages=[package])
  full = {k: s for k, s in pydocs.load_splits([package]).items() if s.query_ids}
  assert full
  for split, one in full.items():
    assert records.read(tables, split) == one


def test_twice_the_same_on_an_installed_package():
  sets = pydocs.load_splits(["optax"])
  assert sets == pydocs.load_splits(["optax"])
  assert len(sets["test"].document_ids) > 100
  assert len(sets["train"].query_ids) > len(sets["test"].query_ids) > 0
  assert "optax" in pydocs.summarize(sets)


SUMMARIES = [
  ("One line only.", None),
  ("First line\n  goes on.\n\n  Body.", ("First line goes on.", "Body.")),
  ("Sum. More text.\n\nBody.", ("Sum.", "More text.\n\nBody.")),
  ("As in e.g. this one.\n\nBody.", ("As in e.g. this one.", "Body.")),
  ("f(x, y) -> z\n\nAdds.\n\nBody.", ("Adds.", "Body.")),
  ("Title\n=====\n\nBody.", None),
]


@pytest.mark.parametrize("docstring,want", SUMMARIES)
def test_split_summary(docstring, want):
  assert docstrings.split_summary(docstring) == want


def test_errors():
  with pytest.raises(ValueError, match="nothing_here is not installed"):
    pydocs.load(packages=["nothing_here"])
  with pytest.raises(ValueError, match="top-level packages, got 'a.b'"):
    pydocs.load(packages=["a.b"])
  with pytest.raises(ValueError, match="split must be one of 'train'"):
    pydocs.load("dev")
  with pytest.raises(ValueError, match="each once"):
    pydocs.load(packages=["optax", "optax"])
