"""Public attention under a rule: checks, choice of implementation, gradient."""

import functools
import importlib
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from tokjax import checks, compat
from tokjax.kernels import hopper
from tokjax.kernels.sparse_attention import reference, sharding, xla
from tokjax.ops.mask_rules import Rule, Tokens
from tokjax.typing import Array, Float, Implementation

__all__ = ["RuleAttention", "rule_attention"]


class RuleAttention(NamedTuple):
  """Attention over the keys that a rule allows; `attention.merge` takes it.

  Attributes:
    out: float32; zeros for a query that may read nothing.
    lse: log of the sum of the exponentials of its logits; -inf there.
    highest: its highest logit, without gradient; -inf there.
  """

  out: Float[Array, "B H N e"]
  lse: Float[Array, "B H N"]
  highest: Float[Array, "B H N"]


def rule_attention(
  q: Float[Array, "B H N d"],
  k: Float[Array, "B K M d"],
  v: Float[Array, "B K M e"],
  rule: Rule,
  readers: Tokens,
  read: Tokens | None = None,
  *,
  block_size: int | None = None,
  implementation: Implementation | None = None,
) -> RuleAttention:
  """softmax(q k^T / sqrt(d)) v over the keys that the rule allows.

  For masks that are known from what tokens are: causal, windows, packed
  sequences, scales, sets of items, pictures in a text
  (`tokjax.ops.mask_rules`). Tiles of the mask are made where they are needed;
  no array of all pairs exists, and pairs of blocks of which nothing may be read
  are not computed. (Under `vmap` they may be: put examples into the batch.)

  Args:
    q: queries of H heads, float32 or bfloat16.
    k: keys of K heads; K divides H, and H / K queries in a row share a key.
    v: values.
    rule: who may read whom; static, so keep one function and do not make it
      anew for each call under `jit`. It asks its two tokens and Python numbers;
      what else differs from call to call is a field of the tokens.
    readers: what the queries are, [N] or [B, N].
    read: what the keys are, likewise; None: the same tokens.
    block_size: queries, and keys, of a tile of "xla", at most; 512 for None, of
      128 to 1,024 the best for long sequences on CPU. Kernels have tiles of
      their own.
    implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu" runs that
      one or raises. None chooses when the program is lowered: the TPU kernel
      on TPU, the GPU kernel where the mesh of `jax.set_mesh` says that its
      devices are Hopper GPUs, "xla" elsewhere and where they cannot.

  Returns:
    float32. Gradients reach q, k and v through `out` and `lse`, by computing
    the tiles again; the backward pass is that of "xla" for all of them.

  Raises:
    ValueError: if sizes disagree.
    NotImplementedError: if the named implementation cannot take the arguments.

  Example:
    >>> from tokjax.ops import mask_rules
    >>> x = jnp.arange(1.0, 4).reshape(1, 1, 3, 1)
    >>> attend = jax.jit(lambda x: rule_attention(
    ...   0 * x, x, x, mask_rules.causal, mask_rules.tokens(3), block_size=2))
    >>> attend(x).out.ravel().tolist()
    [1.0, 1.5, 2.0]

  Cost: 4 H d FLOPs for each pair of the blocks that are not empty, 10 in the
  backward pass. Memory beside inputs and results: one tile of each head, and
  a list of blocks.

  On an Explicit mesh batch and heads may be sharded.

  Source: the online softmax of Dao et al. (2022), "FlashAttention"; that
  blocks are judged by the ranges of what their tokens are is ours.
  """
  read = readers if read is None else read
  checks.one_of(
    (None, *get_args(Implementation)), implementation=implementation
  )
  checks.has_rank(4, q=q, k=k, v=v)
  checks.divisible(k.shape[1], heads_of_q=q.shape[1])
  checks.same_size(width_of_q=q.shape[3], width_of_k=k.shape[3])
  checks.same_size(rows_of_k=k.shape[2], rows_of_v=v.shape[2])
  checks.same_size(rows_of_q=q.shape[2], readers=readers.position.shape[-1])
  checks.same_size(rows_of_k=k.shape[2], read=read.position.shape[-1])
  size = 512 if block_size is None else block_size
  checks.in_range(1, 1 << 20, block_size=size)
  plan = _Plan(rule, size, implementation)

  def local(*arrays):
    leaves, tree = jax.tree.flatten(arrays)
    leaves = compat.varying_together(*leaves)
    return RuleAttention(*_attend(plan, *jax.tree.unflatten(tree, leaves)))

  return sharding.over_shards(local, q, k, v, readers, read)


class _Plan(NamedTuple):
  """What is static."""

  rule: Rule
  block_size: int
  implementation: Implementation | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, readers, read):
  return _dispatch(plan, q, k, v, readers, read)


def _forward(plan, q, k, v, readers, read):
  found = out, lse, _ = _attend(plan, q, k, v, readers, read)
  return found, (q, k, v, readers, read, out, lse)


def _backward(plan, kept, cotangents):
  q, k, v, readers, read, out, lse = kept
  d_out, d_lse, _ = cotangents
  delta = jnp.sum(d_out * out, axis=-1) - d_lse
  gradients = xla.rule_attention_backward(
    q,
    k,
    v,
    plan.rule,
    readers,
    read,
    lse,
    delta,
    d_out,
    block_size=plan.block_size,
  )
  return *gradients, None, None


_attend.defvjp(_forward, _backward)


def _dispatch(plan, q, k, v, readers, read):
  """Runs the implementation named, or that of the platform."""
  rule, size, implementation = plan
  arrays = q, k, v, readers, read
  if implementation is not None:
    module = _module(implementation)
    if implementation.startswith("pallas"):
      reason = module.unsupported(q, k, v, readers, read)
      if reason is not None:
        raise NotImplementedError(f"{implementation}: {reason}")
    return _call(module, rule, size)(*arrays)
  branches = {"default": _call(xla, rule, size)}
  kernels = {"tpu": "pallas_tpu"}
  if hopper.on_hopper():
    kernels["cuda"] = "pallas_gpu"
  for platform, name in kernels.items():
    module = _module(name)
    if module.unsupported(*arrays) is None:
      branches[platform] = _call(module, rule, size)
  return jax.lax.platform_dependent(*arrays, **branches)


def _call(module, rule, block_size):
  settings = {"block_size": block_size} if module is xla else {}

  def run(q, k, v, readers, read):
    return module.rule_attention_forward(
      q, k, v, rule, readers, read, **settings
    )

  return run


def _module(name: str):
  """The module of an implementation; only its users import Pallas."""
  modules = {"reference": reference, "xla": xla}
  return modules.get(name) or importlib.import_module(
    f"tokjax.kernels.sparse_attention.{name}"
  )
