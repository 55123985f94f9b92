"""Arrays in, arrays out: no weights, no state, no device named.

- `additive_codes`, `additive_encoding`, `additive_training`: sums of codes,
  choosing and learning them (AQ, LSQ, CQ); `product_codes`: rotated product
  codes (OPQ) and distances.
- `attention`: under a mask; `attention_masks`: who may read whom, as arrays;
  `mask_rules`: as rules about tokens and blocks of them; `policy_attention`:
  keys that count by a learned choice.
- `attention_scores`: rows of an attention map, outliers among scores.
- `binary_codes`: signs as codes (LFQ, BSQ); `bit_indices`: bits as numbers,
  words and sub-tokens.
- `budgets`: how many tokens to keep where, and what that costs.
- `clustering`: k-means of corpora and of one sequence; `medoids`,
  `density_peaks` and `spectral` cluster the tokens of one example.
- `code_entropy`: losses that make choices of codes sure and even;
  `code_usage`: which codes are in use.
- `contrastive`: pairs against all others of the batch.
- `depthwise`: convolutions of each channel by itself.
- `estimators`: gradients past a choice of code.
- `fourier`: coordinates as waves; `rope`: rotated positions.
- `item_sets`: masks, positions and scores of items that are sets.
- `merging`: which tokens go together; `plans`: what became of each.
- `moe_routing`: which experts a token goes to; `moe_losses` keep that even;
  `moe_dispatch`: tokens to rows of experts and back; `moe_experts`: their MLPs,
  and the mixture.
- `packing`: kept positions in a fixed number of rows; `ranking`: who comes
  first.
- `patches`: images cut into squares, and back; `resample`: maps on other
  grids.
- `pooling`: means under a mask.
- `quantize`: packed bits, scalar buckets, int8 rows, product quantisation.
- `rows`: rows of a table by index or by lot, and their sums.
- `scalar_codes`: channels rounded to a few levels (FSQ), in stages too.
- `selection`: exact top-k in blocks, from parts, across devices.
- `similarity`: unit vectors; `distances`: between all pairs.
- `triplanes`: features at points of space; `winding`: inside or outside of a
  mesh.
- `sketching`: SimHash, sign projections, count sketches.
"""

__all__ = [
  "additive_codes",
  "additive_encoding",
  "additive_training",
  "attention",
  "attention_masks",
  "attention_scores",
  "binary_codes",
  "bit_indices",
  "budgets",
  "clustering",
  "code_entropy",
  "code_usage",
  "contrastive",
  "density_peaks",
  "depthwise",
  "distances",
  "estimators",
  "fourier",
  "item_sets",
  "mask_rules",
  "medoids",
  "merging",
  "moe_dispatch",
  "moe_experts",
  "moe_losses",
  "moe_routing",
  "packing",
  "patches",
  "plans",
  "policy_attention",
  "pooling",
  "product_codes",
  "quantize",
  "ranking",
  "resample",
  "rope",
  "rows",
  "scalar_codes",
  "selection",
  "similarity",
  "sketching",
  "spectral",
  "triplanes",
  "winding",
]
