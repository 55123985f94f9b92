"""What claims about single image tokenizers measure, on CIFAR-10.

Each function trains the tokenizers of a `tokenizer_probes.ProbeRun` under the
same conditions and returns rows by name.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from tokjax.benchmarks import tokenizer_probes
from tokjax.benchmarks.tokenizer_probes import ProbeRun
from tokjax.benchmarks.trained_vit import Row
from tokjax.data import cifar10
from tokjax.eval import batching, image_quality, rate_distortion
from tokjax.models import vit_weights
from tokjax.ops import similarity
from tokjax.train import image_classification, tokenizer_run

__all__ = ["by_length", "by_meaning", "by_need", "by_scale"]

_BATCH = 250


def by_length(
  run: ProbeRun,
  *,
  lengths: Sequence[int],
  num_coded: int = 500,
  progress: bool = True,
) -> dict[str, Row]:
  """PSNR of the first tokens of One-D-Pieces, and of JPEG and WebP beside.

  Args:
    run: of tokenizers whose first tokens are an image.
    lengths: tokens of an image.
    num_coded: test images given to JPEG and WebP.
    progress: print when one is done.

  Returns:
    "NAME LENGTH": "psnr" and "bytes"; "jpeg LENGTH" and "webp LENGTH": the
    same in as many bytes, headers not counted, with "fits", the share of
    images that a setting of the codec brings below; the others have no part in
    its PSNR.
  """
  _, test = cifar10.load(run.dataset)
  rows = {}
  for name, config in run.tokenizers:
    done = tokenizer_probes.trained(run, name, config)
    codes = config.quantizer.codebook.num_codes
    for length in lengths:
      decode = functools.partial(_psnr, done.tokenizer, done.state, length)
      found = np.concatenate(
        list(batching.in_batches(decode, test.images, batch_size=_BATCH))
      )
      num_bytes = rate_distortion.token_bytes(length, codes)
      rows[f"{name} {length}"] = Row(
        {"psnr": float(found.mean()), "bytes": float(num_bytes)}
      )
      if progress:
        print(name, length, rows[f"{name} {length}"].metrics, flush=True)
  for codec in ("jpeg", "webp"):
    for length in lengths:
      fitted = rate_distortion.at_budget(
        test.images[:num_coded],
        codec,
        rate_distortion.token_bytes(length, codes),
        count_header=False,
      )
      fits = fitted.quality >= 0
      rows[f"{codec} {length}"] = Row(
        {
          "psnr": float(fitted.psnr[fits].mean()) if fits.any() else 0.0,
          "bytes": float(fitted.num_bytes[fits].mean()) if fits.any() else 0.0,
          "fits": float(fits.mean()),
        }
      )
  return rows


@functools.partial(jax.jit, static_argnums=2)
def _psnr(tokenizer, state, length, raw):
  images = image_classification.pixels(raw)
  indices = tokenizer.encode(images, state).indices
  output = tokenizer.decode(indices[:, :length], state)
  return _quality(images, output)


def _quality(images, output):
  output = jnp.clip(output.astype(jnp.float32), -1, 1)
  return image_quality.psnr((images + 1) / 2, (output + 1) / 2)


def by_scale(run: ProbeRun, *, progress: bool = True) -> dict[str, Row]:
  """PSNR of continuous tokenizers, and the numbers an image takes.

  Args:
    run: of tokenizers of images.
    progress: print when one is done.

  Returns:
    By name: "psnr", "loss" of pixels and divergence, "numbers".
  """
  rows = {}
  for name, config in run.tokenizers:
    found = tokenizer_probes.trained(run, name, config).run.metrics
    rows[name] = Row(
      {
        "psnr": found["psnr"],
        "loss": found["pixels"] + found["kl"],
        "numbers": float(config.num_tokens * config.latent_dim),
      }
    )
    if progress:
      print(name, rows[name].metrics, flush=True)
  return rows


def by_meaning(run: ProbeRun, *, progress: bool = True) -> dict[str, Row]:
  """What a linear classifier reads in MingToks, and how they give back.

  Args:
    run: of MingToks.
    progress: print when one is done.

  Returns:
    By name: "accuracy" on the mean row of the semantic decoder, "latents" on
    the mean latent, "psnr".
  """
  train, test = cifar10.load(run.dataset)
  rows = {}
  for name, config in run.tokenizers:
    done = tokenizer_probes.trained(run, name, config)
    read = functools.partial(_means, done.tokenizer)
    both = [
      np.concatenate(
        list(batching.in_batches(read, data.images, batch_size=_BATCH))
      )
      for data in (train, test)
    ]
    width = config.semantic.width

    def accuracy(part, both=both):
      return tokenizer_probes.ridge_accuracy(
        both[0][:, part], train.labels, both[1][:, part], test.labels
      )

    rows[name] = Row(
      {
        "accuracy": accuracy(slice(0, width)),
        "latents": accuracy(slice(width, None)),
        "psnr": done.run.metrics["psnr"],
      }
    )
    if progress:
      print(name, rows[name].metrics, flush=True)
  return rows


@jax.jit
def _means(tokenizer, raw):
  z = tokenizer.encode(image_classification.pixels(raw))
  both = (tokenizer.semantics(z), z)
  return jnp.concatenate([jnp.mean(x, axis=1) for x in both], axis=1)


def by_need(run: ProbeRun, *, progress: bool = True) -> dict[str, Row]:
  """Whether a LaVIT spends its tokens where images are hard.

  Args:
    run: of LaVITs.
    progress: print when one is done.

  Returns:
    By name, with the patches drawn as in training and as the published code
    draws them always, and by "NAME surest", with those likelier to stay than
    to go: "length", mean tokens of a test image, "spread", their standard
    deviation, "cosine" of the features given back, "random", the same with as
    many patches of each image chosen at random, and "busy", the rank
    correlation of length and bytes of the image as JPEG.
  """
  _, test = cifar10.load(run.dataset)
  images = test.images[: len(test.images) // _BATCH * _BATCH]
  sizes = np.array([_jpeg_bytes(image) for image in images])
  rows: dict[str, Row] = {}
  for name, config in run.tokenizers:
    done = tokenizer_probes.trained(run, name, config)
    teacher = vit_weights.load(tokenizer_probes.encoder(run))
    for label, drawn in ((name, True), (f"{name} surest", False)):
      read = functools.partial(
        _needs, drawn, done.tokenizer, done.state, teacher, run.seed
      )
      found = np.concatenate(
        list(batching.in_batches(read, images, batch_size=_BATCH))
      )
      length, cosine, chance = found.T
      rows[label] = Row(
        {
          "length": float(length.mean()),
          "spread": float(length.std()),
          "cosine": float(cosine.mean()),
          "random": float(chance.mean()),
          "busy": _rank_correlation(length, sizes),
        }
      )
      if progress:
        print(label, rows[label].metrics, flush=True)
  return rows


@functools.partial(jax.jit, static_argnums=0)
def _needs(drawn, tokenizer, state, teacher, seed, raw):
  keys = jax.random.split(jax.random.key(seed))
  images = image_classification.pixels(raw)
  features = tokenizer_run.features(teacher, images)
  keep = tokenizer.select(features, keys[0] if drawn else None).keep
  chance = _shuffled(keys[1], keep)
  columns = [jnp.sum(keep, axis=1)]
  for chosen in (keep, chance):
    output = tokenizer.restore(features, chosen, state)
    columns.append(jnp.mean(similarity.cosine(output, features), axis=1))
  return jnp.stack(columns, axis=1)


def _shuffled(key, keep):
  """As many of each image, elsewhere."""
  return jax.random.permutation(key, keep, axis=1, independent=True)


def _jpeg_bytes(image: Any) -> int:
  return rate_distortion.code(image, "jpeg", 75).payload_bytes


def _rank_correlation(x, y):
  """0 where all of x are the same, which says nothing about y."""
  return float(stats.spearmanr(x, y).statistic) if np.ptp(x) else 0.0
