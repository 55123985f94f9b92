"""Contracts of the one-dimensional image tokenizers and their transformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.tiny_tokenizer import TRUNK, built, quantizer
from tokjax.ops import attention, attention_masks, patches, resample
from tokjax.tokenizers.conv import ConvConfig
from tokjax.tokenizers.one_d_piece import OneDPieceConfig
from tokjax.tokenizers.transformer import Transformer, TransformerConfig
from tokjax.tokenizers.two_stage import TwoStageConfig
from tokjax.tokenizers.vqgan import VqganConfig


def photos(seed):
  return (jax.random.uniform(jax.random.key(seed), (8, 8, 8, 3), minval=-1),)


def tokens(seed):
  return (jax.random.normal(jax.random.key(seed), (8, 5, 8)),)


CONV = ConvConfig(
  4, (1, 1, 1), num_res_blocks=1, z_dim=4, groups=2, attention=False,
  flavour="maskgit",
)  # fmt: skip
PROXY = VqganConfig(CONV, quantizer("ema"))


@functools.cache
def weights(config):
  """NumPy arrays: built once, not in every program."""
  with jax.ensure_compile_time_eval():
    return jax.tree.map(np.asarray, built(config))


def found(images, *, config, train=True):
  tokenizer, state = jax.tree.map(jnp.asarray, weights(config))
  made, state = tokenizer(images, state, train=train, key=jax.random.key(2))
  return made.output, made.losses, state


def one_d_piece(learning, **settings):
  return OneDPieceConfig(8, 4, 6, TRUNK, TRUNK, quantizer(learning), **settings)


def two_stage(stage):
  book = quantizer("ema")
  return TwoStageConfig(8, 4, 3, TRUNK, TRUNK, book, proxy=PROXY, stage=stage)


def transformed(x, **settings):
  config = TransformerConfig(8, 2, 2, init_scale=0.3, **settings)
  model = Transformer(config, rngs=nnx.Rngs(0))
  mask = attention_masks.causal(5)
  if not config.context_dim:
    return model(x, mask=mask)
  return model(x, x[:, :3], mask=mask, context_mask=mask[:, :3])


def attended(x):
  heads = x.reshape(*x.shape[:2], 2, 4).swapaxes(1, 2)
  return attention.attend(heads, heads, heads, jnp.tril(jnp.ones((5, 5), bool)))


def in_parts(x):
  heads = x.reshape(*x.shape[:2], 2, 4).swapaxes(1, 2)
  shared = heads[:, :1]  # one of two
  parts = [
    attention.attend_with_lse(heads, shared[:, :, part], shared[:, :, part])
    for part in (slice(0, 2), slice(2, 5))
  ]
  return attention.merge(*parts)


def row(name, function, inputs=tokens, **settings):
  return Case(name, functools.partial(function, **settings), inputs, (0,), (0,))


CASES = [
  row("transformer", transformed),
  row("transformer-swiglu", transformed, activation="swiglu", context_dim=8),
  row("attend", attended),
  row("attend-in-parts", in_parts),
  row("one-d-piece", found, photos, config=one_d_piece("gradient")),
  row(
    "one-d-piece-evaluated", found, photos, train=False,
    config=one_d_piece("ema", pixel_loss="l1"),
  ),
  row("vqgan", found, photos, config=PROXY),
  row("two-stage-proxy", found, photos, config=two_stage("proxy")),
  row("two-stage-pixels", found, photos, config=two_stage("pixels")),
  row("pyramid", lambda x: resample.pyramid(x[:, :4], (1, 2))),
  row(
    "unpatchify", lambda x: patches.unpatchify(x[:, :4, :], (2, 2), 2)
  ),
]  # fmt: skip


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
