"""VTC-CLS: keep the patches that the vision encoder's [CLS] looks at."""

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import attention_scores
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float

__all__ = ["cls_scores", "vtc_cls"]

_REDUCE = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}


def cls_scores(
  q: Float[Array, "L B H 1 d"],
  k: Float[Array, "L B H S d"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_prefix: int = 1,
  reduce: str = "sum",
  scale: float | None = None,
) -> Float[Array, "B N"]:
  """Attention of [CLS] to each patch, over heads and a choice of layers.

  Per layer the softmax runs over all keys, [CLS] itself included; then the
  mean over heads, the patch columns, and `reduce` over layers. Only the [CLS]
  row is computed.

  The layers are those whose queries and keys are given. The paper takes the
  last few up to the penultimate one, whose features the language model reads;
  the published value is not known, the penultimate alone is our default. The
  last layer is none of them: its [CLS] row is trained for pooling.

  Args:
    q: the [CLS] query of each chosen layer.
    k: all keys of those layers, S = `num_prefix` + N.
    mask: True where a patch exists; None for all.
    num_prefix: tokens in front of the patches, [CLS] first, static. They are
      attended to, but get no score.
    reduce: "sum" (the paper's default), "max" or "min" over layers, static.
    scale: factor of the inner products; None for d ** -0.5.

  Returns:
    float32 scores without gradient; 0 at masked patches.

  Raises:
    ValueError: if sizes disagree, or `reduce` is unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> q, k = jnp.ones((2, 1, 1, 1, 4)), jnp.zeros((2, 1, 1, 5, 4))
    >>> [round(x, 4) for x in cls_scores(q, k)[0].tolist()]
    [0.4, 0.4, 0.4, 0.4]

  Cost: 2 * L * H * S * d FLOPs an image.

  Source: Wang et al. (2024), "[CLS] Token Tells Everything Needed for
  Training-free Efficient MLLMs"; the reference code runs one image at a time.
  """
  checks.one_of(tuple(_REDUCE), reduce=reduce)
  checks.has_rank(5, q=q, k=k)
  checks.same_size(q_layers=q.shape[0], k_layers=k.shape[0])
  checks.in_range(0, k.shape[3] - 1, num_prefix=num_prefix)
  checks.same_size(cls_rows=q.shape[3], one=1)
  if mask is not None:
    checks.same_size(
      patch_keys=k.shape[3] - num_prefix, mask_tokens=mask.shape[1]
    )
    mask = jnp.pad(mask, ((0, 0), (num_prefix, 0)), constant_values=True)
  q, k = jax.lax.stop_gradient((q, k))
  rows = jax.vmap(
    lambda q, k: attention_scores.row_attention(q, k, mask, scale=scale)
  )(q, k)  # [L, B, H, 1, S]
  patches = jnp.mean(rows[:, :, :, 0, num_prefix:], axis=2)  # [L, B, N]
  return _REDUCE[reduce](patches, axis=0)


def vtc_cls(
  features: Float[Array, "B N D"],
  scores: Float[Array, "B N"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  positions: str = "keep",
) -> types.Reduced:
  """Keeps the patches with the highest scores, in raster order.

  With `cls_scores` this is VTC-CLS; it is what every method does that ranks
  tokens by one number. Choose before the projector: what it does to one token
  does not depend on the others, and it then runs on `num_keep` tokens.

  Args:
    features: encoder output of the patches, without [CLS].
    scores: one per patch, such as `cls_scores`.
    mask: True where a patch exists; None for all.
    num_keep: tokens to keep, static, at most N.
    positions: "keep" or "renumber" (the reference code), see `types.positions`.

  Returns:
    The kept tokens in their original order; they keep their gradient, the
    scores get none. Ties go to the lower index.

  Raises:
    ValueError: if the token axes disagree or `num_keep` is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[0.5, 0.6, 0.5, 0.4]])
    >>> vtc_cls(jnp.ones((1, 4, 2)), scores, num_keep=2).index.tolist()
    [[0, 1]]

  Cost: a selection of `num_keep` among N numbers, and a gather.

  Source: as `cls_scores`. Evaluated at 256, 128 and 64 of 576 tokens.
  """
  return types.highest(
    features, scores, mask, num_keep=num_keep, positions=positions
  )
