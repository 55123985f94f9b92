"""A claim is measured, and fails when its statement does."""

import json

import pytest

from tokjax.cli import claim, main

CLAIM = """
from tokjax.cli.claim import Claim
from tokjax.cli.evaluate import EvaluateConfig

def get_config(data):
  return Claim(
    statement="words find more than nothing",
    runs=(EvaluateConfig(dataset=data, model={model!r}, methods=("bm25",)),),
    margin=lambda rows: rows["bm25"].metrics["R@100"] - {bound},
  )
"""


@pytest.mark.parametrize("bound, code", [(0.5, 0), (1.5, 1)])
def test_exit_code_is_the_verdict(bound, code, beir, model, tmp_path, capsys):
  (tmp_path / "mine.py").write_text(CLAIM.format(model=model, bound=bound))
  words = ["claim", "mine", "--data", beir, "--claims", str(tmp_path), "--json"]
  assert main.main(words) == code
  record = json.loads(capsys.readouterr().out)
  assert record["margin"] == 1.0 - bound


@pytest.mark.parametrize("name", ["colbert", "muvera"])
def test_our_claims_can_be_read(name):
  found = claim.load(name, "data")
  assert isinstance(found, claim.Claim) and len(found.runs) == 3
  assert found.runs[0].dataset == "data/scifact"


def test_unknown_claim_lists_those_there_are():
  with pytest.raises(
    ValueError, match="no claim 'colbart'.*colbert, .*mmtok, .*muvera"
  ):
    claim.load("colbart", "data")


class Row:
  def __init__(self, ndcg, recall=0.5, size=100.0):
    self.metrics = {"nDCG@10": ndcg, "R@100": recall}
    self.bytes_per_document = size


# Rows by name, and how far the claim holds on them.
TRAINED = {
  "colbert_trained": (
    {"dense": Row(0.4), "zero-shot": Row(0.5), "colbert": Row(0.6)}, 0.1
  ),
  "xtr": (
    {
      "colbert": Row(0.6), "colbert by 10 tokens": Row(0.3, recall=0.5),
      "xtr": Row(0.6), "xtr by 10 tokens": Row(0.55, recall=0.7),
    },
    0.2,
  ),
  "crisp": (
    {
      "crisp C4x8": Row(0.5), "post-hoc C4x8": Row(0.52),
      "crisp C8x32": Row(0.6), "post-hoc C8x32": Row(0.5),
    },
    -0.02,
  ),
  "heads": ({"head linear": Row(0.5), "head ffn": Row(0.53)}, 0.03),
  "colberter": (
    {"colbert": Row(0.6, size=1000.0), "colberter": Row(0.58, size=90.0)}, 0.01
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_claims_of_trained_systems_say_how_far_they_hold(name):
  found = claim.load(name, "data")
  assert [(run.dataset, run.seed) for run in found.runs] == [
    (dataset, seed)
    for dataset in ("pydocs", "data/scifact")
    for seed in range(3)
  ]
  rows, want = TRAINED[name]
  assert found.margin(rows) == pytest.approx(want)


def test_colberter_has_to_be_small():
  margin = claim.load("colberter", "data").margin
  rows = {"colbert": Row(0.6, size=1000.0), "colberter": Row(0.6, size=200.0)}
  assert margin(rows) == pytest.approx(-0.5)
