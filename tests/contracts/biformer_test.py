"""Contracts of bi-level routing attention and its network."""

import jax
from flax import nnx

from tests.contracts import harness
from tests.contracts.harness import Case
from tests.tokenizers.filled_module import filled
from tokjax.models.biformer import BiFormer, BiFormerConfig
from tokjax.ops import depthwise
from tokjax.sparse import biformer

CONFIG = BiFormerConfig(
  widths=(4, 8, 8),
  depths=(2, 1, 1),
  attention=("routing", "window", "full"),
  num_regions=(3, 2, 1),
  top_k=(2, 1, 1),
  head_dim=2,
  full_num_heads=2,
  num_outputs=3,
  stem_stride=2,
  lepe_size=3,
  drop_path_rate=0.3,
  init_scale=0.3,
)


def maps(seed):
  *keys, last = jax.random.split(jax.random.key(seed), 4)
  mask = jax.random.bernoulli(last, 0.7, (8, 5, 7))
  return *(jax.random.normal(key, (8, 5, 7, 2, 3)) for key in keys), mask


def routed(q, k, v, mask):
  settings = {"num_regions": 3, "block_size": 4, "block_queries": 3}
  return (
    biformer.bi_level_routing_attention(q, k, v, mask, top_k=2, **settings),
    biformer.window_attention(q, k, v, mask, **settings),
  )


def photos(seed):
  return (jax.random.normal(jax.random.key(seed), (8, 14, 16, 3)),)


def trained(model, images):
  model = jax.tree.map(lambda x: x.astype(images.dtype), model)
  return model(images, model.init_state(), train=True, key=jax.random.key(5))


def built():
  return filled(lambda: BiFormer(CONFIG, rngs=nnx.Rngs(0)))


def kernels(seed):
  one, two = jax.random.split(jax.random.key(seed))
  x = jax.random.normal(one, (8, 4, 5, 3))
  return x, jax.random.normal(two, (3, 3, 1, 3))


CASES = [
  Case("depthwise-conv", depthwise.depthwise_conv, kernels, (0,), (0, 1)),
  Case("bi-level-routing", routed, maps, (0, 1, 2, 3), (0, 1, 2)),
  Case(
    "biformer",
    trained,
    photos,
    (0,),
    (0,),
    tolerance=1e-4,
    bfloat16_tolerance=0.2,
    weights=built,
  ),
]


@harness.all_checks(CASES)
def test_contract(check, case):
  check(case)
