"""Models saved as folders: read back exactly, by us and by others' rules."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from tokjax.models import bert, bert_weights, checkpoints, saving, weights
from tokjax.retrieval import colbert, crisp, heads, methods
from tokjax.retrieval.colberter import ColberterConfig, ColberterHead
from tokjax.retrieval.heads import HeadConfig, ProjectionHead

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SHAPE = bert.BertConfig(
  vocab_size=20, width=16, num_layers=2, num_heads=4, mlp_width=24,
  max_positions=12, norm_epsilon=1e-7, dropout_rate=0.25, init_scale=0.5,
)  # fmt: skip
MEANS = crisp.CrispConfig(query_ratio=0.5, document_clusters=3)
TEXT = colbert.ColbertConfig(
  query_length=9, document_length=11, query_marker="[Q]",
  document_marker="[D]", attend_to_expansion=True, skip_words=("!", "."),
)  # fmt: skip


@functools.cache
def made(kind, config, seed):
  return jax.jit(lambda: kind(config, rngs=nnx.Rngs(seed)))()


def make_module(kind, config, seed):
  """One's own, to be changed."""
  return jax.tree.map(lambda x: x, made(kind, config, seed))


def projection(**settings):
  config = HeadConfig(input_dim=16, output_dim=8, **settings)
  return make_module(ProjectionHead, config, 1)


def with_words(number):
  config = ColberterConfig.stage(
    number, hidden_dim=16, cls_dim=5, token_dim=4, query_length=9,
    document_length=11,
  )  # fmt: skip
  return make_module(ColberterHead, config, 2)


NUMBERS = np.arange(48, dtype=np.float32).reshape(16, 3)
# name -> head, and where its parameters go
HEADS = {
  "none": (lambda: None, "none"),
  "matrix": (
    lambda: heads.from_matrix(jnp.asarray(NUMBERS)), "dense",
  ),
  "linear": (projection, "dense"),
  "bias": (lambda: projection(bias=True), "dense"),
  "deep": (
    lambda: projection(
      kind="ffn", depth=3, residual="all", activation="gelu", bias=True
    ),
    "dense",
  ),
  "identity residual": (
    lambda: projection(
      kind="ffn", expand=1.0, residual="first", activation="silu"
    ),
    "dense",
  ),
  "scale": (
    lambda: projection(kind="ffn", residual="all", learned_scale=True),
    "projection",
  ),
  "gates": (
    lambda: projection(kind="glu", activation="silu", bias=True), "projection",
  ),
  "words": (lambda: with_words(3), "colberter"),
  "words compressed": (lambda: with_words(4), "colberter"),
}  # fmt: skip


def make_tokenizer():
  names = "[PAD] [UNK] [CLS] [SEP] [MASK] [Q] [D] ! . a b c".split()
  model = tokenizers.models.WordLevel(
    {name: i for i, name in enumerate(names)}, "[UNK]"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  return tokenizer


def make(head=None, method=None, shape=SHAPE, config=TEXT):
  if method is None:
    words = isinstance(head, ColberterHead)
    method = methods.Method("colberter" if words else "colbert")
  encoder = make_module(bert.Bert, shape, 0)
  return checkpoints.Checkpoint(encoder, head, make_tokenizer(), config, method)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", HEADS)
def test_a_folder_is_read_back_exactly(tmp_path, name):
  head, kind = HEADS[name][0](), HEADS[name][1]
  checkpoint = make(head)
  saved = saving.save(tmp_path / "model", checkpoint)
  got = checkpoints.load(str(tmp_path / "model"))
  assert_same((got.encoder, got.head), (checkpoint.encoder, head))
  assert type(got.head) is type(head)
  assert (got.config, got.method) == (checkpoint.config, checkpoint.method)
  assert got.tokenizer.to_str() == checkpoint.tokenizer.to_str()
  for x in (saved, got):
    assert x.layout == "tokjax" and x.folder == tmp_path / "model"
  assert saved.sha256 == got.sha256
  said = json.loads((tmp_path / "model" / "tokjax.json").read_text())
  assert said["head"] == kind
  files = {path.name for path in (tmp_path / "model").iterdir()}
  assert ("modules.json" in files) == (kind == "dense")
  assert ("head.safetensors" in files) == (kind in ("projection", "colberter"))
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["gates", "words"])
def test_a_read_model_gives_the_same_vectors(tmp_path, name):
  checkpoint = make(HEADS[name][0]())
  saving.save(tmp_path / "model", checkpoint)
  got = checkpoints.load(str(tmp_path / "model"))
  assert isinstance(got, methods.TextModel)
  texts = ["a b ! c", "c c", "b"]
  for want, found in zip(
    (*methods.encode_documents(texts, checkpoint, progress=False),
     *methods.encode_queries(texts, checkpoint)),
    (*methods.encode_documents(texts, got, progress=False),
     *methods.encode_queries(texts, got)),
    strict=True,
  ):  # fmt: skip
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
  "method",
  [
    methods.Method("xtr", k_prime=7),
    methods.Method("crisp", MEANS),
    methods.Method(),
  ],
  ids=lambda method: method.name,
)
def test_the_method_is_kept(tmp_path, method):
  saving.save(tmp_path / "model", make(projection(), method))
  assert checkpoints.load(str(tmp_path / "model")).method == method


