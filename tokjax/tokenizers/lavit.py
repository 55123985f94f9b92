"""LaVIT: as many tokens as an image has to say.

A selector keeps some of the patches that a frozen encoder made of an image; a
merger lets the kept ones read the dropped ones; what is left is quantised. The
decoder gives back all patches from the kept codes and their order alone.

    tokenizer = LavitConfig(feature_dim=1408).build(nnx.Rngs(0))
    found, length = tokenizer.encode(features, state)   # indices [B, K]
    again = tokenizer.decode(found.indices, state)

Sources: Jin et al., 2024, "Unified Language-Vision Pretraining in LLM with
Dynamic Discrete Visual Tokenization", and its code: selector, policies, task
layers, positions by rank. Ours: a fixed number of rows with what finds no
room counted, the surest choice outside of training (`sample` draws, as the
code always does), and the stages as settings: the authors advise to train
selector and merger first, then to freeze the selector and add the codes.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax import checks
from tokjax.ops import attention_masks, estimators, packing, similarity
from tokjax.ops.policy_attention import policy_attention
from tokjax.tokenizers import transformer
from tokjax.tokenizers.codebook import CodebookConfig, CodebookState
from tokjax.tokenizers.measures import masked_mean
from tokjax.tokenizers.transformer import Transformer, TransformerConfig
from tokjax.tokenizers.types import Quantized, Reconstructed
from tokjax.tokenizers.vector_quantizer import VectorQuantizer, VQConfig
from tokjax.typing import Array, Bool, Float, Int, Key

__all__ = ["Lavit", "LavitConfig", "Selected"]

Stage = Literal["merge", "codes"]


def _codes():
  book = CodebookConfig(num_codes=16384, dim=32, metric="cosine")
  return VQConfig(book)


@dataclasses.dataclass(unsafe_hash=True)
class LavitConfig:
  """A dynamic tokenizer; defaults are the published ones."""

  feature_dim: int = 1408  # C, width of the frozen features and of the merger
  num_patches: int = 256  # N
  num_tokens: int = 256  # K, rows for what is kept, at most N
  num_layers: int = 12  # of merger and decoder, each
  num_heads: int = 16
  mlp_ratio: float = 4.3637
  quantizer: VQConfig = dataclasses.field(default_factory=_codes)
  keep_rate: float = 1 / 3  # share of patches that is kept on average
  rate_weight: float = 2.0  # of the squared distance to it
  temperature: float = 1.0  # of the Gumbel choice
  epsilon: float = 1e-6  # of the policies, see `policy_attention`
  stage: Stage = "codes"  # "merge" quantises nothing and trains the selector
  init_scale: float = 0.02  # of the weights

  def build(self, rngs: nnx.Rngs) -> "Lavit":
    """The tokenizer with new parameters."""
    return Lavit(self, rngs=rngs)


class Selected(NamedTuple):
  """Which patches stay.

  Attributes:
    keep: 1 for patches that stay, 0 for others; with the gradient of a soft
      choice.
    logits: log-probabilities of staying and of going.
  """

  keep: Float[Array, "B N"]
  logits: Float[Array, "B N 2"]


class Lavit(nnx.Module):
  """Selector, merger, quantizer and decoder.

  Cost in FLOPs of a forward pass over N patches: in each layer of the merger
  (16 + 4 mlp_ratio) N C^2 + 8 N^2 C, as much again for the decoder; 0.21 TFLOP
  an image for the merger of the published size.

  Attributes:
    config: its settings.
    reads: features of a frozen encoder, without its class token.

  Args:
    config: the shape.
    rngs: seeds the parameters.

  Raises:
    ValueError: for sizes that do not fit.

  Example:
    >>> book = CodebookConfig(num_codes=16, dim=4, metric="cosine")
    >>> config = LavitConfig(8, 6, 6, 1, 2, 2.0, VQConfig(book))
    >>> tokenizer = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    >>> state = tokenizer.init_state(jax.random.key(0))
    >>> features = jax.random.normal(jax.random.key(1), (1, 6, 8))
    >>> found, length = jax.jit(tokenizer.encode)(features, state)
    >>> found.indices.shape, bool((found.mask.sum(1) == length).all())
    ((1, 6), True)
    >>> jax.jit(tokenizer.decode)(found.indices, state).shape
    (1, 6, 8)
  """

  reads: ClassVar[tuple[str, ...]] = ("features",)

  def __init__(self, config: LavitConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    width = config.feature_dim
    shape = TransformerConfig(
      width,
      config.num_layers,
      config.num_heads,
      config.mlp_ratio,
      context_dim=width,
      init_scale=config.init_scale,
    )
    dim = config.quantizer.codebook.dim
    self.selector = _Selector(shape, rngs)
    self.norm_merged = transformer.layer_norm(shape, rngs)
    keys = jax.random.split(rngs.params(), config.num_layers)
    self.merger = jax.vmap(
      lambda key: transformer.Block(shape, rngs=nnx.Rngs(key))
    )(keys)
    self.norm_context = transformer.layer_norm(shape, rngs)
    self.to_code = transformer.TaskLayer(shape, width, dim, rngs=rngs)
    self.quantizer = VectorQuantizer(config.quantizer, rngs=rngs)
    self.from_code = transformer.linear(shape, dim, width, rngs)
    self.ranks = transformer.table(config.num_tokens, width, rngs)
    # Published queries start at zero.
    self.queries = nnx.Param(jnp.zeros((config.num_patches, width)))
    self.decoder = Transformer(shape, rngs=rngs)
    self.to_feature = transformer.TaskLayer(shape, width, width, rngs=rngs)

  def init_state(self, key: Key[Array, ""]) -> CodebookState:
    """The codebook's state before the first step."""
    return self.quantizer.init_state(key)

  def __call__(
    self,
    features: Float[Array, "B N C"],
    state: CodebookState,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Reconstructed, CodebookState]:
    """Features from the tokens of images, with the losses.

    Args:
      features: of all patches.
      state: of the codebook.
      train: static; False keeps the surest choice and the state.
      key: for the choice of patches and the quantizer, in training.
      axis_name: mesh axis over which a `shard_map` cuts the batch.

    Returns:
      Features with losses "features" (1 - cosine), "rate" and those of the
      quantizer; statistics "length", "overflow" and those of the quantizer.

    Raises:
      ValueError: if a key is missing, or shapes do not fit.
    """
    config = self.config
    if train and key is None:
      raise ValueError("key must be given to train, got None")
    keys = (None, None) if key is None else jax.random.split(key)
    merge = config.stage == "merge"
    chosen = self.select(features, keys[0] if train else None)
    if not merge:
      chosen = jax.lax.stop_gradient(chosen)
    rows, mask, overflow = self._kept(features, chosen.keep)
    vectors = self.to_code(rows)
    losses, stats, codes = {}, {}, vectors
    if not merge:
      found, state = self.quantizer(
        vectors, state, mask, train=train, key=keys[1], axis_name=axis_name
      )
      losses, stats, codes = found.losses, found.stats, found.codes
    output = self.decode_codes(codes, mask)
    distance = 1 - similarity.cosine(output, features)
    losses = {
      "features": masked_mean(distance, axis_name=axis_name),
      **losses,
    }
    if merge:
      rate = masked_mean(chosen.keep, axis_name=axis_name)
      off = jnp.square(config.keep_rate - rate)
      losses["rate"] = config.rate_weight * off
    counts = {
      "length": jnp.sum(mask, axis=1).astype(jnp.float32),
      "overflow": overflow.astype(jnp.float32),
    }
    for name, count in counts.items():
      stats[name] = masked_mean(count, axis_name=axis_name)
    return Reconstructed(output, losses, stats), state

  def encode(
    self,
    features: Float[Array, "B N C"],
    state: CodebookState,
    *,
    sample: Key[Array, ""] | None = None,
  ) -> tuple[Quantized, Int[Array, " B"]]:
    """Codes of the kept patches, in the order of the image, and their number.

    Args:
      features: of all patches.
      state: of the codebook.
      sample: key to draw the choice with, as the published code does; None
        takes the likelier one.

    Returns:
      indices [B, K], -1 where there is none, and lengths; an image that wants
      more than K has its last patches dropped.
    """
    chosen = self.select(features, sample)
    rows, mask, _ = self._kept(features, chosen.keep)
    found, _ = self.quantizer(self.to_code(rows), state, mask)
    return found, jnp.sum(mask, axis=1, dtype=jnp.int32)

  def decode(
    self, indices: Int[Array, "B K"], state: CodebookState
  ) -> Float[Array, "B N C"]:
    """Features of all patches from codes; index -1 is no code."""
    codes = self.quantizer.lookup(indices, state)
    return self.decode_codes(codes, indices >= 0)

  def restore(
    self,
    features: Float[Array, "B N C"],
    keep: Float[Array, "B N"],
    state: CodebookState,
  ) -> Float[Array, "B N C"]:
    """Features of all patches from the codes of some, whoever chose them.

    Args:
      features: of all patches.
      keep: 1 for patches that stay, 0 for others.
      state: of the codebook.
    """
    rows, mask, _ = self._kept(features, keep)
    codes = self.to_code(rows)
    if self.config.stage == "codes":
      codes = self.quantizer(codes, state, mask)[0].codes
    return self.decode_codes(codes, mask)

  def select(
    self, features: Float[Array, "B N C"], key: Key[Array, ""] | None = None
  ) -> Selected:
    """Which patches stay: drawn with a key, else the likelier choice."""
    config = self.config
    checks.has_rank(3, features=features)
    checks.same_size(
      features_patches=features.shape[1], num_patches=config.num_patches
    )
    checks.same_size(
      features_width=features.shape[2], feature_dim=config.feature_dim
    )
    logits = self.selector(features)
    if key is None:
      keep = (logits[..., 0] >= logits[..., 1]).astype(jnp.float32)
    else:
      hard = estimators.gumbel_codes(
        key,
        logits,
        jnp.array([[1.0], [0.0]]),
        temperature=config.temperature,
      )
      keep = hard.codes[..., 0]
    return Selected(keep, logits)

  def merge(
    self, features: Float[Array, "B N C"], keep: Float[Array, "B N"]
  ) -> Float[Array, "B N C"]:
    """Patches that have read the dropped ones; those kept are what counts."""
    dtype = self.queries[...].dtype
    x = features.astype(dtype)
    context = self.norm_merged(x).astype(dtype)
    number = features.shape[1]
    before = attention_masks.causal(number).astype(np.float32)
    own = np.eye(number, dtype=np.float32)
    among = jnp.maximum(keep[:, None], own[None]) * before[None]
    dropped = jnp.broadcast_to(1 - keep[:, None], among.shape)

    def read(part, y, context, policy):
      heads = part.heads(y, context)
      mixed = policy_attention(*heads, policy, epsilon=self.config.epsilon)
      return part.join(mixed)

    def step(x, block):
      y = block.norm_attention(x).astype(dtype)
      x = x + read(block.attention, y, y, among)
      y = block.norm_context(x).astype(dtype)
      x = x + read(block.context, y, context, dropped)
      return x + block.mlp(block.norm_mlp(x).astype(dtype)), None

    x, _ = jax.lax.scan(step, x, self.merger)
    return self.norm_context(x).astype(dtype)

  def decode_codes(
    self, codes: Float[Array, "B K d"], mask: Bool[Array, "B K"]
  ) -> Float[Array, "B N C"]:
    """Features of all patches from code vectors and which of them there are."""
    x = self.from_code(codes.astype(self.queries[...].dtype))
    x = jnp.where(mask[..., None], x + self.ranks[: x.shape[1]][None], 0)
    queries = jnp.zeros_like(x[:, :1]) + self.queries[...][None]
    shape = (len(mask), self.config.num_patches, mask.shape[1])
    readable = jnp.broadcast_to(mask[:, None], shape)
    return self.to_feature(self.decoder(queries, x, context_mask=readable))

  def _kept(self, features, keep):
    """Merged rows of the kept patches, which are real, and the surplus."""
    kept = packing.pack(
      jax.lax.stop_gradient(keep) > 0.5, self.config.num_tokens
    )
    merged = self.merge(features, keep)
    rows = jnp.take_along_axis(merged, kept.index[..., None], axis=1)
    return jnp.where(kept.mask[..., None], rows, 0), kept.mask, kept.overflow


