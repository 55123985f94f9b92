"""Do slots that compete separate the pictures of a mosaic?

A mosaic is a 32 x 32 window, at a random place, of four test pictures laid out
two by two: 2 to 4 of them are seen, each of another size. A frozen encoder
makes 8 x 8 features of it; which picture a feature lies in is known. Slots are
trained to describe the features to a decoder, once competing for them, once
reading them by ordinary attention with the same parameters.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.benchmarks import frozen_features, trained_vit
from tokjax.benchmarks.trained_vit import Row
from tokjax.data import cifar10
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.q_former import QFormerConfig
from tokjax.tokenizers.residual_quantizer import RVQConfig
from tokjax.tokenizers.slot_attention import SlotAttentionConfig
from tokjax.tokenizers.slot_mllm import SlotMLLMConfig
from tokjax.typing import Float, Int, UInt8

__all__ = [
  "MosaicRun",
  "adjusted_rand_index",
  "claimed",
  "config",
  "mosaics",
]

_PATCH = 4


@dataclasses.dataclass(frozen=True)
class MosaicRun:
  """One comparison.

  Attributes:
    dataset: folder with CIFAR-10.
    seed: of the encoder, of weights, mosaics and batches.
    runs: folder of the encoders.
    num_images: mosaics to train on.
    num_test: mosaics to test on.
    num_steps: of 64 mosaics, in each stage.
  """

  dataset: str
  seed: int = 0
  runs: str = "runs"
  num_images: int = 4000
  num_test: int = 1000
  num_steps: int = 250


def config(compete: str = "slots") -> SlotMLLMConfig:
  """Four slots of width 64, each of four codes of 64: 96 bits.

  Args:
    compete: what the softmax of slot attention runs over.
  """
  slots = SlotAttentionConfig(
    64, 128, compete=compete, mlp_ratio=2.0, init_scale=0.1
  )
  return SlotMLLMConfig(
    QFormerConfig(
      width=64, num_layers=2, num_heads=4, num_queries=4, context_dim=128,
      read_every=1, mlp_ratio=2.0, dropout_rate=0.0, init_scale=0.1,
      slots=slots,
    ),
    RVQConfig(
      CodebookConfig(64, 16, learning="ema", reset="batch"), num_stages=4
    ),
    num_features=64, feature_dim=128, num_decoder_layers=2,
    num_decoder_heads=4, num_feature_layers=2, causal=False,
  )  # fmt: skip


def mosaics(
  images: UInt8[np.ndarray, "n side side 3"], *, number: int, seed: int
) -> tuple[UInt8[np.ndarray, "m side side 3"], Int[np.ndarray, "m P"]]:
  """Windows of four pictures laid out two by two, and whose each patch is.

  Args:
    images: the pictures.
    number: m, of mosaics.
    seed: of pictures and places.

  Returns:
    Mosaics of the size of a picture, and for each patch of 4 x 4 pixels the
    number of its quadrant; 2 to 4 of them are seen.

  Example:
    >>> images = np.arange(4, dtype=np.uint8)[:, None, None, None]
    >>> images = np.tile(images, (1, 8, 8, 3))
    >>> made, quadrant = mosaics(images, number=3, seed=0)
    >>> made.shape, quadrant.shape
    ((3, 8, 8, 3), (3, 4))
  """
  side = images.shape[1]
  checks.divisible(_PATCH, image_height=side)
  random = np.random.default_rng([seed, number])
  pictures = images[random.integers(0, len(images), (number, 4))]
  rows = pictures.reshape(number, 2, 2, side, side, 3).transpose(
    0, 1, 3, 2, 4, 5
  )
  whole = rows.reshape(number, 2 * side, 2 * side, 3)
  steps = side // _PATCH
  corner = random.integers(0, steps + 1, (number, 2))
  # Not at a corner of all: there a single picture would be seen.
  alone = np.all(corner % steps == 0, axis=1)
  corner[alone] = steps // 2
  inside = np.arange(side)
  y, x = (_PATCH * corner[:, i, None] + inside for i in range(2))
  made = whole[np.arange(number)[:, None, None], y[:, :, None], x[:, None, :]]
  down, right = (z[:, ::_PATCH] >= side for z in (y, x))
  quadrant = 2 * down[:, :, None] + right[:, None, :]
  return made, quadrant.reshape(number, -1)


def adjusted_rand_index(
  labels: Int[np.ndarray, " n"], found: Int[np.ndarray, " n"]
) -> float:
  """How far two partitions agree: 1 the same, 0 as by chance.

  Args:
    labels: group of each element, from 0.
    found: another partition of them, from 0.

  Returns:
    At most 1; 1 too where both have one group only.

  Raises:
    ValueError: if sizes disagree.

  Example:
    >>> one, two = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 2])
    >>> round(adjusted_rand_index(one, two), 4)
    0.5714

  Source: Hubert and Arabie, 1985, "Comparing partitions".
  """
  checks.same_size(labels=len(labels), found=len(found))
  table = np.zeros((labels.max() + 1, found.max() + 1))
  np.add.at(table, (labels, found), 1)

  def pairs(x):
    return float((x * (x - 1) / 2).sum())

  both, one, two = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
  expected = one * two / pairs(np.array([len(labels)]))
  largest = (one + two) / 2
  if largest == expected:
    return 1.0
  return (both - expected) / (largest - expected)


def claimed(run: MosaicRun, *, progress: bool = True) -> dict[str, Row]:
  """Trains slots in both ways, and codes of those that compete.

  Args:
    run: which.
    progress: print when one is done.

  Returns:
    Rows "compete" and "attend": "ari", the mean adjusted Rand index of the
    slot that has most of a feature against the pictures, and "cosine" of the
    decoded features. Rows "level 1" to "level 4": "cosine" of features decoded
    from so many levels of codes, "slots" of the slots restored from them. Row
    "quarters": the "ari" of cutting every mosaic into the same quarters.
  """
  sets = cifar10.load(run.dataset)
  teacher = trained_vit.load(
    trained_vit.VitRun(run.dataset, seed=run.seed, runs=run.runs)
  )
  learn, _ = mosaics(sets[0].images, number=run.num_images, seed=run.seed)
  test, quadrant = mosaics(sets[1].images, number=run.num_test, seed=run.seed)
  learn, test = (
    frozen_features.of_images(teacher, x)[0] for x in (learn, test)
  )
  settings = {"num_steps": run.num_steps, "seed": run.seed}
  rows = {"quarters": Row({"ari": _mean_ari(quadrant, _quarters(quadrant))})}
  for name, compete in (("attend", "inputs"), ("compete", "slots")):
    made = jax.jit(functools.partial(_fresh, config(compete), run.seed))()
    model, state = frozen_features.fit(*made, {"features": learn}, **settings)
    owner, cosine = _tested(model, test)
    rows[name] = Row({"ari": _mean_ari(quadrant, owner), "cosine": cosine})
    if progress:
      print(name, rows[name].metrics, flush=True)
  model.config = dataclasses.replace(model.config, stage="tokenizer")
  model, state = frozen_features.fit(
    model, state, {"features": learn}, **settings
  )
  for level in range(1, 5):
    parts = [
      _by_level(model, state, test[i : i + 250], num_levels=level)
      for i in range(0, len(test), 250)
    ]
    cosine, slots = np.mean(parts, axis=0)
    rows[f"level {level}"] = Row(
      {"cosine": float(cosine), "slots": float(slots)}
    )
  return rows


def _quarters(quadrant):
  """The same four squares of every mosaic."""
  side = int(quadrant.shape[1] ** 0.5)
  half = np.arange(side) >= side // 2
  return np.broadcast_to((2 * half[:, None] + half).ravel(), quadrant.shape)


def _mean_ari(labels, found):
  each = [adjusted_rand_index(*x) for x in zip(labels, found, strict=True)]
  return float(np.mean(each))


def _fresh(config, seed):
  keys = jax.random.split(jax.random.key(seed))
  model = config.build(nnx.Rngs(keys[0]))
  return model, model.init_state(keys[1])


def _tested(model, test):
  """The slot that has most of each feature, and the mean cosine."""
  found = [
    jax.device_get(_test(model, test[i : i + 250]))
    for i in range(0, len(test), 250)
  ]
  owner, cosine = zip(*found, strict=True)
  return np.concatenate(owner), float(np.mean(cosine))


@jax.jit
def _test(model, features):
  features = features.astype(jnp.float32)
  found = model.slots(features)
  output = model.decode_features(found.queries)
  return jnp.argmax(found.attention, axis=1), _cosine(output, features)


@functools.partial(jax.jit, static_argnames="num_levels")
def _by_level(model, state, features, num_levels):
  features = features.astype(jnp.float32)
  indices = model.encode(features, state).indices
  slots = model.decode(indices, state, num_levels=num_levels)
  output = model.decode_features(slots)
  whole = model.slots(features).queries
  return _cosine(output, features), _cosine(slots, whole)


def _cosine(x: Float[jax.Array, "..."], y: Float[jax.Array, "..."]):
  norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return jnp.mean(jnp.sum(x * y, axis=-1) / norms)
