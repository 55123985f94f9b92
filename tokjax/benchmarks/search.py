"""Search over real token embeddings: recall, queries per second, bytes, build.

    python -m tokjax.benchmarks.search embeddings.npz --data folder --pylate

The .npz holds `tokens` [T, D] and `offsets` of the documents, `queries`
[Nq, Q, D] and `query_mask`, `ids` and `query_ids`, and optionally `pooled` and
`query_pooled` (vectors of a dense retriever). Recall is that of the ten best
of exact float32 MaxSim. All methods run in one process, one after the other;
every one searches the same queries twice and the second time counts, and
building includes everything after the embeddings are in memory.

`--tile N` repeats the corpus to N documents, each copy with a little noise,
so that speed can be measured on sizes that were never encoded.
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from tokjax.benchmarks import timing
from tokjax.data import beir
from tokjax.eval import runs
from tokjax.retrieval import codecs, muvera, search, token_index

__all__ = ["main", "run", "tile"]

_BATCH = 16
_K = 10
# Standard deviation of the noise on a number of a repeated unit vector of
# width 384: copies keep a cosine of about 0.93 with the original.
_NOISE = 0.02


def run(
  embeddings: dict[str, np.ndarray],
  *,
  codec: str = "float32",
  num_candidates: tuple[int, ...] = (128, 256, 1000),
  fde_width: int = 10240,
  fde_fill: tuple[bool, ...] = (False, True),
  pylate: bool = False,
  qrels: dict[str, dict[str, int]] | None = None,
  exact: bool = True,
) -> Iterator[dict[str, Any]]:
  """Times every way to search the same embeddings.

  Args:
    embeddings: the arrays named in the module's docstring.
    codec: how our index stores tokens (codecs.NAMES).
    num_candidates: candidates scored exactly, one row for each.
    fde_width: preset of the fixed dimensional encodings; 0 leaves them out.
    fde_fill: whether empty cells of a document are filled, one row for each.
    pylate: also build and search PyLate's PLAID index.
    qrels: judgements, for nDCG@10; None leaves it out.
    exact: whether to scan exhaustively; without it there is no recall.

  Yields:
    One row per method, as made by `timing.row`.
  """
  tokens, offsets = embeddings["tokens"], embeddings["offsets"]
  queries, mask = embeddings["queries"], embeddings["query_mask"]
  num_documents = len(offsets) - 1
  start = time.perf_counter()
  rule = codecs.train(
    codec,
    jax.random.key(0),
    tokens[:: max(1, len(tokens) // 65536)],
    num_tokens=len(tokens),
  )
  index = token_index.build(tokens, offsets, rule)
  token_s = time.perf_counter() - start
  candidates, seconds = _candidates(embeddings, fde_width, fde_fill)
  found = {}

  def measure(name, function, *, build_s, num_bytes):
    start = time.perf_counter()
    function()
    first_s = time.perf_counter() - start
    start = time.perf_counter()
    index = function()
    taken = time.perf_counter() - start
    gold = found.setdefault("exact", index) if exact else None
    line = {
      "first_s": first_s,
      "median_s": taken / len(queries),
      "qps": len(queries) / taken,
      "build_s": build_s,
      "bytes_per_document": num_bytes / num_documents,
    }
    if gold is not None:
      hits = [len({*a} & {*b}) / _K for a, b in zip(index, gold, strict=True)]
      line["recall@10"] = float(np.mean(hits))
    if qrels is not None:
      line["nDCG@10"] = _ndcg(embeddings, index, qrels)
    shape = {"Nd": num_documents, "T": len(tokens), "Nq": len(queries)}
    return timing.row("search", name, shape, codec, line)

  def ours(index, **settings):
    return lambda: (
      search.search_batches(
        index, queries, mask, k=_K, batch_size=_BATCH, **settings
      ).index
    )

  if exact:
    yield measure(
      "exact", ours(index), build_s=token_s, num_bytes=index.num_bytes
    )
  for name, vectors in candidates.items():
    both = dataclasses.replace(index, candidates={name: vectors})
    given = embeddings["query_pooled"] if name == "pooled" else None
    for number in num_candidates:
      yield measure(
        f"{name} + {number}",
        ours(both, mode=name, num_candidates=number, query_vectors=given),
        build_s=token_s + seconds[name],
        num_bytes=both.num_bytes,
      )
  if pylate:
    with tempfile.TemporaryDirectory() as folder:
      function, build_s, num_bytes = _plaid(embeddings, folder)
      yield measure(
        "PyLate PLAID", function, build_s=build_s, num_bytes=num_bytes
      )


def tile(
  embeddings: dict[str, np.ndarray], num_documents: int, *, seed: int = 0
) -> dict[str, np.ndarray]:
  """The same corpus repeated, each copy with noise of its own.

  Args:
    embeddings: the arrays named in the module's docstring.
    num_documents: documents wanted.
    seed: of the noise.

  Returns:
    The arrays with new tokens (float16 unit vectors), offsets and ids;
    pooled vectors are left out.
  """
  random = np.random.default_rng(seed)
  tokens, offsets = embeddings["tokens"], embeddings["offsets"]
  lengths = np.resize(np.diff(offsets), num_documents)
  ends = np.concatenate([[0], np.cumsum(lengths)])
  out = np.empty((ends[-1], tokens.shape[1]), np.float16)
  for start in range(0, len(out), len(tokens)):
    part = out[start : start + len(tokens)]
    copy = tokens[: len(part)].astype(np.float32)
    if start:
      copy += _NOISE * random.standard_normal(copy.shape, np.float32)
    part[:] = copy / np.linalg.norm(copy, axis=1, keepdims=True)
  kept = ("queries", "query_mask", "query_ids")
  return {
    "tokens": out,
    "offsets": ends.astype(np.int64),
    "ids": np.arange(num_documents).astype(str),
    **{name: embeddings[name] for name in kept},
  }


def _candidates(embeddings, fde_width, fde_fill):
  """Candidate vectors by name, and the seconds each took."""
  tokens, offsets = embeddings["tokens"], embeddings["offsets"]
  start = time.perf_counter()
  means = token_index.mean_vectors(tokens, offsets)
  found = {"mean": token_index.store_vectors(means)}
  seconds = {"mean": time.perf_counter() - start}
  if "pooled" in embeddings:
    found["pooled"] = token_index.store_vectors(embeddings["pooled"])
    seconds["pooled"] = 0.0
  for fill in fde_fill if fde_width else ():
    start = time.perf_counter()
    config = muvera.FDEConfig(
      dim=tokens.shape[1], fill_empty=fill, **muvera.PRESETS[fde_width]
    )
    params = muvera.init(jax.random.key(0), config)
    vectors = muvera.encode_corpus(params, config, tokens, offsets)
    name = f"fde{' filled' if fill else ''}"
    found[name] = token_index.store_vectors(
      vectors, name="int8", fde_params=params, fde_config=config
    )
    seconds[name] = time.perf_counter() - start
  return found, seconds


def _plaid(embeddings, folder):
  """Search function, build seconds and bytes of PyLate's PLAID (2 bits)."""
  import torch
  from pylate import indexes, retrieve

  tokens, offsets = embeddings["tokens"], embeddings["offsets"]
  documents = [
    np.asarray(tokens[a:b], np.float32)
    for a, b in zip(offsets[:-1], offsets[1:], strict=True)
  ]
  queries = [
    torch.from_numpy(np.asarray(query[mask], np.float32))
    for query, mask in zip(
      embeddings["queries"], embeddings["query_mask"], strict=True
    )
  ]
  start = time.perf_counter()
  index = indexes.PLAID(
    index_folder=folder,
    index_name="plaid",
    override=True,
    embedding_size=tokens.shape[1],
  )
  index.add_documents(
    documents_ids=[str(i) for i in range(len(documents))],
    documents_embeddings=documents,
  )
  build_s = time.perf_counter() - start
  files = pathlib.Path(folder).rglob("*")
  num_bytes = sum(file.stat().st_size for file in files if file.is_file())
  retriever = retrieve.ColBERT(index=index)

  def function():
    hits = retriever.retrieve(queries_embeddings=queries, k=_K)
    return np.array([[int(hit["id"]) for hit in row] for row in hits])

  return function, build_s, num_bytes