def test_an_encoder_without_segments_is_a_distilbert(tmp_path):
  shape = dataclasses.replace(SHAPE, num_segments=0, norm_epsilon=1e-12)
  checkpoint = make(shape=shape)
  saving.save(tmp_path / "model", checkpoint)
  got = checkpoints.load(str(tmp_path / "model"))
  assert_same(got.encoder, checkpoint.encoder)
  said = json.loads((tmp_path / "model" / "config.json").read_text())
  assert said["model_type"] == "distilbert"
  with pytest.raises(ValueError, match="norm_epsilon must be one of 1e-12"):
    saving.save(
      tmp_path / "other",
      make(shape=dataclasses.replace(shape, norm_epsilon=1e-7)),
    )


def test_bfloat16_is_read_as_the_same_float32(tmp_path):
  checkpoint = make(projection())
  low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), checkpoint.encoder)
  checkpoint = dataclasses.replace(checkpoint, encoder=low)
  saving.save(tmp_path / "model", checkpoint)
  got = checkpoints.load(str(tmp_path / "model"))
  assert_same(
    got.encoder,
    jax.tree.map(lambda x: np.asarray(x, np.float32), checkpoint.encoder),
  )


@pytest.mark.parametrize("name", ["bert_tiny", "distilbert_tiny"])
def test_transformers_files_are_written_as_transformers_does(tmp_path, name):
  config = json.loads((GOLDEN / name / "config.json").read_text())
  tensors = weights.read_tensors([GOLDEN / name / "model.safetensors"])
  encoder = bert_weights.load_encoder(config, tensors)
  checkpoint = dataclasses.replace(make(), encoder=encoder)
  saving.save(tmp_path / "model", checkpoint)
  files = weights.weight_files(tmp_path / "model")
  got = weights.read_tensors(files)
  assert got.keys() == tensors.keys()
  for key, x in tensors.items():
    np.testing.assert_array_equal(got[key], x)
  said = json.loads((tmp_path / "model" / "config.json").read_text())
  ours = {"torch_dtype"}
  assert {key: config[key] for key in said} == said and ours <= said.keys()


@pytest.mark.parametrize("name", ["matrix", "deep", "identity residual"])
def test_pylate_finds_the_same_model(tmp_path, name):
  config = dataclasses.replace(TEXT, query_marker=None)
  checkpoint = make(HEADS[name][0](), config=config)
  saving.save(tmp_path / "model", checkpoint)
  (tmp_path / "model" / "tokjax.json").unlink()
  got = checkpoints.load(str(tmp_path / "model"))
  assert got.layout == "sentence-transformers" and got.config == config
  x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
  project = jax.jit(lambda head, x: head(x))
  np.testing.assert_array_equal(
    project(got.head, x), project(checkpoint.head, x)
  )
  path = tmp_path / "model" / "config_sentence_transformers.json"
  said = json.loads(path.read_text())
  assert said["query_prefix"] == "" and said["document_prefix"] == "[D]"
  said = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
  assert said["mask_token"] == "[MASK]" and said["pad_token"] == "[PAD]"


def test_another_save_replaces_the_folder(tmp_path):
  folder = tmp_path / "deep" / "model"
  first = saving.save(folder, make(projection(kind="glu")))
  second = saving.save(folder, make(projection()))
  assert first.sha256 != second.sha256
  assert not (folder / "head.safetensors").exists()
  assert checkpoints.load(str(folder)).sha256 == second.sha256
  assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
  folder = tmp_path / "model"
  saved = saving.save(folder, make(projection()))

  def full(path, tensors):
    path.write_bytes(b"half")
    raise OSError("no space left")

  with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
    patch.setattr(weights, "write_tensors", full)
    saving.save(folder, make(projection(bias=True)))
  assert checkpoints.load(str(folder)).sha256 == saved.sha256
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_folders_are_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(FileExistsError, match="is not a saved model"):
    saving.save(tmp_path, make())
  assert (tmp_path / "thesis.tex").read_text() == "years of work"
  (tmp_path / "empty").mkdir()
  assert saving.save(tmp_path / "empty", make()).layout == "tokjax"


def gated():
  half = heads.ProjectionLayer(jnp.ones((16, 3)))
  return heads.Projection([heads.GatedLayer(half, half)])


