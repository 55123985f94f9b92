"""What is lost where the small gates of a language model are left out.

A small causal model of bytes with gated MLPs is trained here on documents, and
read with sparse gates on others: by one threshold a layer (CATS), by the
largest gates of each token, and with ReLU in the place of SiLU, before and
after some more training with it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokjax.benchmarks.trained_vit import Row
from tokjax.data import beir
from tokjax.ops import attention_masks
from tokjax.sparse import cats
from tokjax.sparse.cats import CatsConfig
from tokjax.tokenizers import transformer
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.train import image_classification, loop
from tokjax.train.optimizer import OptimizerConfig
from tokjax.typing import Array, Float, Int

__all__ = ["ByteModel", "GateRun", "claimed", "largest", "lead"]

# From what comes before the activation, and a number of the layer.
Gate = Callable[[Float[Array, "*batch F"], Float[Array, ""]], Array]


@dataclasses.dataclass(frozen=True)
class GateRun:
  """One model and what is left out of it."""

  dataset: str  # folder of documents; every tenth is held out
  seed: int = 0
  sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)  # of gates left out
  width: int = 96
  num_layers: int = 2
  num_heads: int = 4
  mlp_ratio: float = 3.0
  num_tokens: int = 128  # bytes of a row
  batch_size: int = 16  # rows of a step
  num_steps: int = 3000
  tuning_steps: int = 300  # more, with ReLU
  learning_rate: float = 3e-3  # its peak
  tuning_rate: float = 5e-4
  num_calibration: int = 64  # rows of training text that thresholds see
  num_test: int = 128  # rows of held-out text


class ByteModel(nnx.Module):
  """Bytes to logits of the next ones.

  Args:
    run: the shape.
    rngs: seeds the parameters.

  Example:
    >>> run = GateRun("", width=8, num_layers=2, num_heads=2, num_tokens=4)
    >>> model = jax.jit(lambda: ByteModel(run, rngs=nnx.Rngs(0)))()
    >>> read = jax.jit(lambda model, ids: model(
    ...   ids, lambda x, _: jax.nn.silu(x), jnp.zeros(2)))
    >>> logits, gates = read(model, jnp.array([[104, 105, 33]]))
    >>> logits.shape, gates.shape
    ((1, 3, 256), (2, 1, 3, 24))
  """

  def __init__(self, run: GateRun, *, rngs: nnx.Rngs):
    config = TransformerConfig(
      run.width,
      run.num_layers,
      run.num_heads,
      run.mlp_ratio,
      activation="swiglu",
    )
    self.table = transformer.table(256, run.width, rngs)
    self.positions = transformer.table(run.num_tokens, run.width, rngs)
    self.blocks = transformer.Transformer(config, rngs=rngs)
    self.head = transformer.linear(config, run.width, 256, rngs)

  def __call__(
    self, ids: Int[Array, "B N"], gate: Gate, numbers: Float[Array, " L"]
  ) -> tuple[Float[Array, "B N 256"], Float[Array, "L B N F"]]:
    """Logits, and the gates of all layers.

    Args:
      ids: bytes.
      gate: the activation of the gates, and what is left out.
      numbers: what `gate` is given in each layer.
    """
    mask = jnp.asarray(attention_masks.causal(ids.shape[1]))
    x = self.table[...][ids] + self.positions[...][None, : ids.shape[1]]

    def step(x, layer):
      block, number = layer
      y = block.norm_attention(x)
      x = x + block.attention(y, y, mask)
      y = block.norm_mlp(x)
      kept = gate(block.mlp.gate(y), number)
      return x + block.mlp.down(kept * block.mlp.up(y)), kept

    x, gates = jax.lax.scan(step, x, (self.blocks.blocks, numbers))
    return self.head(self.blocks.norm(x)), gates


def _silu(x: Float[Array, "*batch F"], number: Float[Array, ""]) -> Array:
  """Leaves nothing out."""
  del number
  return jax.nn.silu(x)


def _relu(x: Float[Array, "*batch F"], number: Float[Array, ""]) -> Array:
  """Leaves out what is negative."""
  del number
  return jax.nn.relu(x)


def _thresholded(
  x: Float[Array, "*batch F"], number: Float[Array, ""]
) -> Array:
  """Leaves out what does not exceed the threshold of its layer."""
  return cats.sparse_gate(jax.nn.silu(x), number)


def largest(x: Float[Array, "*batch F"], number: Float[Array, ""]) -> Array:
  """Leaves out all but so many of the largest of each token.

  Args:
    x: before the activation.
    number: how many stay; of equal ones the first.

  Example:
    >>> x = jnp.array([[3.0, -1.0, 0.1]])
    >>> (largest(x, jnp.array(2.0)) != 0).tolist()
    [[True, True, False]]
  """
  gate = jax.nn.silu(x)
  rank = jnp.argsort(jnp.argsort(-jnp.abs(gate), axis=-1), axis=-1)
  return jnp.where(rank < number, gate, 0)


def claimed(run: GateRun, *, progress: bool = True) -> dict[str, Row]:
  """Trains the model, calibrates thresholds, and reads held-out text.

  Args:
    run: the settings.
    progress: print a row when it is there.

  Returns:
    Rows "dense", "relu", "relu tuned", and for each sparsity "cats s" and
    "top-k s": "loss" of the next byte in nats, and the share of gates "kept".
  """
  learn, test = _texts(run)
  key, tuning_key = jax.random.split(jax.random.key(run.seed))
  model = jax.jit(lambda key: ByteModel(run, rngs=nnx.Rngs(key)))(key)
  model = _trained(run, model, _silu, learn, key, progress)
  tuned = _trained(run, model, _relu, learn, tuning_key, progress)
  nothing = jnp.zeros(run.num_layers)
  found = {
    "dense": (model, _silu, nothing),
    "relu": (model, _relu, nothing),
    "relu tuned": (tuned, _relu, nothing),
  }
  units = int(run.width * run.mlp_ratio)
  thresholds = _thresholds(run, model, learn)
  for sparsity in run.sparsities:
    number = jnp.full(run.num_layers, round((1 - sparsity) * units))
    found[f"cats {sparsity}"] = model, _thresholded, thresholds[sparsity]
    found[f"top-k {sparsity}"] = model, largest, number.astype(jnp.float32)
  rows = {}
  for name, (read, gate, numbers) in found.items():
    rows[name] = Row(_measured(run, read, gate, numbers, test))
    if progress:
      print(name, rows[name].metrics, flush=True)
  return rows


def lead(rows: Mapping[str, Row], *, most: float) -> float:
  """By how much thresholds are good enough, and better than the others.

  Args:
    rows: of `claimed`.
    most: how much of the loss half of the gates may cost.

  Returns:
    In shares of the dense loss, the least of: what is left of `most`; the lead
    of "cats 0.5" over "relu"; the lead at each sparsity over "top-k".

  Example:
    >>> losses = {"dense": 1.0, "relu": 2.0, "cats 0.5": 1.0, "top-k 0.5": 1.5}
    >>> lead({x: Row({"loss": y}) for x, y in losses.items()}, most=0.25)
    0.25
  """
  loss = {name: row.metrics["loss"] for name, row in rows.items()}
  leads = [
    loss[f"top-k {name[5:]}"] - loss[name]
    for name in loss
    if name.startswith("cats ")
  ]
  half, dense = loss["cats 0.5"], loss["dense"]
  return min(most - (half / dense - 1), *[
    x / dense for x in (loss["relu"] - half, *leads)
  ])  # fmt: skip


def _texts(run):
  """Bytes to learn from, and rows of held-out ones."""
  texts = beir.load(run.dataset).document_texts
  learn, test = (
    np.frombuffer("\n".join(part).encode(), np.uint8)
    for part in ([x for i, x in enumerate(texts) if i % 10], texts[::10])
  )
  place = np.random.default_rng(run.seed).integers(
    len(test) - run.num_tokens, size=run.num_test
  )
  return learn, _rows(run, test, place)


def _rows(run, data, place):
  found = data[place[:, None] + np.arange(run.num_tokens)[None]]
  return found.astype(np.int32)


def _trained(run, model, gate, learn, key, progress):
  tuning = gate is _relu
  num_steps = run.tuning_steps if tuning else run.num_steps
  rate = run.tuning_rate if tuning else run.learning_rate

  def batch(step):
    draw = np.random.default_rng([run.seed, int(tuning), step])
    places = len(learn) - run.num_tokens
    return _rows(run, learn, draw.integers(places, size=run.batch_size))

  def loss_fn(model, batch, key):
    del key
    return _loss(model, batch, gate, jnp.zeros(run.num_layers))[0], {}

  batches = grain.MapDataset.range(num_steps).map(batch)
  return loop.train(
    jax.tree.map(jnp.copy, model),  # what comes in is given away
    loss_fn,
    iter(batches.to_iter_dataset(image_classification.READING)),
    loop.TrainConfig(
      num_steps,
      OptimizerConfig(learning_rate=rate, warmup_steps=num_steps // 10),
      log_every=50 if progress else 0,
    ),
    key=key,
  ).state.model


def _loss(model, ids, gate, numbers):
  """Mean -log p of the next byte, and the gates."""
  logits, gates = model(ids, gate, numbers)
  log_p = jax.nn.log_softmax(logits[:, :-1])
  chosen = jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)
  return -jnp.mean(chosen), gates


def _batches(run, rows):
  for start in range(0, len(rows), run.batch_size):
    yield rows[start : start + run.batch_size]


def _thresholds(run, model, learn):
  """{sparsity: float32[L]}, exact on the calibration rows."""
  draw = np.random.default_rng([run.seed, 2])
  places = len(learn) - run.num_tokens
  rows = _rows(run, learn, draw.integers(places, size=run.num_calibration))

  @jax.jit
  def observe(model, histogram, ids):
    gates = model(ids, _silu, jnp.zeros(run.num_layers))[1]
    return jax.vmap(cats.observe)(histogram, gates)

  def seen(histogram):
    for ids in _batches(run, rows):
      histogram = observe(model, histogram, ids)
    return histogram

  empty = jax.tree.map(
    lambda x: jnp.repeat(x[None], run.num_layers, axis=0),
    cats.start_histogram(),
  )
  first, found = seen(empty), {}
  for sparsity in run.sparsities:
    config = CatsConfig(sparsity)
    refine = functools.partial(cats.refine, config=config)
    find = functools.partial(cats.find_threshold, config=config)
    second = seen(jax.vmap(refine)(first))
    found[sparsity] = jax.vmap(find)(second)
  return found


def _measured(run, model, gate, numbers, test):
  @jax.jit
  def measure(model, numbers, ids):
    loss, gates = _loss(model, ids, gate, numbers)
    return loss, jnp.mean(gates != 0)

  parts = [measure(model, numbers, ids) for ids in _batches(run, test)]
  loss, kept = (float(np.mean(x)) for x in zip(*parts, strict=True))
  return {"loss": loss, "kept": kept}