def _ndcg(embeddings, index, qrels):
  ids = embeddings["ids"]
  run = {
    str(query): {
      str(ids[document]): float(-place) for place, document in enumerate(row)
    }
    for query, row in zip(embeddings["query_ids"], index, strict=True)
  }
  judged = {query: qrels[query] for query in run if query in qrels}
  return runs.evaluate(run, judged, ("nDCG@10",))["nDCG@10"]


def main(argv: list[str] | None = None) -> None:
  """Runs the comparison and prints its table.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("embeddings", help=".npz with tokens and queries")
  parser.add_argument("--data", help="data set folder, for nDCG@10")
  parser.add_argument("--codec", default="float32", choices=codecs.NAMES)
  parser.add_argument("--queries", type=int, help="use only the first ones")
  parser.add_argument("--candidates", type=int, nargs="*", default=[128, 256])
  parser.add_argument("--fde", type=int, default=10240, help="0 for none")
  parser.add_argument("--no-fill", action="store_true")
  parser.add_argument("--tile", type=int, help="repeat to so many documents")
  parser.add_argument("--pylate", action="store_true")
  parser.add_argument("--no-exact", action="store_true")
  parser.add_argument("--out", help="file to append JSON lines to")
  options = parser.parse_args(argv)
  with np.load(options.embeddings) as file:
    embeddings = dict(file)
  for name in ("queries", "query_mask", "query_ids", "query_pooled"):
    if name in embeddings:
      embeddings[name] = embeddings[name][: options.queries]
  if options.tile:
    embeddings = tile(embeddings, options.tile)
  rows = []
  for line in run(
    embeddings,
    codec=options.codec,
    num_candidates=tuple(options.candidates),
    fde_width=options.fde,
    fde_fill=(False,) if options.no_fill else (False, True),
    pylate=options.pylate,
    qrels=beir.load(options.data).qrels if options.data else None,
    exact=not options.no_exact,
  ):
    rows.append(line)
    if options.out:  # as they come: the slowest is the last
      timing.write_rows([line], options.out)
  columns = ["implementation", "recall@10", "nDCG@10", "qps", "build_s"]
  timing.print_rows(rows, [*columns, "bytes_per_document", "first_s"])


if __name__ == "__main__":
  main()
