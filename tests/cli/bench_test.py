"""What can be measured, and how to ask for it."""

import pytest

from tokjax.cli import bench


def test_subjects_are_the_hot_paths():
  found = bench.subjects()
  assert set(found) == {
    "attention", "encode", "gated_mlp", "greedy_select", "losses", "maxsim",
    "muvera", "nearest_code", "quantizers", "reduction", "reduction_accuracy",
    "search", "selection", "trained_retrieval", "vector_codes",
  }  # fmt: skip
  assert all(len(text) > 10 for text in found.values())


def test_unknown_subject_is_a_usage_error(capsys):
  with pytest.raises(SystemExit) as done:
    bench.main(["no_such_subject"])
  assert done.value.code == 2
  assert "no_such_subject" in capsys.readouterr().err
