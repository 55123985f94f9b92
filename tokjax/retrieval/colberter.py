"""ColBERTer: one vector for a text and small ones for its unique whole words.

The hidden state of [CLS] becomes the vector that finds candidates; those of
the tokens are projected, averaged per unique word, scaled by a gate that
learns which words a passage can do without, and compared by MaxSim, if wanted
only with the same word. Both scores are mixed by a learned weight. Vectors
keep their lengths: nothing is normalised.

`tokjax.retrieval.words` finds the words of a text, and
`tokjax.retrieval.colberter_texts` takes texts to vectors and to rankings.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import UInt32

from tokjax import checks
from tokjax.retrieval import losses
from tokjax.retrieval.colberter_scores import Scores, score, score_pairs
from tokjax.typing import Array, Bool, Float

__all__ = [
  "Bags",
  "ColberterConfig",
  "ColberterHead",
  "Losses",
  "Scores",
  "drop_stopwords",
  "gate_sparsity",
  "loss",
  "pool_words",
  "score",
  "score_pairs",
  "stopword_gate",
  "warm_start",
]


class Bags(NamedTuple):
  """Encoded texts.

  Attributes:
    cls: vector of the text.
    words: vector of each word; zero where the mask is False.
    mask: True where there is a word.
    word_ids: id of each word; 0 where the mask is False.
    gates: what the words of a passage were scaled by, float32; 1 for queries
      and where there is no gate, 0 where the mask is False.
  """

  cls: Float[Array, "*batch C"]
  words: Float[Array, "*batch W D"]
  mask: Bool[Array, "*batch W"]
  word_ids: UInt32[Array, "*batch W"]
  gates: Float[Array, "*batch W"]


class Losses(NamedTuple):
  """Training loss and its parts, float32 scalars before weighting.

  Attributes:
    total: the weighted sum.
    fused: Margin-MSE of the mixed scores.
    cls: Margin-MSE of the text vectors' scores.
    sparsity: mean gate of the positive passages plus that of the negatives.
  """

  total: Float[Array, ""]
  fused: Float[Array, ""]
  cls: Float[Array, ""]
  sparsity: Float[Array, ""]


def pool_words(
  x: Float[Array, "B N D"],
  word_of_token: UInt32[Array, "B N"],
  unique_words: UInt32[Array, "B W"],
) -> tuple[Float[Array, "B W D"], Bool[Array, "B W"]]:
  """Mean vector of the tokens of each unique word (BOW2).

      vectors[k] = mean of x[i] over the i with word_of_token[i] = unique[k]

  One matrix product with a 0/1 matrix, 2 B W N D FLOPs, and no scatter. The
  gradient of a token is its word's divided by the number of its tokens.

  Args:
    x: token vectors, any float dtype; sums are float32.
    word_of_token: id of each token's word, 0 for tokens of no word, whose
      vectors may hold anything.
    unique_words: each word once, 0 for empty slots. Tokens of other words are
      left out.

  Returns:
    The means in the dtype of `x`, zero in empty slots; and which slots hold a
    word that has a token.

  Raises:
    ValueError: if the axes disagree.
    TypeError: if the ids are not uint32: a hash may not fit an int32.

  Example:
    >>> x = jnp.array([[[1.0, 0.0], [3.0, 2.0], [0.0, 2.0], [5.0, 5.0]]])
    >>> words = jnp.array([[7, 9, 7, 0]], jnp.uint32)
    >>> vectors, mask = pool_words(x, words, jnp.array([[7, 9, 0]], jnp.uint32))
    >>> vectors[0].tolist(), mask[0].tolist()
    ([[0.5, 1.0], [3.0, 2.0], [0.0, 0.0]], [True, True, False])

  Source: Hofstaetter et al., 2022, "ColBERTer". The published code divides by
  0 in empty slots and masks the NaN afterwards.
  """
  checks.has_rank(3, x=x)
  checks.has_rank(2, word_of_token=word_of_token, unique_words=unique_words)
  checks.has_dtype(
    jnp.uint32, word_of_token=word_of_token, unique_words=unique_words
  )
  checks.same_size(x_tokens=x.shape[1], word_of_token=word_of_token.shape[1])
  checks.same_size(
    x_batch=x.shape[0],
    word_of_token_batch=word_of_token.shape[0],
    unique_words_batch=unique_words.shape[0],
  )
  x = jnp.where((word_of_token > 0)[:, :, None], x, 0)
  same = unique_words[:, :, None] == word_of_token[:, None, :]  # [B, W, N]
  same = same & (unique_words > 0)[:, :, None]
  count = jnp.sum(same, axis=2, dtype=jnp.float32)  # [B, W]
  total = jnp.matmul(
    same.astype(x.dtype),
    x,
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  means = total / jnp.maximum(count, 1)[:, :, None]
  return means.astype(x.dtype), count > 0


def stopword_gate(
  vectors: Float[Array, "*batch W D"],
  weight: Float[Array, " D"],
  bias: Float[Array, ""],
  mask: Bool[Array, "*batch W"] | None = None,
) -> tuple[Float[Array, "*batch W D"], Float[Array, "*batch W"]]:
  """Scales each word vector by how much the passage needs the word.

      gates[k] = relu(<weight, vectors[k]> + bias);  vectors[k] *= gates[k]

  A word whose gate is 0 need not be stored: see `drop_stopwords`. Gradients
  flow through both factors, and end at closed gates.

  Args:
    vectors: word vectors of passages, any float dtype.
    weight: of the gate.
    bias: of the gate; 1 to begin with, so that no gate starts closed.
    mask: True where there is a word; the rest gets vector and gate 0, whatever
      it holds. None for all.

  Returns:
    Scaled vectors in the dtype they came in, and float32 gates.

  Raises:
    ValueError: if the widths disagree.

  Example:
    >>> vectors = jnp.array([[0.5, 1.0], [-2.0, 3.0]])
    >>> scaled, gates = stopword_gate(
    ...   vectors, jnp.array([2.0, 0.0]), jnp.array(1.0))
    >>> scaled[0].tolist(), gates.tolist()
    ([1.0, 2.0], [2.0, 0.0])

  Source: Hofstaetter et al., 2022, "ColBERTer", contextualised stop-words.
  """
  checks.same_size(vectors_width=vectors.shape[-1], weight_width=len(weight))
  wide = vectors.astype(jnp.float32)
  if mask is not None:
    wide = jnp.where(mask[..., None], wide, 0)
  logits = jnp.matmul(wide, weight.astype(jnp.float32), precision="highest")
  gates = jax.nn.relu(logits + bias.astype(jnp.float32))
  if mask is not None:
    gates = jnp.where(mask, gates, 0)
  return (wide * gates[..., None]).astype(vectors.dtype), gates


def gate_sparsity(
  gates: Float[Array, "*batch W"], mask: Bool[Array, "*batch W"]
) -> Float[Array, ""]:
  """Mean gate over all words; its gradient closes gates.

  Args:
    gates: what `stopword_gate` returned, never negative.
    mask: True where there is a word.

  Returns:
    float32 scalar, 0 without any word.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> gates = jnp.array([[2.0, 1.0, 9.0]])
    >>> float(gate_sparsity(gates, jnp.array([[True, True, False]])))
    1.5

  Source: Hofstaetter et al., 2022, "ColBERTer", writes an L1 norm; the
  published code takes the mean over the words of a batch, as here.
  """
  if gates.shape != mask.shape:
    raise ValueError(
      f"mask must have the shape of gates {gates.shape}, got {mask.shape}"
    )
  total = jnp.sum(jnp.where(mask, gates.astype(jnp.float32), 0))
  return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)


@dataclasses.dataclass(unsafe_hash=True)
class ColberterConfig:
  """Widths and parts of the head, and how texts are cut; the paper's values."""

  hidden_dim: int = 768  # width of the encoder's hidden states
  cls_dim: int = 128  # width of the vector of a text
  token_dim: int = 32  # width of the word vectors, and of what is pooled
  # Width after a further linear layer: 1 is Uni-ColBERTer; None for no layer.
  compressed_dim: int | None = None
  exact_match: bool = False  # only equal words match; needed at width <= 8
  gates: bool = True  # learned stop-words
  aggregate: bool = True  # one vector per unique word; False: one per token
  stem: bool = True  # do the forms of a word count as one
  query_length: int = 30  # most tokens of a query, specials included
  document_length: int = 200  # most tokens of a document, specials included
  cls_weight: float = 0.1  # a_cls of `loss`
  sparsity_weight: float = 0.75  # a_cs of `loss`

  @classmethod
  def stage(cls, number: int, **changes: Any) -> "ColberterConfig":
    """Settings of one of the paper's training stages.

    1: text vector and reduced token vectors, special tokens included; 2: with
    one vector per unique word; 3: with gates (the default); 4: with one number
    per word and exact match (Uni-ColBERTer). Each starts from the weights of
    the one before (`warm_start`); the encoder of stage 1 starts from a ColBERT
    without reduction. For the paper's 16 and 8 numbers per word change
    `compressed_dim` of stage 4; it has exact match from 8 down.

    Args:
      number: 1, 2, 3 or 4.
      **changes: fields to set otherwise.

    Raises:
      ValueError: for another number.

    Example:
      >>> ColberterConfig.stage(4, compressed_dim=8).exact_match
      True
    """
    checks.one_of((1, 2, 3, 4), number=number)
    settings = {
      1: {"gates": False, "aggregate": False, "cls_weight": 0.5},
      2: {"gates": False},
      3: {},
      4: {"compressed_dim": 1},
    }[number]
    if number < 3:
      settings["sparsity_weight"] = 0.0
    settings |= changes
    if number == 4:
      settings.setdefault("exact_match", settings["compressed_dim"] <= 8)
    return cls(**settings)


