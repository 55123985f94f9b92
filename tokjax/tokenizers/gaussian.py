"""Latent tokens as Gaussians: mean and variance, samples, divergence.

    latent = gaussian.from_features(head(x))  # 2 C numbers a token
    z = gaussian.sample(key, latent) if train else latent.mean
    loss = 1e-3 * gaussian.kl_divergence(latent)

A weight of the divergence means something only together with what it is
averaged over; `kl_divergence` takes it as an argument.

Sources: Kingma and Welling, 2014, "Auto-Encoding Variational Bayes"; the range
of the log-variance from published code (CompVis/latent-diffusion).
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.tokenizers.measures import masked_mean
from tokjax.typing import Array, Bool, Float, Key

__all__ = ["Gaussian", "from_features", "kl_divergence", "sample"]

Per = Literal["element", "example"]


class Gaussian(NamedTuple):
  """A normal distribution with independent coordinates for each token.

  Attributes:
    mean: of each coordinate, float32.
    log_variance: of each coordinate, float32.
  """

  mean: Float[Array, "*batch C"]
  log_variance: Float[Array, "*batch C"]


def from_features(
  x: Float[Array, "*batch C2"], *, low: float = -30.0, high: float = 20.0
) -> Gaussian:
  """The first half of the features as means, the second as log-variances.

  Args:
    x: of width 2 C, any float dtype.
    low: log-variances below are raised to it and get no gradient.
    high: those above are lowered to it.

  Returns:
    float32 of width C.

  Raises:
    ValueError: if the width is odd.

  Example:
    >>> from_features(jnp.array([1.0, 99.0])).log_variance.tolist()
    [20.0]
  """
  checks.divisible(2, width_of_x=x.shape[-1])
  mean, log_variance = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return Gaussian(mean, jnp.clip(log_variance, low, high))


def sample(key: Key[Array, ""], latent: Gaussian) -> Float[Array, "*batch C"]:
  """mean + deviation * normal noise; gradients reach both.

  Args:
    key: of the noise.
    latent: distributions.

  Returns:
    float32, one draw for each coordinate.

  Example:
    >>> latent = Gaussian(jnp.ones(2), jnp.full(2, -30.0))
    >>> sample(jax.random.key(0), latent).round(5).tolist()
    [1.0, 1.0]
  """
  noise = jax.random.normal(key, latent.mean.shape, latent.mean.dtype)
  return latent.mean + jnp.exp(latent.log_variance / 2) * noise


def kl_divergence(
  latent: Gaussian,
  mask: Bool[Array, "*batch"] | None = None,
  *,
  per: Per = "element",
  axis_name: str | None = None,
) -> Float[Array, ""]:
  """How far the latents are from the standard normal distribution.

      (mean^2 + variance - 1 - log variance) / 2     for each coordinate

  Args:
    latent: distributions, [B, N, C] or [N, C] and so on.
    mask: True where a token counts; None means all.
    per: "element" is the mean over all coordinates of all tokens, of which
      1e-3 is a usual weight (3DShape2VecSet); "example" the mean over the
      first axis of sums over everything else, of which 1e-6 is (latent
      diffusion). They differ by the factor N C.
    axis_name: mesh axis over which a `shard_map` cuts the batch.

  Returns:
    float32, 0 where every latent is standard normal.

  Raises:
    ValueError: for another `per`.

  Example:
    >>> latent = Gaussian(jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4)))
    >>> [kl_divergence(latent, per=x).item() for x in ("element", "example")]
    [0.5, 6.0]

  Source: Kingma and Welling, 2014, appendix B.
  """
  checks.one_of(get_args(Per), per=per)
  mean, log_variance = latent
  if mask is None:
    mask = jnp.ones(mean.shape[:-1], bool)
  # What does not count may hold anything, NaN too.
  mean, log_variance = (
    jnp.where(mask[..., None], x, 0) for x in (mean, log_variance)
  )
  variance = jnp.exp(log_variance)
  terms = (jnp.square(mean) + variance - 1 - log_variance) / 2
  if per == "element":
    return masked_mean(jnp.mean(terms, axis=-1), mask, axis_name)
  sums = jnp.sum(terms, axis=tuple(range(1, terms.ndim)))
  counts = jnp.any(mask, axis=tuple(range(1, mask.ndim)))
  return masked_mean(sums, counts, axis_name)
