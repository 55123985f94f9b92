"""Arrays in, arrays out: no weights, no state, no device named.

- `attention_scores`: rows of an attention map, outliers among scores.
- `binary_codes`: signs as codes (LFQ, BSQ); `bit_indices`: bits as numbers,
  words and sub-tokens.
- `budgets`: how many tokens to keep where, and what that costs.
- `clustering`: k-means of corpora and of one sequence; `medoids`,
  `density_peaks` and `spectral` cluster the tokens of one example.
- `code_entropy`: losses that make choices of codes sure and even;
  `code_usage`: which codes are in use.
- `estimators`: gradients past a choice of code.
- `merging`: which tokens go together; `plans`: what became of each.
- `packing`: kept positions in a fixed number of rows; `ranking`: who comes
  first.
- `pooling`: means under a mask.
- `quantize`: packed bits, scalar buckets, int8 rows, product quantisation.
- `rows`: rows of a table by index or by lot, and their sums.
- `scalar_codes`: channels rounded to a few levels (FSQ), in stages too.
- `selection`: exact top-k in blocks, from parts, across devices.
- `similarity`: unit vectors; `distances`: between all pairs.
- `sketching`: SimHash, sign projections, count sketches.
"""

__all__ = [
  "attention_scores",
  "binary_codes",
  "bit_indices",
  "budgets",
  "clustering",
  "code_entropy",
  "code_usage",
  "density_peaks",
  "distances",
  "estimators",
  "medoids",
  "merging",
  "packing",
  "plans",
  "pooling",
  "quantize",
  "ranking",
  "rows",
  "scalar_codes",
  "selection",
  "similarity",
  "sketching",
  "spectral",
]
