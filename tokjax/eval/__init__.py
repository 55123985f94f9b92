"""How good a ranking, an index or a reconstruction is.

- `tokjax.eval.ranking`: nDCG, recall, MRR, MAP of arrays, on device.
- `tokjax.eval.runs`: the same for dicts of string ids, as trec_eval does.
- `tokjax.eval.agreement`: an approximate index against exact search.
- `tokjax.eval.bm25`: the lexical baseline.
- `tokjax.eval.image_quality`: PSNR, SSIM, MS-SSIM; `lpips`, `frechet`: by the
  features of a given network; `reconstruction`: all of them over a set;
  `rate_distortion`: beside JPEG and WebP.
- `tokjax.eval.shapes`: F-score, Chamfer distance, overlap of solids.
- `tokjax.eval.batching`: a function of batches over a set in memory.
"""

__all__ = [
  "agreement",
  "batching",
  "bm25",
  "comparison",
  "frechet",
  "image_quality",
  "lpips",
  "ranking",
  "rate_distortion",
  "reconstruction",
  "runs",
  "shapes",
]
