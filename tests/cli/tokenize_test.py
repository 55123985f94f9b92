"""A picture goes through a trained tokenizer and is put side by side."""

import io
import json

import jax
import numpy as np
import PIL.Image
import pytest

from tests.tokenizers.tiny_tokenizer import TRUNK, built, quantizer
from tokjax.cli import main, tokenize
from tokjax.tokenizers.one_d_piece import OneDPieceConfig

CONFIG = """
from tests.cli.tokenize_test import TOKENIZER
from tokjax.train.loop import TrainConfig
from tokjax.train.tokenizer_run import TokenizerRun

def get_config(arg=""):
  return TokenizerRun(TOKENIZER, arg, batch_size=8, trainer=TrainConfig(2))
"""
TOKENIZER = OneDPieceConfig(32, 16, 4, TRUNK, TRUNK, quantizer("ema"))


def noise(*shape):
  return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


def test_trains_and_writes_a_picture(tmp_path, capsys):
  arrays = {"train_x": noise(16, 32, 32, 3), "test_x": noise(8, 32, 32, 3)}
  labels = np.arange(16) % 10
  np.savez(
    tmp_path / "cifar10.npz", **arrays, train_y=labels, test_y=labels[:8]
  )
  config, run = tmp_path / "tiny.py", tmp_path / "run"
  config.write_text(CONFIG)
  assert main.main(["train", f"{config}:{tmp_path}", "--out", str(run)]) == 0
  rows = (run / "metrics.jsonl").read_text().splitlines()
  assert "eval/psnr" in json.loads(rows[-1])
  photo = tmp_path / "photo.png"
  PIL.Image.fromarray(noise(40, 70, 3)).save(photo)
  words = ["tokenize", str(photo), "--config", str(config), "--model", str(run)]
  out = tmp_path / "out.png"
  capsys.readouterr()
  assert main.main([*words, "--tokens", "1,4", "--out", str(out)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "64 x 32 pixels, 2 tiles"
  assert lines[1].lstrip().startswith("1 tokens a tile,       1 bytes: ")
  assert "jpeg does not fit" in lines[1] and "webp payload" in lines[2]
  assert PIL.Image.open(out).format == "PNG"
  assert main.main([*words, "--json", "--out", str(out)]) == 0
  row = json.loads(capsys.readouterr().out)["rows"][0]
  assert (row["num_tokens"], row["num_bytes"]) == (4, 4)  # 2 x 4 x 4 bits


def test_rebuilt_tiles_are_what_the_tokenizer_decodes():
  tokenizer, state = built(TOKENIZER)
  image = noise(64, 32, 3)
  used, found = tokenize.rebuild(image, tokenizer, state, [2])
  np.testing.assert_array_equal(used, image)
  pixels = image.reshape(2, 32, 32, 3) / np.float32(127.5) - 1

  @jax.jit
  def decode(pixels):
    indices = tokenizer.encode(pixels, state).indices
    return tokenizer.decode(indices[:, :2], state)

  want = np.clip(np.asarray(decode(pixels)), -1, 1).reshape(64, 32, 3)
  want = np.round((want + 1) * 127.5)
  np.testing.assert_allclose(found[0].image, want, atol=1)
  error = np.mean((found[0].image / 255.0 - image / 255.0) ** 2)
  np.testing.assert_allclose(found[0].psnr, -10 * np.log10(error), atol=1e-3)
  picture = PIL.Image.open(io.BytesIO(tokenize.panel(used, found)))
  assert picture.width > picture.height


def test_tiles_are_cut_from_the_middle():
  image = np.arange(5 * 6).reshape(5, 6, 1)
  tiles = tokenize.square_tiles(image, 2)
  assert tiles.shape == (2, 3, 2, 2, 1)
  np.testing.assert_array_equal(tiles[1, 2, ..., 0], image[2:4, 4:, 0])


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--tokens", "1;2"], "tokens must be numbers with commas between"),
    (["--tokens", "9"], "tokens must lie in 1..4, got 9"),
  ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, more, message):
  config, photo = tmp_path / "tiny.py", tmp_path / "photo.png"
  config.write_text(CONFIG)
  PIL.Image.fromarray(noise(40, 70, 3)).save(photo)
  monkeypatch.setattr(
    tokenize.tokenizer_run, "load", lambda *_: built(TOKENIZER)
  )
  words = ["tokenize", str(photo), "--config", str(config), "--model", "x"]
  assert main.main([*words, *more]) == 2
  assert message in capsys.readouterr().err
