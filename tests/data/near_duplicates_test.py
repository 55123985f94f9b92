import random

import numpy as np
import pytest

from tokjax.data import near_duplicates


def brute_force(texts, threshold):
  sets = []
  for text in texts:
    words = text.split()
    sets.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
  group = list(range(len(texts)))
  changed = True
  while changed:
    changed = False
    for i, one in enumerate(sets):
      for j, two in enumerate(sets):
        near = len(one & two) / len(one | two) >= threshold
        if near and group[i] != group[j]:
          group[i] = group[j] = min(group[i], group[j])
          changed = True
  return group


@pytest.mark.parametrize("seed", range(3))
def test_equals_comparing_all_pairs(seed):
  draw = random.Random(seed)
  texts = []
  for _ in range(12):
    words = [f"w{draw.randrange(500)}" for _ in range(80)]
    for num_changes in (0, 1, 3, 12):
      copy = list(words)
      for at in draw.sample(range(80), num_changes):
        copy[at] = "changed"
      texts.append(" ".join(copy))
  want = brute_force(texts, 0.8)
  assert len(set(want)) not in (12, 48)  # some copies are near, some are not
  np.testing.assert_array_equal(near_duplicates.group(texts), want)


def test_short_and_no_texts():
  assert near_duplicates.group([]).tolist() == []
  assert near_duplicates.group(["", "a", "A!", "b"]).tolist() == [0, 1, 1, 3]


@pytest.mark.unchecked
def test_error_for_a_bad_threshold():
  with pytest.raises(ValueError, match="threshold must lie in 0..1, got 2"):
    near_duplicates.group([], threshold=2)
