"""Losses of whole models: what they are made of, and on eight devices."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from tests.compiled import compiled
from tokjax.kernels import maxsim
from tokjax.models import bert
from tokjax.parallel import meshes
from tokjax.retrieval import colbert, colberter, crisp, heads, losses, xtr
from tokjax.train import late_interaction
from tokjax.train import step as steps
from tokjax.train.late_interaction import (
  METHODS,
  LateInteraction,
  Objective,
  TextRules,
  make_loss,
)

colberter = compiled(colberter, leave=("warm_start",))
crisp = compiled(crisp, leave=("cluster_packed",))
losses = compiled(losses)
maxsim = compiled(maxsim)
xtr = compiled(xtr, leave=("text_config",))

B, n, Q, N, WIDTH = 8, 2, 6, 12, 16
CLUSTERS = crisp.CrispConfig(query_clusters=3, document_clusters=4)
PLAIN = TextRules(None, False, (), True)


@functools.cache
def jitted_loss(*settings):
  return jax.jit(make_loss(*settings))


@functools.cache
def loss_and_gradient(objective):
  function = jax.value_and_grad(make_loss(objective, PLAIN), has_aux=True)
  return jax.jit(function)


def batch(seed=0, teacher=False):
  random = np.random.default_rng(seed)
  query_mask = np.arange(Q) < random.integers(2, Q + 1, (B, 1))
  document_mask = np.arange(N) < random.integers(3, N + 1, (B, n, 1))
  made = {
    "query_ids": np.where(query_mask, random.integers(5, 50, (B, Q)), 0),
    "query_mask": query_mask,
    "document_ids": np.where(
      document_mask, random.integers(5, 50, (B, n, N)), 0
    ),
    "document_mask": document_mask,
    "false_negative": random.random((B, B * n)) < 0.1,
  }  # fmt: skip
  row = np.arange(B)
  made["false_negative"][row, row * n] = False
  for side in ("query", "document"):
    words = made[f"{side}_ids"] // 2
    made[f"{side}_words"] = words.astype(np.uint32)
    made[f"{side}_ids"] = made[f"{side}_ids"].astype(np.int32)
  if teacher:
    made["teacher"] = random.standard_normal((B, n)).astype(np.float32)
  return made


@functools.cache
def model(method="colbert", **changes):
  return jax.jit(lambda: new_model(method, **changes))()


def new_model(method, **changes):
  config = bert.BertConfig(
    vocab_size=50, width=WIDTH, num_layers=2, num_heads=2, mlp_width=32,
    max_positions=N,
  )  # fmt: skip
  encoder = bert.Bert(config, rngs=nnx.Rngs(0))
  if method == "colberter":
    settings = dict(hidden_dim=WIDTH, cls_dim=8, token_dim=4) | changes
    head_config = colberter.ColberterConfig(**settings)
    head = colberter.ColberterHead(head_config, rngs=nnx.Rngs(1))
  else:
    head_config = heads.HeadConfig(WIDTH, 8, **changes)
    head = heads.ProjectionHead(head_config, rngs=nnx.Rngs(1))
  return LateInteraction(encoder, head)


def objective(method, **changes):
  return Objective(method=method, clusters=CLUSTERS, k_train=9, **changes)


@jax.jit
def encode(m, ids, mask, scored):
  return colbert.encode_head(m.head, m.encoder(ids, mask), scored)


def token_sets(m, data):
  """Queries and documents encoded the long way."""
  query_mask = data["query_mask"]
  queries = encode(m, data["query_ids"], query_mask, query_mask)
  ids = data["document_ids"].reshape(-1, N)
  mask = data["document_mask"].reshape(-1, N)
  return queries, encode(m, ids, mask, mask), query_mask, mask


@pytest.mark.parametrize("method", ["colbert", "xtr", "crisp"])
@pytest.mark.parametrize("teacher", [False, True])
def test_loss_is_made_of_its_parts(method, teacher):
  data, m = batch(teacher=teacher), model()
  arrays = token_sets(m, data)
  scores = {
    "colbert": lambda: maxsim.maxsim(*arrays),
    "xtr": lambda: xtr.train_scores(*arrays, k_train=9),
    "crisp": lambda: crisp.score(*arrays, CLUSTERS),
  }[method]()
  scores, keep = np.asarray(scores), ~data["false_negative"]
  want = float(losses.in_batch_cross_entropy(scores / 0.5, keep))
  if teacher:
    own = np.stack([scores[i, i * n : (i + 1) * n] for i in range(B)])
    want += 2.0 * losses.kl_distillation(own, data["teacher"], temperature=0.25)
  settings = dict(temperature=0.5, distill_weight=2.0, distill_temperature=0.25)
  loss, metrics = jitted_loss(objective(method, **settings), PLAIN)(
    m, data, None
  )
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  allowed = np.where(keep, scores, -np.inf)
  hits = [allowed[i, i * n] >= allowed[i].max() for i in range(B)]
  assert metrics["accuracy"] == np.mean(hits, dtype=np.float32)


@functools.partial(jax.jit, static_argnums=1)
def encode_words(m, side, ids, mask, *words):
  return getattr(m.head, side)(m.encoder(ids, mask), mask, *words)


@pytest.mark.parametrize("teacher", [False, True])
def test_colberter_loss_is_made_of_its_parts(teacher):
  data, m = batch(teacher=teacher), model("colberter")
  ids = data["document_ids"].reshape(-1, N)
  mask = data["document_mask"].reshape(-1, N)

  def unique(words):
    rows = [np.unique(row[row > 0]) for row in np.asarray(words)]
    return np.stack(
      [np.pad(row, (0, words.shape[1] - len(row))) for row in rows]
    )

  words = data["document_words"].reshape(-1, N)
  documents = encode_words(m, "passages", ids, mask, words, unique(words))
  ids, mask, words = (data[f"query_{x}"] for x in ("ids", "mask", "words"))
  queries = encode_words(m, "queries", ids, mask, words, unique(words))
  found = colberter.score(
    queries.cls, queries.words, queries.mask, documents.cls, documents.words,
    documents.mask, m.head.fusion[...],
  )  # fmt: skip
  found, documents = jax.device_get((found, documents))
  gates = documents.gates.reshape(B, n, N)
  lists = documents.mask.reshape(B, n, N)
  if teacher:
    pairs = colberter.Scores(
      *(np.stack([x[i, i * n : (i + 1) * n] for i in range(B)]) for x in found)
    )
    want = colberter.loss(pairs, data["teacher"], gates, lists).total
  else:
    keep = ~data["false_negative"]
    want = float(losses.in_batch_cross_entropy(found.scores, keep))
    want += 0.1 * float(losses.in_batch_cross_entropy(found.cls_scores, keep))
    for x, where in (
      (gates[:, :1], lists[:, :1]),
      (gates[:, 1:], lists[:, 1:]),
    ):
      want += 0.75 * np.sum(x * where) / np.sum(where)
  loss, _ = jitted_loss(objective("colberter"), PLAIN)(m, data, None)
  np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize("method", ["colbert", "colberter"])
def test_documents_are_encoded_in_parts(method):
  data, m = batch(), model(method)
  in_parts = objective(method, encode_parts=n, remat_encoder="nothing_saveable")
  whole, parts = map(loss_and_gradient, (objective(method), in_parts))
  (want, _), want_gradient = whole(m, data, None)
  (got, _), gradient = parts(m, data, None)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for g, w in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True
  ):
    np.testing.assert_allclose(g, w, atol=1e-5 * max(1, np.abs(w).max()))
  dropped, _ = jitted_loss(in_parts, PLAIN)(m, data, jax.random.key(0))
  assert abs(dropped - want) > 1e-4
  _, shapes = jax.eval_shape(parts, m, data, jax.random.key(0))
  assert jax.tree.structure(shapes) == jax.tree.structure(gradient)
  with pytest.raises(ValueError, match="documents_of_a_query must be a mult"):
    jitted_loss(objective(method, encode_parts=3), PLAIN)(m, data)


@pytest.mark.parametrize("parts", [1, 2])  # of the documents of a device
@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_equal_one(method, parts, monkeypatch):
  if parts > 1:  # each holds two documents, which come one by one
    monkeypatch.setattr(late_interaction, "_GATHERED_BYTES", 1)
  data, m = batch(teacher=method == "colberter"), model(method)
  (want, _), want_gradient = loss_and_gradient(objective(method))(m, data, None)
  # Not the function above, which would remember what it gathered.
  function = loss_and_gradient.__wrapped__(objective(method))
  mesh = meshes.make_mesh(data=4, fsdp=2)
  with jax.set_mesh(mesh):
    shards = meshes.shard_batch(data, mesh)
    whole = jax.device_put(m, jax.NamedSharding(mesh, jax.P()))
    program = function.lower(whole, shards, None).compile()
    (got, _), gradient = program(whole, shards, None)
  gathered = re.findall(
    r"= f32\[(\d+),\d+,\d+\]\S* all-gather\(", program.as_text()
  )
  whole_pool = parts == 1 or method == "xtr"
  assert set(gathered) == {str(B * n if whole_pool else B)}
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for g, w in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True
  ):
    scale = max(1.0, float(np.abs(w).max()))
    np.testing.assert_allclose(g, w, atol=1e-5 * scale)


def test_exact_match_compares_equal_words_only():
  data, m = batch(), model("colberter", exact_match=True)
  loss, _ = jitted_loss(objective("colberter"), PLAIN)(m, data, None)
  words = data["document_words"] + np.uint32(100)
  other = data | {"document_words": words}
  alone, _ = jitted_loss(objective("colberter"), PLAIN)(m, other, None)
  assert np.isfinite(loss) and abs(loss - alone) > 1e-3


def test_queries_are_padded_with_masks():
  data, m = batch(), model()
  expanded = TextRules(7, False, (), True)
  loss, _ = jitted_loss(objective("colbert"), expanded)(m, data, None)
  _, documents, query_mask, mask = token_sets(m, data)
  ids = np.where(query_mask, data["query_ids"], 7)
  queries = encode(m, ids, query_mask, np.ones((B, Q), bool))
  scores = maxsim.maxsim(queries, documents, None, mask)
  keep = ~data["false_negative"]
  want = losses.in_batch_cross_entropy(scores, keep)
  np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_skipped_words_are_not_scored():
  data, m = batch(), model()
  skip = TextRules(None, False, (6, 7, 8), True)
  loss, _ = jitted_loss(objective("colbert"), skip)(m, data, None)
  queries, documents, query_mask, mask = token_sets(m, data)
  ids = data["document_ids"].reshape(-1, N)
  scored = mask & ~np.isin(ids, [6, 7, 8])
  scores = maxsim.maxsim(queries, documents, query_mask, scored)
  keep = ~data["false_negative"]
  want = losses.in_batch_cross_entropy(scores, keep)
  np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_hidden_states_stand_for_frozen_blocks():
  data, m = batch(), model()
  want, _ = jitted_loss(objective("colbert"), PLAIN)(m, data, None)

  @jax.jit
  def halves(encoder, ids, mask):
    lower, upper = bert.split(encoder, 1)
    return upper, lower(ids, mask)

  ids, mask = (data[f"document_{x}"].reshape(-1, N) for x in ("ids", "mask"))
  upper, documents = halves(m.encoder, ids, mask)
  _, queries = halves(m.encoder, data["query_ids"], data["query_mask"])
  hidden = {
    "query_hidden": queries,
    "document_hidden": np.asarray(documents).reshape(B, n, N, WIDTH),
  }
  small = LateInteraction(upper, m.head)
  loss_fn = jitted_loss(objective("colbert"), PLAIN)
  np.testing.assert_allclose(
    loss_fn(small, data | hidden, None)[0], want, rtol=1e-5
  )
  with pytest.raises(ValueError, match="mask_id must be None, got 7"):
    jitted_loss(objective("colbert"), TextRules(7, False, (), True))(
      small, data | hidden, None
    )


@pytest.mark.parametrize("method", METHODS)
def test_microbatches_are_refused(method):
  """Their queries would meet their own documents only: another loss."""
  loss_fn, sgd = make_loss(objective(method), PLAIN), optax.sgd(0.1)
  state = jax.eval_shape(
    lambda key, m: steps.init_state(key, m, sgd),
    jax.random.key(0),
    model(method),
  )
  step = steps.make_step(loss_fn, sgd, num_microbatches=2)
  with pytest.raises(
    ValueError,
    match=r"false_negative must have shape \(4, 8\), got \(4, 16\): .*"
    "num_microbatches to 1 .*gradient_cache",
  ):
    jax.eval_shape(step, state, batch())


@functools.cache
def gradient_with_dropout(policy):
  loss = loss_and_gradient(objective("colbert", remat_encoder=policy))
  with jax.debug_key_reuse(False):  # the same masks twice are the point
    return loss(model(), batch(), jax.random.key(0))[1]


@pytest.mark.parametrize("policy", steps.REMAT)
def test_remat_and_dropout(policy):
  data, m = batch(), model()
  plain = jitted_loss(objective("colbert"), PLAIN)
  one, two = map(gradient_with_dropout, (None, policy))
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6)
  dropped, _ = plain(m, data, jax.random.key(1))
  assert abs(dropped - plain(m, data, None)[0]) > 1e-4


@pytest.mark.unchecked
def test_settings_are_checked():
  with pytest.raises(ValueError, match="clusters must be given"):
    jitted_loss(Objective(method="crisp"), PLAIN)
  with pytest.raises(ValueError, match="remat must be one of .*, got True"):
    jitted_loss(Objective(remat_encoder=True), PLAIN)
  with pytest.raises(ValueError, match="method must be one of"):
    jitted_loss(dataclasses.replace(Objective(), method="bm25"), PLAIN)
  config = dataclasses.replace(colbert.ColbertConfig(), score_specials=False)
  with pytest.raises(ValueError, match="score_specials"):
    late_interaction.text_rules(config, None)
