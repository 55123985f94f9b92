"""LPIPS: how different two images look to a network trained on photographs.

    weights = lpips.read_weights("lpips_vgg16.safetensors", backbone="vgg16")
    distance = lpips.lpips(weights, images, reconstructions)  # one per image

The weights are the caller's; none are shipped or downloaded. `read_weights`
takes safetensors files with the names that torchvision and lpips give, written
once where those are installed and trusted:

    import lpips, pathlib, safetensors.torch, torch, torchvision
    heads = pathlib.Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    tensors = dict(torchvision.models.vgg16(weights="DEFAULT").state_dict())
    tensors |= torch.load(heads, map_location="cpu", weights_only=True)
    safetensors.torch.save_file(tensors, "lpips_vgg16.safetensors")

State the backbone beside every number: VGG16 is the usual one for losses and
in tables of tokenizers, AlexNet the one the authors advise for evaluation.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.models import weights as weight_files
from tokjax.ops import similarity
from tokjax.typing import Array, Float

__all__ = ["LpipsWeights", "from_tensors", "lpips", "read_weights"]

# Of values in -1..1, as published.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class _Conv(NamedTuple):
  """A convolution with its ReLU, and what comes before and after."""

  number: int  # torchvision's `features.<number>`
  size: int = 3  # pixels a side of the kernel
  stride: int = 1
  padding: int = 1
  pool: int = 0  # window of the max-pooling (stride 2) before it; 0 for none
  compared: bool = False  # its output is a layer of the distance


class _Backbone(NamedTuple):
  smallest: int  # pixels a side that leave one place in the last layer
  convolutions: tuple[_Conv, ...]


_BACKBONES = {
  "vgg16": _Backbone(
    16,
    (
      _Conv(0),
      _Conv(2, compared=True),
      _Conv(5, pool=2),
      _Conv(7, compared=True),
      _Conv(10, pool=2),
      _Conv(12),
      _Conv(14, compared=True),
      _Conv(17, pool=2),
      _Conv(19),
      _Conv(21, compared=True),
      _Conv(24, pool=2),
      _Conv(26),
      _Conv(28, compared=True),
    ),
  ),
  "alexnet": _Backbone(
    31,
    (
      _Conv(0, size=11, stride=4, padding=2, compared=True),
      _Conv(3, size=5, padding=2, pool=3, compared=True),
      _Conv(6, pool=3, compared=True),
      _Conv(8, compared=True),
      _Conv(10, compared=True),
    ),
  ),
}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["kernels", "biases", "heads"],
  meta_fields=["backbone"],
)
@dataclasses.dataclass(frozen=True)
class LpipsWeights:
  """A backbone and the weight of each of its channels in the distance.

  Attributes:
    kernels: of the convolutions, [height, width, in, out].
    biases: the same, [out].
    heads: of the five layers that are compared, [channels], not negative.
    backbone: "vgg16" or "alexnet"; static.
  """

  kernels: tuple[Float[Array, "_ _ _ _"], ...]
  biases: tuple[Float[Array, " _"], ...]
  heads: tuple[Float[Array, " _"], ...]
  backbone: str


def lpips(
  weights: LpipsWeights,
  images: Float[Array, "B H W 3"],
  reconstructions: Float[Array, "B H W 3"],
  *,
  precision: str | None = "highest",
) -> Float[Array, " B"]:
  """Learned perceptual distance, per image.

  Both images go through the backbone; in five of its layers the features of
  each place are scaled to length one and compared:

    sum over layers of mean over places of sum_c head_c (f_c - g_c)^2.

  Gradients flow to the images, and to the weights unless you stop them: as a
  loss it wants the weights fixed.

  Args:
    weights: of the backbone and the heads.
    images: values in 0..1 (not -1..1), any float dtype; at least 16 pixels a
      side for VGG16, 31 for AlexNet.
    reconstructions: the same.
    precision: of the convolutions. "highest" is float32 on every device; None
      is the device's own, faster, which will do for a loss.

  Returns:
    float32, not negative; 0 where both are equal.

  Raises:
    ValueError: if the shapes differ or do not suit the backbone.

  Example:
    >>> sizes = [(11, 3, 2), (5, 2, 2), (3, 2, 2), (3, 2, 2), (3, 2, 2)]
    >>> ones = LpipsWeights(
    ...   tuple(jnp.ones((size, size, i, o)) for size, i, o in sizes),
    ...   tuple(jnp.zeros(o) for _, _, o in sizes),
    ...   tuple(jnp.ones(o) for _, _, o in sizes), "alexnet")
    >>> images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    >>> print(jax.jit(lpips)(ones, images, images))
    [0. 0.]

  Cost: two passes of the backbone: for 256 x 256 pixels 40 GFLOPs each with
    VGG16, 1.7 with AlexNet.

  Source: Zhang et al. (2018), "The unreasonable effectiveness of deep features
    as a perceptual metric", version 0.1 of its code (shift, scale and layers),
    whose argument `normalize=True` takes values in 0..1 as here. Features
    shorter than 1e-12 count as zero here, which keeps the gradient finite.
  """
  checks.one_of(tuple(_BACKBONES), backbone=weights.backbone)
  checks.has_rank(4, images=images, reconstructions=reconstructions)
  if images.shape != reconstructions.shape:
    raise ValueError(
      f"reconstructions must have the shape of images, {images.shape}, got "
      f"{reconstructions.shape}"
    )
  checks.in_range(3, 3, image_channels=images.shape[3])
  smallest = _BACKBONES[weights.backbone].smallest
  checks.in_range(smallest, float("inf"), image_side=min(images.shape[1:3]))
  total = 0.0
  for one, two, head in zip(
    _layers(weights, images, precision),
    _layers(weights, reconstructions, precision),
    weights.heads,
    strict=True,
  ):
    difference = similarity.safe_normalize(one) - similarity.safe_normalize(two)
    weighted = (
      jnp.square(difference) * head.astype(jnp.float32)[None, None, None]
    )
    total = total + jnp.mean(jnp.sum(weighted, axis=3), axis=(1, 2))
  return total


def read_weights(
  *paths: str | os.PathLike, backbone: str = "vgg16"
) -> LpipsWeights:
  """Reads the weights from safetensors files.

  Args:
    *paths: one file with everything, or one of the backbone and one of the
      heads. The names are those of `from_tensors`.
    backbone: "vgg16" or "alexnet".

  Returns:
    float32 weights.

  Raises:
    FileNotFoundError: if a file is not there.
    ValueError: if a file is damaged, or as `from_tensors`.

  Example: see the top of this module.
  """
  files = [pathlib.Path(path).expanduser() for path in paths]
  for path in files:
    if not path.is_file():
      raise FileNotFoundError(f"no weights of LPIPS at {path}")
  return from_tensors(weight_files.read_tensors(files), backbone=backbone)


def from_tensors(
  tensors: Mapping[str, np.ndarray], *, backbone: str = "vgg16"
) -> LpipsWeights:
  """Weights from tensors by the names of torchvision and lpips.

  Args:
    tensors: `features.<n>.weight` [out, in, height, width] and
      `features.<n>.bias` of the backbone's convolutions, and
      `lin<k>.model.1.weight` [1, channels, 1, 1] of the heads, k = 0..4.
      `classifier.*`, which nothing here uses, is passed over.
    backbone: "vgg16" or "alexnet".

  Returns:
    float32 weights.

  Raises:
    ValueError: listing every tensor that is missing, unknown or of another
      shape, and heads with negative weights.
  """
  checks.one_of(tuple(_BACKBONES), backbone=backbone)
  left = {k: x for k, x in tensors.items() if not k.startswith("classifier.")}
  problems = []

  def take(name, *shape):
    """The tensor or None; None in `shape` stands for any size."""
    x = left.pop(name, None)
    if x is None:
      problems.append(f"missing tensor {name}")
    elif len(x.shape) != len(shape) or any(
      want not in (None, got) for want, got in zip(shape, x.shape, strict=True)
    ):
      wanted = [size or "any" for size in shape]
      problems.append(f"{name} must be {wanted}, got {list(x.shape)}")
    return x

  kernels, biases, heads, width = [], [], [], 3
  for layer in _BACKBONES[backbone].convolutions:
    name = f"features.{layer.number}"
    kernels.append(take(f"{name}.weight", None, width, layer.size, layer.size))
    width = None if kernels[-1] is None else len(kernels[-1])
    biases.append(take(f"{name}.bias", width))
    if layer.compared:
      name = f"lin{len(heads)}.model.1.weight"
      heads.append(take(name, 1, width, 1, 1))
      if heads[-1] is not None and heads[-1].min() < 0:
        problems.append(f"{name} must not be negative, got {heads[-1].min()}")
  problems += [f"unknown tensor {name}" for name in sorted(left)]
  if problems:
    raise ValueError(
      f"the tensors are not LPIPS with {backbone}:\n  " + "\n  ".join(problems)
    )

  def arrays(tensors):
    return tuple(jnp.asarray(x, jnp.float32) for x in tensors)

  return LpipsWeights(
    arrays(kernel.transpose(2, 3, 1, 0) for kernel in kernels),
    arrays(biases),
    arrays(head.reshape(-1) for head in heads),
    backbone,
  )


def _layers(weights, images, precision):
  """Features of the layers that are compared, float32 [B, h, w, channels]."""
  shift = np.float32(_SHIFT)[None, None, None]
  scale = np.float32(_SCALE)[None, None, None]
  x = (2 * images.astype(jnp.float32) - 1 - shift) / scale
  found = []
  for layer, kernel, bias in zip(
    _BACKBONES[weights.backbone].convolutions,
    weights.kernels,
    weights.biases,
    strict=True,
  ):
    if layer.pool:
      window = (1, layer.pool, layer.pool, 1)
      x = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID"
      )
    x = jax.lax.conv_general_dilated(
      x,
      kernel.astype(jnp.float32),
      (layer.stride, layer.stride),
      [(layer.padding, layer.padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=precision,
    )
    x = jax.nn.relu(x + bias.astype(jnp.float32)[None, None, None])
    if layer.compared:
      found.append(x)
  return found
