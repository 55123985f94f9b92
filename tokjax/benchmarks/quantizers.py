"""How much of its codes each quantizer of the zoo uses, and to what end.

    python -m tokjax.benchmarks.quantizers cifar10

The same small auto-encoder is trained with each quantizer between its halves,
for as many steps and with as many bits: on points of a mixture of 64 Gaussians
in the unit square, and on patches of 4 x 4 pixels of CIFAR-10. Then all test
points or patches are encoded: `usage`, the share of the codes that occur, and
`perplexity`, how many equally frequent ones would be as hard to guess, both of
the whole code of a vector, all tables together, and `psnr` in dB.

"rvq N of 4" is one more residual quantizer, of four stages, trained with a
random number of them and tried with the first N.
"""

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokjax import checks
from tokjax.benchmarks import timing
from tokjax.benchmarks.trained_vit import Row
from tokjax.data import cifar10
from tokjax.ops import code_usage
from tokjax.tokenizers import quantizers
from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.residual_quantizer import RVQConfig

__all__ = [
  "DEPTHS",
  "NAMES",
  "QuantizerRun",
  "main",
  "margin",
  "measure",
  "mixture",
  "on_seeds",
]

DEPTHS = (1, 2, 3, 4)
NAMES = (*quantizers.TABLE, "rvq of 4")
_TESTED = 200  # images encoded at a time


@dataclasses.dataclass(frozen=True)
class QuantizerRun:
  """One seed of all trainings.

  Attributes:
    dataset: folder with CIFAR-10.
    seed: of parameters, batches and the mixture.
    mixture_steps: of the training on points.
    image_steps: of the training on patches.
    names: of `NAMES`.
  """

  dataset: str
  seed: int = 0
  mixture_steps: int = 1000
  image_steps: int = 600
  names: tuple[str, ...] = NAMES


def on_seeds(
  dataset: str, *, seeds: Sequence[int] = (0, 1, 2)
) -> tuple[QuantizerRun, ...]:
  """The same trainings with other seeds.

  Example:
    >>> [run.seed for run in on_seeds("cifar10")]
    [0, 1, 2]
  """
  return tuple(QuantizerRun(dataset, seed) for seed in seeds)


@dataclasses.dataclass(frozen=True)
class _Task:
  """What is encoded, and the sizes of the auto-encoder; static."""

  width: int  # of the vectors that are quantised
  bits: int
  hidden: int
  batch_size: int
  learning_rate: float = 2e-3


_MIXTURE = _Task(width=4, bits=6, hidden=64, batch_size=256)
_IMAGES = _Task(width=16, bits=8, hidden=96, batch_size=16)


