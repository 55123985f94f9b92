"""`tokjax train`: a config file in, a model that every command reads out."""

import json
import pathlib
import shutil

import pytest

from tokjax.cli import main, train

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
