"""Late interaction: texts as sets of token vectors, compared by MaxSim.

- `tokjax.retrieval.colbert`: texts in, token vectors out.
- `tokjax.retrieval.token_index`, `search`: an index in memory, and search.
- `tokjax.retrieval.index_files`: the index on disk or in a bucket.
- `tokjax.retrieval.muvera`: fixed dimensional encodings for candidates.
- `tokjax.retrieval.codecs`: how token vectors are stored.
- `tokjax.retrieval.xtr`: scores from retrieved tokens, and their training.
- `tokjax.retrieval.crisp`: token vectors replaced by cluster means;
  `token_pruning`: fewer tokens without training.
- `tokjax.retrieval.colberter`: a text vector and small whole-word vectors;
  `colberter_texts` encodes and searches, `words` finds the words.
- `tokjax.retrieval.heads`: hidden states to token vectors.
- `tokjax.retrieval.losses`: what all of them are trained by.
- `tokjax.retrieval.methods`: one way to encode and search for every method.
- `tokjax.retrieval.alignment`: which word answered which.
"""

__all__ = [
  "alignment",
  "codecs",
  "colbert",
  "colberter",
  "colberter_texts",
  "crisp",
  "heads",
  "index_files",
  "losses",
  "masks",
  "methods",
  "muvera",
  "search",
  "token_index",
  "token_pruning",
  "words",
  "xtr",
]
