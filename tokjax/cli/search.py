"""`tokjax search`: asks an index, once or from the terminal."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from tokjax.cli import index as index_command
from tokjax.models import checkpoints
from tokjax.retrieval import (
  alignment,
  colbert,
  index_files,
  methods,
  token_index,
)

__all__ = ["Hit", "Searcher", "main", "open_searcher"]

# Below so many documents the exact scan answers as fast as candidates do.
_EXACT_DOCUMENTS = 10_000


class Hit(NamedTuple):
  """One result.

  Attributes:
    id: of the document.
    score: by the method of the index: MaxSim, for XTR the mean over the
      tokens retrieved, for ColBERTer both scores mixed.
    text: of the document.
  """

  id: str
  score: float
  text: str


class Searcher(NamedTuple):
  """An opened index with the model that encodes its queries.

  Attributes:
    index: the documents.
    ids: one string per document.
    texts: one text per document.
    checkpoint: the model, with the method of the index.
  """

  index: token_index.TokenIndex
  ids: list[str]
  texts: list[str]
  checkpoint: checkpoints.Checkpoint

  def __call__(
    self,
    query: str,
    *,
    k: int = 10,
    mode: str = "auto",
    num_candidates: int = 512,
  ) -> list[Hit]:
    """The k best documents for a query, best first.

    Args:
      query: any text.
      k: how many, cut to the size of the index.
      mode: as in `methods.search`, or "auto": the method's own, but "fde"
        for large indexes of ColBERT and CRISP that have it.
      num_candidates: documents scored in full, where the mode finds
        candidates.

    Returns:
      The documents found.

    Raises:
      ValueError: for an empty query or a mode the index does not have.
    """
    if not query.strip():
      raise ValueError("query must not be empty")
    if mode == "auto":
      mode = self._own_mode()
    k = min(k, self.index.num_documents)
    found = methods.search(
      self.index,
      self.encode(query),
      self.checkpoint,
      mode=mode,
      k=k,
      num_candidates=max(k, num_candidates),
      batch_size=1,
    )
    return [
      Hit(self.ids[place], float(score), self.texts[place])
      for place, score in zip(found.index[0], found.scores[0], strict=True)
      if place >= 0
    ]

  def encode(self, query: str) -> colbert.Queries:
    """The query's vectors."""
    return methods.encode_queries([query], self.checkpoint)

  def matches(self, query: str, text: str) -> list[alignment.Match]:
    """Words of a text that the words of the query matched best.

    By the token vectors, whatever CRISP makes of them; none for ColBERTer,
    which has no token vectors.
    """
    if self.checkpoint.method.name == "colberter":
      return []
    model = dataclasses.replace(self.checkpoint, method=methods.Method())
    return alignment.align(
      query,
      text,
      methods.encode_queries([query], model).tokens[0],
      methods.encode_documents([text], model, progress=False).tokens,
      model.tokenizer,
      model.config,
    )

  def _own_mode(self):
    large = self.index.num_documents > _EXACT_DOCUMENTS
    by_maxsim = self.checkpoint.method.name in ("colbert", "crisp")
    found = by_maxsim and large and "fde" in self.index.candidates
    return "fde" if found else None


def open_searcher(folder: str, *, model: str | None = None) -> Searcher:
  """Opens an index that `tokjax index` made, and its model.

  Args:
    folder: local path or bucket URL.
    model: where the model is now; None for where it was.

  Returns:
    A function of queries.

  Raises:
    FileNotFoundError: if the index or the model is not there.
    ValueError: if the model's weights are not those the index was made with.
  """
  stored = index_files.open_index(folder)
  index, ids, texts = index_command.load(stored)
  checkpoint = checkpoints.load(model or stored.metadata["model"])
  if checkpoint.sha256 != stored.metadata["sha256"]:
    raise ValueError(
      f"index {folder} was made with weights of sha256 "
      f"{stored.metadata['sha256'][:16]}..., the model has "
      f"{checkpoint.sha256[:16]}...; name the right one with --model"
    )
  method = index_command.read_config(stored).method
  checkpoint = dataclasses.replace(checkpoint, method=method)
  return Searcher(index, ids, texts, checkpoint)


def main(argv: list[str]) -> int:
  """Searches; see `tokjax search --help`."""
  parser = argparse.ArgumentParser(
    prog="tokjax search",
    description="Asks an index. Without a query, reads one query a line from"
    " the terminal (or a pipe) until the end of the input.",
  )
  add = parser.add_argument
  add("index", help="folder that `tokjax index` wrote")
  add("query", nargs="?", help="what to look for; put it in quotes")
  add("-k", type=int, default=10, help="results (default: 10)")
  add(
    "--mode",
    default="auto",
    choices=("auto", "exact", "fde", "pooled", "xtr", "cls"),
    help="how candidates are found before exact MaxSim; exact scores all,"
    f" auto is exact up to {_EXACT_DOCUMENTS:,} documents, and always xtr for"
    " XTR and cls for ColBERTer (default: auto)",
  )
  add("--candidates", type=int, default=512, metavar="N")
  add("--model", help="where the model is, if it has moved")
  add("--json", action="store_true", help="one object a query")
  options = parser.parse_args(argv)
  if options.k < 1:
    raise ValueError(f"-k must be at least 1, got {options.k}")
  searcher = open_searcher(options.index, model=options.model)
  console = Console()
  for query in _queries(options.query):
    start = time.perf_counter()
    hits = searcher(
      query,
      k=options.k,
      mode=options.mode,
      num_candidates=options.candidates,
    )
    ms = 1e3 * (time.perf_counter() - start)
    if options.json:
      rows = [hit._asdict() for hit in hits]
      print(json.dumps({"query": query, "ms": round(ms, 2), "hits": rows}))
      continue
    for rank, hit in enumerate(hits, 1):
      console.print(f"{rank:>3}. {hit.score:7.3f}  {hit.id}", highlight=False)
      shown = _marked(searcher, query, hit.text) if rank <= 3 else None
      if shown is not None:
        console.print(shown)
    console.print(f"     {ms:.0f} ms, encoding included", style="dim")
  return 0


def _queries(query: str | None) -> Iterator[str]:
  if query is not None:
    yield query
    return
  ask = sys.stdin.isatty()
  while True:
    if ask:
      print("query> ", end="", flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if line.strip():
      yield line.strip()


def _marked(searcher: Searcher, query: str, text: str, room: int = 400) -> Text:
  """The start of a text, matched words bold."""
  shown = Text(text[:room] + (" ..." if len(text) > room else ""))
  for match in searcher.matches(query, text):
    if match.end <= room and match.similarity > 0.3:
      shown.stylize("bold", match.start, match.end)
  shown.pad_left(5)
  return shown
