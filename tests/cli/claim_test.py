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
  with pytest.raises(ValueError, match="no claim 'colbart'.*colbert, muvera"):
    claim.load("colbart", "data")
