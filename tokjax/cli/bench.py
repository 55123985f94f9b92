"""`tokjax bench`: measures the hot paths on this machine."""

import argparse
import importlib
import inspect
import pkgutil

from tokjax import benchmarks

__all__ = ["main", "subjects"]


def subjects() -> dict[str, str]:
  """What can be measured: name -> first line of its module.

  Example:
    >>> "maxsim" in subjects()
    True
  """
  found = {}
  for info in pkgutil.iter_modules(benchmarks.__path__):
    module = importlib.import_module(f"tokjax.benchmarks.{info.name}")
    if hasattr(module, "main"):
      found[info.name] = inspect.getdoc(module).split("\n")[0].rstrip(".")
  return found


def main(argv: list[str]) -> int:
  """Runs one benchmark; see `tokjax bench --help`."""
  known = subjects()
  lines = "\n".join(f"  {name:<10} {text}" for name, text in known.items())
  parser = argparse.ArgumentParser(
    prog="tokjax bench",
    description="Measures one subject against the baselines that are"
    " installed; the others are left out.\n\nsubjects:\n" + lines,
    epilog="`tokjax bench SUBJECT --help` lists its options.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("subject", choices=known)
  options = parser.parse_args(argv[:1])
  module = importlib.import_module(f"tokjax.benchmarks.{options.subject}")
  module.main(argv[1:])
  return 0
