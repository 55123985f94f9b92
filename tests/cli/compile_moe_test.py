"""A layer of experts compiled for devices, here by the compiler for CPU."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from tokjax.cli import compile as command
from tokjax.cli import compile_moe
from tokjax.models.moe_transformer import (
  CONFIGS,
  MoeTransformer,
  MoeTransformerConfig,
)
from tokjax.parallel.moe_weights import MoeConfig

TINY = MoeTransformerConfig(
  16, 8, 1, 2, 2, 4, moe=MoeConfig(8, 2, capacity_factor=1.0)
)


def test_all_layouts():
  devices = jax.devices("cpu")[:8]
  found = {
    row["program"]: row
    for row in compile_moe.rows(
      TINY, topology="v5e:2x4", devices=devices, length=16
    )
  }
  assert list(found) == list(compile_moe.LAYOUTS)
  folded, unfolded, stages = found.values()
  assert {row["state"] for row in found.values()} == {"compiled"}
  # One expert of 3 x 8 x 4 or two halves: as many weights on a device. Stages
  # have one more expert of two bytes, and three more micro-batches.
  assert folded["argument_bytes"] == unfolded["argument_bytes"]
  more = 2 * 3 * 8 * 4 + 3 * 2 * 16 // 2 * 8
  assert stages["argument_bytes"] == folded["argument_bytes"] + more
  # 8 tokens, 2 experts each, to them and back, in both passes; 2 bytes.
  once = 2 * 2 * (8 * 2 * 8 * 2)
  assert folded["sent_bytes"] == once * 7 / 8
  assert unfolded["sent_bytes"] == once * 3 / 4 + once
  assert stages["sent_bytes"] == 5 * once * 3 / 4
  # A tick of each pass.
  assert stages["collectives"]["collective-permute"] == 2
  assert "collective-permute" not in folded["collectives"]
  # Seen by the compiler: parts of experts are gathered and summed up again.
  assert folded["collectives"]["all-to-all"] >= 4
  assert folded["bound_ms"]["links"] < unfolded["bound_ms"]["links"]
  assert folded["bound_ms"]["arithmetic"] == unfolded["bound_ms"]["arithmetic"]
  of_ticks = 5 * folded["bound_ms"]["arithmetic"]
  assert stages["bound_ms"]["arithmetic"] == pytest.approx(of_ticks)


@pytest.mark.parametrize(
  ("name", "billions"),
  [("mixtral-8x7b", 46.7), ("mixtral-8x22b", 140.6), ("qwen2-57b-a14b", 57.4)],
)
def test_published_shapes_have_their_parameters(name, billions):
  model = jax.eval_shape(
    lambda: MoeTransformer(CONFIGS[name], rngs=nnx.Rngs(0))
  )
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(model))
  assert round(total / 1e9, 1) == billions


def test_errors(capsys):
  devices = jax.devices("cpu")[:4]
  with pytest.raises(ValueError, match="moe must be one of"):
    next(compile_moe.rows("mixtral", topology="v5e:2x2", devices=devices))
  with pytest.raises(ValueError, match="devices must be a multiple of 8"):
    next(compile_moe.rows(TINY, topology="v5e:2x2", devices=devices))
  odd = dataclasses.replace(TINY, hidden=3)
  with pytest.raises(ValueError, match="hidden"):
    list(
      compile_moe.rows(
        odd, topology="v5e:2x4", devices=jax.devices("cpu")[:8], length=16
      )
    )
  with pytest.raises(SystemExit):
    command.main(["--moe", "mixtral-8x7b", "--search", "9"])
  assert "give one of" in capsys.readouterr().err
