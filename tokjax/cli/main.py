"""`tokjax COMMAND ...`: finds the command, turns bad input into one clear line.

Each command is a module of this package with `main(argv) -> int`, imported
when it is called, so that `tokjax --help` answers at once.
"""

import errno
import importlib
import os
import sys

__all__ = ["COMMANDS", "main"]

# name -> what it does, one line each, in the order people meet them.
COMMANDS = {
  "demo": "index and search real documentation, measure it, write a report",
  "index": "encode a corpus and build a searchable index in a folder",
  "search": "ask an index; without a query, read queries from the terminal",
  "evaluate": "ranking quality and cost on a BEIR folder or on pydocs",
  "train": "train a retriever, encoder or tokenizer as a config file says",
  "reduce": "cut the tokens of a picture and show what is left",
  "tokenize": "write a picture in fewer and fewer tokens, and read it again",
  "encode": "encode a corpus into one file of token vectors",
  "compile": "compile kernels, training and search for absent TPUs and H100s",
  "bench": "measure the hot paths on this machine against their baselines",
  "claim": "repeat the experiment behind one of our statements",
  "list": "the published systems, and which of them exist here",
}


def _usage() -> str:
  width = max(len(name) for name in COMMANDS)
  lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
  return (
    "usage: tokjax COMMAND [options]\n\n"
    + "\n".join(lines)
    + "\n\n`tokjax COMMAND --help` explains one. Exit codes: 0 done, 1 did"
    " not succeed,\n2 bad input, 130 interrupted. Set TOKJAX_DEBUG=1 for"
    " full tracebacks.\n"
  )


def main(argv: list[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the words after `tokjax`; None takes them from the command line.

  Returns:
    The exit code: 0 done, 1 did not succeed, 2 bad input, 130 interrupted.

  Example:
    >>> main(["list", "--area", "analysis", "--state", "available"])
    0
  """
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ("-h", "--help"):
    print(_usage(), end="")
    return 0 if argv else 2
  name, *rest = argv
  if name == "--version":
    from tokjax import __version__

    print(f"tokjax {__version__}")
    return 0
  if name not in COMMANDS:
    print(f"tokjax: no command {name!r}\n\n{_usage()}", end="", file=sys.stderr)
    return 2
  module = importlib.import_module(f"tokjax.cli.{name}")
  try:
    return module.main(rest)
  except KeyboardInterrupt:
    print("tokjax: interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:  # the reader, `head` say, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (ValueError, OSError) as error:
    if os.environ.get("TOKJAX_DEBUG"):
      raise
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    text = f"the disk is full: {error}" if full else error
    print(f"tokjax {name}: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
