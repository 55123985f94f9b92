"""`pyapi`: interactions with text that are already there, in installed code.

A source file is a user; the items it chose are the public functions and
classes it calls, in the order of their first call; the text of an item is its
name and the first sentence of its docstring. The same installed versions give
the same set, without a download. Files are parsed, never imported or executed.

- A call counts if it goes through an import of the file: `jnp.sum(x)` after
  `import jax.numpy as jnp` is followed through the imports of the packages to
  the place of its definition, so that all its names are one item. Methods of
  values, and functions of the file itself, are not followed.
- Public: no part of the name it was called by begins with an underscore. An
  item is named by the shortest of those.
- An item without a docstring is none. Files with few items and items of few
  files are left out, again and again, until all have enough.
"""

import ast
import collections
import functools
import gc
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokjax import checks
from tokjax.data import docstrings, interactions
from tokjax.data.interactions import Interactions

__all__ = ["PACKAGES", "load"]

PACKAGES = ("jax", "numpy", "scipy", "flax", "optax", "python")

_MAX_TRIED = 100  # names on the way to a definition
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "lib2to3"}


def load(
  packages: Sequence[str] = PACKAGES,
  *,
  min_files: int = 5,
  min_items: int = 5,
  max_length: int = 50,
  max_items: int = 20_000,
) -> Interactions:
  """Which functions the files of packages call.

  Args:
    packages: installed top-level packages; "python" is the standard library.
      Their files are the users, their functions the items.
    min_files: files that must call an item.
    min_items: items that a file must call.
    max_length: only the first so many items of a file count.
    max_items: only the so many items that most files call.

  Returns:
    Interactions whose `texts` are "name: sentence". Users in the order of
    packages and paths, items in the order of their names. Takes a minute or
    two for the default packages.

  Raises:
    ValueError: if a package is not installed, settings are out of range or
      nothing is left.
  """
  if isinstance(packages, str) or not packages:
    raise ValueError(f"packages must be a list of names, got {packages!r}")
  checks.in_range(
    1, 1 << 31, min_files=min_files, min_items=min_items, max_length=max_length,
    max_items=max_items,
  )  # fmt: skip
  sequences, summaries, names = _calls(tuple(packages))
  counts = collections.Counter(x for items in sequences for x in items)
  kept = set(sorted(counts, key=lambda x: (-counts[x], x))[:max_items])
  sequences = _core(sequences, kept, min_files, min_items, max_length)
  items = sorted({x for items in sequences for x in items}, key=names.get)
  if not items:
    raise ValueError(
      f"packages {tuple(packages)} have no {min_items} items that "
      f"{min_files} files call"
    )
  number = {item: i for i, item in enumerate(items)}
  return interactions.from_sequences(
    [[number[x] for x in items] for items in sequences],
    num_items=len(items),
    texts=[f"{names[item]}: {summaries[item]}" for item in items],
  )


class _Module(NamedTuple):
  """What a source file says, names as they are written.

  Attributes:
    defined: qualified name within the module -> first sentence, "" if none.
    imported: local name -> what it stands for.
    stars: modules of which everything is imported.
    called: dotted names of calls, in order, the first part imported.
  """

  defined: dict[str, str]
  imported: dict[str, str]
  stars: list[str]
  called: list[str]


@functools.cache  # a minute; the results are never changed
def _calls(packages):
  """Items of each file by where they are defined, their sentences, names."""
  modules, newdocs = {}, {}
  enabled = gc.isenabled()
  gc.disable()  # it would look in vain for cycles in growing trees
  try:
    for package in packages:
      for module, path, inside in _files(package):
        tree = _parse(path)
        if tree is not None:
          modules[module] = _read(tree, inside)
          newdocs |= _added_docs(tree)
  finally:
    if enabled:
      gc.enable()
  find = functools.cache(functools.partial(_find, modules, newdocs))
  sequences, summaries, names = [], {}, {}
  for module in modules.values():
    items = {}
    for dotted in module.called:
      found = find(dotted)
      if found is None or not found[1] or _is_private(dotted):
        continue
      item, summaries[found[0]] = found
      items[item] = None
      best = names.setdefault(item, dotted)
      names[item] = min(best, dotted, key=lambda x: (x.count("."), x))
    sequences.append(list(items))
  return sequences, summaries, names


def _files(package: str) -> Iterator[tuple[str, pathlib.Path, str]]:
  """Name, path and surrounding package of each module."""
  folder = docstrings.package_folder(package)
  prefix = () if package == docstrings.STANDARD_LIBRARY else (package,)
  for path in sorted(folder.rglob("*.py")):
    parts = path.relative_to(folder).with_suffix("").parts
    if _SKIPPED & set(parts):
      continue
    parts = (*prefix, *parts)
    if parts[-1] == "__init__":
      parts = parts[:-1]
      inside = parts
    else:
      inside = parts[:-1]
    yield ".".join(parts), path, ".".join(inside)


