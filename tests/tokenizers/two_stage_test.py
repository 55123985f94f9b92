"""Two stages: another's codes first, then pixels through its decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled import run
from tests.tokenizers.tiny_tokenizer import (
  TRUNK,
  built,
  gradients,
  parts,
  pictures,
  quantizer,
)
from tokjax.tokenizers.conv import ConvConfig
from tokjax.tokenizers.two_stage import FROZEN, TwoStage, TwoStageConfig
from tokjax.tokenizers.vqgan import Vqgan, VqganConfig
from tokjax.train.optimizer import frozen_mask

PROXY = VqganConfig(
  ConvConfig(
    4, (1, 1, 1), num_res_blocks=1, z_dim=6, groups=2, attention=False,
    flavour="maskgit",
  ),
  quantizer("ema", input_dim=6),
)  # fmt: skip
CONFIG = TwoStageConfig(8, 4, 6, TRUNK, TRUNK, quantizer("ema"), proxy=PROXY)
PIXELS = dataclasses.replace(CONFIG, stage="pixels")
KEY = jax.random.key(3)


def call(config, **settings):
  tokenizer, state = built(config)
  return run(TwoStage.__call__, tokenizer, pictures(), state, **settings)


def test_the_first_stage_names_the_codes_of_the_other():
  tokenizer, state = built(CONFIG)
  found, _ = call(CONFIG)
  target = run(Vqgan.encode, tokenizer.proxy, pictures(), state.proxy).indices
  codes = run(TwoStage.encode, tokenizer, pictures(), state).codes
  logits = np.float64(run(TwoStage.logits, tokenizer, codes))
  assert logits.shape == (3, 4, 16)
  shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  flat = np.asarray(target).reshape(3, 4)
  picked = np.take_along_axis(shares, flat[..., None], -1)
  assert float(found.losses["proxy"]) == pytest.approx(
    -np.log(picked).mean(), rel=1e-5
  )
  agreement = (logits.argmax(-1) == flat).mean()
  assert float(found.stats["agreement"]) == pytest.approx(agreement)
  book = np.float64(state.proxy.codes)
  out = np.float64(tokenizer.proxy.quantizer.project_out[...])
  np.testing.assert_allclose(found.output, shares @ book @ out, atol=1e-5)


def test_one_sure_code_at_each_patch_is_the_other_tokenizer():
  """Logits of a hundred leave one code of each softmax."""
  tokenizer, state = built(PIXELS)
  indices = np.random.default_rng(0).integers(0, 16, (2, 2, 2))
  sure = 100 * np.eye(16, dtype=np.float32)[indices.reshape(2, 4)]
  got = run(TwoStage._images, tokenizer, sure, state)
  want = run(Vqgan.decode, tokenizer.proxy, indices, state.proxy)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_second_stage_gives_images_of_any_beginning():
  tokenizer, state = built(PIXELS)
  found, _ = call(PIXELS)
  indices = run(TwoStage.encode, tokenizer, pictures(), state).indices
  whole = run(TwoStage.decode, tokenizer, indices, state)
  np.testing.assert_allclose(found.output, whole, atol=1e-5)
  assert set(found.losses) == {"pixels"}
  want = np.mean((pictures() - np.float64(whole)) ** 2)
  assert float(found.losses["pixels"]) == pytest.approx(want, rel=1e-5)
  short = run(TwoStage.decode, tokenizer, indices[:, :2], state)
  masked = run(TwoStage.decode, tokenizer, indices, state, jnp.int32(2))
  np.testing.assert_allclose(short, masked, atol=1e-5)
  assert np.abs(short - whole).max() > 1e-4


def test_states_move_only_where_they_should():
  _, state = built(CONFIG)
  _, first = call(CONFIG, train=True, key=KEY)
  assert np.abs(first.tokens.counts - state.tokens.counts).max() > 0
  jax.tree.map(np.testing.assert_array_equal, first.proxy, state.proxy)
  found, second = call(PIXELS, train=True, key=KEY)
  jax.tree.map(np.testing.assert_array_equal, second, state)
  assert 1 <= float(found.stats["length"]) <= 6


def test_what_is_frozen_gets_no_gradient_and_the_rest_does():
  everything = {
    "patches", "encoder", "queries", "to_code", "from_code", "mask_token",
    "decoder", "pixels",
  }  # fmt: skip
  writes = {"patches", "encoder", "queries", "to_code"}
  for config, want in (
    (CONFIG, everything),
    (PIXELS, everything - writes | {"proxy"}),
  ):
    tokenizer, state = built(config)
    found = gradients(tokenizer, state, (pictures(),), None, KEY)
    assert parts(found) == want
    mask = frozen_mask({"tokenizer": tokenizer}, FROZEN[config.stage])
    for g, frozen in zip(
      jax.tree.leaves(found), jax.tree.leaves(mask), strict=True
    ):
      assert not (frozen and np.any(np.asarray(g)))
  moved = parts(found.proxy)
  assert moved == {"decoder"}


def test_begins_with_a_trained_proxy():
  tokenizer, state = built(CONFIG)
  other, other_state = built(PROXY)
  assert np.abs(other_state.codes - state.proxy.codes).max() > 0
  made, new = tokenizer.with_proxy(other, other_state, state)
  jax.tree.map(np.testing.assert_array_equal, made.proxy, other)
  jax.tree.map(np.testing.assert_array_equal, new.tokens, state.tokens)
  jax.tree.map(np.testing.assert_array_equal, new.proxy, other_state)
  assert tokenizer.proxy is not other  # the old one stays as it was
  wrong, wrong_state = built(dataclasses.replace(PROXY, pixel_loss="l2"))
  with pytest.raises(ValueError, match="proxy must be of"):
    tokenizer.with_proxy(wrong, wrong_state, state)


def test_settings_must_fit():
  with pytest.raises(ValueError, match="patch_size=2, proxy_factor=4"):
    built(dataclasses.replace(CONFIG, patch_size=2))
  with pytest.raises(ValueError, match="stage must be one of"):
    built(dataclasses.replace(CONFIG, stage="all"))
  tokenizer, state = built(CONFIG)
  with pytest.raises(ValueError, match="key must be given"):
    tokenizer(pictures(), state, train=True)
