"""How good a ranking or an index is.

- `tokjax.eval.ranking`: nDCG, recall, MRR, MAP of arrays, on device.
- `tokjax.eval.runs`: the same for dicts of string ids, as trec_eval does.
- `tokjax.eval.agreement`: an approximate index against exact search.
- `tokjax.eval.bm25`: the lexical baseline.
"""

__all__ = ["agreement", "bm25", "comparison", "ranking", "runs"]
