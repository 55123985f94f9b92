"""MUVERA: a set of token vectors as one vector of fixed width.

The inner product of a query's and a document's fixed dimensional encoding
(FDE) stands for their Chamfer similarity (MaxSim), so any index for single
vectors can find candidates, which exact MaxSim then re-ranks. Nothing is
trained: `init` draws random hyperplanes and projections once, and both sides
use the same ones.

    config = muvera.FDEConfig(dim=128, **muvera.PRESETS[10240])
    params = muvera.init(jax.random.key(0), config)
    scores = (muvera.encode_queries(params, config, queries, query_mask)
              @ muvera.encode_documents(params, config, docs, doc_mask).T)

Each repetition cuts the space into 2^k cells by k hyperplanes. A query adds up
the projected tokens of each cell; a document takes their mean, and a cell
without tokens borrows the token whose bits differ least. FDE values lie well
below MaxSim (a mean never beats the maximum it stands for), so use them to find
candidates and not as final scores. For smaller indexes, product codes of
8 dimensions a byte (`tokjax.ops.quantize`) lose little.

Share of the exact ten best documents among N candidates, for N = 64 / 128 /
256 (all-MiniLM-L6-v2 zero-shot tokens of width 384, measured on CPU):

    preset, empty cells    cranfield          vaswani
    1280, left empty       .869 .948 .984     .808 .905 .963
    2560, left empty       .881 .944 .983     .873 .945 .974
    10240, left empty      .951 .986 .997     .941 .983 .999
    10240, filled          .908 .972 .995     .798 .910 .960
    (mean token, 384)      .967 .991 .997     .926 .976 .994

so filling empty cells, as published, hurts on these tokens.

Source: Dhulipala, Hadian, Jayaram, Lee, Mirrokni, 2024, "MUVERA: Multi-Vector
Retrieval via Fixed Dimensional Encodings". From the paper: the construction,
sign projections, ball carving, the presets. From the authors' code
(google/graph-mining): the count sketches and filling by the lowest token among
the nearest. Ours: cells are numbered in binary (theirs in Gray order; inner
products are the same), every part of the randomness has its own key, and empty
cells are found by a distance transform over cells instead of a search over
tokens.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.ops import sketching
from tokjax.retrieval.ball_carving import Balls, ball_carve
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = [
  "PRESETS",
  "Balls",
  "FDEConfig",
  "FDEParams",
  "ball_carve",
  "encode_corpus",
  "encode_documents",
  "encode_packed",
  "encode_queries",
  "init",
]

# Pareto-optimal settings of the paper (its MS MARCO experiments), by FDE width.
# Measured on the synthetic set of the tests (500 documents, 100 queries of
# which each has one right document; mean of 3 keys), recall at 1 and at 10:
# 1280 .817 .980, 2560 .957 .997, 5120 .993 1.0.
PRESETS = {
  1280: dict(num_simhash_bits=3, num_repetitions=20, projection_dim=8),
  2560: dict(num_simhash_bits=4, num_repetitions=20, projection_dim=8),
  5120: dict(num_simhash_bits=5, num_repetitions=20, projection_dim=8),
  10240: dict(num_simhash_bits=5, num_repetitions=20, projection_dim=16),
  20480: dict(num_simhash_bits=5, num_repetitions=20, projection_dim=32),
}

# Repetitions encoded in one step: as many as keep the row of cells or of
# projections of one token below this many numbers.
_STEP_WIDTH = 1024


@dataclasses.dataclass(unsafe_hash=True)
class FDEConfig:
  """Sizes of an encoding; its width is `output_dim`.

  Attributes:
    dim: width D of the token vectors.
    num_simhash_bits: k, hyperplanes per repetition, 0..10; 2^k cells.
    num_repetitions: R, independent partitions side by side.
    projection_dim: width each token is projected to; None keeps it whole.
    final_dim: width after a last count sketch; None leaves R 2^k d as it is.
    inner: the projection: "sign", dense +-1 / sqrt(d) (paper), or "sketch",
      one signed output per coordinate (authors' code).
    fill_empty: whether a document's empty cells borrow a token.
    scale: divides the inner product of both sides by R, so that it estimates
      the Chamfer similarity itself; ranking is the same.
  """

  dim: int
  num_simhash_bits: int = 5
  num_repetitions: int = 20
  projection_dim: int | None = 16
  final_dim: int | None = None
  inner: Literal["sign", "sketch"] = "sign"
  fill_empty: bool = True
  scale: bool = False

  @property
  def num_cells(self) -> int:
    return 2**self.num_simhash_bits

  @property
  def cell_dim(self) -> int:
    return self.dim if self.projection_dim is None else self.projection_dim

  @property
  def full_dim(self) -> int:
    return self.num_repetitions * self.num_cells * self.cell_dim

  @property
  def output_dim(self) -> int:
    return self.full_dim if self.final_dim is None else self.final_dim


class FDEParams(NamedTuple):
  """The random numbers that both sides share.

  Attributes:
    hyperplanes: normals of each repetition, float32.
    projection: matrix of each repetition, entries -1, 0, 1; None for identity.
    final: sketch of the whole encoding; None without.
  """

  hyperplanes: Float[Array, "R D k"]
  projection: Float[Array, "R D d"] | None
  final: sketching.CountSketch | None


def init(key: Key[Array, ""], config: FDEConfig) -> FDEParams:
  """Random hyperplanes, projections and final sketch, from three keys.

  Args:
    key: PRNG key; the same key and config give the same encoding for ever, on
      the same version of jax.
    config: sizes.

  Returns:
    A pytree of arrays for the `encode_*` functions.

  Raises:
    ValueError: if a field of the config is out of range.

  Example:
    >>> import jax
    >>> config = FDEConfig(dim=4, num_simhash_bits=2, num_repetitions=3,
    ...                    projection_dim=2)
    >>> params = init(jax.random.key(0), config)
    >>> params.hyperplanes.shape, params.projection.shape, config.output_dim
    ((3, 4, 2), (3, 4, 2), 24)
  """
  _check_config(config)
  plane_key, projection_key, final_key = jax.random.split(key, 3)
  repetitions, dim, cell_dim = (
    config.num_repetitions,
    config.dim,
    config.cell_dim,
  )
  hyperplanes = sketching.init_hyperplanes(
    plane_key, (repetitions, dim, config.num_simhash_bits)
  )
  projection = None
  if config.projection_dim is not None and config.inner == "sign":
    projection = sketching.init_signs(
      projection_key, (repetitions, dim, cell_dim)
    )
  elif config.projection_dim is not None:
    sketch = sketching.init_count_sketch(
      projection_key, (repetitions, dim), num_outputs=cell_dim
    )
    projection = sketching.sketch_matrix(sketch, num_outputs=cell_dim)
  final = None
  if config.final_dim is not None:
    final = sketching.init_count_sketch(
      final_key, (config.full_dim,), num_outputs=config.final_dim
    )
  return FDEParams(hyperplanes, projection, final)


@functools.partial(jax.jit, static_argnames=("config",))
def encode_queries(
  params: FDEParams,
  config: FDEConfig,
  x: Float[Array, "B N D"],
  mask: Bool[Array, "B N"],
) -> Float[Array, "B F"]:
  """One vector per query: the sum of the projected tokens of every cell.

  Empty cells are zero. Linear within a cell: gradients flow through the
  projected tokens, none through the choice of the cell. Costs
  R N D (k + d) multiply-adds per query.

  Args:
    params: from `init`.
    config: the config given to `init`; static.
    x: query tokens; float32 or bfloat16 (sums are float32).
    mask: True where the token is real; masked rows may hold anything.

  Returns:
    float32 of width `config.output_dim`; zeros for a query without tokens.

  Raises:
    ValueError: if sizes or config disagree.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> config = FDEConfig(dim=2, num_simhash_bits=0, num_repetitions=1,
    ...                    projection_dim=None)
    >>> params = init(jax.random.key(0), config)
    >>> x = jnp.array([[[1.0, 0.0], [2.0, 1.0]]])
    >>> encode_queries(params, config, x, jnp.ones((1, 2), bool)).tolist()
    [[3.0, 1.0]]
  """
  _check_batch(params, config, x, mask)
  return _encode_batch(params, config, x, mask, document=False)


@functools.partial(jax.jit, static_argnames=("config",))
def encode_documents(
  params: FDEParams,
  config: FDEConfig,
  x: Float[Array, "B N D"],
  mask: Bool[Array, "B N"],
) -> Float[Array, "B F"]:
  """One vector per document: the mean of the projected tokens of every cell.

  With `config.fill_empty` an empty cell takes the token whose bits differ from
  it least (ties: lowest token). Gradients flow through the projected tokens,
  none through the choice of cells. Costs R N D (k + d) multiply-adds per
  document; for texts of many lengths see `encode_corpus`.

  Args:
    params: from `init`.
    config: the config given to `init`; static.
    x: document tokens; float32 or bfloat16 (sums are float32).
    mask: True where the token is real; masked rows may hold anything.

  Returns:
    float32 of width `config.output_dim`; zeros for an empty document.

  Raises:
    ValueError: if sizes or config disagree.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> config = FDEConfig(dim=2, num_simhash_bits=0, num_repetitions=1,
    ...                    projection_dim=None)
    >>> params = init(jax.random.key(0), config)
    >>> x = jnp.array([[[1.0, 0.0], [2.0, 1.0]]])
    >>> encode_documents(params, config, x, jnp.ones((1, 2), bool)).tolist()
    [[1.5, 0.5]]
  """
  _check_batch(params, config, x, mask)
  return _encode_batch(params, config, x, mask, document=True)


@functools.partial(jax.jit, static_argnames=("config", "num_documents"))
def encode_packed(
  params: FDEParams,
  config: FDEConfig,
  tokens: Float[Array, "T D"],
  document_ids: Int[Array, " T"],
  *,
  num_documents: int,
) -> Float[Array, "Nd F"]:
  """`encode_documents` for documents back to back, without padding.

  Adds rows by scatter, which is the fast way on a CPU and slow on a TPU.

  Args:
    params: from `init`.
    config: the config given to `init`; static.
    tokens: tokens of all documents.
    document_ids: document of each token; `num_documents` or more marks padding,
      which may hold anything.
    num_documents: static.

  Returns:
    float32 of width `config.output_dim`; zeros for a document without tokens.

  Raises:
    ValueError: if sizes or config disagree.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> config = FDEConfig(dim=1, num_simhash_bits=0, num_repetitions=1,
    ...                    projection_dim=None)
    >>> params = init(jax.random.key(0), config)
    >>> tokens, ids = jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 1])
    >>> encode_packed(params, config, tokens, ids, num_documents=2).tolist()
    [[2.0], [5.0]]
  """
  _check_config(config)
  _check_params(params, config)
  checks.has_rank(2, tokens=tokens)
  checks.same_size(tokens=tokens.shape[0], document_ids=document_ids.shape[0])
  checks.same_size(tokens_width=tokens.shape[1], config_dim=config.dim)
  checks.in_range(1, 2**31 - 1, num_documents=num_documents)
  owner = document_ids.astype(jnp.int32)
  owner = jnp.where(owner >= 0, owner, num_documents)
  tokens = jnp.where((owner < num_documents)[:, None], tokens, 0)

  def pool(cells, values):
    return _pool_by_scatter(cells, values, owner, num_documents, config)

  def encode(planes, projection):
    cells, values = _cells_and_values(config, planes, projection, tokens)
    return _finish_documents(config, pool(cells, values), values)

  start = jnp.zeros_like(tokens, shape=(num_documents, 0), dtype=jnp.float32)
  return _over_repetitions(params, config, start, encode)


def encode_corpus(
  params: FDEParams,
  config: FDEConfig,
  tokens: Float[np.ndarray, "T D"],
  offsets: Int[np.ndarray, " O"],
  *,
  step_tokens: int = 4096,
) -> Float[np.ndarray, "Nd F"]:
  """Encodes documents of any lengths, on the host, in steps of bounded size.

  Packs as many whole documents as fit into `step_tokens` tokens and calls
  `encode_packed`, with the same shapes at each step: one program is compiled
  and at most one document's worth of a step is padding.

  Args:
    params: from `init`.
    config: the config given to `init`.
    tokens: all documents back to back, a NumPy array or memory map.
    offsets: document i owns tokens[offsets[i]:offsets[i + 1]]; Nd + 1 numbers
      from 0 to T.
    step_tokens: tokens per step; raised to the longest document.

  Returns:
    float32 NumPy array, one row per document in order.

  Raises:
    ValueError: if the offsets do not ascend from 0 to the number of tokens.

  Example:
    >>> import jax
    >>> import numpy as np
    >>> config = FDEConfig(dim=1, num_simhash_bits=0, num_repetitions=1,
    ...                    projection_dim=None)
    >>> params = init(jax.random.key(0), config)
    >>> tokens = np.array([[1.0], [3.0], [5.0]], np.float32)
    >>> encode_corpus(params, config, tokens, np.array([0, 2, 3])).tolist()
    [[2.0], [5.0]]
  """
  offsets = np.asarray(offsets, np.int64)
  lengths = np.diff(offsets)
  if offsets[0] != 0 or offsets[-1] != len(tokens) or (lengths < 0).any():
    raise ValueError(
      f"offsets must ascend from 0 to {len(tokens)} (the tokens), got "
      f"{offsets[0]}..{offsets[-1]}"
    )
  checks.in_range(1, 2**30, step_tokens=step_tokens)
  num_documents = len(lengths)
  encodings = np.zeros((num_documents, config.output_dim), np.float32)
  if not len(tokens):
    return encodings
  step_tokens = max(step_tokens, int(lengths.max()))
  # Room for a quarter more documents than fit at the mean length; where they
  # are shorter still, a step ends with room for tokens left.
  capacity = 5 * step_tokens * num_documents // (4 * len(tokens))
  capacity = max(1, min(num_documents, capacity))
  block = np.zeros((step_tokens, tokens.shape[1]), tokens.dtype)
  ids = np.empty(step_tokens, np.int32)
  first = 0
  while first < num_documents:
    end = np.searchsorted(offsets, offsets[first] + step_tokens, "right") - 1
    end = min(int(end), first + capacity)
    used = offsets[end] - offsets[first]
    block[:used] = tokens[offsets[first] : offsets[end]]
    ids[:used] = np.repeat(np.arange(end - first), lengths[first:end])
    ids[used:] = capacity
    # The device copies the host buffers, which the next step fills again.
    step = encode_packed(
      params,
      config,
      jnp.array(block),
      jnp.array(ids),
      num_documents=capacity,
    )
    encodings[first:end] = np.asarray(step)[: end - first]
    first = end
  return encodings


def _encode_batch(params, config, x, mask, *, document):
  x = jnp.where(mask[..., None], x, 0)  # NaN padding must not spread

  def one(mask, cells, values):
    def by_scatter(mask, cells, values):
      owner = jnp.where(mask, 0, 1)
      return _pool_by_scatter(cells, values, owner, 1, config)

    def by_matmul(mask, cells, values):
      return _pool_by_matmul(cells, values, mask, config)

    pooled = jax.lax.platform_dependent(
      mask, cells, values, cpu=by_scatter, default=by_matmul
    )
    if document:
      return _finish_documents(config, pooled, values)[0]
    return pooled.sums[0]

  def encode(planes, projection):
    cells, values = _cells_and_values(config, planes, projection, x)
    return jax.vmap(one)(mask, cells, values)

  start = jnp.sum(x, axis=1, dtype=jnp.float32)[:, :0]
  return _over_repetitions(params, config, start, encode)


def _over_repetitions(params, config, start, encode):
  """Joins, or sketches, the cells of some repetitions at a time.

  `start` [B, 0] has the rows, and the sharding, of what comes out.
  """
  num_rows = start.shape[0]
  width = max(config.num_cells, config.cell_dim)
  size = max(
    r
    for r in range(1, config.num_repetitions + 1)
    if config.num_repetitions % r == 0 and (r == 1 or r * width <= _STEP_WIDTH)
  )
  steps = config.num_repetitions // size
  params = jax.tree.map(
    lambda leaf: leaf.reshape(steps, len(leaf) // steps, *leaf.shape[1:]),
    params,
  )

  def step(total, part):
    rows = encode(part.hyperplanes, part.projection)  # [B, r, C, d]
    rows = rows.reshape(num_rows, -1)
    if config.scale:
      rows = rows / config.num_repetitions**0.5
    if part.final is None:
      return total, rows
    short = sketching.count_sketch(
      rows, part.final, num_outputs=config.final_dim
    )
    return total + short, None

  total = jnp.pad(start, [(0, 0), (0, config.final_dim or 0)])
  total, rows = jax.lax.scan(step, total, params)
  if config.final_dim is not None:
    return total
  return jnp.moveaxis(rows, 0, 1).reshape(num_rows, -1)


class _Pooled(NamedTuple):
  sums: Float[Array, "Nd r C d"]
  counts: Int[Array, "Nd r C"]
  first: Int[Array, "Nd r C"]  # lowest token of the cell, T where empty


def _cells_and_values(config, planes, projection, x):
  """[..., D] -> cells [..., r] and projected tokens [..., r, d], float32."""
  num, dim, num_bits = planes.shape
  # One matmul for the bits and projections of all repetitions of the step.
  weights = jnp.moveaxis(planes, 0, 1).reshape(dim, num * num_bits)
  if projection is not None:
    flat = jnp.moveaxis(projection, 0, 1).reshape(dim, -1)
    weights = jnp.concatenate([weights, flat], axis=1)
  products = jnp.matmul(
    x,
    weights.astype(x.dtype),  # exact: the entries fit bfloat16
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  bits = products[..., : num * num_bits] > 0  # strict, on both sides
  cells = sketching.bits_to_index(bits.reshape(*x.shape[:-1], num, num_bits))
  if projection is None:
    values = x.astype(jnp.float32)[..., None, :]
    return cells, jnp.repeat(values, num, axis=-2)
  values = products[..., num * num_bits :]
  if config.inner == "sign":
    values = values / config.cell_dim**0.5
  return cells, values.reshape(*x.shape[:-1], num, -1)


def _pool_by_scatter(cells, values, owner, num_documents, config):
  num_tokens, num, cell_dim = values.shape
  num_rows = num_documents * num * config.num_cells
  repetition = jnp.arange(num, dtype=jnp.int32)
  row = owner[:, None] * num + repetition[None, :]
  row = row * config.num_cells + cells  # [T, r]
  row = jnp.where((owner < num_documents)[:, None], row, num_rows)
  token = jnp.broadcast_to(jnp.arange(num_tokens)[:, None], row.shape)
  shape = (num_documents, num, config.num_cells)

  # Rows of padding lie outside and are dropped.
  sums = jnp.zeros_like(values, shape=(num_rows, cell_dim))
  sums = sums.at[row.reshape(-1)].add(values.reshape(-1, cell_dim))
  counts = jnp.zeros_like(row, shape=(num_rows,))
  counts = counts.at[row.reshape(-1)].add(1)
  first = jnp.full_like(row, num_tokens, shape=(num_rows,))
  first = first.at[row.reshape(-1)].min(token.reshape(-1))
  return _Pooled(
    sums.reshape(*shape, cell_dim), counts.reshape(shape), first.reshape(shape)
  )


def _pool_by_matmul(cells, values, mask, config):
  num_tokens = values.shape[0]
  members = cells[..., None] == jnp.arange(config.num_cells)[None, None, :]
  members = members & mask[:, None, None]  # [N, r, C]
  sums = jnp.einsum(
    "nrc,nrd->rcd",
    members.astype(jnp.float32),
    values,
    precision="highest",
  )
  token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None, None]
  first = jnp.min(jnp.where(members, token, num_tokens), axis=0)
  counts = jnp.sum(members, axis=0, dtype=jnp.int32)
  return _Pooled(sums[None], counts[None], first[None])


def _finish_documents(config, pooled, values):
  """Means of the cells, the empty ones filled: [Nd, r, C, d]."""
  counts = pooled.counts[..., None]
  means = pooled.sums / jnp.maximum(counts, 1)
  if not config.fill_empty:
    return means
  num_tokens = values.shape[0]
  nearest = sketching.nearest_by_hamming(pooled.first, num_tokens=num_tokens)
  found = (nearest < num_tokens)[..., None]
  index = jnp.minimum(nearest, num_tokens - 1)  # [Nd, r, C]
  num_documents, num, num_cells = index.shape
  index = jnp.moveaxis(index, 1, 2).reshape(-1, num)  # [Nd C, r]
  filled = jnp.take_along_axis(values, index[..., None], axis=0)
  filled = filled.reshape(num_documents, num_cells, num, -1)
  filled = jnp.moveaxis(filled, 1, 2)
  return jnp.where((counts == 0) & found, filled, means)


def _check_config(config):
  largest = 2**31 - 1
  checks.in_range(1, largest, dim=config.dim)
  checks.in_range(0, 10, num_simhash_bits=config.num_simhash_bits)
  checks.in_range(1, largest, num_repetitions=config.num_repetitions)
  checks.one_of(("sign", "sketch"), inner=config.inner)
  if config.projection_dim is not None:
    checks.in_range(1, largest, projection_dim=config.projection_dim)
  if config.final_dim is not None:
    checks.in_range(1, config.full_dim, final_dim=config.final_dim)


def _check_params(params, config):
  want = (config.num_repetitions, config.dim, config.num_simhash_bits)
  if params.hyperplanes.shape != want:
    raise ValueError(
      f"params must come from init with this config: hyperplanes of shape "
      f"{want}, got {params.hyperplanes.shape}"
    )
  if (params.final is None) != (config.final_dim is None):
    raise ValueError(
      f"params must come from init with this config: final_dim is "
      f"{config.final_dim}, params.final is {type(params.final).__name__}"
    )


def _check_batch(params, config, x, mask):
  _check_config(config)
  _check_params(params, config)
  checks.has_rank(3, x=x)
  checks.has_rank(2, mask=mask)
  checks.same_size(x=x.shape[0], mask=mask.shape[0])
  checks.same_size(x_tokens=x.shape[1], mask_tokens=mask.shape[1])
  checks.same_size(x_width=x.shape[2], config_dim=config.dim)
