"""Public column attention: checks, choice of implementation."""

import functools
import importlib
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from tokjax import checks, compat
from tokjax.kernels import hopper
from tokjax.kernels.column_attention import reference, sharding, xla
from tokjax.typing import Array, Bool, Float, Implementation, Int32

__all__ = ["ColumnAttention", "column_attention"]

# Ids that meet nothing: hidden keys, and rows that see nothing.
_HIDDEN_KEY, _BLIND_ROW = -2, -1


class ColumnAttention(NamedTuple):
  """What a softmax attention map says about its keys and rows.

  Attributes:
    received: weighted sum over rows of the probability each key got.
    log_normalizer: logarithm of the sum of exponentials of each row; -inf in
      rows of weight zero and in rows that see no key.
    highest: highest probability of each row; 0 in those rows.
  """

  received: Float[Array, "*batch H S"]
  log_normalizer: Float[Array, "*batch H R"]
  highest: Float[Array, "*batch H R"]


def column_attention(
  q: Float[Array, "B H R d"],
  k: Float[Array, "B Hk S d"],
  mask: Bool[Array, "B S"] | None = None,
  row_weight: Float[Array, "B R"] | Float[Array, "B H R"] | None = None,
  *,
  scale: float | None = None,
  causal: bool = False,
  segment_ids: Int32[Array, "B S"] | None = None,
  normalizers: ColumnAttention | None = None,
  implementation: Implementation | None = None,
) -> ColumnAttention:
  """How much attention each key receives, without the attention matrix.

      p[i, j] = softmax over visible j of scale * <q[i], k[j]>
      received[j] = sum_i row_weight[i] * p[i, j]

  per head. Fused attention kernels hide p, and writing it out costs R * S
  values a head; here nothing of that size is held: a block of rows is
  normalised and added to the columns at once ("xla"), or a first pass finds
  the maximum and the sum of exponentials of each row and a second adds up the
  probabilities per key (the kernels).

  No gradient passes, to queries, keys or weights: what comes out is meant for
  choosing tokens.

  Args:
    q: queries, float32 or bfloat16, after rotary or other position encoding.
    k: keys in the same dtype; Hk divides H, and query head h reads key head
      h // (H // Hk).
    mask: True where a key exists; None for all. What masked keys hold, NaN
      included, has no influence.
    row_weight: factor of each row, for all heads or per head. Rows of weight
      zero have no influence whatever they hold: give masked rows zero. None
      for 1 / R, which makes `received` a mean.
    scale: factor of the inner products, static; None for d ** -0.5.
    causal: whether row i sees only keys j <= i + (S - R), static: the rows are
      the last R of S tokens.
    segment_ids: rows and keys of equal id see each other, as in encoders with
      windows; then R == S. Negative ids see nothing and are not seen.
    normalizers: what an earlier call returned for other weights and all else
      alike: its softmax is used again, which saves the kernels a pass. Rows
      that had weight zero there must have it here.
    implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu" runs that
      one or raises. None chooses when the program is lowered: the TPU kernel
      on TPU, "xla" elsewhere, and the GPU kernel only where the mesh of
      `jax.set_mesh` says that its devices are Hopper GPUs.

  Returns:
    float32 sums per key and two numbers per row. A key that is masked
    receives 0.

  Raises:
    ValueError: if ranks or sizes disagree, or dtypes differ.
    NotImplementedError: if the named implementation cannot take the arguments.

  Example:
    >>> import jax.numpy as jnp
    >>> q = jnp.zeros((1, 1, 2, 4))
    >>> k = jnp.zeros((1, 1, 4, 4))
    >>> column_attention(q, k).received.tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]

  Cost: 2 * H * R * S * d FLOPs and H * R * S exponentials ("xla"), twice that
  in the kernels, which trade it for memory traffic; half of it when causal.
  Holds O(H (R + S)) values and one block of rows.

  On an Explicit mesh batch and heads may be sharded.

  Source: ours. The two passes are those of the backward of Dao (2023),
  "FlashAttention-2", with the values left out.
  """
  _check(q, k, mask, row_weight, segment_ids, implementation)
  if normalizers is not None:
    normalizers = normalizers[1:]
    if any(x.shape != q.shape[:3] for x in normalizers):
      raise ValueError(
        f"normalizers must be those of {q.shape[:3]} rows, "
        f"got {normalizers[0].shape}"
      )
  if scale is None:
    scale = q.shape[-1] ** -0.5
  q, k, row_weight, normalizers = jax.lax.stop_gradient(
    (q, k, row_weight, normalizers)
  )
  return _column_attention(
    q,
    k,
    mask,
    row_weight,
    segment_ids,
    *(normalizers or (None, None)),
    scale=float(scale),
    causal=causal,
    implementation=implementation,
  )


