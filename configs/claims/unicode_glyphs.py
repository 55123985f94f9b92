"""Frozen glyphs: pictures of tokens instead of rows that are trained.

tokjax claim unicode_glyphs --data ../shared/data
"""

import functools

from tokjax.benchmarks import glyph_language_models, tokenizer_probes
from tokjax.benchmarks.glyph_language_models import GlyphRun
from tokjax.cli.claim import Claim


def get_config(data: str) -> Claim:
  """The claim over one run; reads installed packages and translations."""
  del data  # what is read comes with the system
  return Claim(
    statement="A language model that reads frozen rows of glyphs writes "
    "held-out text in no more bits per byte than the same model whose rows "
    "start random and are trained.",
    runs=(GlyphRun(),),
    measure=glyph_language_models.claimed,
    margin=functools.partial(
      tokenizer_probes.margin,
      leads=(("trained", "glyphs", "bits/byte", 0.0),),
    ),
  )
