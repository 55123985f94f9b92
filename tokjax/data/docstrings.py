"""Docstrings of installed packages, read from their source files.

Files are parsed, never imported or executed. What is written in C is found
where a package keeps its docstrings in Python (`add_newdoc` calls of NumPy
and SciPy); otherwise it is left out.
"""

import ast
import contextlib
import gc
import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from typing import NamedTuple

__all__ = [
  "STANDARD_LIBRARY",
  "Docstring",
  "extract",
  "package_folder",
  "package_version",
  "split_summary",
]

# The name the standard library goes by in a list of packages.
STANDARD_LIBRARY = "python"

# Folders without documentation of their own: tests, demos, other packages.
_SKIPPED_FOLDERS = frozenset({
    "__pycache__", "_vendor", "dist-packages", "ensurepip", "idlelib",
    "lib2to3", "site-packages", "test", "testing", "tests", "turtledemo",
})  # fmt: skip

# name(arguments) or name(arguments) -> result, alone in its paragraph.
_SIGNATURE = re.compile(r"[\w.]+\s*\(.*\)(\s*->.*)?", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z`\"'(*:])")
# The rule under a section title of numpydoc or reStructuredText.
_UNDERLINE = re.compile(r"^\s*([-=~^*#])\1{2,}\s*$", re.MULTILINE)


class Docstring(NamedTuple):
  """One docstring, cut after its summary.

  Attributes:
    name: qualified name, `module.Class.method`; unique within a package.
    summary: its first sentence, on one line.
    body: all that follows, indentation of the first line removed.
  """

  name: str
  summary: str
  body: str


def extract(package: str) -> list[Docstring]:
  """All docstrings of a package that have a summary and a body.

  Modules, classes, and functions that are not inside functions. A name that
  is defined twice gets "#2" at its second place, and so on.

  Args:
    package: name of an installed top-level package, or `STANDARD_LIBRARY`.

  Returns:
    Docstrings in the order of file names and lines.

  Raises:
    ValueError: if there is no such package with source files.
  """
  folder = package_folder(package)
  prefix = () if package == STANDARD_LIBRARY else (package,)
  seen: dict[str, int] = {}
  found = []
  for path in _source_files(folder):
    parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
    module = ".".join(p for p in parts if p != "__init__")
    for name, docstring in _of_file(path, module):
      parts = split_summary(docstring)
      if parts is not None:
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
          name = f"{name}#{seen[name]}"
        found.append(Docstring(name, *parts))
  return found


def package_folder(package: str) -> pathlib.Path:
  """Where the source files of a package are, without importing it.

  Args:
    package: name of an installed top-level package, or `STANDARD_LIBRARY`.

  Returns:
    Its folder.

  Raises:
    ValueError: if it is not installed, or is a single file.
  """
  if package == STANDARD_LIBRARY:
    return pathlib.Path(sysconfig.get_paths()["stdlib"])
  if not package.isidentifier():  # a dotted name would import its parent
    raise ValueError(f"packages must name top-level packages, got {package!r}")
  spec = importlib.util.find_spec(package)
  if spec is None:
    raise ValueError(f"packages: {package} is not installed")
  if not spec.submodule_search_locations:
    raise ValueError(f"packages: {package} is not a folder of source files")
  return pathlib.Path(next(iter(spec.submodule_search_locations)))


def package_version(package: str) -> str:
  """Version of an installed package, "unknown" where it states none.

  Args:
    package: name of an installed top-level package, or `STANDARD_LIBRARY`.

  Returns:
    The version as its metadata gives it.
  """
  if package == STANDARD_LIBRARY:
    return platform.python_version()
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def split_summary(docstring: str) -> tuple[str, str] | None:
  """Cuts a docstring into its first sentence and the rest.

  A leading paragraph that only repeats the signature is dropped. The summary
  ends at the first full stop before a capital letter, else with its
  paragraph.

  Args:
    docstring: as it stands in the source, indentation included.

  Returns:
    (summary on one line, body), or None where there is no text after the
    summary or the docstring starts with a section title.

  Example:
    >>> split_summary("Adds numbers. Both are\\n  finite.\\n\\n  Args: two.")
    ('Adds numbers.', 'Both are\\nfinite.\\n\\nArgs: two.')
  """
  paragraph, rest = _first_paragraph(inspect.cleandoc(docstring))
  if _SIGNATURE.fullmatch(paragraph):
    paragraph, rest = _first_paragraph(rest.removeprefix("--").strip())
  if _UNDERLINE.search(paragraph):
    return None
  end = _SENTENCE_END.search(paragraph)
  cut = end.end() if end else len(paragraph)
  body = f"{paragraph[cut:].strip()}\n\n{rest.strip()}".strip()
  summary = " ".join(paragraph[:cut].split())
  return (summary, body) if summary and body else None


def _first_paragraph(text: str) -> tuple[str, str]:
  paragraph, _, rest = text.partition("\n\n")
  return paragraph.strip(), rest


def _source_files(folder: pathlib.Path) -> list[pathlib.Path]:
  found = []
  for place, folders, files in os.walk(folder):
    # In place: `os.walk` then does not enter the others.
    folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
    found += [
      pathlib.Path(place, name)
      for name in files
      if name.endswith(".py")
      and not name.startswith("test_")
      and not name.endswith("_test.py")
    ]
  return sorted(found)


def _of_file(path: pathlib.Path, module: str) -> Iterator[tuple[str, str]]:
  source = path.read_bytes()
  if b'"""' not in source and b"'''" not in source:
    return  # a docstring with a body has several lines
  try:
    with warnings.catch_warnings(), _collector_paused():
      warnings.simplefilter("ignore")  # invalid escapes in the code of others
      tree = ast.parse(source)
  except (SyntaxError, ValueError):
    return  # written for another Python
  yield from _of_scope(tree, module)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
  """No garbage collection: it looks in vain for cycles in a growing tree, and
  takes a quarter of the time of parsing."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


def _of_scope(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
  """Docstring of a module, class or function, then those inside it."""
  docstring = ast.get_docstring(node, clean=False)
  if docstring:
    yield name, docstring
  if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
    return
  yield from _of_statements(node.body, name)


def _of_statements(
  statements: list[ast.stmt], name: str
) -> Iterator[tuple[str, str]]:
  for statement in statements:
    if isinstance(
      statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    ):
      yield from _of_scope(statement, f"{name}.{statement.name}")
    elif isinstance(statement, ast.If):
      yield from _of_statements(statement.body, name)
      yield from _of_statements(statement.orelse, name)
    elif isinstance(statement, ast.Try):
      yield from _of_statements(statement.body, name)
      for handler in statement.handlers:
        yield from _of_statements(handler.body, name)
      yield from _of_statements(statement.orelse, name)
    elif isinstance(statement, ast.Expr):
      yield from _of_add_newdoc(statement.value, name)


def _of_add_newdoc(node: ast.expr, module: str) -> Iterator[tuple[str, str]]:
  """The forms of `add_newdoc`: (place, name, text), (place, name,
  (attribute, text)), (place, name, [(attribute, text), ...]), (name, text).
  """
  if not (
    isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id == "add_newdoc"
  ):
    return
  try:
    arguments = [ast.literal_eval(argument) for argument in node.args]
  except ValueError:
    return  # put together when it runs
  match arguments:
    case [str(name), str(text)]:
      yield f"{module.rpartition('.')[0]}.{name}", text
    case [str(place), str(name), str(text)]:
      yield f"{place}.{name}", text
    case [str(place), str(name), (str(attribute), str(text))]:
      yield f"{place}.{name}.{attribute}", text
    case [str(place), str(name), list(pairs)]:
      for attribute, text in pairs:
        yield f"{place}.{name}.{attribute}", text
