"""Published files of BiFormer into ours, against NumPy in float64."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from tests.sparse.routing_oracle import oracle
from tokjax.models import biformer, biformer_weights, weights
from tokjax.models.biformer import BiFormerConfig

TINY = BiFormerConfig(
  widths=(8, 16, 16),
  depths=(2, 1, 1),
  attention=("routing", "routing", "full"),
  num_regions=(3, 2, 1),
  top_k=(2, 3, 1),
  head_dim=4,
  num_outputs=5,
)
PATCHES = dataclasses.replace(
  TINY, mlp_ratio=4, position_size=0, stem="patches"
)
SHAPES = {"convs": TINY, "patches": PATCHES}


def shapes_of(config):
  """Names and shapes of the state dict of the published modules."""
  patches, shapes = config.stem == "patches", {}

  def layer(name, *shape, bias=True):
    shapes[f"{name}.weight"] = shape
    if bias:
      shapes[f"{name}.bias"] = shape[:1]

  def batch_norm(name, width):
    layer(name, width)
    for buffer in ("running_mean", "running_var"):
      shapes[f"{name}.{buffer}"] = (width,)
    shapes[f"{name}.num_batches_tracked"] = ()

  first, *rest = config.widths
  stem = "downsample_layers.0"
  if patches:
    layer(f"{stem}.0", first, 3, 4, 4)
    batch_norm(f"{stem}.1", first)
  else:
    layer(f"{stem}.0", first // 2, 3, 3, 3)
    batch_norm(f"{stem}.1", first // 2)
    layer(f"{stem}.3", first, first // 2, 3, 3)
    batch_norm(f"{stem}.4", first)
  for i, (before, after) in enumerate(zip(config.widths, rest, strict=False)):
    name = f"downsample_layers.{i + 1}"
    if patches:
      batch_norm(f"{name}.0", before)
      layer(f"{name}.1", after, before, 2, 2)
    else:
      layer(f"{name}.0", after, before, 3, 3)
      batch_norm(f"{name}.1", after)
  for stage, width in enumerate(config.widths):
    for number in range(config.depths[stage]):
      inside = f"blocks.{number}" if patches else number
      block = f"stages.{stage}.{inside}"
      if not patches:
        layer(f"{block}.pos_embed", width, 1, 3, 3)
      layer(f"{block}.norm1", width)
      layer(f"{block}.norm2", width)
      if config.attention[stage] == "full":
        layer(f"{block}.attn.qkv", 3 * width, width, bias=False)
        layer(f"{block}.attn.proj", width, width)
      else:
        layer(f"{block}.attn.qkv.qkv", 3 * width, width)
        layer(f"{block}.attn.wo", width, width)
      layer(f"{block}.attn.lepe", width, 1, 5, 5)
      layer(f"{block}.mlp.0", config.mlp_ratio * width, width)
      last = 2 if patches else 3
      layer(f"{block}.mlp.{last}", width, config.mlp_ratio * width)
  batch_norm("norm", config.widths[-1])
  layer("head", config.num_outputs, config.widths[-1])
  return shapes


def tensors_of(config):
  """A state dict with drawn weights."""
  random, tensors = np.random.default_rng(0), {}
  for name, shape in shapes_of(config).items():
    x = random.normal(0, 0.3, shape)
    if name.endswith(("running_var", "norm1.weight", "norm2.weight")):
      x = 0.5 + np.abs(x)
    tensors[name] = np.asarray(x, np.float32)
  return tensors


class Published:
  """The network from its state dict, channels last, float64."""

  def __init__(self, config, tensors):
    self.config = config
    self.tensors = {name: x.astype(float) for name, x in tensors.items()}

  def __call__(self, x):
    config, norm, conv = self.config, self.batch_norm, self.conv
    for stage, depth in enumerate(config.depths):
      name = f"downsample_layers.{stage}"
      if config.stem == "patches":
        if stage:
          x = conv(f"{name}.1", norm(f"{name}.0", x), stride=2, padding=0)
        else:
          x = norm(f"{name}.1", conv(f"{name}.0", x, stride=4, padding=0))
      else:
        x = norm(f"{name}.1", conv(f"{name}.0", x, stride=2, padding=1))
        if not stage:
          x = conv(f"{name}.3", gelu(x), stride=2, padding=1)
          x = norm(f"{name}.4", x)
      for number in range(depth):
        inside = f"blocks.{number}" if config.stem == "patches" else number
        x = self.block(stage, f"stages.{stage}.{inside}", x)
    x = norm("norm", x).mean((1, 2))
    return self.linear("head", x)

  def block(self, stage, name, x):
    if f"{name}.pos_embed.weight" in self.tensors:
      x = x + self.conv(f"{name}.pos_embed", x, padding=1)
    x = x + self.attention(stage, f"{name}.attn", self.norm(f"{name}.norm1", x))
    y = self.linear(f"{name}.mlp.0", self.norm(f"{name}.norm2", x))
    last = 2 if self.config.stem == "patches" else 3
    return x + self.linear(f"{name}.mlp.{last}", gelu(y))

  def attention(self, stage, name, x):
    config, width = self.config, x.shape[-1]
    full = config.attention[stage] == "full"
    heads = 8 if full else width // config.head_dim
    qkv = self.linear(f"{name}.qkv" if full else f"{name}.qkv.qkv", x)
    parts = np.split(qkv, 3, axis=-1)
    q, k, v = (y.reshape(*y.shape[:3], heads, -1) for y in parts)
    if full:
      more = {"num_regions": 1, "top_k": 1, "scale": (width // heads) ** -0.5}
    else:
      more = {
        "num_regions": config.num_regions[stage],
        "top_k": config.top_k[stage],
      }
    mixed = oracle(q, k, v, **more).reshape(x.shape)
    mixed = mixed + self.conv(
      f"{name}.lepe", x if full else parts[2], padding=2
    )
    return self.linear(f"{name}.proj" if full else f"{name}.wo", mixed)

  def linear(self, name, x):
    bias = self.tensors.get(f"{name}.bias", 0)
    return x @ self.tensors[f"{name}.weight"].T + bias

  def norm(self, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

  def batch_norm(self, name, x):
    mean, variance = (
      self.tensors[f"{name}.running_{part}"] for part in ("mean", "var")
    )
    x = (x - mean) / np.sqrt(variance + 1e-5)
    return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

  def conv(self, name, x, *, stride=1, padding):
    kernel = self.tensors[f"{name}.weight"]  # [out, in / groups, h, w]
    size = kernel.shape[-1]
    x = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), rows, columns, len(kernel)))
    for i, j in np.ndindex(rows, columns):
      top, left = i * stride, j * stride
      window = x[:, top : top + size, left : left + size]  # [B, h, w, in]
      depthwise = kernel.shape[1] == 1
      letters = "bhwo,ohw->bo" if depthwise else "bhwi,oihw->bo"
      out[:, i, j] = np.einsum(
        letters, window, kernel[:, 0] if depthwise else kernel
      )
    return out + self.tensors[f"{name}.bias"]


def gelu(x):
  return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def photos():
  # Maps of 6 x 5, 3 x 3 and 2 x 2, or of 6 x 5, 3 x 2 and 1 x 1.
  random = np.random.default_rng(1)
  return random.normal(size=(2, 24, 20, 3)).astype(np.float32)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_published_network(name):
  config = SHAPES[name]
  tensors = tensors_of(config)
  want = Published(config, tensors)(photos())
  model, state = biformer_weights.load_model(config, tensors)
  got, same = jax.jit(lambda m, s, x: m(x, s))(model, state, photos())
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
  jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize("name", biformer.CONFIGS)
def test_published_files_have_as_many_parameters(name):
  config = biformer.shape(name)
  model = jax.eval_shape(lambda: biformer.BiFormer(config, rngs=nnx.Rngs(0)))
  want = sum(math.prod(x.shape) for x in jax.tree.leaves(model))
  buffers = ("running_mean", "running_var", "num_batches_tracked")
  assert want == sum(
    math.prod(shape)
    for key, shape in shapes_of(config).items()
    if not key.endswith(buffers)
  )


@pytest.mark.unchecked
def test_unknown_and_missing_names_are_listed():
  tensors = tensors_of(TINY)
  tensors["surplus.weight"] = np.zeros(3, np.float32)
  tensors["stages.0.2.norm1.weight"] = np.zeros(8, np.float32)
  tensors["stages.1.0.attn.wo.bias"] = np.zeros(99, np.float32)
  tensors["downsample_layers.1.1.running_var"] = np.zeros(3, np.float32)
  gone = [
    "stages.0.1.pos_embed.weight",
    "downsample_layers.0.3.weight",
    "norm.running_mean",
  ]
  for name in gone:
    del tensors[name]
  with pytest.raises(ValueError, match="do not fit the module") as error:
    biformer_weights.load_model(TINY, tensors)
  text = str(error.value)
  for name in gone:
    assert f"missing tensor {name}" in text
  for line in (
    "unknown tensor surplus.weight",
    "unknown tensor stages.0.2.norm1.weight",
    "stages.1.0.attn.wo.bias must be (16,), got (99,)",
    "downsample_layers.1.1.running_var must be (16,), got (3,)",
  ):
    assert line in text
  # Another kind of attention has other names.
  with pytest.raises(ValueError, match=r"missing tensor stages.1.0.attn.proj"):
    biformer_weights.load_model(
      dataclasses.replace(TINY, attention=("routing", "full", "full")),
      tensors_of(TINY),
    )


def test_files_are_read(tmp_path):
  tensors = tensors_of(PATCHES)
  weights.write_tensors(tmp_path / "model.safetensors", tensors)
  got = biformer_weights.load(str(tmp_path), PATCHES)
  want = biformer_weights.load_model(PATCHES, tensors)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  with pytest.raises(FileNotFoundError, match="no model.safetensors"):
    biformer_weights.load(str(tmp_path.parent), PATCHES)
