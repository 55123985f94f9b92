"""The house: imports point down, public names are documented and tested."""

import ast
import functools
import importlib
import inspect
import json
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import tokjax
from tokjax.cli import list as catalogue

ROOT = pathlib.Path(tokjax.__file__).parent
TESTS = pathlib.Path(__file__).parent
LEVELS = {
    name: level
    for level, names in enumerate((
        ("typing", "checks", "compat", "files"),
        ("ops",),
        ("kernels",),
        ("retrieval", "reduction", "projectors", "adapters", "tokenizers",
         "generation", "sparse", "parallel", "analysis"),
        ("models",),
        ("data", "train", "checkpoint", "eval"),
        ("benchmarks", "cli"),
    ))
    for name in names
}  # fmt: skip
# Areas of these levels may import their neighbours on the same level.
OPEN_LEVELS = {0, 5, 6}
FILES = sorted(ROOT.rglob("*.py"))
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "tokjax."))


def area_of(module: str) -> str:
  return module.split(".")[1] if "." in module else ""


def tokjax_imports(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module == "tokjax":
        yield from ("tokjax." + alias.name for alias in node.names)
      elif node.module.startswith("tokjax."):
        yield node.module
    elif isinstance(node, ast.Import):
      yield from (a.name for a in node.names if a.name.startswith("tokjax."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
  here = path.relative_to(ROOT).parts[0].removesuffix(".py")
  if here == "__init__":
    return
  for name in tokjax_imports(path):
    there = area_of(name)
    if there in (here, "__version__"):
      continue
    down = LEVELS[there] < LEVELS[here]
    neighbour = LEVELS[there] == LEVELS[here] and LEVELS[here] in OPEN_LEVELS
    assert down or neighbour, f"{here} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_ops_and_kernels_import_no_flax(path):
  if path.relative_to(ROOT).parts[0] in ("ops", "kernels"):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
      names = [alias.name for alias in getattr(node, "names", ())]
      names.append(getattr(node, "module", None) or "")
      assert not any(name.split(".")[0] == "flax" for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
  lines = path.read_text(encoding="utf-8").splitlines()
  assert len(lines) <= 600
  assert max(map(len, lines), default=0) <= 100


def test_import_is_light():
  program = "import tokjax, sys, json; print(json.dumps(sorted(sys.modules)))"
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, check=True
  )
  loaded = set(json.loads(done.stdout))
  heavy = {"flax", "optax", "orbax", "tensorstore", "tensorflow", "grain",
           "tensorflow_datasets", "tokenizers", "safetensors", "matplotlib",
           "jax.experimental.pallas", "huggingface_hub"}  # fmt: skip
  assert not heavy & loaded


def test_imports_leave_the_devices_alone():
  """Processes of one program must find each other before any computation."""
  program = (
    "import importlib, sys\n"
    "for name in sys.argv[1:]: importlib.import_module(name)\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge.backends_are_initialized()\n"
  )
  names = [n for n in MODULES if n.startswith("tokjax.cli.")]
  subprocess.run([sys.executable, "-c", program, *names], check=True)


@pytest.mark.parametrize("name", MODULES)
def test_module_is_documented_and_exports(name):
  module = importlib.import_module(name)
  assert module.__doc__ and module.__doc__.strip()
  for public in module.__all__:
    value = getattr(module, public, None)
    if value is None:  # a submodule that nobody has imported yet
      value = importlib.import_module(f"{name}.{public}")
    if callable(value) and getattr(value, "__module__", "") == name:
      assert value.__doc__, f"{name}.{public} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_public_definitions_are_exported(name):
  module = importlib.import_module(name)
  tree = ast.parse(pathlib.Path(module.__file__).read_text(encoding="utf-8"))
  defined = {
    node.name
    for node in tree.body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    and not node.name.startswith("_")
  }
  assert defined <= set(module.__all__), defined - set(module.__all__)


@functools.cache
def names_in_tests() -> set[str]:
  found = set()
  for path in TESTS.rglob("*_test.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Attribute):
        found.add(node.attr)
      elif isinstance(node, ast.Name):
        found.add(node.id)
      elif isinstance(node, ast.alias):
        found.add(node.name.split(".")[-1])
      elif isinstance(node, ast.keyword) and node.arg:
        found.add(node.arg)
  return found


# Parts of one subject that its front door calls; tested through that door.
PARTS = (
  "tokjax.data.docstrings",
  "tokjax.data.json_lines",
  "tokjax.data.near_duplicates",
  "tokjax.kernels.column_attention.sharding",
  "tokjax.kernels.greedy_select.picks",
  "tokjax.kernels.greedy_select.sharding",
  "tokjax.kernels.greedy_select.xla",
  "tokjax.kernels.maxsim.sharding",
  "tokjax.kernels.maxsim.xla",
  "tokjax.kernels.sparse_attention.sharding",
  "tokjax.kernels.sparse_attention.xla",
  "tokjax.retrieval.index_scoring",
  "tokjax.retrieval.index_storage",
)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_is_called_by_a_test(name):
  if area_of(name) == "benchmarks" or name in PARTS:
    return  # measured, or tested through another module
  module = importlib.import_module(name)
  own = {
    public
    for public in module.__all__
    if inspect.isfunction(getattr(module, public, None))
    and getattr(module, public).__module__ == name
  }
  assert own <= names_in_tests(), own - names_in_tests()


def test_everyday_names_resolve():
  for name in tokjax.__all__:
    if (ROOT / name).is_dir() or not (ROOT / f"{name}.py").exists():
      assert getattr(tokjax, name) is not None
  with pytest.raises(AttributeError, match="no attribute 'maxsin'"):
    _ = tokjax.maxsin


def test_catalogue_lists_58_systems_and_is_the_readme_table():
  rows = catalogue.systems()
  assert len(rows) == 58 == len({row.file for row in rows})
  readme = (TESTS.parent / "README.md").read_text(encoding="utf-8")
  assert catalogue.markdown_table(rows) in readme


def test_catalogue_state_is_the_truth():
  for row in catalogue.systems():
    assert area_of(f"tokjax.{row.file.split('/')[0]}") in LEVELS
    exists = (ROOT / row.file).is_file()
    assert row.state.startswith("available" if exists else "planned")


def test_top_level_is_the_fixed_list():
  root = TESTS.parent
  done = subprocess.run(
    ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False
  )
  if done.returncode:
    pytest.skip("not a git checkout")
  top = {line.split("/")[0] for line in done.stdout.splitlines()}
  fixed = {"pyproject.toml", "tokjax", "configs", "notebooks", "tests", "tpu",
           "README.md", "LICENSE"}  # fmt: skip
  assert {name for name in top if not name.startswith(".")} <= fixed
