"""The command reduces a picture, writes another, and says what it read."""

import io
import json

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from tokjax.cli import main, reduce
from tokjax.models import vit, vit_weights

SIDE = 6


@pytest.fixture
def photo(tmp_path):
  random = np.random.default_rng(0)
  small = random.integers(0, 255, (9, 12, 3), dtype=np.uint8)
  path = tmp_path / "photo.png"
  PIL.Image.fromarray(small).resize((120, 90)).save(path)
  return path


def words(photo, *more):
  out = photo.with_name("out.png")
  return ["reduce", str(photo), "--side", str(SIDE), "--out", str(out), *more]


def test_writes_a_picture_and_numbers(photo, capsys):
  names = ["divprune", "aim", "transforming"]
  assert (
    main.main(words(photo, "--keep", "9", "--json", "--method", *names)) == 0
  )
  told = json.loads(capsys.readouterr().out)
  assert told["features"] == "statistics of pixels, no network"
  assert list(told["methods"]) == names
  assert all(row["kept"] == 9 for row in told["methods"].values())
  with PIL.Image.open(told["out"]) as picture:
    assert picture.format == "PNG" and picture.size[0] > picture.size[1]


def test_reads_a_model(photo, tmp_path, capsys):
  config = vit.VitConfig(
    image_size=SIDE * 4, patch_size=4, width=16, num_layers=3, num_heads=2,
    mlp_width=16, num_outputs=3,
  )  # fmt: skip
  folder = tmp_path / "vit"
  vit_weights.save(folder, vit.Vit(config, rngs=nnx.Rngs(0)))
  command = words(photo, "--keep", "5", "--method", "vtc_cls")
  assert main.main([*command, "--model", str(folder)]) == 0
  said = capsys.readouterr().out
  assert f"{SIDE**2} tokens of {folder}" in said and "5 kept" in said


def test_panel_shows_all_methods():
  image = np.zeros((12, 12, 3), np.uint8)
  shown, found = reduce.reduce_image(
    np.arange(4800, dtype=np.uint8).reshape(40, 40, 3),
    ["uniform", "pooling"],
    num_keep=4,
    side=3,
  )
  assert shown.shape == (42, 42, 3)
  few = reduce.panel(image, {"uniform": found["uniform"]}, (3, 3))
  with PIL.Image.open(io.BytesIO(few)) as picture:
    width = picture.size[0]
  with PIL.Image.open(io.BytesIO(reduce.panel(image, found, (3, 3)))) as all:
    assert all.size[0] > width
  reduced, numbers = found["uniform"]
  assert numbers["kept"] == int(jnp.sum(reduced.mask)) == 4


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--method", "magic"], "no method 'magic'; there are: random"),
    (["--keep", "37"], "num_keep must lie in 1..36, got 37"),
    (["--model", "nowhere"], "nowhere"),
  ],
)
def test_bad_input_is_one_line(photo, capsys, more, message):
  assert main.main(words(photo, *more)) == 2
  error = capsys.readouterr().err
  assert message in error and error.startswith("tokjax reduce: ")
  assert not photo.with_name("out.png").exists()


def test_a_file_that_is_no_picture(tmp_path, capsys):
  path = tmp_path / "photo.png"
  path.write_text("text")
  assert main.main(["reduce", str(path)]) == 2
  assert "is not a whole image" in capsys.readouterr().err
