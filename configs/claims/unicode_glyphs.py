"""Frozen glyphs: pictures of tokens instead of rows that are trained.

    tokjax claim unicode_glyphs --data ../shared/data

Recorded 2026-11-28, two busy AMD EPYC cores, jax 0.10.2, seed 0 only, 300 steps
of 16 rows of 128 tokens; bits per byte of held-out text, all of it and by
language:

               all     en     de     ru     el     ka    parameters
    trained    2.716  3.623  3.559  2.338  2.216  1.564   703,488
    glyphs     2.883  3.900  3.751  2.444  2.380  1.628   550,144
    random     2.939  3.896  3.856  2.472  2.446  1.712   550,144

Does not hold, by .167 bits a byte: after this training the model whose rows
are trained is ahead in every language. Frozen pictures of tokens are worth more
than frozen random rows, by .056, though 76 of 1,198 tokens look like another.
Longer trainings, in which the published models draw level, were not measured.
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