def altered():
  head = projection()
  head.layers[0] = heads.ProjectionLayer(jnp.ones((16, 8)), activation="tanh")
  return head


def reconfigured():
  encoder = make().encoder
  encoder.config = dataclasses.replace(SHAPE, dropout_rate=0.0)
  return encoder  # its blocks still have the other rate


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    pytest.param(
      lambda: {"head": jnp.ones((16, 3))},
      TypeError,
      "from_matrix",
      marks=pytest.mark.unchecked,
    ),
    pytest.param(
      lambda: {"encoder": None},
      TypeError,
      "must be a Bert, got None",
      marks=pytest.mark.unchecked,
    ),
    (
      lambda: {"encoder": reconfigured()},
      ValueError,
      "encoder must be made as",
    ),
    (lambda: {"head": gated()}, ValueError, "must be a ProjectionHead"),
    (lambda: {"head": altered()}, ValueError, "Dense folders must hold"),
    (
      lambda: {"head": with_words(3)},
      ValueError,
      "must be 'colberter' for a ColBERTer head",
    ),
    (
      lambda: {"head": heads.from_matrix(jnp.ones((5, 3)))},
      ValueError,
      "1_Dense must take width 16, got 5",
    ),
    (
      lambda: {
        "head": ProjectionHead(HeadConfig(5, kind="glu"), rngs=nnx.Rngs(0))
      },
      ValueError,
      "must take width 16, got 5",
    ),
    (lambda: {"method": methods.Method("colberter")}, ValueError, "NoneType"),
  ],
)
def test_parts_that_do_not_fit_are_not_saved(tmp_path, change, error, message):
  checkpoint = dataclasses.replace(make(), **change())
  with pytest.raises(error, match=message):
    saving.save(tmp_path / "model", checkpoint)
  assert not list(tmp_path.iterdir())


def changed(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  ("head", "damage", "message"),
  [
    (
      "linear",
      lambda f: changed(f / "tokjax.json", format="tokjax model 9"),
      "tokjax.json must have the format 'tokjax model 1', got 'tokjax model 9'",
    ),
    (
      "linear",
      lambda f: (f / "tokjax.json").write_text("[1]"),
      r"tokjax.json must have the format .* got \[1\]",
    ),
    (
      "linear",
      lambda f: (f / "tokjax.json").write_text('{"format": "tok'),
      "tokjax.json is not JSON",
    ),
    (
      "linear",
      lambda f: changed(f / "tokjax.json", licence="MIT"),
      r"tokjax.json has unknown fields \['licence'\]",
    ),
    (
      "linear",
      lambda f: changed(f / "tokjax.json", config={"query_size": 4}),
      r"tokjax.json: config has unknown fields \['query_size'\]",
    ),
    (
      "linear",
      lambda f: changed(f / "tokjax.json", method={"name": "colberter"}),
      "tokjax.json: method must be 'colberter' for a ColBERTer head",
    ),
    (
      "gates",
      lambda f: changed(f / "tokjax.json", projection=None),
      "tokjax.json: projection must be given for head 'projection'",
    ),
    (
      "gates",
      lambda f: (f / "head.safetensors").write_bytes(
        (f / "head.safetensors").read_bytes()[:-3]
      ),
      "head.safetensors is not a complete safetensors file",
    ),
    (
      "gates",
      lambda f: weights.write_tensors(
        f / "head.safetensors", {"layers.0.kernel": np.zeros((2, 2))}
      ),
      "head.safetensors must hold .*gate.kernel",
    ),
    (
      "identity residual",
      lambda f: changed(
        f / "1_Dense" / "config.json",
        activation_function="torch.nn.modules.activation.Tanh",
      ),
      "tokjax.json: the Dense folders must hold the head of projection",
    ),
    (
      "linear",
      lambda f: changed(
        f / "1_Dense" / "config.json", activation_function="torch.nn.ELU"
      ),
      "activation_function must be one of",
    ),
  ],
)
def test_damaged_folders_are_named(tmp_path, head, damage, message):
  saving.save(tmp_path / "model", make(HEADS[head][0]()))
  damage(tmp_path / "model")
  with pytest.raises(ValueError, match=message):
    checkpoints.load(str(tmp_path / "model"))


def test_a_missing_head_is_named(tmp_path):
  saving.save(tmp_path / "model", make(with_words(3)))
  (tmp_path / "model" / "head.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="head.safetensors is not there"):
    checkpoints.load(str(tmp_path / "model"))


def test_abstract_heads_have_the_shapes_of_real_ones():
  for head in (projection(kind="glu"), with_words(4)):
    want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), head)
    got = checkpoints.abstract_head(head.config)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.leaves(got) == jax.tree.leaves(want)
