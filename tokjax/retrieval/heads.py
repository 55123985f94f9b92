"""Projection heads: the encoder's hidden states in, token vectors out.

ColBERT projects every token by one matrix. MaxSim sends the gradient of a query
token to a single document token, so that matrix is moved by few rank-one terms
at a time; a deeper head spreads them over several factors and skips. A head is
a stack of layers, and masking and unit length are not its business:

    config = heads.HeadConfig(input_dim=768, kind="ffn", residual="first")
    head = heads.ProjectionHead(config, rngs=nnx.Rngs(0))
    tokens = colbert.encode_head(head, hidden, mask)

A head without activations is a linear map, whatever its depth: train it deep,
then `fold` it into one matrix, at no cost and with the same token vectors.

Published results are mixed: the paper gains 2 points of nDCG@10 on average,
while others report a loss against one matrix when the training set is small.
So the default is the single matrix.

Source: Clavié, Lee, Takehi, Shakir, Kato, 2025, "Simple Projection Variants
Improve ColBERT Performance". From the paper: the variants, upscaled widths,
skips, a learned scale on them. From published code (lightonai/pylate): a layer
adds its skip after the activation, the input itself where the widths agree and
else a product without bias; weights start as torch's linear layers do. Ours:
where skips stand in gated layers and in stacks, the scale starts at 1, the
identity start, `fold`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tokjax import checks
from tokjax.typing import Array, Float

__all__ = [
  "Activation",
  "GatedLayer",
  "HeadConfig",
  "Projection",
  "ProjectionHead",
  "ProjectionLayer",
  "fold",
  "from_matrix",
]

Activation = Literal["identity", "tanh", "relu", "gelu", "silu"]

_ACTIVATIONS = {
  "identity": lambda x: x,
  "tanh": jnp.tanh,
  "relu": jax.nn.relu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "silu": jax.nn.silu,
}


@dataclasses.dataclass(unsafe_hash=True)
class HeadConfig:
  """Shape of a head; the default is ColBERT's one matrix."""

  input_dim: int  # width h of the hidden states
  output_dim: int = 128  # width D of a token vector
  kind: Literal["linear", "ffn", "glu"] = "linear"  # what the hidden layers are
  depth: int = 2  # layers of "ffn" and "glu", the last one included
  expand: float = 2.0  # width of their hidden layers, in units of input_dim
  activation: Activation = "identity"  # of their hidden layers
  residual: Literal["none", "first", "all"] = "none"  # which layers have a skip
  learned_scale: bool = False  # one trained number per skip, from 1
  bias: bool = False  # does every layer add one; skips never do
  init: Literal["torch", "identity"] = "torch"  # "identity": see ProjectionHead


class ProjectionLayer(nnx.Module):
  """One linear layer: activation(x W + b), plus x R, plus x, or plus nothing.

  Attributes:
    kernel: W, [inputs, outputs].
    bias: b, or None.
    residual: R, or None.
    activation: name of the function.
    identity_residual: whether x itself is added.
    scale: what the skip is multiplied by, a trained number; None for 1.

  Args:
    kernel: W.
    bias: b; None for none.
    residual: R; None for none.
    activation: name of the function; "gelu" is the exact one.
    identity_residual: whether x itself is added where there is no R.
    scale: start of the trained number; None for none.

  Raises:
    ValueError: for an unknown activation.

  Example:
    >>> layer = ProjectionLayer(jnp.array([[1.0], [-3.0]]), activation="relu",
    ...                         residual=jnp.array([[1.0], [0.5]]))
    >>> layer(jnp.array([[2.0, 1.0]])).tolist()
    [[2.5]]
  """

  def __init__(
    self,
    kernel: Float[Array, "h D"],
    bias: Float[Array, " D"] | None = None,
    residual: Float[Array, "h D"] | None = None,
    *,
    activation: Activation = "identity",
    identity_residual: bool = False,
    scale: Float[Array, ""] | None = None,
  ):
    checks.one_of(get_args(Activation), activation=activation)
    self.kernel = nnx.Param(kernel)
    self.bias = None if bias is None else nnx.Param(bias)
    self.residual = None if residual is None else nnx.Param(residual)
    self.scale = None if scale is None else nnx.Param(scale)
    self.activation = activation
    self.identity_residual = identity_residual

  def __call__(self, x: Float[Array, "*batch h"]) -> Float[Array, "*batch D"]:
    y = x @ self.kernel[...]
    if self.bias is not None:
      y = y + jnp.broadcast_to(self.bias[...], y.shape)
    return _add_skip(self, x, _ACTIVATIONS[self.activation](y))


