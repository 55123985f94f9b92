"""Files of transformers into `Vit`, and back."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokjax.models import vit, vit_shapes, vit_weights, weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = (
  "clip_tiny",
  "siglip_tiny",
  "dinov2_tiny",
  "dinov2_registers_tiny",
  "vit_tiny",
  "deit_tiny",
)


def golden_maker():
  path = GOLDEN / "make_vits.py"
  spec = importlib.util.spec_from_file_location("make_vits", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def read(name):
  folder = GOLDEN / name
  config = json.loads((folder / "config.json").read_text())
  return config, weights.read_tensors(weights.weight_files(folder))


def pixels():
  return jax.random.normal(jax.random.key(0), (2, 16, 16, 3))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers_computed_now(name):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  maker = golden_maker()
  for seed, changes in ((1, {}), (2, {"num_hidden_layers": 2})):
    model = maker.torch_vit(name, seed, **changes)
    images = maker.example(seed)
    want = maker.torch_outputs(model, images)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    encoder = vit_weights.load_encoder(model.config.to_dict(), tensors)
    got = encoder(jnp.asarray(images))
    np.testing.assert_allclose(got, want["output"], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_unknown_and_missing_names_are_listed(name):
  config, tensors = read(name)
  wrong = dict(tensors)
  taken = next(n for n in sorted(tensors) if "layer" in n and "bias" in n)
  gone = next(n for n in sorted(tensors) if "patch" in n and "weight" in n)
  wrong["surplus.weight"] = np.zeros(3, np.float32)
  wrong[taken] = np.zeros(99, np.float32)
  del wrong[gone]
  with pytest.raises(ValueError, match="do not fit the module") as error:
    vit_weights.load_encoder(config, wrong)
  text = str(error.value)
  assert "unknown tensor surplus.weight" in text
  assert f"missing tensor {gone}" in text
  assert f"{taken} must be" in text and "got (99,)" in text
  kept = {k: v for k, v in wrong.items() if k != "surplus.weight"}
  kept |= {gone: tensors[gone], taken: tensors[taken]}
  encoder = vit_weights.load_encoder(
    config, {**kept, "theirs": np.zeros(1)}, ignored=["theirs"]
  )
  assert encoder(pixels()).shape[0] == 2


def test_a_pair_of_towers_gives_the_vision_one():
  config, tensors = read("clip_tiny")
  inside = {k: v for k, v in config.items() if k != "model_type"}
  both = {"model_type": "clip", "vision_config": inside, "text_config": {}}
  more = {
    **tensors,
    "text_model.embeddings.token_embedding.weight": np.zeros((2, 2)),
    "text_projection.weight": np.zeros((2, 2)),
    "logit_scale": np.zeros(()),
    "vision_model.embeddings.position_ids": np.arange(17),
  }
  got = vit_weights.load_encoder(both, more)
  want = vit_weights.load_encoder(config, tensors)
  assert got.config == want.config
  np.testing.assert_array_equal(got(pixels()), want(pixels()))


def test_a_bare_encoder_has_no_linear_head():
  config, tensors = read("vit_tiny")
  bare = {
    name.removeprefix("vit."): x
    for name, x in tensors.items()
    if not name.startswith("classifier")
  }
  bare["pooler.dense.weight"] = np.zeros((16, 16), np.float32)
  encoder = vit_weights.load_encoder({**config, "model_type": "vit"}, bare)
  assert encoder.head is None and encoder(pixels()).shape == (2, 16)


def test_plain_deit_has_one_head():
  config, tensors = read("deit_tiny")
  plain = {
    name.replace("cls_classifier", "classifier"): x
    for name, x in tensors.items()
    if "distillation_classifier" not in name
  }
  got = vit_weights.load_encoder(config, plain)
  both = vit_weights.load_encoder(config, tensors)
  assert both.distill_head is not None and got.distill_head is None
  encoded = both.encode(pixels())
  want = both.head(both.normalize(encoded.tokens[:, 0]))
  np.testing.assert_allclose(got(pixels()), want, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("clip_b32", {"model_type": "clip", "vision_config": {}}),
    (
      "clip_l14_336",
      {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
      },
    ),
    ("siglip_b16", {"model_type": "siglip", "vision_config": {}}),
    ("dinov2_b14", {"model_type": "dinov2", "image_size": 518}),
    (
      "dinov2_registers_b14",
      {"model_type": "dinov2_with_registers", "image_size": 518},
    ),
    ("vit_b16", {"model_type": "vit"}),
  ],
)
def test_published_configs_give_the_named_shapes(name, said):
  want = dataclasses.replace(vit_shapes.shape(name), num_outputs=0)
  assert vit_weights.config_from_json(said) == want


@pytest.mark.parametrize("num_outputs", [0, 5])
def test_saved_encoders_are_read_back(num_outputs, tmp_path):
  config = vit.VitConfig(
    image_size=16,
    patch_size=4,
    width=16,
    num_layers=2,
    num_heads=2,
    mlp_width=24,
    norm_epsilon=1e-5,
    activation="gelu_tanh",
    num_outputs=num_outputs,
  )
  encoder = vit.Vit(config, rngs=nnx.Rngs(3))
  vit_weights.save(tmp_path / "a" / "b", encoder)
  again = vit_weights.load(str(tmp_path / "a" / "b"))
  assert again.config == config
  jax.tree.map(np.testing.assert_array_equal, again, encoder)


def test_saved_encoders_are_the_published_files(tmp_path):
  """Names and layouts: the stored model comes out as it went in."""
  _, want = read("vit_tiny")
  vit_weights.save(tmp_path, vit_weights.load(str(GOLDEN / "vit_tiny")))
  got = weights.read_tensors(weights.weight_files(tmp_path))
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name], x)


def test_saved_encoders_are_read_by_transformers(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  encoder = vit_weights.load(str(GOLDEN / "vit_tiny"))
  vit_weights.save(tmp_path, encoder)
  model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
  images = np.array(pixels())
  with torch.inference_mode():
    got = model(torch.tensor(images.transpose(0, 3, 1, 2).copy())).logits
  np.testing.assert_allclose(got.numpy(), encoder(images), atol=1e-4)


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("name", "field"),
  [
    ("clip_tiny", "norm_input|patch_bias"),
    ("siglip_tiny", "class_token"),
    ("dinov2_tiny", "layer_scale"),
    ("deit_tiny", "distill_token"),
  ],
)
def test_other_encoders_are_not_saved_as_vit(name, field, tmp_path):
  encoder = vit_weights.load(str(GOLDEN / name))
  with pytest.raises(ValueError, match=field):
    vit_weights.save(tmp_path, encoder)
  assert not list(tmp_path.iterdir())


@pytest.mark.unchecked
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "swin"}, "model_type must be one of 'clip'"),
    ({"hidden_act": "relu"}, "hidden_act must be one of"),
    ({"qkv_bias": False}, "qkv_bias must be one of True, got False"),
    ({"use_swiglu_ffn": True}, "use_swiglu_ffn must be one of False"),
    ({"vision_use_head": False}, "vision_use_head must be one of True"),
  ],
)
def test_configs_that_we_cannot_follow(changes, message):
  with pytest.raises(ValueError, match=message):
    vit_weights.config_from_json({"model_type": "vit", **changes})


def test_folders_that_are_not_whole(tmp_path):
  config, tensors = read("vit_tiny")
  with pytest.raises(FileNotFoundError, match="config.json is not there"):
    vit_weights.load(str(tmp_path))
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="is not JSON"):
    vit_weights.load(str(tmp_path))
  shutil.copy(GOLDEN / "vit_tiny" / "config.json", tmp_path / "config.json")
  with pytest.raises(FileNotFoundError, match="no model.safetensors"):
    vit_weights.load(str(tmp_path))
  with pytest.raises(ValueError, match="no positions .* prefixes"):
    vit_weights.load_encoder(
      config, {k: v for k, v in tensors.items() if "position" not in k}
    )


def test_tables_name_every_parameter_of_their_family():
  assert set(vit_weights.TABLES) >= {"clip", "siglip", "vit", "deit", "dinov2"}
  for name in FAMILIES:
    encoder = vit_weights.load(str(GOLDEN / name))
    names = set(weights.parameter_names(encoder))
    assert any(names <= set(table) for table in vit_weights.TABLES.values())
