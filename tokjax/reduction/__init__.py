"""Methods that drop or fuse tokens: one file each, the same contract.

Features [B, N, D], what else the method reads, and a mask in; `Reduced` out,
which cuts other streams by the same choice (`apply`) and spreads results over
all tokens again (`restore`). Every example of a batch is reduced alone.
Selection passes no gradient, what is kept does.

- Spread and cover: `divprune`, `todre`, `mmtok`, `catp`.
- By attention: `vtc_cls`, `hiprune`, `fastv`, `sparsevlm`.
- Keep some and fuse the rest: `visionzip`, `visiondrop`, `prumerge`,
  `correlation_guided`, `global_com` (crops of one picture).
- Merge and mix: `tome`, `aim`, `center_clip` (video), `token_transforming`.
- `controls`: random, uniform, pooling, smaller pictures.
- `types`: `Reduced` and how to make one; `pictures`: what is left, drawn.
"""

__all__ = [
  "aim",
  "catp",
  "center_clip",
  "controls",
  "correlation_guided",
  "correlation_scores",
  "divprune",
  "fastv",
  "global_com",
  "global_com_scores",
  "hiprune",
  "mmtok",
  "pictures",
  "prumerge",
  "sparsevlm",
  "sparsevlm_scores",
  "todre",
  "token_transforming",
  "tome",
  "types",
  "visiondrop",
  "visionzip",
  "vtc_cls",
]
