"""Scores from attention never hold, or pass over, a map of all tokens by all.

Looks at the optimised program for CPU: no array in it has two axes of N, nor
as many values as N x N. Not in the table are methods that compare all tokens
with each other by cosine, which is their definition and no attention:
`divprune`, `todre` stage 1, `mmtok`, `catp` stage 1, `tome` and `aim_merge`.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from tokjax.reduction import (
  aim,
  catp,
  correlation_guided,
  correlation_scores,
  fastv,
  global_com,
  global_com_scores,
  hiprune,
  prumerge,
  sparsevlm,
  sparsevlm_scores,
  todre,
  token_transforming,
  visiondrop,
  visionzip,
  vtc_cls,
)

N = 1024
T = 24  # words
SPAN = dict(first_visual=3, num_visual=N)
TILED = dict(grid=(2, 2))


def array(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def mask(*shape):
  return array(*shape, dtype=bool)


X = array(1, N, 8)
SCORE = array(1, N)
MASK = mask(1, N)
ROW = array(1, 2, 1, 16)
HEADS = array(1, 2, N, 16)
PREFIXED = array(1, 2, N + 1, 16)
PROMPT = array(1, 2, N + 3 + T, 16)
WORDS = array(1, 2, T, 16)
INDEX = array(1, N, dtype=jnp.int32)
CROPS, CROP_SCORES = array(1, 4, N, 8), array(1, 4, N)


def keep(method, **settings):
  return functools.partial(method, num_keep=64, **settings)


CASES = {
  "cls_scores": (
    vtc_cls.cls_scores, array(2, *ROW.shape), array(2, *PREFIXED.shape), MASK,
  ),
  "vtc_cls": (keep(vtc_cls.vtc_cls), X, SCORE, MASK),
  "received_scores": (
    hiprune.received_scores, PREFIXED, PREFIXED, mask(1, N + 1),
  ),
  "received_scores, windows": (
    lambda q, k, ids: hiprune.received_scores(
      q, k, num_prefix=0, segment_ids=ids, group_size=4
    ),
    HEADS, HEADS, INDEX,
  ),
  "hiprune": (
    keep(hiprune.hiprune, grid=(32, 32)),
    X, SCORE, SCORE, MASK, array(1, T, 8), mask(1, T),
  ),
  "encoder_stage": (
    functools.partial(
      visiondrop.encoder_stage, num_dominant=56, num_contextual=8
    ),
    X, HEADS, HEADS, MASK,
  ),
  "encoder_stage, no class": (
    functools.partial(
      visiondrop.encoder_stage,
      num_dominant=56,
      num_contextual=8,
      class_token=False,
    ),
    X, HEADS, HEADS, MASK,
  ),
  "llm_stage": (
    functools.partial(
      visiondrop.llm_stage,
      start=3,
      stop=3 + N,
      num_dominant=56,
      num_contextual=8,
    ),
    array(1, N + 3 + T, 8), PROMPT, PROMPT, mask(1, N + 3 + T),
  ),
  "visual_attention": (
    functools.partial(
      visiondrop.visual_attention, causal=True, causal_debias=True
    ),
    HEADS, array(1, 2, N + 3, 16), mask(1, N + 3),
  ),
  "fastv_scores": (
    fastv.fastv_scores, ROW, PROMPT, INDEX, mask(1, N + 3 + T),
  ),
  "fastv": (keep(fastv.fastv), X, SCORE, MASK),
  "select_raters": (
    sparsevlm_scores.select_raters, X, array(1, T, 8), MASK, mask(1, T),
  ),
  "rater_scores": (
    functools.partial(sparsevlm_scores.rater_scores, **SPAN),
    WORDS, PROMPT, mask(1, T), mask(1, N + 3 + T),
  ),
  "corrected_scores": (
    functools.partial(sparsevlm_scores.corrected_scores, num_heads=1, **SPAN),
    WORDS, PROMPT, mask(1, T), mask(1, N + 3 + T),
  ),
  "sparsevlm": (keep(sparsevlm.sparsevlm), X, SCORE, MASK),
  "prumerge_attention": (
    prumerge.prumerge_attention, array(1, 32), array(1, N + 1, 32),
    mask(1, N + 1),
  ),
  "prumerge": (keep(prumerge.prumerge), X, X, SCORE, MASK),
  "prumerge_plus": (keep(prumerge.prumerge_plus), X, X, SCORE, MASK),
  "visionzip_signals": (
    visionzip.visionzip_signals, ROW, HEADS, MASK,
  ),
  "visionzip": (keep(visionzip.visionzip), X, X, SCORE, MASK),
  "information_density": (correlation_scores.information_density, X, MASK),
  "sample_tokens": (
    correlation_scores.sample_tokens, SCORE, array(1, dtype=jnp.int32), MASK,
  ),
  "correlation_guided": (
    keep(correlation_guided.correlation_guided), X, X, SCORE, SCORE, MASK,
  ),
  "correlation_guided, means": (
    keep(correlation_guided.correlation_guided, aggregation="nearest_mean"),
    X, X, SCORE, SCORE, MASK,
  ),
  "class_scores": (
    functools.partial(global_com_scores.class_scores, kind="prob"),
    array(1, 2, 16), PREFIXED,
  ),
  "no_class_scores": (global_com_scores.no_class_scores, X, MASK),
  "crop_budgets": (
    functools.partial(global_com_scores.crop_budgets, **TILED), SCORE,
  ),
  "holistic_scores": (
    functools.partial(global_com_scores.holistic_scores, **TILED),
    CROP_SCORES, SCORE, mask(1, 4, N),
  ),
  "global_com": (
    functools.partial(global_com.global_com, **TILED),
    X, CROPS, SCORE, CROP_SCORES, mask(1, 4, N), array(8),
  ),
  "cls_pivot": (todre.cls_pivot, array(1, 2, N), MASK),
  "cross_modal_ratio": (todre.cross_modal_ratio, HEADS, HEADS, INDEX),
  "catp_context": (
    keep(catp.catp_context), X, SCORE, SCORE, array(1, 8), MASK,
  ),
  "catp_query": (keep(catp.catp_query), X, array(1, 8), MASK),
  "token_transforming": (
    keep(token_transforming.token_transforming), X, X, SCORE, MASK,
  ),
  "pagerank_importance": (aim.pagerank_importance, HEADS, HEADS, MASK),
  "aim_prune": (keep(aim.aim_prune), X, SCORE, MASK, MASK),
}  # fmt: skip


def squares(function, *inputs):
  """Shapes in the optimised program that are as large as N x N."""
  text = jax.jit(function).lower(*inputs).compile().as_text()
  found = {
    tuple(int(size) for size in shape.split(","))
    for shape in re.findall(r"\b[a-z]+\d*\[(\d[\d,]*)\]", text)
  }
  assert found  # else the text is not what it was
  return {
    shape
    for shape in found
    if sum(size >= N for size in shape) > 1 or math.prod(shape) >= N * N
  }


@pytest.mark.parametrize("name", CASES)
def test_no_map_of_all_tokens_by_all(name):
  function, *inputs = CASES[name]
  assert not squares(function, *inputs)


def test_a_dense_map_is_found():
  def received(q, k):
    logits = jnp.einsum("bhrd,bhsd->bhrs", q, k)
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(1, 2))

  assert any(shape[-2:] == (N, N) for shape in squares(received, HEADS, HEADS))
  assert squares(
    functools.partial(hiprune.received_scores, implementation="reference"),
    PREFIXED,
    PREFIXED,
  )
