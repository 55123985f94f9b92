"""Arrays in, arrays out: no weights, no state, no device named.

- `attention_scores`: rows of an attention map, outliers among scores.
- `budgets`: how many tokens to keep where, and what that costs.
- `clustering`: k-means of corpora and of one sequence; `medoids`,
  `density_peaks` and `spectral` cluster the tokens of one example.
- `merging`: which tokens go together; `plans`: what became of each.
- `packing`: kept positions in a fixed number of rows; `ranking`: who comes
  first.
- `pooling`: means under a mask.
- `quantize`: packed bits, scalar buckets, int8 rows, product quantisation.
- `selection`: exact top-k in blocks, from parts, across devices.
- `similarity`: unit vectors; `distances`: between all pairs.
- `sketching`: SimHash, sign projections, count sketches.
"""

__all__ = [
  "attention_scores",
  "budgets",
  "clustering",
  "density_peaks",
  "distances",
  "medoids",
  "merging",
  "packing",
  "plans",
  "pooling",
  "quantize",
  "ranking",
  "selection",
  "similarity",
  "sketching",
  "spectral",
]
