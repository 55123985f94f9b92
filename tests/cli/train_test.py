"""`tokjax train`: a config file in, a model that every command reads out."""

import json
import pathlib
import shutil

import pytest

from tokjax.cli import evaluate, main, train

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CONFIG = """
from tokjax.retrieval.heads import HeadConfig
from tokjax.train.loop import TrainConfig
from tokjax.train.retrieval_run import DataConfig, RetrievalRun

def get_config(arg=""):
  return RetrievalRun(
    model={model!r}, document_length=8, query_length=4,
    head=HeadConfig(input_dim={width}, output_dim=8),
    data=DataConfig(dataset={beir!r}, batch_size=8, bucket=8),
    trainer=TrainConfig(num_steps=9, save_every=2, log_every=1),
  )
"""


@pytest.fixture
def config(beir, model, tmp_path):
  qrels = pathlib.Path(beir) / "qrels"
  shutil.copy(qrels / "test.tsv", qrels / "train.tsv")
  facts = json.loads((pathlib.Path(model) / "config.json").read_text())
  path = tmp_path / "tiny.py"
  path.write_text(
    CONFIG.format(model=model, beir=beir, width=facts["hidden_size"])
  )
  return str(path)


def test_trains_saves_and_is_indexed(config, beir, tmp_path, capsys):
  out = tmp_path / "run"
  words = ["train", config, "--out", str(out), "--config.trainer.num_steps=4"]
  assert main.main(words) == 0
  lines = (out / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
  record = json.loads((out / "run.json").read_text())
  assert record["config"]["trainer"]["num_steps"] == 4
  model = str(out / "model")
  assert capsys.readouterr().out.splitlines()[-1] == model
  index = str(tmp_path / "index")
  assert main.main(["index", beir, index, "--model", model, "--fde", "0"]) == 0
  assert main.main(["search", index, "wing", "--json"]) == 0
  assert "d0" in capsys.readouterr().out
  # Called again it has nothing left to do, and says where the model is.
  assert main.main(words) == 0


def test_ranking_is_measured_on_the_way(config, beir, tmp_path, capsys):
  qrels = pathlib.Path(beir) / "qrels"
  # Answered by the document that has the word once, not by that of the query.
  lines = [f"q{i}\td{i + 1}\t1" for i in range(9)]
  header = "query-id\tcorpus-id\tscore"
  (qrels / "dev.tsv").write_text("\n".join([header, *lines]) + "\n")
  out = tmp_path / "run"
  words = [
    "train", config, "--out", str(out), "--config.trainer.num_steps=5",
    "--config.trainer.evaluate_every=2", "--config.trainer.tensorboard=true",
    "--config.evaluation.split=dev", "--config.evaluation.num_queries=4",
    "--config.evaluation.metrics=('nDCG@10', 'R@5')",
  ]  # fmt: skip
  assert main.main(words) == 0
  rows = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
  rows = {row["step"]: row for row in rows if "loss" not in row}
  assert list(rows) == [2, 4, 5]
  names = {"step", "eval/nDCG@10", "eval/R@5"}
  assert all(set(row) == names for row in rows.values())
  assert f"step 5/5  eval/nDCG@10 {rows[5]['eval/nDCG@10']:.4g}  eval/R@5" in (
    capsys.readouterr().out
  )
  # The last row is of the model that was saved: the same by other means.
  config = evaluate.EvaluateConfig(
    dataset=beir, split="dev", model=str(out / "model"), max_queries=4,
    methods=("maxsim",), metrics=("nDCG@10", "R@5"), codec="float32",
  )  # fmt: skip
  (want,) = evaluate.measure(config, evaluate.encode(config, progress=False))
  assert 0 < want.metrics["nDCG@10"] < 1
  for name, value in want.metrics.items():
    assert rows[5][f"eval/{name}"] == pytest.approx(value, abs=1e-6)
  written = b"".join(p.read_bytes() for p in (out / "tensorboard").iterdir())
  assert b"eval/nDCG" in written


def test_evaluation_settings_that_do_not_fit(config):
  def refused(*words):
    words = [f"--config.{word}" for word in words]
    found = train.settings(config, ["--config.trainer.folder=x", *words])
    with pytest.raises(ValueError) as error:
      train.run(found)
    return str(error.value)

  assert "split must name a split" in refused("trainer.evaluate_every=2")
  triples = ("evaluation.split=dev", "data.dataset=a/examples.json")
  assert "config.evaluation.dataset must name a folder" in refused(*triples)
  metric = ("evaluation.split=test", "evaluation.metrics=('NDCG',)")
  assert "metrics must be of the form" in refused(*metric)
  assert not pathlib.Path("x").exists()
  with pytest.raises(ValueError, match="--out or config.trainer.folder must"):
    train.run(train.settings(config, ["--config.trainer.folder=gs://b/run"]))


def test_text_settings_are_overridden(config):
  words = ["query_marker=[Q]", "expand_queries=true", "document_marker="]
  found = train.settings(config, [f"--config.{word}" for word in words])
  assert (found.query_marker, found.document_marker) == ("[Q]", "")
  assert found.expand_queries is True and found.attend_to_expansion is None


def test_settings_name_what_is_wrong(config):
  assert train.settings(config, ["--config.seed=7"]).seed == 7
  with pytest.raises(ValueError, match="no such config file"):
    train.settings("nowhere.py", [])
  with pytest.raises(ValueError, match="sede"):
    train.settings(config, ["--config.sede=7"])
  with pytest.raises(ValueError, match="num_steps"):
    train.settings(config, ["--config.trainer.num_steps=many"])
  with pytest.raises(ValueError, match="unknown words"):
    train.settings(config, ["surplus"])
  with pytest.raises(ValueError, match="must name a folder"):
    train.run(train.settings(config, []))


@pytest.mark.parametrize(
  "path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem
)
def test_our_configs_can_be_read(path):
  found = train.settings(str(path), ["--config.trainer.num_steps=3"])
  assert found.trainer.num_steps == 3