class ColberterHead(nnx.Module):
  """Projections, gate and mixing weight on top of an encoder.

  Computes in the wider of the dtypes of hidden states and parameters;
  products of float32 have the platform's default precision.

  Args:
    config: widths and parts.
    rngs: seeds the parameters.

  Raises:
    ValueError: if exact match is asked for without whole words.

  Example:
    >>> config = ColberterConfig(hidden_dim=6, cls_dim=5, token_dim=4)
    >>> head = jax.jit(lambda: ColberterHead(config, rngs=nnx.Rngs(0)))()
    >>> words = jnp.array([[0, 7, 8, 7, 0]], jnp.uint32)
    >>> bags = jax.jit(head.passages)(
    ...   jnp.ones((1, 5, 6)), jnp.ones((1, 5), bool), words,
    ...   jnp.array([[7, 8]], jnp.uint32))
    >>> bags.cls.shape, bags.words.shape
    ((1, 5), (1, 2, 4))

  Source: Hofstaetter et al., 2022, "ColBERTer". All linear layers have a bias,
  as in the published code.
  """

  def __init__(self, config: ColberterConfig, *, rngs: nnx.Rngs):
    if config.exact_match and not config.aggregate:
      raise ValueError("exact_match needs aggregate=True, got False")
    self.config = config

    def linear(inputs, outputs, **settings):
      return nnx.Linear(inputs, outputs, rngs=rngs, **settings)

    ones = nnx.initializers.ones
    width, compressed = config.token_dim, config.compressed_dim
    self.cls = linear(config.hidden_dim, config.cls_dim)
    self.tokens = linear(config.hidden_dim, width)
    self.gate = linear(width, 1, bias_init=ones) if config.gates else None
    self.compress = None if compressed is None else linear(width, compressed)
    self.fusion = nnx.Param(jnp.zeros(()))

  def queries(
    self,
    hidden: Float[Array, "B N h"],
    attention_mask: Bool[Array, "B N"],
    word_of_token: UInt32[Array, "B N"],
    unique_words: UInt32[Array, "B W"] | None = None,
  ) -> Bags:
    """Vectors of queries, which have no gates.

    Args:
      hidden: last hidden states, [CLS] first.
      attention_mask: True where there is a token.
      word_of_token: id of each token's word, 0 for special tokens and padding.
      unique_words: each word once, 0 for empty slots; read, and then needed,
        only by a head of whole words (`aggregate`).

    Returns:
      One slot per unique word, or per token where there are no whole words:
      then special tokens count too.

    Raises:
      ValueError: if the axes disagree, or unique words are needed.
      TypeError: if word ids are not uint32.
    """
    bags = self._bags(hidden, attention_mask, word_of_token, unique_words)
    return self._compressed(bags)

  def passages(
    self,
    hidden: Float[Array, "B N h"],
    attention_mask: Bool[Array, "B N"],
    word_of_token: UInt32[Array, "B N"],
    unique_words: UInt32[Array, "B W"] | None = None,
  ) -> Bags:
    """Vectors of passages, scaled by their gates.

    A word whose gate is closed keeps its slot, as training wants it.

    Args:
      hidden: as in `queries`.
      attention_mask: as in `queries`.
      word_of_token: as in `queries`.
      unique_words: as in `queries`.

    Returns:
      As `queries`.

    Raises:
      ValueError: if the axes disagree, or unique words are needed.
      TypeError: if word ids are not uint32.
    """
    bags = self._bags(hidden, attention_mask, word_of_token, unique_words)
    if self.gate is not None:
      words, gates = stopword_gate(
        bags.words,
        self.gate.kernel[...][:, 0],
        self.gate.bias[...][0],
        bags.mask,
      )
      bags = bags._replace(words=words, gates=gates)
    return self._compressed(bags)

  def _bags(self, hidden, attention_mask, word_of_token, unique_words):
    checks.has_rank(3, hidden=hidden)
    for name, x in (
      ("attention_mask", attention_mask),
      ("word_of_token", word_of_token),
    ):
      checks.has_rank(2, **{name: x})
      checks.same_size(**{"hidden_tokens": hidden.shape[1], name: x.shape[1]})
    # Padding may hold NaN, and 0 * NaN is NaN in the gradient of a matrix.
    hidden = jnp.where(attention_mask[..., None], hidden, 0)
    words = self.tokens(hidden)
    if self.config.aggregate:
      if unique_words is None:
        raise ValueError("unique_words must be given where aggregate=True")
      word_of_token = jnp.where(attention_mask, word_of_token, 0)
      words, mask = pool_words(words, word_of_token, unique_words)
      word_ids = jnp.where(mask, unique_words, 0)
    else:
      checks.has_dtype(jnp.uint32, word_of_token=word_of_token)
      words = jnp.where(attention_mask[..., None], words, 0)
      mask = attention_mask
      word_ids = jnp.where(mask, word_of_token, 0)
    return Bags(
      cls=self.cls(hidden[:, 0]),
      words=words,
      mask=mask,
      word_ids=word_ids,
      gates=mask.astype(jnp.float32),
    )

  def _compressed(self, bags):
    if self.compress is None:
      return bags
    words = jnp.where(bags.mask[..., None], self.compress(bags.words), 0)
    return bags._replace(words=words)


