"""The dispatcher: help, unknown commands, errors as one line, exit codes."""

import errno
import importlib

import pytest

from tokjax.cli import main as cli


def test_help_lists_every_command(capsys):
  assert cli.main(["--help"]) == 0
  printed = capsys.readouterr().out
  assert all(f"  {name} " in printed for name in cli.COMMANDS)


def test_no_command_is_a_usage_error():
  assert cli.main([]) == 2


def test_unknown_command_names_itself(capsys):
  assert cli.main(["serach"]) == 2
  assert "no command 'serach'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
  with pytest.raises(SystemExit) as done:
    cli.main([name, "--help"])
  assert done.value.code == 0
  assert f"tokjax {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
  "error, code, text",
  [
    (ValueError("k must lie in 1..9, got 0"), 2, "k must lie in 1..9, got 0"),
    (FileNotFoundError("no folder x"), 2, "no folder x"),
    (OSError(errno.ENOSPC, "No space left"), 2, "the disk is full"),
    (KeyboardInterrupt(), 130, "interrupted"),
  ],
)
def test_errors_become_one_line(monkeypatch, capsys, error, code, text):
  command = importlib.import_module("tokjax.cli.list")

  def fail(argv):
    raise error

  monkeypatch.setattr(command, "main", fail)
  assert cli.main(["list"]) == code
  printed = capsys.readouterr().err
  assert text in printed and "Traceback" not in printed
  assert printed.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch):
  monkeypatch.setenv("TOKJAX_DEBUG", "1")
  with pytest.raises(ValueError, match="bad corpus"):
    command = importlib.import_module("tokjax.cli.list")
    monkeypatch.setattr(command, "main", lambda argv: _raise("bad corpus"))
    cli.main(["list"])


def _raise(text):
  raise ValueError(text)
