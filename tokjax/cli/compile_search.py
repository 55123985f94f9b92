"""`tokjax compile --search N`: search of a corpus spread over a slice.

The program is `retrieval.search.search_sharded`; the index is a stack of
shards, one per device, as shapes: N documents of 80 tokens of width 128, about
what passages of MS MARCO have. Sixteen queries of 32 tokens are searched at
once, by each mode:

- exact: every document;
- mean: one mean vector per document (int8), the best 256 of every device
  scored exactly;
- fde: the same with a fixed dimensional encoding of width 10,240 (int8).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import checks
from tokjax.cli import compile_fit
from tokjax.parallel import data_sheets
from tokjax.retrieval import codecs as token_codecs
from tokjax.retrieval import muvera, search, token_index

__all__ = ["CODECS", "MODES", "abstract_index", "rows"]

CODECS = ("int8", "residual2")  # what is compiled if none is named
MODES = ("exact", "mean", "fde")
_TOKENS = 80  # of a document
_DIM = 128
_QUERIES, _QUERY_TOKENS = 16, 32
_K, _CANDIDATES = 10, 256
_FDE = muvera.FDEConfig(dim=_DIM, **muvera.PRESETS[10240])


def rows(
  num_documents: int,
  *,
  topology: str,
  devices: Sequence[Any],
  codecs: Sequence[str] = CODECS,
) -> Iterator[dict[str, Any]]:
  """Compiles every mode over every codec.

  Args:
    num_documents: of the whole corpus.
    topology: name of the devices.
    devices: from `topologies.devices_of`.
    codecs: names in `retrieval.codecs.NAMES`.

  Yields:
    Rows, see `compile_fit.compile_row`; the bound is for one query of a batch.

  Raises:
    ValueError: for an unknown codec or fewer documents than devices.
  """
  mesh = jax.sharding.Mesh(np.array(devices), ("shards",))
  shard, whole = (
    jax.sharding.NamedSharding(mesh, spec)
    for spec in (jax.P("shards"), jax.P())
  )
  array = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
  queries = array((_QUERIES, _QUERY_TOKENS, _DIM), jnp.float32)
  query_mask = array((_QUERIES, _QUERY_TOKENS), bool)
  sheet = data_sheets.find(topology)
  for codec in codecs:
    for mode in MODES:
      index, sizes = abstract_index(
        num_documents, len(devices), codec=codec, mode=mode
      )
      index = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shard), index
      )
      function = functools.partial(
        search.search_sharded,
        mesh=mesh,
        axis_name="shards",
        shard_sizes=sizes,
        mode=mode,
        k=_K,
        num_candidates=min(_CANDIDATES, max(sizes)),
      )
      bound = None
      if sheet:
        bound = data_sheets.bound(sheet, **_work(index, mode, len(devices)))
        bound = data_sheets.Bound(*(seconds / _QUERIES for seconds in bound))
      yield compile_fit.compile_row(
        # The index lies in memory whether a mode reads all of it or not.
        jax.jit(function, keep_unused=True),
        (index, queries, query_mask),
        topology=topology,
        devices=devices,
        bound=bound,
        unit="query",
        program=f"{mode} {codec}",
        num_documents=num_documents,
      )


def abstract_index(
  num_documents: int,
  num_shards: int,
  *,
  codec: str,
  mode: str,
  num_tokens: int = _TOKENS,
  dim: int = _DIM,
  fde: muvera.FDEConfig = _FDE,
) -> tuple[token_index.TokenIndex, tuple[int, ...]]:
  """What `token_index.stack_shards` gives for a corpus, as shapes.

  Args:
    num_documents: of the corpus, at least `num_shards`.
    num_shards: parts of equal size, to within one document.
    codec: a name in `retrieval.codecs.NAMES`.
    mode: one of `MODES`; the index holds its candidate vectors.
    num_tokens: of every document.
    dim: width of a token.
    fde: settings of mode "fde".

  Returns:
    The index, and the documents of each shard.

  Raises:
    ValueError: for an unknown codec or mode, or sizes out of range.

  Example:
    >>> index, sizes = abstract_index(1000, 8, codec="int8", mode="exact")
    >>> index.payload["values"].shape, sizes[0]
    ((8, 14096, 128), 125)
  """
  checks.one_of(token_codecs.NAMES, codec=codec)
  checks.one_of(MODES, mode=mode)
  checks.in_range(num_shards, 1 << 31, num_documents=num_documents)
  smallest, rest = divmod(num_documents, num_shards)
  sizes = tuple(smallest + (shard < rest) for shard in range(num_shards))
  largest = sizes[0]
  # Pages and blocks are those of a real index of one such document.
  small = token_index.build(
    np.zeros((num_tokens, dim), np.float32), np.array([0, num_tokens])
  )
  per_block = small.block_pages // small.max_pages
  num_blocks = math.ceil(largest / per_block)
  # A block past the end of each index, and one more past that of each shard.
  num_pages = largest * small.max_pages + 2 * small.block_pages

  def stacked(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((num_shards, *shape), dtype)

  def repeated(tree):
    return jax.tree.map(lambda x: stacked(*x.shape, dtype=x.dtype), tree)

  def encoded(codec, rows):
    vectors = jax.ShapeDtypeStruct((rows, codec.dim), jnp.float32)
    shapes = jax.eval_shape(lambda codec, x: codec.encode(x), codec, vectors)
    return repeated(shapes)

  candidates = {}
  if mode != "exact":
    is_fde = mode == "fde"
    stored = token_codecs.Int8Codec(dim=fde.output_dim if is_fde else dim)
    params = None
    if is_fde:
      params = jax.eval_shape(lambda: muvera.init(jax.random.key(0), fde))
    candidates[mode] = token_index.Candidates(
      codec=stored,
      payload=encoded(stored, largest),
      fde_params=repeated(params),
      fde_config=fde if is_fde else None,
    )
  tokens = _abstract_codec(codec, dim, num_documents * num_tokens)
  index = token_index.TokenIndex(
    codec=repeated(tokens),
    payload=encoded(tokens, num_pages * small.page_size),
    first_page=stacked(largest),
    num_pages=stacked(largest),
    num_tokens=stacked(largest),
    page_rank=stacked(num_pages),
    live=stacked(largest, dtype=bool),
    block_start=stacked(num_blocks + 1),
    candidates=candidates,
    page_size=small.page_size,
    block_pages=small.block_pages,
    max_pages=small.max_pages,
    block_documents=min(per_block, largest),
  )
  return index, sizes


def _abstract_codec(name, dim, num_tokens):
  """The codec that `codecs.train` makes for a corpus of that size."""
  if name in ("float32", "bfloat16", "float16", "int8"):
    return token_codecs.train(name, None, jnp.zeros((1, dim)))
  if not name.startswith("residual"):
    sample = jax.ShapeDtypeStruct((256, dim), jnp.float32)
    return jax.eval_shape(
      lambda x: token_codecs.train(name, jax.random.key(0), x), sample
    )
  num_bits = int(name.removeprefix("residual"))
  array = jax.ShapeDtypeStruct
  return token_codecs.ResidualCodec(
    centroids=array(
      (token_codecs.num_residual_centroids(num_tokens), dim), jnp.float32
    ),
    cutoffs=array((2**num_bits - 1,), jnp.float32),
    weights=array((2**num_bits,), jnp.float32),
    dim=dim,
    num_bits=num_bits,
  )


def _work(index, mode, num_devices):
  """What one device has to compute and read for one batch, at least.

  Products are float32 at full precision. Stored rows are read once for the
  batch, those of candidates once for each query; decoding is not counted.
  """
  num_documents = index.num_documents
  of_document = index.max_pages * index.page_size  # rows, padding included
  num_rows = num_documents * of_document
  multiply = 2 * data_sheets.FLOAT32_PASSES
  flops = memory_bytes = 0.0
  if mode == "exact":
    scored = num_rows * _QUERIES
    read = num_rows
  else:
    vectors = index.candidates[mode].codec
    flops = multiply * _QUERIES * num_documents * vectors.dim
    memory_bytes = num_documents * vectors.bytes_per_token
    scored = read = _QUERIES * min(_CANDIDATES, num_documents) * of_document
  flops += multiply * scored * _QUERY_TOKENS * index.codec.dim
  row_bytes = sum(
    math.prod(x.shape[2:]) * x.dtype.itemsize for x in index.payload.values()
  )
  found = 8 * _QUERIES * _K * (num_devices - 1)  # position and score
  return {
    "flops": flops,
    "memory_bytes": memory_bytes + read * row_bytes,
    "link_bytes": float(found),
  }