def drop_stopwords(bags: Bags) -> Bags:
  """Takes the words whose gate is closed out of the passages.

  Not the same as their zero vectors: those still offer 0 to the maximum of
  every query word, which counts where all other products are negative.
  (With a layer after the gate they offer a product with its bias.)

  Args:
    bags: from `ColberterHead.passages`.

  Returns:
    The same with mask False, and vector and id 0, for those words.

  Example:
    >>> bags = Bags(
    ...   cls=jnp.ones((1, 1)), words=jnp.ones((1, 2, 1)),
    ...   mask=jnp.ones((1, 2), bool), word_ids=jnp.ones((1, 2), jnp.uint32),
    ...   gates=jnp.array([[0.5, 0.0]]))
    >>> drop_stopwords(bags).mask.tolist()
    [[True, False]]

  Source: Hofstaetter et al., 2022, "ColBERTer", indexing.
  """
  mask = bags.mask & (bags.gates > 0)
  return bags._replace(
    words=jnp.where(mask[..., None], bags.words, 0),
    mask=mask,
    word_ids=jnp.where(mask, bags.word_ids, 0),
  )


def warm_start(
  head: ColberterHead, config: ColberterConfig, *, rngs: nnx.Rngs
) -> ColberterHead:
  """A head with other parts that starts from the weights of a trained one.

  Args:
    head: of the stage before.
    config: of the stage to come.
    rngs: seeds the parts that `head` lacks.

  Returns:
    A new head; the weights of the parts that both have are those of `head`.

  Raises:
    ValueError: if such a part has another width.

  Example:
    >>> sizes = {"hidden_dim": 6, "cls_dim": 5, "token_dim": 4}
    >>> old = ColberterHead(
    ...   ColberterConfig.stage(1, **sizes), rngs=nnx.Rngs(0))
    >>> new = warm_start(old, ColberterConfig.stage(3, **sizes),
    ...                  rngs=nnx.Rngs(1))
    >>> bool((new.tokens.kernel[...] == old.tokens.kernel[...]).all())
    True

  Source: Hofstaetter et al., 2022, "ColBERTer", training in stages.
  """
  new = ColberterHead(config, rngs=rngs)
  for name in ("cls", "tokens", "gate", "compress", "fusion"):
    have, want = getattr(head, name), getattr(new, name)
    if have is None or want is None:
      continue
    shapes = [[x.shape for x in jax.tree.leaves(part)] for part in (have, want)]
    if shapes[0] != shapes[1]:
      raise ValueError(
        f"{name} of the new head must have the shapes {shapes[0]} of the old "
        f"one, got {shapes[1]}"
      )
    setattr(new, name, jax.tree.map(lambda x: x, have))
  return new


