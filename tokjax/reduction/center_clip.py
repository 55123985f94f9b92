"""CenterCLIP: frames of a video are fused into few, with cluster centers only.

Neighboring frames look alike. Between two blocks of the image encoder the
frames are split into segments; the patches of a segment are clustered, only
the centers go on, and the segment becomes one pseudo-frame with one [CLS].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import medoids, merging, similarity, spectral
from tokjax.reduction import types
from tokjax.typing import Array, Bool, Float

__all__ = ["PseudoFrames", "center_clip", "center_cluster", "pool_frames"]

_ALGORITHMS = {
  "kmedoids": medoids.kmedoids,
  "spectral": spectral.spectral_medoids,
}


class PseudoFrames(NamedTuple):
  """Frames of a video after clustering; S segments of M centers.

  Attributes:
    tokens: [CLS] of the segment, then its centers.
    mask: True where the row holds a token.
    patches: the centers alone, with their positions among the patches of
      their segment (frame after frame).
    segment_mask: True where the segment counts in the mean over the video.
  """

  tokens: Float[Array, "*batch S R D"]
  mask: Bool[Array, "*batch S R"]
  patches: types.Reduced
  segment_mask: Bool[Array, "*batch S"]


def center_cluster(
  x: Float[Array, "B T R D"],
  frame_mask: Bool[Array, "B T"] | None = None,
  *,
  num_segments: int,
  num_centers: int,
  algorithm: str = "kmedoids",
  aggregation: str = "medoid",
  compat: str | None = None,
  **options,
) -> PseudoFrames:
  """Turns T frames into S pseudo-frames of M patches each.

  Patches of a segment of T / S frames are clustered together, without any
  notion of where they are; their centers stay in the order of time and space.
  [CLS] tokens are not clustered: the segment gets their mean.

  Args:
    x: tokens of every frame, [CLS] first, as they enter an encoder block
      (standard: the first block of the second half).
    frame_mask: True where the frame is real; None for all. Tokens of other
      frames have no influence.
    num_segments: S, static, divides T.
    num_centers: M, static, at most (R - 1) T / S. 49 for ViT-B/32, 160 for
      ViT-B/16 in the paper.
    algorithm: "kmedoids" (k-medoids++, see `ops.medoids.kmedoids`) or
      "spectral" (see `ops.spectral.spectral_medoids`).
    aggregation: what a center is: "medoid", the token itself (paper), or
      "mean", the mean of its cluster (an option of the published code).
    compat: None, or "reference": padded frames are clustered and averaged as
      real ones, and a segment counts if its last frame is real, as in the
      published code. By default a segment counts if any of its frames does.
    **options: settings of the algorithm: `metric`, `num_iterations`;
      `sigma`, `num_neighbors`, `window`. Published spectral runs: sigma 2,
      5 neighbors per frame of a segment (ViT-B/32).

  Returns:
    S frames of 1 + M tokens. A segment with fewer real patches than M keeps
    all of them; a segment without real frames is masked. Gradients flow to the
    medoids (to all members of a mean) and to [CLS], not through the choice.

  Raises:
    ValueError: if sizes disagree, S does not divide T, M is out of range or a
      name is unknown.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([0.0, 1.0, 2.0, 9.0, 10.0, 12.0]).reshape(1, 2, 3, 1)
    >>> cluster = jax.jit(functools.partial(
    ...     center_cluster, num_segments=1, num_centers=2))
    >>> cluster(x).tokens.tolist()  # [CLS]: 0, 9
    [[[[4.5], [1.0], [10.0]]]]

  Cost: per segment of n patches 2 n^2 D FLOPs, then 2 n^2 M per iteration
  (spectral: 9 n^3); n^2 floats. With many patches clustering can cost more
  time than the shorter sequences save, as the authors' own table shows.

  Source: Zhao et al. (2022), "CenterCLIP: Token Clustering for Efficient
  Text-Video Retrieval". Algorithm and [CLS] mean are those of the published
  code; masks of padded frames are ours.
  """
  checks.has_rank(4, x=x)
  batch, frames, rows, _ = x.shape
  checks.one_of(tuple(_ALGORITHMS), algorithm=algorithm)
  checks.one_of(("medoid", "mean"), aggregation=aggregation)
  checks.one_of((None, "reference"), compat=compat)
  checks.in_range(1, frames, num_segments=num_segments)
  checks.divisible(num_segments, x_frames=frames)
  per_segment = frames // num_segments * (rows - 1)
  checks.in_range(1, per_segment, num_centers=num_centers)
  if frame_mask is None:
    frame_mask = jnp.ones_like(x[:, :, 0, 0], dtype=bool)
  checks.has_rank(2, frame_mask=frame_mask)
  checks.same_size(x_batch=batch, frame_mask_batch=frame_mask.shape[0])
  checks.same_size(x_frames=frames, frame_mask_frames=frame_mask.shape[1])

  def one(x, frame_mask):  # [T, R, D], [T]
    segments = x.reshape(num_segments, -1, rows, x.shape[-1])
    real = frame_mask.reshape(num_segments, -1)  # [S, T / S]
    if compat == "reference":
      counts, real = real[:, -1], jnp.ones_like(real)
    else:
      counts = jnp.any(real, axis=1)
    patches = segments[:, :, 1:].reshape(num_segments, per_segment, -1)
    centers = _ALGORITHMS[algorithm](
      patches,
      jnp.repeat(real, rows - 1, axis=1),
      num_clusters=num_centers,
      **options,
    )
    reduced = _reduce(patches, centers, aggregation, "keep")
    weight = real / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    classes = jnp.where(real[:, :, None], segments[:, :, 0], 0)
    classes = classes.astype(jnp.float32) * weight[:, :, None]
    mean = jnp.sum(classes, axis=1).astype(x.dtype)  # [S, D]
    return PseudoFrames(
      tokens=jnp.concatenate([mean[:, None], reduced.tokens], axis=1),
      mask=jnp.concatenate([real.any(1, keepdims=True), reduced.mask], axis=1),
      patches=reduced,
      segment_mask=counts,
    )

  return jax.vmap(one)(x, frame_mask)


def center_clip(
  features: Float[Array, "B N D"],
  mask: Bool[Array, "B N"] | None = None,
  *,
  num_keep: int,
  num_segments: int = 1,
  algorithm: str = "kmedoids",
  aggregation: str = "medoid",
  positions: str = "keep",
  **options,
) -> types.Reduced:
  """The cluster centers of a sequence of tokens, segment by segment.

  The clustering of `center_cluster` for any tokens, without frames or [CLS].

  Args:
    features: tokens; a segment is N / S of them in a row.
    mask: True where the token is real; masked ones have no influence.
    num_keep: tokens to keep, static, at most N; S divides it.
    num_segments: S, static, divides N.
    algorithm: "kmedoids" or "spectral".
    aggregation: "medoid" or "mean" of each cluster.
    positions: "keep" or "renumber", see `types.positions`.
    **options: settings of the algorithm, see `center_cluster`.

  Returns:
    Medoids (a selection), or means with the plan that makes them; in both
    cases `index` says where the medoids are, ascending. Every segment keeps
    num_keep / S tokens, or all of its valid ones where it has fewer.

  Raises:
    ValueError: if sizes disagree, a number is out of range or not divisible,
      or a name is unknown.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[[0.0], [1.0], [5.0], [20.0], [21.0], [25.0]]])
    >>> reduce = functools.partial(center_clip, num_keep=2, aggregation="mean")
    >>> kept = jax.jit(reduce)(x)
    >>> kept.index.tolist(), kept.tokens.tolist()
    ([[1, 4]], [[[2.0], [22.0]]])

  Cost: as `center_cluster`.

  Source: Zhao et al. (2022), "CenterCLIP".
  """
  checks.has_rank(3, features=features)
  num_tokens = features.shape[1]
  checks.in_range(1, num_tokens, num_keep=num_keep)
  checks.in_range(1, num_tokens, num_segments=num_segments)
  checks.divisible(num_segments, features_tokens=num_tokens, num_keep=num_keep)
  checks.one_of(tuple(_ALGORITHMS), algorithm=algorithm)
  checks.one_of(("medoid", "mean"), aggregation=aggregation)
  if mask is None:
    mask = jnp.ones_like(features[..., 0], dtype=bool)
  checks.same_size(features_batch=features.shape[0], mask_batch=mask.shape[0])
  checks.same_size(features_tokens=num_tokens, mask_tokens=mask.shape[1])
  size = num_tokens // num_segments

  def one(x, mask):  # [N, D], [N]
    centers = _ALGORITHMS[algorithm](
      x.reshape(num_segments, size, -1),
      mask.reshape(num_segments, size),
      num_clusters=num_keep // num_segments,
      **options,
    )
    return _reduce(x, _joined(centers, num_tokens), aggregation, positions)

  return jax.vmap(one)(features, mask)


def pool_frames(
  class_tokens: Float[Array, "B S D"],
  segment_mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B D"]:
  """One unit vector per video, from those of its pseudo-frames.

  Each vector is scaled to length one, the mean is taken over the segments that
  count, and scaled again.

  Args:
    class_tokens: projected [CLS] of every pseudo-frame.
    segment_mask: True where a segment counts; None for all.

  Returns:
    Unit vectors in the dtype of the input; zero where no segment counts.

  Raises:
    ValueError: if the axes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([[[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    >>> pooled = pool_frames(x, jnp.array([[True, True, False]]))
    >>> [round(float(v), 4) for v in pooled[0]]
    [0.7071, 0.7071]

  Source: the head of Zhao et al. (2022), "CenterCLIP", which is that of
  CLIP4Clip (Luo et al. 2022), mean pooling.
  """
  checks.has_rank(3, class_tokens=class_tokens)
  if segment_mask is None:
    segment_mask = jnp.ones_like(class_tokens[..., 0], dtype=bool)
  checks.same_size(
    class_tokens_segments=class_tokens.shape[1],
    segment_mask_segments=segment_mask.shape[1],
  )
  known = jnp.where(segment_mask[..., None], class_tokens, 0)
  unit = similarity.safe_normalize(known.astype(jnp.float32))
  # A sum has the direction of the mean.
  pooled = similarity.safe_normalize(jnp.sum(unit, axis=1))
  return pooled.astype(class_tokens.dtype)


def _reduce(x, centers, aggregation, positions):
  """Medoids [*, K, D] of tokens [*, N, D], or the means of their clusters."""
  if aggregation == "medoid":
    return types.selected(x, centers.index, centers.mask, positions=positions)
  plan = merging.mean_plan(centers.assignment, centers.index.shape[-1])
  return types.fused(x, plan, centers.index, centers.mask, positions=positions)


def _joined(centers, num_tokens):
  """Centers [S, M] of segments as those of one sequence, real ones first."""
  num_segments, per_segment = centers.index.shape
  segment = jnp.arange(num_segments, dtype=jnp.int32)[:, None]
  index = centers.index + segment * (num_tokens // num_segments)
  live = centers.mask.reshape(-1)
  index = jnp.sort(jnp.where(live, index.reshape(-1), num_tokens))
  # Row of each center once the missing ones are moved to the end.
  first = jnp.cumsum(live, dtype=jnp.int32).reshape(centers.mask.shape)[:, 0]
  first = first - centers.mask[:, 0]
  row = first[:, None] + centers.assignment
  row = jnp.where(centers.assignment < per_segment, row, live.size)
  return medoids.Centers(
    jnp.minimum(index, num_tokens - 1), ~jnp.sort(~live), row.reshape(-1)
  )