class _AutoEncoder(nnx.Module):
  """An MLP to vectors, a quantizer, an MLP back."""

  def __init__(self, name, task, inputs, *, rngs):
    hidden = task.hidden

    def layers(*sizes):
      return nnx.List(
        [
          nnx.Linear(before, after, rngs=rngs)
          for before, after in zip(sizes, sizes[1:], strict=False)
        ]
      )

    self.encoder = layers(inputs, hidden, hidden, task.width)
    self.decoder = layers(task.width, hidden, hidden, inputs)
    if name == "rvq of 4":
      book = CodebookConfig(2 ** (task.bits // 2), task.width, learning="ema")
      self.quantizer = RVQConfig(book, 4, dropout_from=1).build(rngs)
    else:
      self.quantizer = quantizers.make(name, task.width, task.bits, rngs)

  def __call__(self, x, state, **settings):
    found, state = self.quantizer(_mlp(self.encoder, x), state, **settings)
    return _mlp(self.decoder, found.codes), found, state


def _mlp(layers, x):
  for layer in layers[:-1]:
    x = jax.nn.gelu(layer(x))
  return layers[-1](x)


def mixture(
  key: jax.Array, number: int, *, num_components: int = 64
) -> jax.Array:
  """Points of a mixture of Gaussians of deviation .01 in the unit square.

  Args:
    key: of the components and the points.
    number: of points.
    num_components: equally likely.

  Returns:
    [number, 2].
  """
  of_mean, of_choice, of_noise = jax.random.split(key, 3)
  means = jax.random.uniform(of_mean, (num_components, 2))
  index = jax.random.randint(of_choice, (number,), 0, num_components)
  return means[index] + 0.01 * jax.random.normal(of_noise, (number, 2))


def _patches(images):
  """[n, 32, 32, 3] -> [n, 64, 48], still bytes."""
  x = images.reshape(-1, 8, 4, 8, 4, 3).swapaxes(2, 3)
  return x.reshape(-1, 64, 48)


def _scaled(x):
  """What the auto-encoder sees, around 0."""
  if x.dtype == jnp.uint8:
    x = x.astype(jnp.float32) / 255
  return 2 * x - 1


@functools.partial(jax.jit, static_argnames=("name", "task", "num_steps"))
def _train(key, data, *, name, task, num_steps):
  """A trained auto-encoder and the state of its quantizer."""
  keys = jax.random.split(key, 3)
  model = _AutoEncoder(
    name, task, data.shape[-1], rngs=nnx.Rngs(params=keys[0])
  )
  state = model.quantizer.init_state(keys[1])
  optimizer = optax.adam(task.learning_rate)

  def step(carry, key):
    model, state, moments = carry
    rows_key, quantizer_key = jax.random.split(key)
    rows = jax.random.randint(rows_key, (task.batch_size,), 0, len(data))
    x = _scaled(data[rows])

    def loss(model):
      y, found, after = model(x, state, train=True, key=quantizer_key)
      return jnp.mean(jnp.square(y - x)) + sum(found.losses.values()), after

    grads, state_after = jax.grad(loss, has_aux=True)(model)
    updates, moments = optimizer.update(grads, moments, model)
    return (optax.apply_updates(model, updates), state_after, moments), None

  carry = model, state, optimizer.init(model)
  carry, _ = jax.lax.scan(step, carry, jax.random.split(keys[2], num_steps))
  return carry[:2]


@functools.partial(jax.jit, static_argnames="depth")
def _tried(model, state, data, depth=None):
  """The joint code of every test vector, and the mean PSNR."""
  settings = {} if depth is None else {"num_active": depth}

  def some(data):
    x = _scaled(data)
    y, found, _ = model(x, state, **settings)
    # In 0..1, of each image or point.
    error = jnp.square(jnp.clip(y, -1, 1) - x) / 4
    error = jnp.mean(error, axis=tuple(range(1, x.ndim)))
    return found.indices, error

  indices, error = jax.lax.map(some, data.reshape(-1, _TESTED, *data.shape[1:]))
  if data.dtype == jnp.uint8:
    psnr = jnp.mean(-10 * jnp.log10(jnp.maximum(error, 1e-10)))
  else:  # a point has no noise to speak of: the error of all
    psnr = -10 * jnp.log10(jnp.mean(error))
  return indices, psnr


def _of_codes(model, indices, data):
  number = model.quantizer.num_codes
  ndim = data.ndim
  joint = quantizers.joint_index(indices, number, ndim)
  several = np.prod(indices.shape[ndim:], dtype=int)
  histogram = code_usage.code_histogram(joint, num_codes=number**several)
  return {
    "usage": float(code_usage.usage(histogram)),
    "perplexity": float(code_usage.perplexity(histogram)),
  }


def measure(run: QuantizerRun, *, progress: bool = True) -> dict[str, Row]:
  """Trains and tries every quantizer on both data sets.

  Args:
    run: the seed and the lengths.
    progress: not used.

  Returns:
    Rows "points NAME" and "patches NAME" with `usage` (0..1), `perplexity`
    and `psnr`; of "rvq N of 4" `psnr` alone.
  """
  del progress
  of_points = jax.random.fold_in(jax.random.key(run.seed), 1)
  points = np.asarray(mixture(of_points, 40_000))
  sets = {
    "points": (_MIXTURE, run.mixture_steps, points[:-10_000], points[-10_000:]),
    "patches": (
      _IMAGES,
      run.image_steps,
      *(_patches(part.images) for part in cifar10.load(run.dataset)),
    ),
  }
  rows = {}
  for title, (task, num_steps, train, test) in sets.items():
    test = test[: len(test) // _TESTED * _TESTED]
    for name in run.names:
      model, state = _train(
        jax.random.key(run.seed), train, name=name, task=task,
        num_steps=num_steps,
      )  # fmt: skip
      if name == "rvq of 4":
        for depth in DEPTHS:
          _, psnr = _tried(model, state, test, depth)
          row = Row({"psnr": float(psnr)})
          rows[f"{title} rvq {depth} of 4"] = row
        continue
      indices, psnr = _tried(model, state, test)
      found = _of_codes(model, indices, test)
      rows[f"{title} {name}"] = Row(found | {"psnr": float(psnr)})
  return rows


def margin(
  rows: Mapping[str, Row], *, least: float = 0.9, data: Sequence[str]
) -> float:
  """How far the expected order of the literature holds, where least.

  Args:
    rows: of one run.
    least: usage that resets, "vq_simvq" and "vq_cosine" should reach.
    data: "points" and "patches", or one of them.

  Returns:
    The smallest of: usages less that of plain "vq"; usage of the remedies less
    `least`; gain of PSNR, in units of 10 dB, of each residual stage.
  """
  parts = []
  for title in data:
    found = {
      name.removeprefix(f"{title} "): row.metrics
      for name, row in rows.items()
      if name.startswith(f"{title} ")
    }
    usage = {name: m["usage"] for name, m in found.items() if "usage" in m}
    parts += [usage[name] - usage["vq"] for name in usage if name != "vq"]
    remedied = "vq_ema_reset", "vq_simvq", "vq_cosine"
    parts += [usage[name] - least for name in remedied]
    depths = [found[f"rvq {n} of 4"]["psnr"] for n in DEPTHS]
    parts += [(b - a) / 10 for a, b in zip(depths, depths[1:], strict=False)]
  return min(parts)


def main(argv: list[str] | None = None) -> None:
  """Prints what the quantizers are, and what they do.

  Args:
    argv: command line; None for the process's own.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("data", help="what `tokjax.data.cifar10.load` reads")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int, help="of both trainings")
  parser.add_argument("--names", nargs="*", choices=NAMES, default=NAMES)
  options = parser.parse_args(argv)
  run = QuantizerRun(options.data, options.seed, names=tuple(options.names))
  if options.steps is not None:
    checks.in_range(1, 1 << 30, steps=options.steps)
    run = dataclasses.replace(
      run, mixture_steps=options.steps, image_steps=options.steps
    )
  kinds = [name for name in run.names if name in quantizers.TABLE]
  rows = [
    row._asdict()
    | {"codes": row.effective_codes, "needs_remedy": row.needs_remedy}
    for row in quantizers.compare(_IMAGES.width, _IMAGES.bits, kinds)
  ]
  timing.print_rows(
    rows,
    ["name", "tables", "codes", "parameters", "losses", "unused_codes_move",
     "needs_remedy"],
  )  # fmt: skip
  rows = [{"": name, **row.metrics} for name, row in measure(run).items()]
  timing.print_rows(rows, ["", "usage", "perplexity", "psnr"])


if __name__ == "__main__":
  main()
