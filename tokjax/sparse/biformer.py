"""Bi-level routing attention: a region of a map reads the few that matter.

    out = bi_level_routing_attention(q, k, v, num_regions=7, top_k=4)

of maps [B, H, W, heads, dim]. The map is cut into num_regions x num_regions
regions; each takes the `top_k` regions whose mean key is closest to its mean
query, and its tokens attend to all tokens of those. The steps are functions of
their own: `split_regions`, `region_route`, `routed_attention`, `join_regions`.
`window_attention` is the same with every region reading itself.

`tokjax.models.biformer` is the network of it.

Source: Zhu, Wang, Ke, Zhang, Lau (2023), "BiFormer: Vision Transformer with
Bi-Level Routing Attention", and its code.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokjax import checks
from tokjax.ops import attention
from tokjax.typing import Array, Bool, Float, Int, Int32

__all__ = [
  "Routes",
  "bi_level_routing_attention",
  "join_regions",
  "region_route",
  "routed_attention",
  "split_regions",
  "window_attention",
]


class Routes(NamedTuple):
  """Which regions each region reads.

  Attributes:
    index: numbers of regions, the closest first; ties: the lower number.
    weights: softmax of the affinities of those, float32; 0 for a region
      without valid tokens. Read by soft routing only.
  """

  index: Int32[Array, "*batch R k"]
  weights: Float[Array, "*batch R k"]


def bi_level_routing_attention(
  q: Float[Array, "B H W heads dim"],
  k: Float[Array, "B H W heads dim"],
  v: Float[Array, "B H W heads dim"],
  mask: Bool[Array, "B H W"] | None = None,
  *,
  num_regions: int,
  top_k: int,
  scale: float | None = None,
  soft_routing: bool = False,
  block_size: int | None = None,
  block_queries: int | None = None,
) -> Float[Array, "B H W heads dim"]:
  """Attention of each region to the `top_k` regions closest to it.

  Routes are shared by the heads and pass no gradient. Sides that do not divide
  by `num_regions` are filled up at the bottom and at the right; what is filled
  up, like what the mask hides, is in no mean, read by nobody, and a region of
  nothing else is taken last. (The published code fills up with zeros, which
  its means and its softmax count.)

  Args:
    q: queries.
    k: keys.
    v: values.
    mask: True where a token is real; None for all.
    num_regions: S, regions a side.
    top_k: regions that each reads, 1 to S^2; S^2 is full attention.
    scale: of the logits; None for (heads * dim)^-1/2, which is that of the
      published weights, and not dim^-1/2.
    soft_routing: multiply keys and values of a region by its weight among the
      chosen; off in all published models.
    block_size: as in `routed_attention`.
    block_queries: as in `routed_attention`.

  Returns:
    The mixed values in the dtype of `v`; zeros where the mask is False. To be
    told of positions, the published block adds a 5 x 5 depthwise convolution
    of the whole map of `v`.

  Raises:
    ValueError: if shapes disagree or a number is out of range.

  Example:
    >>> x = jnp.repeat(jnp.array([1.0, 0.0, -1.0, 2.0]), 4)
    >>> x = x.reshape(1, 2, 2, 2, 2).swapaxes(2, 3).reshape(1, 4, 4, 1, 1)
    >>> attend = jax.jit(lambda x: bi_level_routing_attention(
    ...   x, x, x, num_regions=2, top_k=1))
    >>> attend(x)[0, :, :, 0, 0].tolist()[0]
    [2.0, 2.0, 1.0, 1.0]

  Cost: 2 S^4 C FLOPs for the routes and 4 k N^2 C / S^2 for attention of N
    tokens of width C; with S^6 about N^2 k it is of the order N^(4/3).
  """
  _check(q, k, v, mask)
  size = q.shape[1:3]
  q, k, v, valid = _regions(q, k, v, mask, num_regions)
  routes = region_route(q, k, valid, top_k=top_k, scale=scale)
  mixed = routed_attention(
    q,
    k,
    v,
    routes.index,
    valid,
    weights=routes.weights if soft_routing else None,
    scale=scale,
    block_size=block_size,
    block_queries=block_queries,
  )
  return join_regions(mixed, size=size, num_regions=num_regions)


def window_attention(
  q: Float[Array, "B H W heads dim"],
  k: Float[Array, "B H W heads dim"],
  v: Float[Array, "B H W heads dim"],
  mask: Bool[Array, "B H W"] | None = None,
  *,
  num_regions: int,
  scale: float | None = None,
  block_size: int | None = None,
  block_queries: int | None = None,
) -> Float[Array, "B H W heads dim"]:
  """Attention of each region to itself: routing that looks at nothing.

  Args, returns and errors are those of `bi_level_routing_attention`.

  Example:
    >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1, 1)
    >>> jax.jit(lambda x: window_attention(x, x, x, num_regions=2))(x).tolist()
    [[[[[0.0]], [[1.0]]], [[[2.0]], [[3.0]]]]]

  Cost: 4 N^2 C / S^2 FLOPs.
  """
  _check(q, k, v, mask)
  size = q.shape[1:3]
  q, k, v, valid = _regions(q, k, v, mask, num_regions)
  own = jax.lax.iota(jnp.int32, num_regions**2)[None, :, None]
  # Made from an input it is laid out over a mesh as that is.
  own = own + jnp.zeros_like(q[:, :, :1, 0, 0], jnp.int32)
  mixed = routed_attention(
    q,
    k,
    v,
    own,
    valid,
    scale=scale,
    block_size=block_size,
    block_queries=block_queries,
  )
  return join_regions(mixed, size=size, num_regions=num_regions)


def region_route(
  q: Float[Array, "B R n heads dim"],
  k: Float[Array, "B R n heads dim"],
  mask: Bool[Array, "B R n"] | None = None,
  *,
  top_k: int,
  scale: float | None = None,
) -> Routes:
  """The `top_k` regions whose mean key is closest to a region's mean query.

      affinity = scale * mean(q) mean(k)^T    over all heads side by side

  Means and affinities are float32, without gradient.

  Args:
    q: queries of the tokens of each region, see `split_regions`.
    k: keys.
    mask: True where a token is real; None for all. Others are in no mean, and
      a region of none but those comes after all others.
    top_k: how many, 1 to R.
    scale: matters for the weights only; None for (heads * dim)^-1/2.

  Returns:
    Regions in order of affinity.

  Raises:
    ValueError: if shapes disagree or `top_k` is out of range.

  Example:
    >>> x = jnp.array([1.0, 0.0, -1.0, 2.0]).reshape(1, 4, 1, 1, 1)
    >>> routes = jax.jit(lambda x: region_route(x, x, top_k=2))(x)
    >>> routes.index[0].tolist()
    [[3, 0], [0, 1], [2, 1], [3, 0]]

  Cost: 2 R^2 heads dim FLOPs.
  """
  _check(q, k, None, mask)
  checks.in_range(1, q.shape[1], top_k=top_k)
  scale = _scale(scale, q)
  means, known = _means(q, mask), _means(k, mask)
  affinity = scale * jnp.einsum(
    "bid,bjd->bij", means, known, precision=jax.lax.Precision.HIGHEST
  )
  if mask is not None:
    affinity = jnp.where(jnp.any(mask, axis=2)[:, None], affinity, -jnp.inf)
  found, index = jax.lax.top_k(affinity, top_k)
  largest = jnp.where(jnp.isfinite(found[..., :1]), found[..., :1], 0)
  weights = jnp.exp(found - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return Routes(index, weights / jnp.where(total > 0, total, 1))


def routed_attention(
  q: Float[Array, "B R n heads dim"],
  k: Float[Array, "B R n heads dim"],
  v: Float[Array, "B R n heads dim"],
  index: Int[Array, "B R k"],
  mask: Bool[Array, "B R n"] | None = None,
  *,
  weights: Float[Array, "B R k"] | None = None,
  scale: float | None = None,
  block_size: int | None = None,
  block_queries: int | None = None,
) -> Float[Array, "B R n heads dim"]:
  """Attention of the tokens of a region to those of the regions it is given.

  Keys and values are gathered for `block_size` regions at a time, and read by
  `block_queries` tokens of each at a time. If that makes more than one block
  they run one after the other, and again in the backward pass: what is held
  is one block, never `top_k` copies of all keys and values.

  Args:
    q: queries of the tokens of each region, see `split_regions`.
    k: keys.
    v: values.
    index: regions that each reads, none twice; beyond R - 1 counts as R - 1.
    mask: True where a token is real; None for all.
    weights: multiply the keys and the values of a region read; None for 1.
    scale: of the logits; None for (heads * dim)^-1/2.
    block_size: regions at a time; None for R / k, which gathers as much as
      `k` and `v` hold.
    block_queries: tokens of a region at a time; None for all. For a map whose
      regions are large: the logits of a block take 4 B block_size heads
      block_queries k n bytes.

  Returns:
    The mixed values in the dtype of `v`; zeros for tokens that are not real,
    and where there is nothing real to read. Softmax and sums are float32.

  Raises:
    ValueError: if shapes disagree or a number is out of range.

  Example:
    >>> x = jnp.array([1.0, 0.0, -1.0, 2.0]).reshape(1, 4, 1, 1, 1)
    >>> read = jax.jit(routed_attention)(
    ...   x, x, x, jnp.array([[[3], [0], [2], [3]]]))
    >>> read.ravel().tolist()
    [2.0, 1.0, -1.0, 2.0]

  Cost: 4 B R n^2 k heads dim FLOPs. A map of 600 x 500 in float32, 2 heads of
    32, 16 of 49 regions read: compiled for CPU it holds .5 GB beside its inputs
    and result in blocks of 1 and 64, .7 with the gradient, and the same for 1
    region read; at once 460 and 690 GB.
  """
  _check(q, k, v, mask)
  _, num_regions, num_tokens, _, width = q.shape
  checks.has_rank(3, index=index, weights=weights)
  checks.same_size(index_regions=index.shape[1], regions=num_regions)
  if block_size is None:
    block_size = max(1, num_regions // index.shape[2])
  if block_queries is None:
    block_queries = num_tokens
  checks.in_range(1, math.inf, block_size=block_size)
  checks.in_range(1, math.inf, block_queries=block_queries)
  if mask is not None:
    real = mask[..., None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
  # `attend` divides by sqrt(dim).
  factor = _scale(scale, q) * width**0.5
  q = (q.astype(jnp.float32) * factor).astype(q.dtype)
  one_image = functools.partial(
    _read_regions, block_size=block_size, block_queries=block_queries
  )
  mixed = jax.vmap(one_image)(q, k, v, index, mask, weights)
  return mixed if mask is None else jnp.where(real, mixed, 0)


def split_regions(
  x: Float[Array, "B H W *rest"] | Bool[Array, "B H W"], *, num_regions: int
) -> Float[Array, "B R n *rest"] | Bool[Array, "B R n"]:
  """The tokens of num_regions x num_regions regions of a map, row by row.

  Args:
    x: of every token of the map. Sides that do not divide are filled up at the
      end with zeros, False in a mask.
    num_regions: a side; regions beyond the map are filled up whole.

  Returns:
    R = num_regions^2 regions of n = ceil(H / S) ceil(W / S) tokens.

  Raises:
    ValueError: if `num_regions` is below 1.

  Example:
    >>> x = jnp.arange(8.0).reshape(1, 2, 4)
    >>> split_regions(x, num_regions=2).tolist()
    [[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]]
  """
  batch, height, width, *rest = x.shape
  checks.in_range(1, math.inf, num_regions=num_regions)
  rows, columns = -(-height // num_regions), -(-width // num_regions)
  missing = (rows * num_regions - height, columns * num_regions - width)
  if any(missing):
    x = jnp.pad(x, ((0, 0), *((0, n) for n in missing), *[(0, 0)] * len(rest)))
  # One axis at a time, or an explicit mesh cannot tell how it is laid out.
  x = x.reshape(batch, num_regions, rows, x.shape[2], *rest)
  x = x.reshape(batch, num_regions, rows, num_regions, columns, *rest)
  x = x.swapaxes(2, 3)  # [B, S, S, rows, columns, ...]
  x = x.reshape(batch, num_regions**2, rows, columns, *rest)
  return x.reshape(batch, num_regions**2, rows * columns, *rest)


def join_regions(
  x: Float[Array, "B R n *rest"], *, size: tuple[int, int], num_regions: int
) -> Float[Array, "B H W *rest"]:
  """The map that `split_regions` cut up.

  Args:
    x: of every token of the regions.
    size: height and width of the map; what was filled up is left out.
    num_regions: a side.

  Returns:
    [B, H, W, ...].

  Raises:
    ValueError: if the regions are not those of such a map.

  Example:
    >>> x = split_regions(jnp.arange(9.0).reshape(1, 3, 3), num_regions=2)
    >>> join_regions(x, size=(3, 3), num_regions=2)[0].tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
  """
  (height, width), (batch, num, tokens, *rest) = size, x.shape
  rows, columns = -(-height // num_regions), -(-width // num_regions)
  checks.same_size(regions=num, num_regions_squared=num_regions**2)
  checks.same_size(tokens_of_a_region=tokens, tokens_of_size=rows * columns)
  x = x.reshape(batch, num, rows, columns, *rest)
  x = x.reshape(batch, num_regions, num_regions, rows, columns, *rest)
  x = x.swapaxes(2, 3)  # [B, S, rows, S, columns, ...]
  x = x.reshape(batch, num_regions * rows, num_regions, columns, *rest)
  x = x.reshape(batch, num_regions * rows, num_regions * columns, *rest)
  return x[:, :height, :width]


def _read_regions(q, k, v, index, mask, weights, *, block_size, block_queries):
  """One image: q, k and v [R, n, heads, dim]."""
  num_regions, num_tokens = q.shape[:2]

  def region(queries, index, weights):
    keys, values = (x.at[index].get(mode="clip") for x in (k, v))
    if weights is not None:
      weights = weights[:, None, None, None]
      keys, values = (x * weights.astype(x.dtype) for x in (keys, values))
    read = None if mask is None else mask.at[index].get(mode="clip").reshape(-1)
    keys, values = (  # [1, heads, k n, dim]
      x.reshape(-1, *x.shape[2:]).swapaxes(0, 1)[None] for x in (keys, values)
    )

    def rows(queries):  # [m, heads, dim]
      allowed = None
      if read is not None:
        allowed = jnp.broadcast_to(read[None], (len(queries), len(read)))
      queries = queries.swapaxes(0, 1)[None]
      mixed = attention.attend(queries, keys, values, allowed)
      return mixed[0].swapaxes(0, 1)

    if block_queries >= num_tokens:
      return rows(queries)
    return _in_blocks(rows, queries, block_queries)

  def regions(args):
    return jax.vmap(region)(*args)

  args = (q, index, weights)
  if block_size >= num_regions:
    return regions(args)
  return _in_blocks(regions, args, block_size)


def _in_blocks(function, args, size):
  """function of `size` rows at a time; the last block is filled up."""
  num_rows = jax.tree.leaves(args)[0].shape[0]
  num_blocks = -(-num_rows // size)

  def blocks(x):
    missing = num_blocks * size - num_rows
    if missing:
      x = jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(num_blocks, size, *x.shape[1:])

  found = jax.lax.map(jax.checkpoint(function), jax.tree.map(blocks, args))
  return found.reshape(-1, *found.shape[2:])[:num_rows]


def _regions(q, k, v, mask, num_regions):
  """Split maps, and which tokens of them are real; None for all."""
  height, width = q.shape[1:3]
  checks.in_range(1, math.inf, num_regions=num_regions)
  if mask is None and (height % num_regions or width % num_regions):
    mask = jnp.ones_like(q[..., 0, 0], dtype=bool)
  q, k, v = (split_regions(x, num_regions=num_regions) for x in (q, k, v))
  if mask is not None:
    mask = split_regions(mask, num_regions=num_regions)
  return q, k, v, mask


def _means(x, mask):
  """Mean over the real tokens of each region, float32 [B, R, heads dim]."""
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  x = x.reshape(*x.shape[:3], -1)
  if mask is None:
    return jnp.mean(x, axis=2)
  total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=2)
  count = jnp.sum(mask, axis=2, dtype=jnp.float32)
  return total / jnp.maximum(count, 1)[..., None]


def _scale(scale, q):
  return math.prod(q.shape[-2:]) ** -0.5 if scale is None else scale


def _check(q, k, v, mask):
  checks.has_rank(5, q=q)
  for name, x, want in (
    ("k", k, q.shape),
    ("v", v, q.shape),
    ("mask", mask, q.shape[:3]),
  ):
    if x is not None and x.shape != want:
      raise ValueError(f"{name} must be {want} as q is, got {x.shape}")