def loss(
  scores: Scores,
  teacher: Float[Array, "B n"],
  gates: Float[Array, "B n W"],
  document_mask: Bool[Array, "B n W"],
  *,
  fused_weight: float | Float[Array, ""] = 1.0,
  cls_weight: float | Float[Array, ""] = 0.1,
  sparsity_weight: float | Float[Array, ""] = 0.75,
) -> Losses:
  """Distillation of both scores, and a pull on the gates.

      total = fused_weight * margin_mse(scores.scores, teacher)
            + cls_weight * margin_mse(scores.cls_scores, teacher)
            + sparsity_weight * (mean gate of the positives
                                 + mean gate of the negatives)

  Column 0 of each list is the positive passage. Passages without words are no
  candidates of the first term.

  Args:
    scores: from `score_pairs`.
    teacher: the teacher's for the same passages; gets no gradient.
    gates: from `ColberterHead.passages`, in the lists of the scores.
    document_mask: True where there is a word.
    fused_weight: a_b of the paper.
    cls_weight: a_cls; 0.5 in the first stage.
    sparsity_weight: a_cs; 0 where there are no gates.

  Returns:
    float32 total and parts.

  Raises:
    ValueError: if shapes disagree or there is no negative.

  Example:
    >>> pair = jnp.array([[3.0, 1.0]])
    >>> found = jax.jit(loss)(
    ...   Scores(pair, 2 * pair, pair), jnp.array([[1.0, 0.0]]),
    ...   jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4), bool))
    >>> [round(float(x), 3) for x in found]  # 1 + 0.1 * 9 + 0.75 * 2
    [3.4, 1.0, 9.0, 2.0]

  Source: Hofstaetter et al., 2022, "ColBERTer"; its teacher is an ensemble of
  BERT cross-encoders.
  """
  checks.has_rank(3, gates=gates, document_mask=document_mask)
  present = jnp.any(document_mask, axis=2)
  fused = losses.margin_mse(scores.scores, teacher, present)
  cls = losses.margin_mse(scores.cls_scores, teacher)
  sparsity = gate_sparsity(gates[:, :1], document_mask[:, :1]) + gate_sparsity(
    gates[:, 1:], document_mask[:, 1:]
  )
  total = fused_weight * fused + cls_weight * cls + sparsity_weight * sparsity
  return Losses(total, fused, cls, sparsity)
