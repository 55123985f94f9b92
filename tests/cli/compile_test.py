"""The command: choices, estimates and what happens without a compiler.

What the compilers themselves say is tested in tests/kernels/*_compile_*.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from tokjax.cli import compile as command
from tokjax.kernels.maxsim.shapes import SHAPES


def program(name, shape="rerank", dtype="bfloat16"):
  return command.Program(name, SHAPES[shape], dtype)


def test_programs_are_all_combinations():
  rows = list(
    command.programs(
      list(command.PROGRAMS), ["rerank", "long"], [128, 64], ["float32"]
    )
  )
  assert len(rows) == len(set(rows)) == 4 * len(command.PROGRAMS)


def test_roofline_of_one_query_is_the_memory():
  got = command.roofline_us(program("forward"), "h100")
  assert got == pytest.approx(1e6 * 1000 * 300 * 128 * 2 / 3352e9)


def test_roofline_of_a_batch_is_the_arithmetic():
  got = command.roofline_us(program("forward", "batch"), "v5e:2x2")
  assert got == pytest.approx(1e6 * 2 * (128 * 32) * (128 * 300) * 128 / 197e12)


def test_roofline_divides_a_sharded_step():
  one, four = (
    command.roofline_us(program("sharded"), "v6e:2x2", n) for n in (1, 4)
  )
  assert four == pytest.approx(one / 4)


def test_roofline_of_an_unknown_device_is_none():
  assert command.roofline_us(program("forward"), "v99:2x2") is None


@pytest.mark.parametrize("option", ["--shape", "--program"])
def test_unknown_choice_lists_the_known(option):
  with pytest.raises(ValueError, match=f"{option} must be one of .*'nonsense'"):
    command.main([option, "nonsense"])


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed"
)
def test_missing_compiler_is_exit_code_2(capsys):
  assert command.main(["--topology", "v5e:2x2", "--json"]) == 2
  printed = capsys.readouterr()
  assert 'pip install -e ".[aot]"' in printed.err
  assert [json.loads(line) for line in printed.out.splitlines()] == []


CHATTER = """
import os
from tokjax.cli import compile
from tokjax.parallel import topologies

def devices_of(topology):
  os.write(1, b"a compiler says hello\\n")
  return [None]

topologies.devices_of = devices_of
compile._rows = lambda *words: iter([{"state": "compiled"}])
raise SystemExit(compile.main(["--topology", "h100", "--in-this-process"]))
"""


def test_what_a_compiler_prints_is_no_row():
  done = subprocess.run(
    [sys.executable, "-c", CHATTER], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == {"state": "compiled"}
  assert "a compiler says hello" in done.stderr
