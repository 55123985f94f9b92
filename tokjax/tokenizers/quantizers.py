"""The quantizer zoo: every kind at the same width and number of bits.

    quantizer = make("fsq", 64, 12, nnx.Rngs(0))
    state = quantizer.init_state(key)
    found, state = quantizer(features, state, train=True, key=key)
    for row in compare(64, 12): print(row)

All are called alike; `TABLE` says how each is set up, and is the place to copy
settings from. With several tables the bits are shared out: two codes of half
the bits for "rvq" and "pq".

The kinds are those of the survey below but for two: additive codes are chosen
jointly, by search and not in a network, and graph tokens stand for nodes, not
for vectors (`tokjax.tokenizers.graph_tokens`). Its comparison is `compare`,
worked out from the quantizers themselves.

Source: Li et al., 2025, "Discrete Tokenization for Multimodal LLMs: A
Comprehensive Survey". Ours: the width of projected codes, 8; the counts below
which a code is dead, .25 of a vector a step; "vq_gumbel" without losses of its
own and "lfq" with a commitment of .25, without which both collapsed in
`configs/claims/quantizers.py`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.ops import code_usage
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.grouped_quantizer import GroupedConfig
from tokjax.tokenizers.lookup_free import LookupFreeConfig
from tokjax.tokenizers.product_quantizer import PQConfig
from tokjax.tokenizers.residual_quantizer import RVQConfig
from tokjax.tokenizers.vector_quantizer import VQConfig
from tokjax.typing import Array, Int

__all__ = [
  "TABLE",
  "Properties",
  "compare",
  "fsq_levels",
  "joint_index",
  "make",
]

_NARROW = 8  # width of projected codes of length one, as in LlamaGen
# Of the paper; their products are 240, 1000, 4375, 15360 and 64000.
_FSQ_LEVELS = {
  8: (8, 6, 5),
  10: (8, 5, 5, 5),
  12: (7, 5, 5, 5, 5),
  14: (8, 8, 8, 6, 5),
  16: (8, 8, 8, 5, 5, 5),
}


def fsq_levels(bits: int) -> tuple[int, ...]:
  """Levels of each channel for about 2^bits codes.

  Args:
    bits: 2 to 30.

  Returns:
    Those of the paper where it has some, else 8 and 4 with the very product.

  Example:
    >>> fsq_levels(12), fsq_levels(7)
    ((7, 5, 5, 5, 5), (8, 4, 4))
  """
  checks.in_range(2, 30, bits=bits)
  if bits in _FSQ_LEVELS:
    return _FSQ_LEVELS[bits]
  fours = -bits % 3  # a 4 where a third bit is lacking
  return (8,) * ((bits - 2 * fours) // 3) + (4,) * fours


def _vq(width, bits, estimator="straight_through", **settings):
  book = CodebookConfig(2**bits, width, **settings)
  return VQConfig(book, estimator=estimator)


def _gumbel(width, bits):
  # Losses that pull a vector to a code drawn at random keep all codes together.
  book = CodebookConfig(2**bits, width)
  return VQConfig(
    book, estimator="gumbel", commitment_weight=0.0, codebook_weight=0.0
  )


def _cosine(width, bits):
  book = CodebookConfig(2**bits, min(_NARROW, width), metric="cosine")
  return VQConfig(book, input_dim=width)


def _ema(width, bits):
  return CodebookConfig(2**bits, width, learning="ema")


def _rvq(width, bits):
  # As few stages as may be: 2 for even bits.
  stages = next(n for n in range(2, bits + 1) if bits % n == 0)
  return RVQConfig(_ema(width, bits // stages), stages)


def _signs(kind, **settings):
  return lambda width, bits: LookupFreeConfig(
    kind, num_bits=bits, input_dim=width, **settings
  )


# How each is set up for a width and an even number of bits.
TABLE: dict[str, Callable[[int, int], Any]] = {
  "vq": _vq,
  "vq_ema": lambda width, bits: VQConfig(_ema(width, bits)),
  "vq_ema_reset": lambda width, bits: _vq(
    width, bits, learning="ema", reset="batch", reset_threshold=0.25
  ),
  "vq_anchors": lambda width, bits: _vq(width, bits, reset="anchors"),
  "vq_simvq": lambda width, bits: _vq(width, bits, learning="simvq"),
  "vq_rotation": lambda width, bits: _vq(width, bits, "rotation"),
  "vq_cosine": _cosine,
  "vq_ibq": lambda width, bits: _vq(width, bits, "index"),
  "vq_gumbel": _gumbel,
  "rvq": _rvq,
  "grouped_rvq": lambda width, bits: GroupedConfig(
    _rvq(width // 2, bits // 2), num_groups=2
  ),
  "pq": lambda width, bits: PQConfig(
    VQConfig(_ema(width // 2, bits // 2)), num_groups=2
  ),
  "fsq": lambda width, bits: LookupFreeConfig(
    "fsq", fsq_levels(bits), input_dim=width
  ),
  "lfq": _signs("lfq", commitment_weight=0.25),
  "bsq": _signs("bsq"),
}


class Properties(NamedTuple):
  """What a quantizer is made of, and whether its codes can die.

  Attributes:
    name: in `TABLE`.
    tables: shape of what holds its codes, [.., K, d]; () without a table.
    bits: log2 of the number of vectors it can give.
    parameters: numbers that its codes are made of, by whom ever learned;
      projections to and from the codes do not count.
    losses: names of its own losses.
    unused_codes_move: whether codes that no vector chooses change in
      training; None without a table.
  """

  name: str
  tables: tuple[int, ...]
  bits: float
  parameters: int
  losses: tuple[str, ...]
  unused_codes_move: bool | None

  @property
  def effective_codes(self) -> float:
    """Vectors it can give."""
    return 2.0**self.bits

  @property
  def needs_remedy(self) -> bool:
    """Whether nothing in it works against the collapse of its codes."""
    return self.unused_codes_move is False


def make(name: str, width: int, bits: int, rngs: nnx.Rngs) -> nnx.Module:
  """A quantizer of the zoo.

  Args:
    name: in `TABLE`.
    width: of vectors; even.
    bits: of the code of a vector, 4 to 20 and even; "fsq" has about as many.
    rngs: source of the first parameters.

  Returns:
    A module with `init_state`, a call, `lookup`, `num_codes` and
    `bits_per_vector`.

  Raises:
    ValueError: for an unknown name, or sizes out of range.

  Example:
    >>> quantizer = make("bsq", 16, 12, nnx.Rngs(0))
    >>> quantizer.num_codes, quantizer.bits_per_vector
    (4096, 12.0)
  """
  checks.one_of(tuple(TABLE), name=name)
  checks.in_range(4, 20, bits=bits)
  checks.divisible(2, width=width, bits=bits)
  return TABLE[name](width, bits).build(rngs)


def joint_index(
  indices: Int[Array, "..."], num_codes: int, ndim: int
) -> Int[Array, "*batch"]:
  """One number for all codes of a vector, the first counting least.

  Args:
    indices: of a quantizer, with `ndim` axes of vectors.
    num_codes: of each table.
    ndim: axes before those of codes.

  Returns:
    Numbers in 0..num_codes^codes - 1, which must fit int32; -1 where a code
    is.

  Example:
    >>> joint_index(jnp.array([[1, 2], [-1, 0]]), 10, 1).tolist()
    [21, -1]
  """
  flat = indices.reshape(*indices.shape[:ndim], -1)
  checks.in_range(0, 31, bits=flat.shape[-1] * math.log2(num_codes))
  weights = num_codes ** np.arange(flat.shape[-1])
  weights = weights.astype(np.int32).reshape((1,) * ndim + (-1,))
  return jnp.where(
    jnp.all(flat >= 0, axis=-1), jnp.sum(flat * weights, axis=-1), -1
  )


def compare(
  width: int, bits: int, names: Sequence[str] = tuple(TABLE)
) -> list[Properties]:
  """The comparison table of the survey, from the quantizers.

  Each is built and trained for 200 steps on four vectors, so that most codes
  are chosen by none, to see what becomes of those.

  Args:
    width: of vectors.
    bits: of the code of a vector.
    names: in `TABLE`.

  Returns:
    A row for each name.

  Example:
    >>> row = compare(4, 4, ["lfq"])[0]
    >>> row.effective_codes, row.parameters, row.needs_remedy
    (16.0, 0, False)
  """
  return [_properties(name, width, bits) for name in names]


def _properties(name, width, bits):
  key, state_key, train_key = jax.random.split(jax.random.key(0), 3)

  def start(key):
    quantizer = make(name, width, bits, nnx.Rngs(0))
    return quantizer, quantizer.init_state(key)

  quantizer, state = jax.jit(start)(state_key)
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path((quantizer, state))
  }
  tables = [x for place, x in shapes.items() if "codes" in place.split("/")]
  mixes = [x for place, x in shapes.items() if "mix" in place.split("/")]
  x = jax.random.normal(key, (4, width))
  found, _ = jax.eval_shape(
    lambda: quantizer(x, state, train=True, key=train_key)
  )
  moved = None
  if tables:
    moved = bool(jax.jit(_unused_codes_move)(quantizer, state, x, train_key))
  return Properties(
    name,
    tables[0] if tables else (),
    quantizer.bits_per_vector,
    sum(math.prod(shape) for shape in (*tables, *mixes)),
    tuple(found.losses),
    moved,
  )


def _unused_codes_move(quantizer, state, x, key, num_steps=200, rate=0.1):
  """Trains on x, and looks whether codes never chosen are where they were."""

  def step(carry, key):
    quantizer, state = carry

    def loss(quantizer):
      found, after = quantizer(x, state, train=True, key=key)
      error = jnp.mean(jnp.square(found.codes - x))
      return error + sum(found.losses.values()), (found.indices, after)

    (_, (index, state)), grads = jax.value_and_grad(loss, has_aux=True)(
      quantizer
    )

    def descend(path, leaf, grad):
      # Projections stay, so that what moves is codes.
      fixed = "project" in jax.tree_util.keystr(path)
      return leaf if fixed else leaf - rate * grad

    quantizer = jax.tree_util.tree_map_with_path(descend, quantizer, grads)
    return (quantizer, state), index

  keys = jax.random.split(key, num_steps)
  (trained, after), index = jax.lax.scan(step, (quantizer, state), keys)
  number, several = quantizer.num_codes, index.shape[2:]
  hits = code_usage.code_histogram(index, num_codes=number)
  every = jnp.arange(number).reshape(-1, *(1,) * len(several))
  every = jnp.broadcast_to(every, (number, *several))
  change = trained.lookup(every, after) - quantizer.lookup(every, state)
  far = jnp.linalg.norm(change, axis=-1)
  # Moving means that nothing is added to shrink by their smoothing.
  return jnp.all((hits > 0) | (far > 1e-3 * jnp.max(far)))
