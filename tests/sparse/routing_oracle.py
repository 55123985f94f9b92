"""Bi-level routing attention by loops over tokens, in float64."""

import numpy as np

__all__ = ["oracle"]


def oracle(
  q, k, v, mask=None, *, num_regions, top_k=None, scale=None, soft=False
):
  """One token at a time; without `top_k` each region reads itself."""
  batch, height, width, heads, dim = q.shape
  out = np.zeros(q.shape)
  scale = (heads * dim) ** -0.5 if scale is None else scale
  rows, columns = -(-height // num_regions), -(-width // num_regions)
  for b in range(batch):
    members = [[] for _ in range(num_regions**2)]
    for i, j in np.ndindex(height, width):
      if mask is None or mask[b, i, j]:
        members[i // rows * num_regions + j // columns].append((i, j))

    def mean(x, places, b=b):
      return np.mean([x[b, i, j].astype(float).ravel() for i, j in places], 0)

    for region, readers in enumerate(members):
      if not readers:
        continue
      affinity = {
        other: scale * mean(q, readers) @ mean(k, places)
        for other, places in enumerate(members)
        if places
      }
      chosen = sorted(affinity, key=lambda r: (-affinity[r], r))[:top_k]
      chosen = [region] if top_k is None else chosen
      weights = np.exp([affinity[r] for r in chosen])
      weights = weights / weights.sum() if soft else np.ones(len(chosen))
      read = [
        (w, p) for w, r in zip(weights, chosen, strict=True) for p in members[r]
      ]
      for i, j in readers:
        for h in range(heads):
          logits = [
            scale * q[b, i, j, h].astype(float) @ (w * k[b, y, x, h])
            for w, (y, x) in read
          ]
          shares = np.exp(logits - np.max(logits))
          values = [w * v[b, y, x, h].astype(float) for w, (y, x) in read]
          out[b, i, j, h] = shares @ np.array(values) / shares.sum()
  return out
