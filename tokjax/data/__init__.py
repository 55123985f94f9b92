"""Retrieval data sets: a user's own files, BEIR folders, installed docstrings.

- `tokjax.data.beir`: folders in the BEIR layout.
- `tokjax.data.pydocs`: the docstrings of the packages installed beside us.
- `tokjax.data.corpus`: the documents a user wants to encode or index.
- `tokjax.data.records`: any of them as ArrayRecord tables for grain.
"""

__all__ = ["beir", "corpus", "pydocs", "records", "retrieval_set"]
