"""An image encoder is trained by the same command, and reduces a picture."""

import json

import numpy as np
import PIL.Image

from tokjax.cli import main

CONFIG = """
from tokjax.models.vit_shapes import VitConfig
from tokjax.train.image_classification import ImageRun
from tokjax.train.loop import TrainConfig

def get_config(arg=""):
  return ImageRun(
    model=VitConfig(image_size=32, patch_size=16, width=16, num_layers=2,
                    num_heads=2, mlp_width=16, num_outputs=10),
    data=arg, batch_size=8, trainer=TrainConfig(num_steps=2),
  )
"""


def test_trains_saves_and_reduces(tmp_path, capsys):
  random = np.random.default_rng(0)
  arrays = {}
  for split in ("train", "test"):
    arrays[f"{split}_x"] = random.integers(0, 255, (16, 32, 32, 3), np.uint8)
    arrays[f"{split}_y"] = np.arange(16, dtype=np.uint8) % 10
  np.savez(tmp_path / "cifar10.npz", **arrays)
  config, out = tmp_path / "tiny.py", tmp_path / "run"
  config.write_text(CONFIG)
  words = ["train", f"{config}:{tmp_path}", "--out", str(out)]
  assert main.main([*words, "--config.trainer.num_steps=3"]) == 0
  assert capsys.readouterr().out.splitlines()[-1] == str(out / "model")
  record = json.loads((out / "run.json").read_text())
  assert record["config"]["trainer"]["num_steps"] == 3
  rows = (out / "metrics.jsonl").read_text().splitlines()
  assert "eval/accuracy" in json.loads(rows[-1])
  photo = tmp_path / "photo.png"
  PIL.Image.fromarray(arrays["test_x"][0]).resize((80, 80)).save(photo)
  words = ["reduce", str(photo), "--model", str(out / "model"), "--side", "4"]
  words += ["--keep", "3", "--out", str(tmp_path / "out.png")]
  assert main.main(words) == 0
  assert "3 kept" in capsys.readouterr().out
