"""Arrays in, arrays out: no weights, no state, no device named.

- `clustering`: k-means of corpora and of one sequence.
- `pooling`: means under a mask.
- `quantize`: packed bits, scalar buckets, int8 rows, product quantisation.
- `selection`: exact top-k in blocks, from parts, across devices.
- `similarity`: unit vectors.
- `sketching`: SimHash, sign projections, count sketches.
"""

__all__ = [
  "clustering",
  "pooling",
  "quantize",
  "selection",
  "similarity",
  "sketching",
]
