"""Prompts of many images: whose tokens are kept.

For the claim of CATP on scenes of `tokjax.benchmarks.scenes`. A prompt is four
example scenes and the scene of a question; two of the examples show its class.
The mean patch of a class stands in for the words that name it, and the class
token of the question's image for the last word of the prompt.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.benchmarks import reduction_methods, scenes, trained_vit
from tokjax.data import cifar10, image_batches
from tokjax.ops import similarity
from tokjax.reduction import catp, controls, divprune, types

__all__ = ["measure"]


def measure(
  run: trained_vit.VitRun,
  *,
  keep: Sequence[int] = (64, 32, 16),
  num_prompts: int = 250,
  progress: bool = True,
) -> dict[str, trained_vit.Row]:
  """Counts whose tokens each way keeps; what the claim measures.

  Args:
    run: the encoder; `pictures` is the folder of photographs.
    keep: tokens that stage 1 keeps of a scene's 256; stage 2 keeps as many of
      all four examples together.
    num_prompts: prompts.
    progress: not used.

  Returns:
    For each K "catp K", "divprune K", "attention K", "random K", with the share
    of kept tokens that are the object's (`object`), and "catp context K",
    "attention context K", "random context K" with the share that belongs to
    examples of the question's class (`related`).
  """
  del progress
  model = trained_vit.load(run)
  train, test = cifar10.load(run.dataset)
  _, words = scenes.reader(model, train)
  scene_rows = 5 * num_prompts
  made = scenes.compose(
    _chosen(test, num_prompts, run.seed),
    trained_vit.photographs(run),
    num_scenes=scene_rows,
    seed=run.seed,
  )
  seen = scenes.see(model, made.squares)
  num_patches = seen.patches.shape[1]
  patches = seen.patches.reshape(scene_rows, 4 * num_patches, -1)
  text = jnp.asarray(words)[made.labels]
  attended = reduction_methods.class_attention(seen.last)
  attended = attended.reshape(scene_rows, -1)
  square = np.arange(4 * num_patches) // num_patches

  def on_object(reduced):
    hit = square[np.asarray(reduced.index)] == made.place[:, None]
    return trained_vit.Row({"object": float(hit.mean())})

  labels = made.labels.reshape(num_prompts, 5)
  result = {}
  for num_keep in keep:
    key, second = jax.random.split(jax.random.key(run.seed * 1000 + num_keep))
    ways = _first_stage(patches, text, attended, key, num_keep)
    for name, reduced in ways.items():
      result[f"{name} {num_keep}"] = on_object(reduced)
    related = np.repeat(labels[:, :4] == labels[:, 4:], num_keep, axis=1)
    ways = _second_stage(ways["catp"], seen, text, second, num_prompts)
    for name, reduced in ways.items():
      hit = np.take_along_axis(related, np.asarray(reduced.index), axis=1)
      row = trained_vit.Row({"related": float(hit.mean())})
      result[f"{name} context {num_keep}"] = row
  return result


@functools.partial(jax.jit, static_argnames="num_keep")
def _first_stage(patches, text, attended, key, num_keep):
  """Every scene by itself."""
  return {
    "catp": catp.catp_stage1(patches, text, num_keep=num_keep),
    "divprune": divprune.divprune(patches, num_keep=num_keep),
    "attention": types.highest(patches, attended, num_keep=num_keep),
    "random": controls.random_keep(key, patches, num_keep=num_keep),
  }


@functools.partial(jax.jit, static_argnames="num_prompts")
def _second_stage(stage1, seen, text, key, num_prompts):
  """The examples of a prompt together, after stage 1 has cut every scene."""
  num_keep = stage1.index.shape[1]

  def rows(attention):
    """How the question's class token attends to all patches, [B, 4 K]."""
    heads, width = attention.keys.shape[1], attention.keys.shape[3]
    keys = attention.keys[:, :, 1:].swapaxes(1, 2)
    keys = stage1.apply(keys.reshape(num_prompts * 5, -1, heads * width))
    keys = keys.reshape(num_prompts, 5, num_keep, heads, width)[:, :4]
    keys = keys.reshape(num_prompts, 4 * num_keep, heads, width)
    first = attention.queries[:, :, 0].reshape(num_prompts, 5, 4, heads, width)
    query = jnp.mean(first[:, 4], axis=1)  # over the squares of the question
    logits = jnp.einsum("bhd,bnhd->bhn", query, keys) * width**-0.5
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=1)

  tokens = stage1.tokens.reshape(num_prompts, 5, num_keep, -1)
  examples = tokens[:, :4].reshape(num_prompts, 4 * num_keep, -1)
  question = jnp.mean(tokens[:, 4], axis=1)
  words = text.reshape(num_prompts, 5, -1)[:, 4]
  unit = similarity.safe_normalize
  query_mean = unit(question) + unit(words)
  now, before = rows(seen.last), rows(seen.before)
  return {
    "catp": catp.catp_context(
      examples, now, before, query_mean, num_keep=num_keep
    ),
    "attention": types.highest(examples, now, num_keep=num_keep),
    "random": controls.random_keep(key, examples, num_keep=num_keep),
  }


def _chosen(test, num_prompts, seed):
  """Five images a prompt: two of the class of the fifth, two of others."""
  draw = np.random.default_rng(seed)
  rows = []
  for _ in range(num_prompts):
    label = draw.integers(len(test.classes))
    same = draw.choice(np.flatnonzero(test.labels == label), 3, replace=False)
    other = draw.choice(np.flatnonzero(test.labels != label), 2, replace=False)
    examples = draw.permutation(np.concatenate([same[:2], other]))
    rows.extend([*examples, same[2]])
  return image_batches.ImageSet(
    test.images[rows], test.labels[rows], test.classes
  )