class GatedLayer(nnx.Module):
  """A gated linear unit: value(x) * gate(x), plus a skip.

  Attributes:
    value: the layer that is gated.
    gate: the layer that opens it; the activation is the gate's own.
    residual: R of the skip x R, or None.
    identity_residual: whether x itself is added.
    scale: what the skip is multiplied by, a trained number; None for 1.

  Args:
    value: layer without activation.
    gate: layer with one, of the same width.
    residual: R; None for none.
    identity_residual: whether x itself is added where there is no R.
    scale: start of the trained number; None for none.

  Example:
    >>> value = ProjectionLayer(jnp.array([[1.0], [1.0]]))
    >>> gate = ProjectionLayer(jnp.array([[0.0], [2.0]]), activation="relu")
    >>> GatedLayer(value, gate)(jnp.array([[3.0, 1.0], [3.0, -1.0]])).tolist()
    [[8.0], [0.0]]
  """

  def __init__(
    self,
    value: ProjectionLayer,
    gate: ProjectionLayer,
    residual: Float[Array, "h D"] | None = None,
    *,
    identity_residual: bool = False,
    scale: Float[Array, ""] | None = None,
  ):
    self.value = value
    self.gate = gate
    self.residual = None if residual is None else nnx.Param(residual)
    self.scale = None if scale is None else nnx.Param(scale)
    self.identity_residual = identity_residual

  def __call__(self, x: Float[Array, "*batch h"]) -> Float[Array, "*batch D"]:
    return _add_skip(self, x, self.value(x) * self.gate(x))


class Projection(nnx.Module):
  """A head: layers applied in turn.

  What a checkpoint holds, and what `ProjectionHead` makes from a config.

  Attributes:
    layers: the layers, first to last.

  Args:
    layers: at least one.

  Example:
    >>> double = ProjectionLayer(2 * jnp.eye(2))
    >>> Projection([double, double])(jnp.array([[1.0, 3.0]])).tolist()
    [[4.0, 12.0]]
  """

  def __init__(self, layers: Iterable[ProjectionLayer | GatedLayer]):
    self.layers = nnx.List(layers)

  def __call__(self, x: Float[Array, "*batch h"]) -> Float[Array, "*batch D"]:
    for layer in self.layers:
      x = layer(x)
    return x


class ProjectionHead(Projection):
  """A head with fresh weights.

  With h the width of x, H = expand * h and f the activation:

      linear          x W                             W: h -> D
      ffn, depth 2    f(x W1) W2                      W1: h -> H, W2: H -> D
      glu, depth 2    (x Wv * f(x Wg)) Wo             Wv, Wg: h -> H, Wo: H -> D

  Deeper ones have more hidden layers of width H. The last layer has no
  activation. A skip adds to its layer's output x, or x R where the widths
  differ. The paper's best heads are "ffn" of depth 2, twice as wide, with a
  skip on the first layer and "identity" or "silu".

  Weights and biases start uniform within 1 / sqrt(inputs), as in torch. With
  `init="identity"` the head starts by returning its input, so that training
  continues from the token vectors of a sentence encoder; that needs kind
  "linear" without skip and output_dim = input_dim. For narrower starts see
  `from_matrix`.

  FLOPs per token: linear 2 h D; ffn 2 h H + 2 H D; glu 4 h H + 2 H D; each
  further hidden layer 2 H^2 (ffn) or 4 H^2 (glu); each R as many as a kernel of
  its shape. For h = 768, D = 128 and H = 2 h: 0.2, 2.8 and 5.1 million.

  Attributes:
    config: the shape.
    layers: as in `Projection`.

  Args:
    config: the shape.
    rngs: seeds the weights.

  Raises:
    ValueError: for a size out of range, an unknown name, an activation on a
      linear head, or an identity start that the shape does not allow. When
      called: if the width of x is not `input_dim`.

  Example:
    >>> config = HeadConfig(input_dim=6, output_dim=4, kind="glu",
    ...                     activation="silu", residual="first")
    >>> head = ProjectionHead(config, rngs=nnx.Rngs(0))
    >>> head(jnp.ones((2, 3, 6))).shape
    (2, 3, 4)
  """

  def __init__(self, config: HeadConfig, *, rngs: nnx.Rngs):
    _check(config)
    super().__init__(_layers(config, rngs))
    self.config = config

  def __call__(self, x: Float[Array, "*batch h"]) -> Float[Array, "*batch D"]:
    checks.same_size(x_width=x.shape[-1], input_dim=self.config.input_dim)
    return super().__call__(x)


def from_matrix(matrix: Float[Array, "h D"]) -> Projection:
  """A trainable linear head that starts as a given matrix.

  For fine-tuning from known directions: the leading right singular vectors of
  a sample of token vectors, say, keep as much of their inner products as D
  numbers can. `ProjectionHead` with `init="identity"` is the case without any
  change of width.

  Args:
    matrix: [input width, output width].

  Returns:
    A head of one layer.

  Raises:
    ValueError: if it is not a matrix.

  Example:
    >>> head = from_matrix(jnp.array([[1.0], [2.0]]))
    >>> head(jnp.array([[3.0, 4.0]])).tolist()
    [[11.0]]

  Source: ours.
  """
  checks.has_rank(2, matrix=matrix)
  return Projection([ProjectionLayer(matrix)])


