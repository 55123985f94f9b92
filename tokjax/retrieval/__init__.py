"""Late interaction: texts as sets of token vectors, compared by MaxSim.

- `tokjax.retrieval.colbert`: texts in, token vectors out.
- `tokjax.retrieval.token_index`, `search`: an index in memory, and search.
- `tokjax.retrieval.index_files`: the index on disk or in a bucket.
- `tokjax.retrieval.muvera`: fixed dimensional encodings for candidates.
- `tokjax.retrieval.codecs`: how token vectors are stored.
- `tokjax.retrieval.alignment`: which word answered which.
"""

__all__ = [
  "alignment",
  "codecs",
  "colbert",
  "index_files",
  "masks",
  "muvera",
  "search",
  "token_index",
]
