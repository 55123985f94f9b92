"""Groups of texts that say nearly the same.

MinHash finds pairs worth a look, their Jaccard similarity is then computed
exactly, so no group rests on a lucky hash.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from tokjax import checks

__all__ = ["group", "jaccard", "shingles", "union"]

# Bands x rows of the MinHash table. A pair of similarity s meets in at least
# one band with probability 1 - (1 - s**5)**25: 0.99995 at 0.8, 0.08 at 0.3.
_BANDS, _ROWS = 25, 5


def group(texts: Sequence[str], *, threshold: float = 0.8) -> np.ndarray:
  """Number of the group of each text; near duplicates share one.

  Two texts are joined if |A & B| / |A | B| of their sets of three-word runs
  reaches the threshold, and groups are closed under joining (a chain of near
  duplicates is one group).

  Args:
    texts: any strings; case and punctuation do not count.
    threshold: similarity in 0..1 from which two texts are joined. Default:
      ours. Pairs below 0.6 are found less and less surely.

  Returns:
    int64 [len(texts)], the lowest index in the group of each text.

  Raises:
    ValueError: if the threshold lies outside 0..1.

  Example:
    >>> group(["a b c d", "something else here", "A, b c d."]).tolist()
    [0, 1, 0]

  Source:
    Broder 1997, "On the Resemblance and Containment of Documents"; the
    constants are ours.
  """
  checks.in_range(0, 1, threshold=threshold)
  sets = [shingles(text) for text in texts]
  pairs = (
    (one, two)
    for one, two in _candidates(sets)
    if jaccard(sets[one], sets[two]) >= threshold
  )
  return union(len(texts), pairs)


def shingles(text: str) -> np.ndarray:
  """Sorted distinct hashes of the runs of three words of a text.

  Args:
    text: any string; a text of one or two words is one run.

  Returns:
    uint64 [number of distinct runs], ascending.
  """
  words = re.findall(r"\w+", text.lower())
  codes = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
  if len(codes) < 3:
    codes = np.concatenate([codes, np.zeros(3 - len(codes), np.uint64)])
  runs = _mix(_mix(_mix(codes[:-2]) + codes[1:-1]) + codes[2:])
  return np.unique(runs)


def jaccard(one: np.ndarray, two: np.ndarray) -> float:
  """|one & two| / |one | two| of two arrays without repeats.

  Args:
    one: hashes of a text.
    two: hashes of another.

  Returns:
    A number in 0..1.

  Example:
    >>> jaccard(np.array([1, 2, 3]), np.array([2, 3, 4]))
    0.5
  """
  shared = len(np.intersect1d(one, two, assume_unique=True))
  return shared / (len(one) + len(two) - shared)


def union(size: int, pairs: Iterator[tuple[int, int]]) -> np.ndarray:
  """Groups that come from joining pairs, named by their lowest member.

  Args:
    size: number of members.
    pairs: members to join, as indices.

  Returns:
    int64 [size].

  Example:
    >>> union(4, iter([(1, 3)])).tolist()
    [0, 1, 2, 1]
  """
  parent = list(range(size))

  def root(member: int) -> int:
    while parent[member] != member:
      parent[member] = parent[parent[member]]
      member = parent[member]
    return member

  for one, two in pairs:
    low, high = sorted((root(one), root(two)))
    parent[high] = low
  return np.array([root(member) for member in range(size)], np.int64)


def _candidates(sets: list[np.ndarray]) -> Iterator[tuple[int, int]]:
  """Pairs of indices that agree in all rows of a band, each pair once."""
  keys = np.arange(1, _BANDS * _ROWS + 1, dtype=np.uint64)
  keys = _mix(keys)[:, None]  # [hashes, 1]
  signatures = np.stack([
      _mix(runs[None, :] ^ keys).min(axis=1) for runs in sets
  ]) if sets else np.zeros((0, _BANDS * _ROWS), np.uint64)  # fmt: skip
  seen = set()
  for band in range(_BANDS):
    buckets = defaultdict(list)
    rows = signatures[:, band * _ROWS : (band + 1) * _ROWS]
    for member, row in enumerate(np.ascontiguousarray(rows)):
      buckets[row.tobytes()].append(member)
    for members in buckets.values():
      for at, two in enumerate(members):
        for one in members[:at]:
          if (one, two) not in seen:
            seen.add((one, two))
            yield one, two


def _mix(x: np.ndarray) -> np.ndarray:
  """splitmix64: an invertible hash of 64-bit integers (Steele et al. 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
