"""Settings to JSON and back, and every way in which a file can be wrong."""

import dataclasses
import json

import pytest

from tokjax.models import json_settings
from tokjax.retrieval import colbert, crisp, heads, methods
from tokjax.retrieval.colberter import ColberterConfig

MEANS = crisp.CrispConfig(**crisp.PRESETS["C25"])


@pytest.mark.parametrize(
  "settings",
  [
    colbert.ColbertConfig(),
    colbert.ColbertConfig.zero_shot(7),
    colbert.ColbertConfig(skip_words=("!", "ä")),
    methods.Method(),
    methods.Method("xtr", k_prime=40),
    methods.Method("crisp", MEANS),
    heads.HeadConfig(16, expand=1.5, kind="glu", activation="silu"),
    ColberterConfig.stage(4),
  ],
  ids=lambda x: type(x).__name__,
)
def test_round_trip_through_text(settings):
  text = json.dumps(json_settings.to_json(settings))
  got = json_settings.from_json(
    type(settings), json.loads(text), source="a.json"
  )
  assert got == settings
  assert hash(got) == hash(settings)  # tuples, not lists


def test_missing_fields_have_their_defaults():
  got = json_settings.from_json(colbert.ColbertConfig, {}, source="a.json")
  assert got == colbert.ColbertConfig()


def test_whole_numbers_stand_for_floats():
  said = {"input_dim": 4, "expand": 2}
  got = json_settings.from_json(heads.HeadConfig, said, source="a.json")
  assert got == heads.HeadConfig(4, expand=2.0) and type(got.expand) is float


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"colour": 1}, r"a.json has unknown fields \['colour'\]"),
    (
      {"crisp": {"query_cluster": 1}},
      r"a.json: crisp has unknown fields \['query_cluster'\]",
    ),
    ({"crisp": 3}, "a.json: crisp must hold a JSON object, got 3"),
    ({"k_prime": "9"}, "a.json: k_prime must be int, got '9'"),
    ({"k_prime": True}, "a.json: k_prime must be int, got True"),
    ({"k_prime": 1.0}, "a.json: k_prime must be int, got 1.0"),
    ({"name": "plaid"}, "a.json: name must be .*crisp.*, got 'plaid'"),
    ({"k_prime": 0}, "a.json: k_prime must lie in 1..2147483648, got 0"),
    ({"crisp": None}, "a.json: crisp must be given for method 'crisp'"),
  ],
)
def test_what_is_wrong_is_named(change, message):
  said = json_settings.to_json(methods.Method("crisp", MEANS)) | change
  with pytest.raises(ValueError, match=message):
    json_settings.from_json(methods.Method, said, source="a.json")


def test_needed_fields_are_named():
  with pytest.raises(ValueError, match=r"a.json lacks the fields \['input_dim"):
    json_settings.from_json(heads.HeadConfig, {"bias": True}, source="a.json")
  said = dataclasses.asdict(colbert.ColbertConfig()) | {"skip_words": "!"}
  with pytest.raises(ValueError, match="skip_words must be .*got '!'"):
    json_settings.from_json(colbert.ColbertConfig, said, source="a.json")
