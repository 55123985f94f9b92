"""A tiny ViT, and its forward in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.compiled import run
from tokjax.models import vit
from tokjax.ops import patches
from tokjax.reduction import types

CONFIG = vit.VitConfig(
  image_size=12,
  patch_size=4,
  width=12,
  num_layers=3,
  num_heads=3,
  mlp_width=20,
  num_outputs=5,
  init_scale=0.3,
)


@functools.cache
def _made(config):
  return jax.jit(lambda: vit.Vit(config, rngs=nnx.Rngs(0)))()


def tiny(**changes):
  made = _made(dataclasses.replace(CONFIG, **changes))
  return jax.tree.map(lambda x: x, made)  # one's own, to be changed


def encode(model, x, mask=None, **settings):
  """`model.encode`, compiled as a whole: much faster than op by op."""
  return run(vit.Vit.encode, model, x, mask, **settings)


def embed(model, x, mask=None, **settings):
  return run(vit.Vit.__call__, model, x, mask, **settings)


def output(model, encoded):
  return run(vit.Vit.embed, model, encoded)


def photos(seed=0, batch=2, side=12):
  random = np.random.default_rng(seed)
  return random.normal(size=(batch, side, side, 3)).astype(np.float32)


def cut(images):
  """Patches of photos."""
  return np.asarray(run(patches.patchify, images, CONFIG.patch_size))


# --- the same in float64 loops, one image at a time -------------------------


def norm64(module, x):
  x = np.asarray(x, np.float64)
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon)
  return x * np.asarray(module.scale[...]) + np.asarray(module.bias[...])


def linear64(module, x):
  kernel = np.asarray(module.kernel[...], np.float64)
  return x @ kernel + np.asarray(module.bias[...], np.float64)


def block_of(model, layer):
  return jax.tree.map(lambda x: np.asarray(x)[layer], model.blocks)


def attention64(block, x, size=None):
  """x after attention, and the keys of each head, [H, N, d]."""
  heads = block.config.num_heads
  qkv = linear64(block.qkv, norm64(block.norm_attention, x))
  q, k, v = qkv.reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
  mixed = np.zeros((len(x), heads, q.shape[-1]))
  for h, i in np.ndindex(heads, len(x)):
    logits = k[h] @ q[h, i] / math.sqrt(q.shape[-1])
    if size is not None:
      logits = logits + np.log(size)
    weight = np.exp(logits - logits.max())
    mixed[i, h] = weight @ v[h] / weight.sum()
  return x + linear64(block.out, mixed.reshape(len(x), -1)), k


def mlp64(block, x):
  hidden = linear64(block.up, norm64(block.norm_mlp, x))
  erf = np.vectorize(math.erf)
  hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
  return x + linear64(block.down, hidden)


def embed64(model, image):
  """Rows before the first block."""
  side, patch = image.shape[0], CONFIG.patch_size
  rows = [
    image[i : i + patch, j : j + patch].reshape(-1)
    for i in range(0, side, patch)
    for j in range(0, side, patch)
  ]
  cells = linear64(model.patches, np.asarray(rows, np.float64))
  first = np.asarray(model.class_token[...], np.float64)[None]
  return np.concatenate([first, cells]) + np.asarray(model.positions[...])


# --- published families -----------------------------------------------------


def keep_all(layer, x, keys, size, mask):
  return types.selected(x, jnp.tile(jnp.arange(x.shape[1]), (len(x), 1)), mask)
