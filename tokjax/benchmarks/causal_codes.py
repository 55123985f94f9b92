"""Do causal codes of an image find another view of it?

Two tokenizers of the same bits are trained alike: SEED, whose queries read the
image one after the other, and one whose tokens are a 4 x 4 map of pooled
patches, each seeing its cell only. First their continuous tokens learn to find
what the frozen encoder says of another view of the image; then codes learn to
restore them. Test images are moved, mirrored, made lighter or darker, twice:
each first view must find the second view of the same image among all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.benchmarks import frozen_features, trained_vit
from tokjax.benchmarks.trained_vit import Row
from tokjax.data import cifar10
from tokjax.ops import resample, similarity
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.q_former import QFormerConfig
from tokjax.tokenizers.seed import Seed, SeedConfig
from tokjax.tokenizers.transformer import (
  Transformer,
  TransformerConfig,
  linear,
  table,
)
from tokjax.typing import Array, Float, Key

__all__ = ["CONFIG", "ViewsRun", "claimed", "recall", "views"]

_SIDE = 4  # of the map of pooled patches
CONFIG = SeedConfig(
  QFormerConfig(
    width=128, num_layers=4, num_heads=4, num_queries=_SIDE**2,
    context_dim=128, mlp_ratio=2.0, dropout_rate=0.0,
  ),
  CodebookConfig(256, 16, learning="ema", reset="batch"),
  num_decoder_layers=2, reverse=None, other_dim=128, projection_dim=64,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ViewsRun:
  """One comparison.

  Attributes:
    dataset: folder with CIFAR-10.
    seed: of the encoder, of weights, views and batches.
    runs: folder of the encoders.
    num_images: of the training set, two views each.
    num_steps: of 64 views, in each of the two stages.
  """

  dataset: str
  seed: int = 0
  runs: str = "runs"
  num_images: int = 4000
  num_steps: int = 250


def views(
  key: Key[Array, ""], images: Float[Array, "B height width 3"], *, shift: int
) -> Float[Array, "B height width 3"]:
  """Another view of each image: moved, mirrored, lighter or darker.

  Args:
    key: of all draws.
    images: in -1..1.
    shift: pixels an image is moved at most; its edge fills what is left.

  Returns:
    Images in -1..1.

  Example:
    >>> views(jax.random.key(0), jnp.zeros((2, 4, 4, 3)), shift=1).shape
    (2, 4, 4, 3)
  """

  def one(key, image):
    keys = jax.random.split(key, 3)
    border = ((shift, shift), (shift, shift), (0, 0))
    padded = jnp.pad(image, border, mode="edge")
    start = jax.random.randint(keys[0], (2,), 0, 2 * shift + 1)
    image = jax.lax.dynamic_slice(padded, (*start, 0), image.shape)
    mirrored = jax.random.bernoulli(keys[1])
    image = jnp.where(mirrored, image[:, ::-1], image)
    gain, bias = jax.random.uniform(keys[2], (2,), minval=-0.3, maxval=0.3)
    return jnp.clip(image * (1 + gain) + bias, -1, 1)

  return jax.vmap(one)(jax.random.split(key, len(images)), images)


def recall(
  queries: Float[np.ndarray, "n E"], found: Float[np.ndarray, "n E"], *, k: int
) -> float:
  """Share of rows whose own row is among the k most similar of the others.

  Args:
    queries: one view, of length one.
    found: the other; row i belongs to row i.
    k: how many count.

  Returns:
    In 0..1; a tie counts against the row.

  Example:
    >>> x = np.eye(3)
    >>> recall(x, x[[0, 2, 1]], k=1)
    0.3333333333333333
  """
  scores = queries @ found.T
  own = np.diagonal(scores)[:, None]
  return float(np.mean((scores >= own).sum(1) <= k))


def claimed(run: ViewsRun, *, progress: bool = True) -> dict[str, Row]:
  """Trains both tokenizers and lets the views find each other.

  Args:
    run: which.
    progress: print when one is done.

  Returns:
    Rows "causal", "causal codes", "patches", "patches codes", and "teacher",
    the class token of the encoder: recall "R@1" and "R@5"; of codes also the
    "cosine" of what they restore.
  """
  sets = cifar10.load(run.dataset)
  teacher = trained_vit.load(
    trained_vit.VitRun(run.dataset, seed=run.seed, runs=run.runs)
  )
  learn, test = (
    [
      frozen_features.of_images(teacher, _pictures(images, run.seed, place + i))
      for i in range(2)
    ]
    for place, images in (
      (0, sets[0].images[: run.num_images]), (2, sets[1].images)
    )
  )  # fmt: skip
  pairs = {
    "features": np.concatenate([patches for patches, _ in learn]),
    "other": np.concatenate([classes for _, classes in learn[::-1]]),
  }
  whole = {"features": pairs["features"]}
  unit = [
    np.asarray(similarity.safe_normalize(jnp.float32(classes)))
    for _, classes in test
  ]
  rows = {"teacher": Row(_recalls(*unit))}
  for name, make in (("causal", Seed), ("patches", _PatchSeed)):
    model, state = jax.jit(functools.partial(_fresh, make, run.seed))()
    settings = {"num_steps": run.num_steps, "seed": run.seed}
    model, state = frozen_features.fit(model, state, pairs, **settings)
    rows[name] = Row(_recalls(*(_embedded(model, x) for x, _ in test)))
    model.config = dataclasses.replace(CONFIG, stage="tokenizer")
    model, state = frozen_features.fit(model, state, whole, **settings)
    coded = [_embedded(model, x, state) for x, _ in test]
    cosine = _restored_cosine(model, state, test[0][0][:500])
    rows[f"{name} codes"] = Row(_recalls(*coded) | {"cosine": float(cosine)})
    if progress:
      print(name, rows[name].metrics, rows[f"{name} codes"].metrics, flush=True)
  return rows


def _pictures(images, seed, place):
  """8-bit views of 8-bit images."""
  key = jax.random.fold_in(jax.random.key(seed), place)
  pixels = jnp.asarray(images, jnp.float32) / 127.5 - 1
  found = jax.jit(functools.partial(views, shift=6))(key, pixels)
  return np.asarray(jnp.round((found + 1) * 127.5).astype(jnp.uint8))


def _recalls(first, second):
  return {f"R@{k}": recall(first, second, k=k) for k in (1, 5)}


def _fresh(make, seed):
  keys = jax.random.split(jax.random.key(seed))
  model = make(CONFIG, rngs=nnx.Rngs(keys[0]))
  return model, model.init_state(keys[1])


def _embedded(model, features, state=None, batch_size=250):
  """What is compared: of continuous tokens, or with a state of codes."""
  return np.concatenate(
    [
      np.asarray(_embed(model, features[i : i + batch_size], state))
      for i in range(0, len(features), batch_size)
    ]
  )


@jax.jit
def _embed(model, features, state):
  features = features.astype(jnp.float32)
  if state is None:
    return model.projected(model.queries(features))
  indices = model.encode(features, state).indices
  return model.projected(model.decode(indices, state))


@jax.jit
def _restored_cosine(model, state, features):
  found, _ = model(features.astype(jnp.float32), state)
  return found.stats["cosine"]


class _PatchSeed(Seed):
  """The same tokenizer of tokens that have a place each; their mean is it."""

  def __init__(self, config, *, rngs):
    super().__init__(config, rngs=rngs)
    self.q_former = _Cells(config.q_former, rngs=rngs)

  def projected(self, queries):
    found = self.project(jnp.mean(queries, axis=1))
    return similarity.safe_normalize(found.astype(jnp.float32))


class _Cells(nnx.Module):
  """Pooled patches through as many layers, each cell by itself."""

  def __init__(self, config, *, rngs):
    blocks = TransformerConfig(
      config.width, config.num_layers, config.num_heads, config.mlp_ratio
    )
    self.project = linear(blocks, config.context_dim, config.width, rngs)
    self.positions = table(config.num_queries, config.width, rngs)
    self.blocks = Transformer(blocks, rngs=rngs)

  def __call__(self, features, context_mask=None, *, mask=None, key=None):
    del context_mask, mask, key
    x = self.project(resample.pyramid(features, (_SIDE,)))
    alone = np.eye(_SIDE**2, dtype=bool)
    return self.blocks(x + self.positions[...][None], mask=alone)
