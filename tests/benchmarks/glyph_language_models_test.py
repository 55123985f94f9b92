"""Texts of catalogues and a tiny run of the three language models."""

import dataclasses
import struct

import numpy as np
import pytest

from tokjax.benchmarks import glyph_language_models
from tokjax.benchmarks.glyph_language_models import GlyphRun
from tokjax.cli import claim
from tokjax.tokenizers.unicode_tokens import UnicodeTokenizer


def write_catalogue(path, translations, order="<"):
  """A .mo file whose originals are empty."""
  data = [x.encode() + b"\0" for x in translations]
  number, start = len(data), 28
  place, table = start + 16 * len(data), b""
  for x in data:
    table += struct.pack(f"{order}2I", len(x) - 1, place)
    place += len(x)
  originals = struct.pack(f"{order}2I", 0, start) * number
  header = struct.pack(
    f"{order}7I", 0x950412DE, 0, number, start, start + 8 * number, 0, 0
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(header + originals + table + b"".join(data))


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_of_a_catalogue(tmp_path, order):
  path = tmp_path / "a.mo"
  texts = ["Project-Id-Version: x\n", "один", "eins\0zwei"]
  write_catalogue(path, texts, order)
  found = list(glyph_language_models.messages(path))
  assert found == ["один", "eins", "zwei"]
  path.write_bytes(b"something else")
  with pytest.raises(ValueError, match="no catalogue of gettext"):
    list(glyph_language_models.messages(path))


def test_rows_hold_the_texts_in_order():
  tokenizer = UnicodeTokenizer(("ab",))
  rows = glyph_language_models.rows_of(tokenizer, ["abc", "d"], num_tokens=3)
  assert rows.shape == (2, 3)
  assert tokenizer.decode(rows.ravel()) == "abc\n\nd\n"


def test_claim_of_a_tiny_run(tmp_path, monkeypatch):
  draw = np.random.default_rng(0)
  letters = np.array(list("абвгд "))
  for number in range(2):
    texts = ["".join(draw.choice(letters, 60)) for _ in range(300)]
    write_catalogue(tmp_path / "ru" / "LC_MESSAGES" / f"{number}.mo", texts)
  english = ["word of a text that is read " * 4] * 40

  class Documents:
    document_texts = english

  monkeypatch.setattr(
    glyph_language_models.pydocs, "load", lambda packages: Documents
  )
  found = claim.load("unicode_glyphs", "nowhere")
  (run,) = found.runs
  assert isinstance(run, GlyphRun)
  run = dataclasses.replace(
    run, catalogues=str(tmp_path), languages=("ru", "xx"), top=5, num_steps=2,
    num_tokens=16, batch_size=8, width=8, num_layers=1, max_bytes=200_000,
  )  # fmt: skip
  rows = found.measure(run, progress=False)
  assert list(rows) == ["glyphs", "random", "trained"]
  tokens = rows["glyphs"].metrics["tokens"]
  frozen, trained = (
    rows[x].metrics["parameters"] for x in ("glyphs", "trained")
  )
  assert trained - frozen == 8 * tokens
  for row in rows.values():
    assert {"bits/byte", "en", "ru"} <= row.metrics.keys()
    assert 0 < row.metrics["bits/byte"] < 8
  margin = found.margin(rows)
  assert margin == (
    rows["trained"].metrics["bits/byte"] - rows["glyphs"].metrics["bits/byte"]
  )