def fold(head: Projection) -> Float[Array, "h D"]:
  """The one matrix that a head without activations is.

      x (W1 + R1) (W2 + R2) ... = x matrix

  Use it in place of the head when encoding: `colbert.encode_head` takes it, and
  the cost per token falls to 2 h D FLOPs. Differentiable.

  Args:
    head: every layer linear: no activation, no bias, no gate.

  Returns:
    The product, computed in float32, in the dtype of the first kernel.

  Raises:
    ValueError: if a layer is not linear; the message names the first.

  Example:
    >>> head = Projection([ProjectionLayer(jnp.array([[1.0, 2.0]])),
    ...                    ProjectionLayer(jnp.array([[3.0], [4.0]]))])
    >>> fold(head).tolist()
    [[11.0]]

  Source: ours; common knowledge.
  """
  for i, layer in enumerate(head.layers):
    reason = _not_linear(layer)
    if reason:
      raise ValueError(
        f"head must be linear to be one matrix, but layer {i} has {reason}"
      )
  kernel = head.layers[0].kernel[...]
  wide = jax.tree.map(lambda p: p.astype(jnp.float32), head)
  # A linear map's matrix is what it makes of the unit vectors.
  with jax.default_matmul_precision("highest"):
    matrix = wide(jnp.eye(kernel.shape[0], dtype=jnp.float32))
  return matrix.astype(kernel.dtype)


def _add_skip(layer, x, y):
  if layer.residual is not None:
    skip = x @ layer.residual[...]
  elif layer.identity_residual:
    skip = x
  else:
    return y
  return y + (skip if layer.scale is None else layer.scale[...] * skip)


def _not_linear(layer):
  if isinstance(layer, GatedLayer):
    return "a gate"
  if layer.activation != "identity":
    return f"activation {layer.activation!r}"
  return None if layer.bias is None else "a bias"


def _check(config):
  checks.in_range(
    1, 1 << 20, input_dim=config.input_dim, output_dim=config.output_dim
  )
  checks.one_of(("linear", "ffn", "glu"), kind=config.kind)
  checks.one_of(get_args(Activation), activation=config.activation)
  checks.one_of(("none", "first", "all"), residual=config.residual)
  checks.one_of(("torch", "identity"), init=config.init)
  if config.kind != "linear":
    checks.in_range(2, 1 << 10, depth=config.depth)
    checks.in_range(1, 1 << 20, hidden_width=_hidden_width(config))
  elif config.activation != "identity":
    raise ValueError(
      "activation must be 'identity' for kind 'linear', which has no hidden "
      f"layer, got {config.activation!r}"
    )
  if config.init == "identity":
    checks.one_of(("linear",), kind_for_identity_init=config.kind)
    checks.one_of(("none",), residual_for_identity_init=config.residual)
    checks.same_size(input_dim=config.input_dim, output_dim=config.output_dim)
  if config.learned_scale and config.residual == "none":
    raise ValueError("learned_scale=True needs residual 'first' or 'all'")


def _hidden_width(config):
  return round(config.expand * config.input_dim)


def _layers(config, rngs):
  hidden = 0 if config.kind == "linear" else config.depth - 1
  widths = [config.input_dim, *[_hidden_width(config)] * hidden]
  widths.append(config.output_dim)
  with_skip = {"none": 0, "first": 1, "all": hidden + 1}[config.residual]
  layers = []
  for i, (inputs, outputs) in enumerate(
    zip(widths[:-1], widths[1:], strict=True)
  ):
    skip = {}
    if i < with_skip:
      same = inputs == outputs
      skip = dict(
        identity_residual=same,
        residual=None if same else _uniform(rngs, inputs, (inputs, outputs)),
        scale=jnp.ones(()) if config.learned_scale else None,
      )
    if i == hidden:
      layers.append(_linear(config, rngs, inputs, outputs, **skip))
    elif config.kind == "ffn":
      skip["activation"] = config.activation
      layers.append(_linear(config, rngs, inputs, outputs, **skip))
    else:
      value = _linear(config, rngs, inputs, outputs)
      gate = _linear(
        config, rngs, inputs, outputs, activation=config.activation
      )
      layers.append(GatedLayer(value, gate, **skip))
  return layers


def _linear(config, rngs, inputs, outputs, **settings):
  if config.init == "identity":
    kernel = jnp.eye(inputs)
    bias = jnp.zeros(outputs) if config.bias else None
  else:
    kernel = _uniform(rngs, inputs, (inputs, outputs))
    bias = _uniform(rngs, inputs, (outputs,)) if config.bias else None
  return ProjectionLayer(kernel, bias, **settings)


def _uniform(rngs, inputs, shape):
  limit = inputs**-0.5
  return jax.random.uniform(rngs.params(), shape, minval=-limit, maxval=limit)