class _Selector(nnx.Module):
  """Half of the channels of a patch, half of the mean patch, to two logits."""

  def __init__(self, shape, rngs):
    width = shape.width
    self.norm = transformer.layer_norm(shape, rngs)
    self.mix = transformer.linear(shape, width, width, rngs)
    self.down = transformer.linear(shape, width, width // 2, rngs)
    self.lower = transformer.linear(shape, width // 2, width // 4, rngs)
    self.out = transformer.linear(shape, width // 4, 2, rngs)

  def __call__(self, features):
    def gelu(x):
      return jax.nn.gelu(x, approximate=False)

    x = self.norm(features)
    x = gelu(self.mix(x.astype(self.mix.kernel[...].dtype)))
    local, whole = jnp.split(x, 2, axis=-1)
    whole = jnp.mean(whole.astype(jnp.float32), axis=1, keepdims=True)
    whole = jnp.zeros_like(local) + whole.astype(x.dtype)
    x = jnp.concatenate([local, whole], axis=-1)
    x = self.out(gelu(self.lower(gelu(self.down(x)))))
    return jax.nn.log_softmax(x.astype(jnp.float32), axis=-1)


def _check(config):
  checks.one_of(get_args(Stage), stage=config.stage)
  checks.divisible(4, feature_dim=config.feature_dim)
  checks.in_range(1, config.num_patches, num_tokens=config.num_tokens)
  checks.in_range(0, 1, keep_rate=config.keep_rate)
