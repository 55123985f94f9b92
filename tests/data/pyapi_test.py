"""Calls of files to public functions, made from a package that cannot run."""

import sys

import pytest

from tokjax.data import pyapi

PRIVATE = '''
def one():
  """Gives one. And no more."""

def two():
  """Gives two."""

def _hidden():
  """Is nobody's business."""

def silent():
  return 1

class Three:
  """Makes threes."""

  def of(self):
    """Counts its threes."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
  folder = tmp_path / "madeup_api"
  (folder / "inner").mkdir(parents=True)
  files = {
    "__init__.py": "raise RuntimeError('imported')\n"
    "from madeup_api.inner import *\nfrom .c import c\n",
    "inner/__init__.py": "from ._code import one, two as second\n"
    "from ._code import Three, _hidden, silent\n"
    "from . import _loop\nfrom ._loop import *\n",
    "inner/_code.py": PRIVATE,
    "inner/_loop.py": "from madeup_api.inner import *\n",
    "docs.py": "add_newdoc('madeup_api.c', 'four', "
    "'''four(x)\n--\n\nGives four.''')\n",
    "a.py": "import madeup_api as m\n"
    "def f(x):\n  m.inner.second(m.one())\n  x.one()\n  f(m.one())\n"
    "  m.Three.of(m.silent(), m.inner._hidden())\n",
    "b.py": "from madeup_api.inner import one as first, second\n"
    "from madeup_api.c import four\nfrom .inner import Three\n"
    "first(); four(); second(); Three.of()\n",
    "broken.py": "def (",
    "c_user.py": "import madeup_api\nmadeup_api.c.c.d()\n"
    "madeup_api.c.four()\nmadeup_api.inner._code.two()\n",
  }
  for name, text in files.items():
    (folder / name).write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  pyapi._calls.cache_clear()
  return "madeup_api"


def sequences(found):
  ends = zip(found.starts[:-1], found.starts[1:], strict=True)
  names = [text.partition(":")[0] for text in found.texts]
  return [[names[i] for i in found.items[a:b]] for a, b in ends]


def test_calls_are_followed_to_one_name(package):
  found = pyapi.load([package], min_files=2, min_items=1)
  second, one = "madeup_api.inner.second", "madeup_api.one"
  three, four = "madeup_api.Three.of", "madeup_api.c.four"
  assert sequences(found) == [
    [second, one, three],  # a.py
    [one, four, second, three],  # b.py
    [four],  # c_user.py; what it calls by a private name does not count
  ]
  assert found.texts == (
    f"{three}: Counts its threes.",
    f"{four}: Gives four.",
    f"{second}: Gives two.",
    f"{one}: Gives one.",
  )
  assert package not in sys.modules


def test_sizes_are_limited(package):
  few = pyapi.load([package], min_files=1, min_items=2, max_length=2)
  assert [len(items) for items in sequences(few)] == [2, 2]
  core = pyapi.load([package], min_files=2, min_items=3)
  assert len(sequences(core)) == 2 and core.num_items == 3
  top = pyapi.load([package], min_files=1, min_items=1, max_items=1)
  assert top.num_items == 1


def test_errors(package):
  with pytest.raises(ValueError, match="must be a list of names, got 'optax'"):
    pyapi.load("optax")
  with pytest.raises(ValueError, match="nothing_here is not installed"):
    pyapi.load(["nothing_here"])
  with pytest.raises(ValueError, match="have no 9 items that 5 files call"):
    pyapi.load([package], min_items=9)
  with pytest.raises(ValueError, match="min_files must lie in"):
    pyapi.load([package], min_files=0)
