"""Contracts of the vision host: forward, taps, reductions inside."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled
from tokjax.models import positions, reducing, vit, vit_blocks
from tokjax.models.reducing import Reduction, Taps
from tokjax.ops import patches, plans
from tokjax.reduction import types

CONFIG = vit.VitConfig(
  image_size=8,
  patch_size=4,
  width=8,
  num_layers=2,
  num_heads=2,
  mlp_width=12,
  num_outputs=3,
  num_registers=1,
  layer_scale=0.5,
  init_scale=0.3,
)


def built(**changes):
  config = vit.VitConfig(**{**vars(CONFIG), **changes})
  return filled(lambda: vit.Vit(config, rngs=nnx.Rngs(0)))


def pooling_by_attention():
  return built(class_token=False, pool="attention", num_registers=0)


def cast(model, images):
  return jax.tree.map(lambda x: x.astype(images.dtype), model)


def photos(seed, batch=8):
  return (jax.random.normal(jax.random.key(seed), (batch, 8, 8, 3)),)


def forward(model, images):
  return cast(model, images)(images)


def tapped(model, images):
  taps = Taps(queries=(-1,), keys=(0, -1), hidden=(0,))
  return cast(model, images).encode(images, taps=taps)


def first_rows(layer, x, keys, size, mask):
  picks = jnp.zeros_like(x[:, :4, 0], dtype=jnp.int32) + jnp.arange(4)[None]
  return types.selected(x, picks)


def pairs(layer, x, keys, size, mask):
  """Rows 2, 3 into one and 4, 5 into one; rows of a second frame go."""
  slot = jnp.array([0, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4])[: x.shape[1]]
  slot = jnp.zeros_like(x[..., 0], dtype=jnp.int32) + slot[None]
  weight = jnp.where(slot < 2, 1.0, 0.5)
  index = slot[:, :4] * 0 + jnp.array([0, 1, 2, 4])[None]
  return types.fused(x, plans.Merge(slot, weight), index, size=size)


def selected_inside(model, images):
  reduction = Reduction(first_rows, (0,), "after")
  encoded = cast(model, images).encode(images, reductions=(reduction,))
  return encoded._replace(taps=None)


def merged_inside(model, images):
  reduction = Reduction(pairs, (0,))
  return cast(model, images)(images, reductions=(reduction,))


def frames_inside(model, images):
  reduction = Reduction(pairs, (1,), "before", frames=2)
  return cast(model, images)(
    images, reductions=(reduction,), proportional=False
  )


def attention_inputs(seed):
  keys = jax.random.split(jax.random.key(seed), 4)
  q, k, v = (jax.random.normal(key, (8, 2, 5, 4)) for key in keys[:3])
  return q, k, v, jax.random.normal(keys[3], (8, 5))


def stream_bias(size):
  mask, index = size > 0.3, jnp.zeros_like(size, dtype=jnp.int32)
  return reducing.key_bias(
    reducing.Stream(size[..., None], index, mask, size, 5)
  )


def sizes(seed):
  return (jax.random.uniform(jax.random.key(seed), (8, 5)) + 0.1,)


def row(name, function, inputs=photos, weights=built, **settings):
  return Case(name, function, inputs, (0,), (0,), weights=weights, **settings)


CASES = [
  row("vit", forward),
  row("vit_attention_pool", forward, weights=pooling_by_attention),
  row(
    "vit_taps",
    tapped,
    bfloat16_tolerance=0.15,  # logits of size 10 after two layers
  ),
  row("vit_selected", selected_inside),
  row("vit_merged", merged_inside),
  row("vit_frames", frames_inside, lambda seed: photos(seed, batch=16)),
  Case(
    "attend", vit_blocks.attend, attention_inputs, (0, 1, 2, 3), (0, 1, 2, 3)
  ),
  Case("patchify", lambda x: patches.patchify(x, 4), photos, (0,), (0,)),
  Case(
    "interpolate_grid",
    lambda x: positions.interpolate_grid(x, (4, 2), (2, 3)),
    lambda seed: (jax.random.normal(jax.random.key(seed), (8, 6)),),
    batched=(),
    differentiable=(0,),
  ),
  Case("key_bias", stream_bias, sizes, bfloat16_tolerance=None),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
