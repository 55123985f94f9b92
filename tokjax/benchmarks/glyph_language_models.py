"""Can a language model read pictures of letters as well as rows it trains?

Three language models of one shape read the same tokens of docstrings and of
translated messages: with frozen rows of glyphs, with frozen random rows, and
with rows that start random and are trained. All else is equal, the head is
trained in each. What counts is the code length of held-out text per byte.
"""

import dataclasses
import math
import pathlib
import struct
from collections.abc import Iterator, Mapping, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib import font_manager

from tokjax.benchmarks.trained_vit import Row
from tokjax.data import pydocs
from tokjax.ops import similarity
from tokjax.tokenizers import unicode_glyphs, unicode_tokens
from tokjax.tokenizers.glyph_language_model import GlyphLanguageModelConfig
from tokjax.tokenizers.unicode_tokens import UnicodeTokenizer
from tokjax.train import image_classification, loop
from tokjax.train.optimizer import OptimizerConfig

__all__ = ["GlyphRun", "claimed", "messages", "rows_of"]

_MIN_LENGTH = 40  # characters of a message that says something
_MESSAGES = 20  # in one text


@dataclasses.dataclass(frozen=True)
class GlyphRun:
  """One comparison.

  Attributes:
    dataset: what is read, for the title of the table.
    seed: of weights, random rows and batches.
    packages: whose docstrings are the English text.
    catalogues: folder of compiled translations, `<language>/LC_MESSAGES/*.mo`.
    languages: of the translations; what has none there is left out.
    font: file of the glyphs; "" is DejaVu Sans, which comes with matplotlib.
    top: ngrams of each length in each language.
    max_bytes: of text in each language.
    num_tokens: of a row.
    batch_size: rows of a step.
    num_steps: of each training.
    learning_rate: its peak.
    width: of rows and blocks.
    num_layers: of the model.
  """

  dataset: str = "docstrings and translations"
  seed: int = 0
  packages: tuple[str, ...] = ("numpy", "optax", "flax")
  catalogues: str = "/usr/share/locale"
  languages: tuple[str, ...] = ("de", "ru", "el", "ka")
  font: str = ""
  top: int = 100
  max_bytes: int = 400_000
  num_tokens: int = 128
  batch_size: int = 16
  num_steps: int = 300
  learning_rate: float = 3e-3
  width: int = 128
  num_layers: int = 2


def messages(path: pathlib.Path) -> Iterator[str]:
  """The translations in a compiled catalogue of gettext.

  Args:
    path: a .mo file.

  Yields:
    Each, without the header; of plural forms each by itself. Nothing if it is
    not UTF-8.

  Raises:
    ValueError: if it is no such file.
  """
  data = path.read_bytes()
  order = {0x950412DE: "<", 0xDE120495: ">"}.get(
    int.from_bytes(data[:4], "little")
  )
  if order is None:
    raise ValueError(f"{path} is no catalogue of gettext")
  _, number, _, start = struct.unpack_from(f"{order}4I", data, 4)
  for i in range(number):
    length, place = struct.unpack_from(f"{order}2I", data, start + 8 * i)
    try:
      found = data[place : place + length].decode("utf-8")
    except UnicodeDecodeError:
      return
    if not found.startswith("Project-Id-Version:"):
      yield from found.split("\0")