def _parse(path: pathlib.Path) -> ast.Module | None:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes in the code of others
      return ast.parse(path.read_bytes())
  except (SyntaxError, ValueError, RecursionError):
    return None  # written for another Python, or to test a parser


def _read(tree: ast.Module, package: str) -> _Module:
  module = _Module(dict(_definitions(tree.body, "")), {}, [], [])
  calls = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        name = alias.asname or alias.name.partition(".")[0]
        target = alias.name if alias.asname else name
        module.imported.setdefault(name, target)
    elif isinstance(node, ast.ImportFrom):
      origin = _origin(node, package)
      for alias in node.names if origin else ():
        if alias.name == "*":
          module.stars.append(origin)
        else:
          name = alias.asname or alias.name
          module.imported.setdefault(name, f"{origin}.{alias.name}")
    elif isinstance(node, ast.Call):
      calls.append((node.lineno, node.col_offset, node.func))
  for *_, function in sorted(calls, key=lambda call: call[:2]):
    parts = _dotted(function)
    if parts and parts[0] in module.imported:
      module.called.append(".".join([module.imported[parts[0]], *parts[1:]]))
  return module


def _definitions(
  statements: Sequence[ast.stmt], prefix: str
) -> Iterator[tuple[str, str]]:
  """Functions, classes and what is in classes, with their sentences."""
  for node in statements:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      text = ast.get_docstring(node, clean=False)
      yield prefix + node.name, _sentence(text or "")
      if isinstance(node, ast.ClassDef):
        yield from _definitions(node.body, f"{prefix}{node.name}.")
    elif isinstance(node, ast.If | ast.Try):
      yield from _definitions(node.body, prefix)
      yield from _definitions(node.orelse, prefix)


def _added_docs(tree: ast.Module) -> dict[str, str]:
  """Sentences that NumPy keeps for what is written in C."""
  found = {}
  for node in tree.body:
    match node:
      case ast.Expr(
        ast.Call(
          ast.Name("add_newdoc"),
          [ast.Constant(str(place)), ast.Constant(str(name)), text, *_],
        )
      ):
        try:
          text = ast.literal_eval(text)
        except ValueError:
          continue  # put together when it runs
        if isinstance(text, str):
          found[f"{place}.{name}"] = _sentence(text)
  return found


def _sentence(docstring: str) -> str:
  # A body, as without one a docstring has no summary there.
  docstring = docstring.replace("\n--\n", "\n")  # after a C signature
  parts = docstrings.split_summary(f"{docstring.rstrip()}\n\nBody.")
  return parts[0] if docstring.strip() and parts else ""


def _origin(node: ast.ImportFrom, package: str) -> str:
  """The module of `from module import ...`; "" beyond the top."""
  if not node.level:
    return node.module or ""
  parents = package.split(".")
  parents = parents[: len(parents) - node.level + 1]
  return ".".join([*parents, *filter(None, [node.module])]) if parents else ""


def _dotted(node: ast.expr) -> list[str]:
  """["a", "b", "c"] of a.b.c; empty for other expressions."""
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  return [node.id, *parts[::-1]] if isinstance(node, ast.Name) else []


def _find(modules, newdocs, dotted):
  """(where it is defined, its sentence), or None; follows imports."""
  # Imports may go in circles, and grow: `from .c import c`, c not in Python.
  tried, ahead = set(), [dotted]
  while ahead and len(tried) < _MAX_TRIED:
    dotted = ahead.pop()
    if dotted in tried:
      continue
    tried.add(dotted)
    if dotted in newdocs:
      return dotted, newdocs[dotted]
    parts = dotted.split(".")
    cut = len(parts) - 1
    while cut and ".".join(parts[:cut]) not in modules:
      cut -= 1
    if not cut:
      continue
    module, rest = modules[".".join(parts[:cut])], parts[cut:]
    if ".".join(rest) in module.defined:
      return dotted, module.defined[".".join(rest)]
    # What is imported by name goes before what comes with a star.
    ahead += [".".join([star, *rest]) for star in module.stars[::-1]]
    if rest[0] in module.imported:
      ahead.append(".".join([module.imported[rest[0]], *rest[1:]]))
  return None


def _is_private(dotted: str) -> bool:
  return any(part.startswith("_") for part in dotted.split("."))


def _core(sequences, kept, min_files, min_items, max_length):
  """Sequences of items that are left when all have enough of the others."""
  while True:
    sequences = [
      [x for x in items if x in kept][:max_length] for items in sequences
    ]
    sequences = [items for items in sequences if len(items) >= min_items]
    counts = collections.Counter(x for items in sequences for x in items)
    enough = {item for item, count in counts.items() if count >= min_files}
    if len(enough) == len(counts):
      return sequences
    kept = enough
