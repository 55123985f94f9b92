"""Gradients past a choice of code: what goes forward is not what comes back.

x is continuous, q the code that was picked for it. Forward all of these give
q, bit for bit, but for `directional`; they differ in the gradient of x.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax.ops import similarity
from tokjax.typing import Array, Float, Int, Key

__all__ = [
  "Coded",
  "directional",
  "gumbel_codes",
  "index_backpropagation",
  "rotate_to",
  "straight_through",
]


class Coded(NamedTuple):
  """What a quantiser made of vectors.

  Attributes:
    codes: the vectors picked, with the gradient that the quantiser documents.
    index: which code each vector got, int32; of residual quantisers one per
      stage, on one more axis.
  """

  codes: Float[Array, "*batch D"]
  index: Int[Array, "*batch"] | Int[Array, "*batch M"]


def straight_through(
  x: Float[Array, "*batch D"], q: Float[Array, "*batch D"]
) -> Float[Array, "*batch D"]:
  """The codes q, with the gradient of x: dz/dx = I, none to q.

  Computed as q + (x - stop_gradient(x)): the usual x + (q - x) is q only up
  to the rounding of x, and 0 where x is huge.

  Args:
    x: continuous vectors.
    q: the code of each.

  Returns:
    q in the dtype of x.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> x, q = jnp.array([0.3, -2.0]), jnp.array([0.5, -1.0])
    >>> z, vjp = jax.vjp(lambda x: straight_through(x, q), x)
    >>> z.tolist(), vjp(jnp.array([7.0, 9.0]))[0].tolist()
    ([0.5, -1.0], [7.0, 9.0])

  Source: Bengio, Leonard, Courville, 2013, "Estimating or Propagating
  Gradients Through Stochastic Neurons".
  """
  _same_shape(x, q)
  return jax.lax.stop_gradient(q).astype(x.dtype) + (
    x - jax.lax.stop_gradient(x)
  )


def rotate_to(
  x: Float[Array, "*batch D"], q: Float[Array, "*batch D"]
) -> Float[Array, "*batch D"]:
  """The codes q, as the rotation and scaling of x that ends there.

  dz/dx = s R, where s = |q| / |x| and R turns x towards q in the plane of the
  two: a gradient keeps its angle to q as an angle to x. R is held fixed and q
  gets no gradient. With the unit vectors u of x, v of q and w of u + v,
  R = I - 2 w w^T + 2 v u^T, computed as two reflections, orthogonal whatever
  the rounding. Opposite vectors (|u + v| below 1e-6) have no plane: R is then
  the reflection that takes u to v. Where x is 0 the gradient is the
  straight-through one; where q is 0, s and the gradient are 0.

  Args:
    x: continuous vectors; float32 inside.
    q: the code of each.

  Returns:
    q in the dtype of x.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> x, q = jnp.array([3.0, 4.0]), jnp.array([2.0, 0.0])
    >>> z, vjp = jax.vjp(jax.jit(rotate_to), x, q)
    >>> [round(float(g), 6) for g in vjp(jnp.array([1.0, 0.0]))[0]]
    [0.24, 0.32]

  Source: Fifty et al., 2025, "Restructuring Vector Quantization with the
  Rotation Trick"; the cases of opposite and zero vectors are ours.
  """
  _same_shape(x, q)
  wide = x.astype(jnp.float32)
  fixed, code = jax.lax.stop_gradient((wide, q.astype(jnp.float32)))
  u, v = similarity.safe_normalize(fixed), similarity.safe_normalize(code)
  # |x| as x.u, whose squares cannot overflow; 0 where x counts as zero.
  length = jnp.sum(fixed * u, axis=-1, keepdims=True)
  nonzero = length > 0
  w = jnp.where(nonzero, similarity.safe_normalize(u + v, epsilon=1e-6), 0)
  scale = jnp.sum(code * v, axis=-1, keepdims=True) / jnp.where(
    nonzero, length, 1.0
  )
  # (I - 2 w w^T)(I - 2 u u^T) = R, as the left one takes u to -v.
  turned = _reflect(_reflect(wide, u), w) * jnp.where(nonzero, scale, 1.0)
  return straight_through(turned, code).astype(x.dtype)


def directional(
  key: Key[Array, ""],
  x: Float[Array, "*batch D"],
  q: Float[Array, "*batch D"],
  *,
  variance: float | Float[Array, ""] = 5e-3,
) -> Float[Array, "*batch D"]:
  """x moved by the distance to its code, in a noisy direction towards it.

  z = x + |q - x| d, where d is the direction of q - x + n, n ~ N(0, variance
  I), held fixed. Gradients reach x and q through the distance, so the codes
  learn without a loss of their own. z is not q: it lies exactly as far from
  x. Without training use q.

  Args:
    key: PRNG key of the noise.
    x: continuous vectors; float32 inside.
    q: the code of each, with its gradient.
    variance: of each component of the noise; 5e-3 as in public code.

  Returns:
    z in the dtype of x. Where q = x it is x, and no gradient passes the
    distance.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> x, q = jnp.array([0.0, 0.0]), jnp.array([3.0, 4.0])
    >>> z = jax.jit(directional)(jax.random.key(0), x, q)
    >>> round(float(jnp.linalg.norm(z)), 5)
    5.0

  Source: Vali et al., 2025, "DiVeQ: Differentiable Vector Quantization Using
  the Reparameterization Trick".
  """
  _same_shape(x, q)
  wide = x.astype(jnp.float32)
  error = q.astype(jnp.float32) - wide
  noise = jnp.sqrt(variance) * jax.random.normal(key, error.shape, jnp.float32)
  direction = jax.lax.stop_gradient(similarity.safe_normalize(error + noise))
  square = jnp.sum(jnp.square(error), axis=-1, keepdims=True)
  nonzero = square > 0  # the inner `where` keeps sqrt away from 0
  distance = jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, square, 1.0)), 0)
  return (wide + distance * direction).astype(x.dtype)


def gumbel_codes(
  key: Key[Array, ""],
  logits: Float[Array, "*batch V"],
  codebook: Float[Array, "V D"],
  *,
  temperature: float | Float[Array, ""] = 1.0,
) -> Coded:
  """A code drawn from softmax(logits), with the gradient of a soft choice.

  With Gumbel noise g the draw is the argmax of logits + g. Backward it counts
  as p = softmax((logits + g) / temperature): dz/dlogits is that of p @
  codebook. The codebook gets the gradient of the rows drawn. The identity as
  codebook gives the choice itself, one-hot.

  Args:
    key: PRNG key of the draw.
    logits: unnormalised log probabilities, -distance for instance; float32
      inside.
    codebook: the vectors to choose from.
    temperature: low ones make p sharp and its gradient steep; 1 is ours.

  Returns:
    The codes drawn in the dtype of the codebook and their index.

  Raises:
    ValueError: if the logits are not one per code.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[0.0, 50.0], [50.0, 0.0]])
    >>> book = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> jax.jit(gumbel_codes)(jax.random.key(0), logits, book).codes.tolist()
    [[3.0, 4.0], [1.0, 2.0]]

  Source: Jang, Gu, Poole, 2017, "Categorical Reparameterization with
  Gumbel-Softmax" (the straight-through form).
  """
  _one_logit_per_code(logits, codebook)
  noise = jax.random.gumbel(key, logits.shape, jnp.float32)
  noisy = logits.astype(jnp.float32) + noise
  return _pick(noisy, noisy / temperature, codebook)


def index_backpropagation(
  logits: Float[Array, "*batch V"], codebook: Float[Array, "V D"]
) -> Coded:
  """The code of the largest logit, with the gradient of softmax(logits).

  dz/dlogits is that of softmax(logits) @ codebook, so when the logits are
  x @ codebook.T all codes get a gradient, not those picked alone. z itself
  gives the codebook the gradient of the rows picked. Holds N x V floats.

  Args:
    logits: similarity of every vector with every code (ties: lowest index);
      float32 inside.
    codebook: the codes.

  Returns:
    The codes in the dtype of the codebook and their index.

  Raises:
    ValueError: if the logits are not one per code.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> logits, book = jnp.array([[0.0, 2.0]]), jnp.array([[1.0], [3.0]])
    >>> coded = jax.jit(index_backpropagation)(logits, book)
    >>> coded.codes.tolist(), coded.index.tolist()
    ([[3.0]], [1])

  Source: Shi et al., 2024, "Scalable Image Tokenization with Index
  Backpropagation Quantization".
  """
  _one_logit_per_code(logits, codebook)
  wide = logits.astype(jnp.float32)
  return _pick(wide, wide, codebook)


def _pick(scores, logits, codebook):
  """Hard by scores going forward, softmax(logits) coming back."""
  index = jnp.argmax(scores, axis=-1).astype(jnp.int32)
  hard = jax.nn.one_hot(index, codebook.shape[0], dtype=jnp.float32)
  choice = straight_through(jax.nn.softmax(logits, axis=-1), hard)
  codes = jnp.einsum(
    "...v,vd->...d", choice, codebook.astype(jnp.float32), precision="highest"
  )
  return Coded(codes.astype(codebook.dtype), index)


def _reflect(x, unit):
  return x - 2 * jnp.sum(x * unit, axis=-1, keepdims=True) * unit


def _same_shape(x, q):
  if x.shape != q.shape:
    raise ValueError(f"q must have the shape of x, {x.shape}, got {q.shape}")


def _one_logit_per_code(logits, codebook):
  if codebook.ndim != 2 or codebook.shape[0] != logits.shape[-1]:
    raise ValueError(
      f"codebook must have one row for each of {logits.shape[-1]} logits, "
      f"got shape {codebook.shape}"
    )