@functools.partial(
  jax.jit, static_argnames=("scale", "causal", "implementation")
)
def _column_attention(
  q,
  k,
  mask,
  row_weight,
  segment_ids,
  log_normalizer,
  highest,
  *,
  scale,
  causal,
  implementation,
):
  def local(*arrays):
    arrays = compat.varying_together(*arrays)
    q, k, mask, row_weight, segment_ids, log_normalizer, highest = arrays
    ids = _ids(q, k, mask, row_weight, segment_ids)
    weight = _weights(q, row_weight)
    softmax = None
    if highest is not None:
      some = highest > 0
      top = log_normalizer + jnp.log(jnp.where(some, highest, 1))
      softmax = jnp.where(some, top, 0), highest
    received, log_normalizer, highest = _dispatch(
      (q, k, *ids, weight, softmax),
      implementation,
      scale=scale,
      causal=causal,
    )
    if row_weight is not None:
      live = weight != 0
      log_normalizer = jnp.where(live, log_normalizer, -jnp.inf)
      highest = jnp.where(live, highest, 0)
    return ColumnAttention(received, log_normalizer, highest)

  return sharding.over_shards(
    local, q, k, mask, row_weight, segment_ids, log_normalizer, highest
  )


def _ids(q, k, mask, row_weight, segment_ids):
  """Ids [B, R] and [B, S] such that rows see the keys of their id.

  None for both when all is visible and every row counts.
  """
  if mask is None and segment_ids is None and row_weight is None:
    return None, None
  row_ids = jnp.zeros_like(q[:, 0, :, 0], dtype=jnp.int32)  # [B, R]
  key_ids = jnp.zeros_like(k[:, 0, :, 0], dtype=jnp.int32)  # [B, S]
  if segment_ids is not None:
    ids = segment_ids.astype(jnp.int32)
    row_ids = jnp.where(ids >= 0, ids, _BLIND_ROW)
    key_ids = jnp.where(ids >= 0, ids, _HIDDEN_KEY)
  if mask is not None:
    key_ids = jnp.where(mask, key_ids, _HIDDEN_KEY)
  return row_ids, key_ids


def _weights(q, row_weight):
  """float32[B, H, R]."""
  if row_weight is None:
    return jnp.full_like(q[..., 0], 1 / q.shape[2], dtype=jnp.float32)
  weight = row_weight.astype(jnp.float32)
  if weight.ndim == 2:
    weight = jnp.broadcast_to(weight[:, None, :], q.shape[:3])
  return weight


def _dispatch(arrays, implementation, **settings):
  """Runs the implementation named, or that of the platform."""
  q, k = arrays[:2]
  if implementation is not None:
    module = _module(implementation)
    if implementation.startswith("pallas"):
      reason = module.unsupported(q, k)
      if reason is not None:
        raise NotImplementedError(f"{implementation}: {reason}")
    return module.column_attention_forward(*arrays, **settings)

  def branch(module):
    return functools.partial(module.column_attention_forward, **settings)

  branches = {"default": branch(xla)}
  kernels = {"tpu": "pallas_tpu"}
  if hopper.on_hopper():
    kernels["cuda"] = "pallas_gpu"
  for platform, name in kernels.items():
    module = _module(name)
    if module.unsupported(q, k) is None:
      branches[platform] = branch(module)
  return jax.lax.platform_dependent(*arrays, **branches)


def _module(name: str):
  """The module of an implementation; only its users import Pallas."""
  modules = {"reference": reference, "xla": xla}
  return modules.get(name) or importlib.import_module(
    f"tokjax.kernels.column_attention.{name}"
  )


def _check(q, k, mask, row_weight, segment_ids, implementation):
  checks.one_of(
    (None, *get_args(Implementation)), implementation=implementation
  )
  checks.has_rank(4, q=q, k=k)
  checks.has_rank(2, mask=mask, segment_ids=segment_ids)
  checks.same_size(q_batch=q.shape[0], k_batch=k.shape[0])
  checks.same_size(q_dim=q.shape[3], k_dim=k.shape[3])
  checks.in_range(1, 1 << 31, key_heads=k.shape[1])
  checks.divisible(k.shape[1], query_heads=q.shape[1])
  checks.in_range(1, 1 << 31, rows=q.shape[2], keys=k.shape[2])
  if q.dtype != k.dtype:
    raise ValueError(
      f"q and k must have one dtype, got {q.dtype} and {k.dtype}"
    )
  if mask is not None:
    checks.same_size(k_batch=k.shape[0], mask_batch=mask.shape[0])
    checks.same_size(k_keys=k.shape[2], mask_keys=mask.shape[1])
  if segment_ids is not None:
    checks.same_size(k_batch=k.shape[0], segment_batch=segment_ids.shape[0])
    checks.same_size(
      q_rows=q.shape[2],
      k_keys=k.shape[2],
      segment_tokens=segment_ids.shape[1],
    )
  if row_weight is not None:
    shapes = ((q.shape[0], q.shape[2]), q.shape[:3])
    if row_weight.shape not in shapes:
      raise ValueError(
        f"row_weight must have shape {shapes[0]} or {shapes[1]}, "
        f"got {row_weight.shape}"
      )
