"""`tokjax compile`: builds programs for TPU and H100 without owning one.

Four kinds: the kernels; the training step of a config (`compile_run`); the
search of a corpus that is spread over devices (`compile_search`); a layer of
experts in two layouts (`compile_moe`).

The compilers read their settings from the environment before jax starts, and
`import tokjax` starts jax. So each topology is compiled in a process of its
own, this module run with those settings, which prints one JSON line a program.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from tokjax.cli import compile_fit
from tokjax.kernels import maxsim
from tokjax.kernels.maxsim.shapes import DIMS, SHAPES, Shape
from tokjax.parallel import data_sheets, topologies

__all__ = ["PROGRAMS", "Program", "main", "programs", "roofline_us"]

# What is compiled of MaxSim.
PROGRAMS = {
  "forward": "scores by the kernel",
  "forward+index": "scores and winners by the kernel",
  "backward": "gradients by the kernel, given the winners",
  "maxsim": "the public function, which has to choose the kernel by itself",
  "gradient": "value and gradient of the public function",
  "sharded": "value and gradient, documents spread over all chips",
}
_DTYPES = {"bf16": "bfloat16", "f32": "float32"}
_TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1", "h100")
# Without --all: one query, a training batch and page images; one narrow width.
_USUAL_SHAPES = ("rerank", "batch", "patches")
_USUAL_DIMS = (128, 48)

# Options that belong to one kind of program.
_OPTIONS = {
  "kernels": ("kernels", "program", "shape", "dim", "dtype", "all"),
  "config": ("batch_size", "encoder"),
  "search": ("codec",),
  "moe": (),
}


@dataclasses.dataclass(frozen=True)
class Program:
  """One program to compile.

  Attributes:
    name: a key of `PROGRAMS`.
    shape: sizes, with the width to use.
    dtype: "bfloat16" or "float32".
  """

  name: str
  shape: Shape
  dtype: str


def programs(
  names: list[str], shapes: list[str], dims: list[int], dtypes: list[str]
) -> Iterator[Program]:
  """All combinations, in the order of the table.

  Args:
    names: keys of `PROGRAMS`.
    shapes: keys of `SHAPES`.
    dims: widths.
    dtypes: "bfloat16" and "float32".

  Example:
    >>> [p.shape.dim for p in programs(
    ...     ["forward"], ["rerank"], [128, 64], ["float32"])]
    [128, 64]
  """
  for shape in shapes:
    for dim in dims:
      for dtype in dtypes:
        for name in names:
          sized = dataclasses.replace(SHAPES[shape], dim=dim)
          yield Program(name, sized, dtype)


def main(argv: list[str]) -> int:
  """Compiles and prints a table; see `tokjax compile --help`.

  Args:
    argv: the words after `tokjax compile`.

  Returns:
    0 if everything compiled, 1 if a compiler refused something or it does not
    fit, 2 if a compiler is not installed or an argument is wrong.
  """
  parser = _parser()
  options, overrides = parser.parse_known_args(argv)
  kind = _kind(parser, options, overrides)
  for name, known in (("shape", SHAPES), ("program", PROGRAMS)):
    for value in getattr(options, name) or ():
      if value not in known:
        raise ValueError(
          f"--{name} must be one of {', '.join(known)}, got {value!r}"
        )
  if options.in_this_process:
    return _compile_here(kind, options, overrides)
  header, line = _HEADER, _line
  if kind != "kernels":
    header, line = compile_fit.HEADER, compile_fit.line
  if options.json:
    line = json.dumps
  else:
    print(header)
  code = 0
  for topology in options.topology or _TOPOLOGIES:
    code = max(code, _compile_apart(topology, line, argv))
  return code


def _parser():
  parser = argparse.ArgumentParser(
    prog="tokjax compile",
    description="Compiles programs for TPU and H100 on this machine: the"
    " kernels, the training step of a config, the search of a corpus, or a"
    " layer of experts.",
    epilog='The compilers come with: pip install -e ".[aot]"',
  )
  parser.add_argument(
    "--topology",
    action="append",
    help="v5e:2x2, v5e:16x16, h100, h100:8, ...; for the kernels by default:"
    f" {', '.join(_TOPOLOGIES)}",
  )
  parser.add_argument(
    "--json", action="store_true", help="one object a line, not a table"
  )
  parser.add_argument(
    "--in-this-process", action="store_true", help=argparse.SUPPRESS
  )
  kernels = parser.add_argument_group("kernels (if nothing else is named)")
  kernels.add_argument(
    "--kernels", action="store_true", help="name them all the same"
  )
  kernels.add_argument(
    "--program", action="append", help=f"one of {', '.join(PROGRAMS)}"
  )
  kernels.add_argument(
    "--shape", action="append", help=f"one of {', '.join(SHAPES)}"
  )
  kernels.add_argument("--dim", action="append", type=int, help="width")
  kernels.add_argument("--dtype", action="append", choices=list(_DTYPES))
  kernels.add_argument(
    "--all", action="store_true", help="every shape, width and dtype"
  )
  run = parser.add_argument_group("training step")
  run.add_argument(
    "config",
    nargs="?",
    help="config file of `tokjax train`; its settings are overridden the same"
    " way, --config.trainer.remat=...",
  )
  run.add_argument("--batch-size", type=int, help="queries, over all devices")
  run.add_argument(
    "--encoder",
    help="a public shape (bert-base-uncased, ...) to take for the checkpoint;"
    " by default the checkpoint itself, or its shape if it is not here",
  )
  search = parser.add_argument_group("search")
  search.add_argument(
    "--search", type=int, metavar="N", help="documents of the corpus"
  )
  search.add_argument(
    "--codec", action="append", help="default: int8 and residual2"
  )
  parser.add_argument_group("mixture of experts").add_argument(
    "--moe", metavar="NAME", help="mixtral-8x22b, qwen2-57b-a14b, ..."
  )
  return parser


def _kind(parser, options, overrides):
  """Which programs are asked for; options must belong to them."""
  asked = [k for k in ("config", "search", "moe") if getattr(options, k)]
  if len(asked) > 1:
    parser.error("give one of a config, --search and --moe")
  kind = asked[0] if asked else "kernels"
  for other, names in _OPTIONS.items():
    given = [name for name in names if getattr(options, name)]
    if given and other != kind:
      option = given[0].replace("_", "-")
      parser.error(f"--{option} is for another kind of program")
  if overrides and kind != "config":
    parser.error(f"unknown words: {' '.join(overrides)}")
  if kind != "kernels" and not options.topology:
    parser.error("--topology must be given")
  return kind


def _compile_apart(topology, line, argv):
  """Runs this module in a process with the right environment."""
  platform = "cuda" if topology.startswith("h100") else "tpu"
  words = [word for word in _without(argv, "--topology") if word != "--json"]
  # Messages of the compilers go to a file, shown only if the process fails.
  with tempfile.TemporaryFile("w+") as log:
    child = subprocess.Popen(
      [sys.executable, "-m", "tokjax.cli.compile", "--in-this-process"]
      + ["--topology", topology, *words],
      env={
        **os.environ,
        **topologies.environment(platform),
        "HF_HUB_OFFLINE": "1",  # shapes are wanted, no weights
      },
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
    )
    good = True
    for text in child.stdout:
      row = json.loads(text)
      good &= row["state"].startswith(("compiled", "not covered"))
      print(line(row), flush=True)
    code = child.wait()
    if code:
      log.seek(0)
      said = log.read().strip().splitlines()
      if code != 2:  # a traceback, and notes below it
        said = [line for line in said if re.match(r"[\w.]+Error: ", line)]
      last = said[-1] if said else f"exit code {code}"
      print(f"tokjax compile: {topology}: {last}", file=sys.stderr)
      return 2 if code == 2 else 1
  return int(not good)


def _without(argv, option):
  """The words without an option and its value, in both spellings."""
  kept, skip = [], False
  for word in argv:
    if not skip and word != option and not word.startswith(option + "="):
      kept.append(word)
    skip = word == option and not skip
  return kept


def _compile_here(kind, options, overrides):
  topology = options.topology[0]
  # Compilers write to standard output as they like: rows keep it to
  # themselves, the rest goes where the messages go.
  with os.fdopen(os.dup(1), "w") as output:
    os.dup2(2, 1)
    try:
      devices = topologies.devices_of(topology)
      for row in _rows(kind, options, overrides, topology, devices):
        print(json.dumps(row), file=output, flush=True)
    except (ModuleNotFoundError, ValueError) as error:
      print(" ".join(str(error).split()), file=sys.stderr)
      return 2
  return 0


def _rows(kind, options, overrides, topology, devices):
  where = {"topology": topology, "devices": devices}
  if kind == "config":  # imported here: the parent process needs none of it
    from tokjax.cli import compile_run

    if options.batch_size:
      overrides.append(f"--config.data.batch_size={options.batch_size}")
    return compile_run.rows(
      options.config, overrides, encoder=options.encoder, **where
    )
  if kind == "search":
    from tokjax.cli import compile_search

    return compile_search.rows(
      options.search, codecs=options.codec or compile_search.CODECS, **where
    )
  if kind == "moe":
    from tokjax.cli import compile_moe

    return compile_moe.rows(options.moe, **where)
  dtypes = options.dtype or (["bf16", "f32"] if options.all else ["bf16"])
  chosen = programs(
    options.program or list(PROGRAMS),
    options.shape or list(SHAPES if options.all else _USUAL_SHAPES),
    options.dim or list(DIMS if options.all else _USUAL_DIMS),
    [_DTYPES[dtype] for dtype in dtypes],
  )
  return (_compile(program, topology, devices) for program in chosen)


def _compile(program, topology, devices):
  """One row: the program and what its compiler said."""
  row: dict[str, Any] = {
    "topology": topology,
    "program": program.name,
    "dtype": program.dtype,
    **dataclasses.asdict(program.shape),
    "estimated_us": roofline_us(program, topology, len(devices)),
  }
  function, args, reason = _function(program, topology, devices)
  if reason:
    return {**row, "state": f"not covered: {reason}"}
  try:
    report = topologies.compile_for(function, args, devices=devices)
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    return {**row, "state": f"refused: {str(error).splitlines()[0][:300]}"}
  measured = report._asdict()
  del measured["text"]
  return {**row, "state": "compiled", **measured}


def _function(program, topology, devices) -> tuple[Callable, tuple, str | None]:
  """What to compile, its arguments, and why not if it cannot be."""
  platform = "gpu" if topology.startswith("h100") else "tpu"
  module = importlib.import_module(f"tokjax.kernels.maxsim.pallas_{platform}")
  sharded = program.name == "sharded"
  queries, documents, *masks = _arguments(program, devices if sharded else [])
  reason = module.unsupported(queries, documents)
  if reason:
    return None, (), reason
  args = (queries, documents, *masks)
  if program.name.startswith("forward"):
    index = program.name == "forward+index"
    forward = functools.partial(module.maxsim_forward, return_index=index)
    return forward, args, None
  if program.name == "backward":
    if "maxsim_backward" not in module.__all__:
      return None, (), "this platform has its backward in plain XLA"
    shape = program.shape
    pairs = (shape.num_queries, shape.num_documents)
    g = jax.ShapeDtypeStruct(pairs, np.float32)
    index = jax.ShapeDtypeStruct((*pairs, shape.query_tokens), np.int32)
    backward = lambda g, index, *args: module.maxsim_backward(g, *args, index)  # noqa: E731
    return backward, (g, index, *args), None

  # On TPU the function chooses by itself; a program lowered for CUDA does not
  # say which generation it is for, so there the kernel is named.
  named = "pallas_gpu" if platform == "gpu" else None
  score = functools.partial(maxsim.maxsim, implementation=named)
  if program.name == "maxsim":
    return score, args, None

  def value(queries, documents, *masks):
    return score(queries, documents, *masks).sum()

  gradient = jax.value_and_grad(value, argnums=(0, 1))
  if not sharded:
    return gradient, args, None
  if len(devices) == 1:
    return None, (), "there is one device"
  return _over_chips(score, devices), args, None


def _over_chips(score, devices):
  """Value and gradient, with the documents of each chip scored there."""
  whole, cut = jax.P(), jax.P("chips")
  local_scores = jax.shard_map(
    score,
    mesh=_mesh(devices),
    in_specs=(whole, cut, whole, cut),
    out_specs=jax.P(None, "chips"),
  )

  def value(*args):
    return local_scores(*args).sum()

  return jax.value_and_grad(value, argnums=(0, 1))


def _mesh(devices):
  return jax.sharding.Mesh(np.array(devices), ("chips",))


def _arguments(program, devices):
  """Queries, documents and masks; spread over the devices if there are any."""
  shape = program.shape
  whole = cut = None
  num_documents = shape.num_documents
  if devices:
    mesh = _mesh(devices)
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    cut = jax.sharding.NamedSharding(mesh, jax.P("chips"))
    num_documents = -(-num_documents // len(devices)) * len(devices)
  queries = (shape.num_queries, shape.query_tokens)
  documents = (num_documents, shape.document_tokens)
  array = jax.ShapeDtypeStruct
  return (
    array((*queries, shape.dim), program.dtype, sharding=whole),
    array((*documents, shape.dim), program.dtype, sharding=cut),
    array(queries, bool, sharding=whole),
    array(documents, bool, sharding=cut),
  )


def roofline_us(
  program: Program, topology: str, num_devices: int = 1
) -> float | None:
  """Lower bound of the time: the larger of arithmetic and compulsory traffic.

  Takes every document as full and the peaks of the data sheet as reached, so
  it is a bound and no forecast.

  Args:
    program: what would run.
    topology: "h100" or the name of a TPU slice.
    num_devices: devices the documents of a "sharded" program are spread over.

  Returns:
    Microseconds; None for a device whose peaks are not known here.

  Example:
    >>> rerank = Program("forward", SHAPES["rerank"], "bfloat16")
    >>> round(roofline_us(rerank, "v5e:2x2"), 1)  # 76.8 MB at 819 GB/s
    93.8
  """
  sheet = data_sheets.find(topology)
  if sheet is None:
    return None
  shape, itemsize = program.shape, np.dtype(program.dtype).itemsize
  itemsize = itemsize if itemsize <= 4 else 2
  both = program.name in ("gradient", "sharded")
  products = {"backward": 2}.get(program.name, 3 if both else 1)
  flops = products * shape.flops
  if program.dtype == "float32":
    flops *= data_sheets.FLOAT32_PASSES
  document_bytes = shape.num_documents * shape.document_tokens * shape.dim
  traffic = products * document_bytes * itemsize
  if program.name == "sharded":
    flops, traffic = flops / num_devices, traffic / num_devices
  bound = data_sheets.bound(sheet, flops=flops, memory_bytes=traffic)
  return 1e6 * max(bound)


_HEADER = (
  f"{'topology':<12} {'program':<14} {'shape':<8} {'D':>4} {'dtype':<9}"
  f"{'compile':>8} {'arguments':>10} {'results':>9} {'temporary':>10}"
  f" {'on chip':>8} {'GFLOP':>8} {'accessed':>9} {'roofline':>9}"
  "  kernels and collectives\n"
  f"{'':<50}{'s':>7} {'MB':>10} {'MB':>9} {'MB':>10} {'MB':>8} {'':>8}"
  f" {'MB':>9} {'us, est.':>9}"
)


def _line(row):
  start = (
    f"{row['topology']:<12} {row['program']:<14} {row['name']:<8}"
    f" {row['dim']:>4} {row['dtype']:<9}"
  )
  if row["state"] != "compiled":
    return start + row["state"]

  def mega(name, unit=1e6):
    return "-" if row[name] is None else f"{row[name] / unit:.1f}"

  bound = row["estimated_us"]
  counts = {**row["kernels"], **row["collectives"]}
  return (
    f"{start}{row['seconds']:>8.1f} {mega('argument_bytes'):>10}"
    f" {mega('output_bytes'):>9} {mega('temp_bytes'):>10}"
    f" {mega('on_chip_bytes'):>8} {mega('flops', 1e9):>8}"
    f" {mega('bytes_accessed'):>9}"
    f" {'-' if bound is None else format(bound, '.1f'):>9}  "
    + " ".join(f"{name} x{count}" for name, count in counts.items())
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