def rows_of(
  tokenizer: UnicodeTokenizer, texts: Sequence[str], *, num_tokens: int
) -> np.ndarray:
  """Texts one after the other, cut into rows of ids.

  Args:
    tokenizer: of the ids.
    texts: put together, an empty line after each.
    num_tokens: of a row; what fills none is left out.

  Returns:
    int32[n, num_tokens].

  Example:
    >>> rows_of(UnicodeTokenizer(), ["ab", "c"], num_tokens=2).tolist()
    [[97, 98], [10, 10], [99, 10]]
  """
  ids = np.concatenate([tokenizer.encode(text + "\n\n") for text in texts])
  return ids[: len(ids) // num_tokens * num_tokens].reshape(-1, num_tokens)


def claimed(run: GlyphRun, *, progress: bool = True) -> dict[str, Row]:
  """Trains the three models and measures them on held-out text.

  Args:
    run: which.
    progress: print when one is done.

  Returns:
    Rows "glyphs", "random" and "trained", each with "bits/byte" over all
    languages and by language, and how many "parameters" were trained; the first
    also with "tokens", the size of the vocabulary, and "alike", how many of
    them share their glyph with another.
  """
  tokenizer, learn, test = _texts(run)
  used = np.unique(np.concatenate([learn, *test.values()]))
  names = [tokenizer.tokens[i] for i in used]
  sizes = np.array([len(name.encode()) for name in names])
  learn = np.searchsorted(used, learn).astype(np.int32)
  test = {k: np.searchsorted(used, x).astype(np.int32) for k, x in test.items()}
  bits = unicode_glyphs.glyph_bitmaps(
    names,
    run.font or font_manager.findfont("DejaVu Sans"),
    augmentation=unicode_glyphs.Augmentation(),
  )
  keys = jax.random.split(jax.random.key(run.seed))
  normal = jax.random.normal(keys[0], (len(used), run.width))
  tables = {
    "glyphs": jax.jit(unicode_glyphs.frozen_embedding, static_argnums=1)(
      bits, run.width
    ),
    "random": similarity.safe_normalize(normal),
    "trained": None,
  }
  rows = {}
  for name, table in tables.items():
    model, table = _fit(run, table, learn, len(used), keys[1])
    size = sum(x.size for x in jax.tree.leaves(model))
    metrics = _bits_per_byte(model, table, test, sizes, run.batch_size)
    rows[name] = Row({**metrics, "parameters": float(size)})
    if progress:
      print(name, rows[name].metrics, flush=True)
  alike = sum(map(len, unicode_glyphs.collisions(bits)))
  rows["glyphs"].metrics.update(tokens=float(len(used)), alike=float(alike))
  return rows


def _texts(run):
  """The tokenizer, rows to learn from and rows to be tested on by language."""
  documents = pydocs.load(packages=run.packages).document_texts
  corpora = {"en": documents}
  for language in run.languages:
    folder = pathlib.Path(run.catalogues, language, "LC_MESSAGES")
    found = dict.fromkeys(
      message
      for path in sorted(folder.glob("*.mo"))
      for message in messages(path)
      if len(message) >= _MIN_LENGTH
    )
    found = list(found)
    corpora[language] = [
      "\n".join(found[i : i + _MESSAGES])
      for i in range(0, len(found), _MESSAGES)
    ]
  learn, test = {}, {}
  for language, texts in corpora.items():
    texts = _some(texts, run)
    if len(texts) >= 10:
      test[language] = texts[::10]
      learn[language] = [x for i, x in enumerate(texts) if i % 10]
  ngrams = unicode_tokens.frequent_ngrams(learn.values(), top=run.top)
  tokenizer = UnicodeTokenizer(ngrams)
  rows, held = (
    {
      language: rows_of(tokenizer, texts, num_tokens=run.num_tokens)
      for language, texts in part.items()
    }
    for part in (learn, test)
  )
  return tokenizer, np.concatenate(list(rows.values())), held


def _some(texts, run):
  """Texts of characters with ids, in random order, up to a number of bytes."""
  texts = [x for x in texts if all(map(unicode_tokens.is_covered, x))]
  order = np.random.default_rng(0).permutation(len(texts))
  sizes = np.cumsum([len(texts[i].encode()) for i in order])
  return [texts[i] for i in order[: np.searchsorted(sizes, run.max_bytes)]]


def _fit(run, table, learn, vocabulary_size, key):
  config = GlyphLanguageModelConfig(
    vocabulary_size,
    width=run.width,
    num_layers=run.num_layers,
    num_heads=4,
    embedding="trainable" if table is None else "frozen",
  )

  def make(step):
    epoch, place = divmod(step, len(learn) // run.batch_size)
    order = np.random.default_rng([run.seed, epoch]).permutation(len(learn))
    return learn[order[place * run.batch_size : (place + 1) * run.batch_size]]

  batches = grain.MapDataset.range(run.num_steps).map(make)
  done = loop.train(
    jax.jit(lambda key: config.build(nnx.Rngs(key)))(key),
    _loss,
    iter(batches.to_iter_dataset(image_classification.READING)),
    loop.TrainConfig(
      num_steps=run.num_steps,
      optimizer=OptimizerConfig(
        learning_rate=run.learning_rate, warmup_steps=run.num_steps // 10
      ),
      log_every=100,
    ),
    key=key,
    # No parameter: the optimiser holds nothing for it. None is no array.
    buffers={"table": table},
  )
  return jax.device_get((done.state.model, done.state.buffers["table"]))


def _loss(model, buffers, batch, key):
  del key
  nats = model.negative_log_likelihood(batch, buffers["table"])
  return jnp.mean(nats), {}, buffers


def _bits_per_byte(
  model, table, test: Mapping[str, np.ndarray], sizes, batch_size
):
  """Code length of all tokens but the first of each row, over their bytes."""
  bits, bytes_ = {}, {}
  for language, ids in test.items():
    ids = ids[: len(ids) // batch_size * batch_size]
    nats = [
      float(_nats(model, table, ids[i : i + batch_size]))
      for i in range(0, len(ids), batch_size)
    ]
    bits[language] = math.fsum(nats) / math.log(2)
    bytes_[language] = float(sizes[ids[:, 1:]].sum())
  each = {language: bits[language] / bytes_[language] for language in bits}
  return {"bits/byte": sum(bits.values()) / sum(bytes_.values()), **each}


@jax.jit
def _nats(model, table, ids):
  return jnp.sum(model.negative_log_likelihood(ids, table))
