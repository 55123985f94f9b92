"""`tokjax compile CONFIG`: the training step of a config, for a whole slice.

The step is the one that `tokjax train` runs: the same model, loss, optimiser,
mesh and settings, with shapes in place of arrays. Nothing is loaded but a
checkpoint that is on this machine, and nothing is downloaded.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from tokjax import checks
from tokjax.cli import compile_fit, train
from tokjax.models import bert, checkpoints
from tokjax.parallel import data_sheets, meshes, rules
from tokjax.retrieval import colbert
from tokjax.train import late_interaction, optimizer, retrieval_run
from tokjax.train import step as steps

__all__ = [
  "ENCODERS",
  "TrainingStep",
  "abstract_batch",
  "abstract_checkpoint",
  "rows",
  "training_step",
]

# Public encoders by the last part of their name on the hub.
ENCODERS = {
  "all-MiniLM-L6-v2": bert.BertConfig(),
  "all-MiniLM-L12-v2": bert.BertConfig(num_layers=12),
  "bert-base-uncased": bert.BertConfig(
    width=768, num_layers=12, mlp_width=3072
  ),
  "bert-large-uncased": bert.BertConfig(
    width=1024, num_layers=24, num_heads=16, mlp_width=4096
  ),
  "distilbert-base-uncased": bert.BertConfig(
    width=768, num_layers=6, mlp_width=3072, num_segments=0
  ),
}


class TrainingStep(NamedTuple):
  """A step to compile, and what one device of it has to do at least.

  Attributes:
    function: `step.make_step` of the run.
    args: state and batch, as shapes with shardings.
    mesh: to be set while it is lowered.
    token_width: D, width of a token vector; None for ColBERTer, which has
      two.
    work: arguments of `data_sheets.bound`.
  """

  function: Callable[..., Any]
  args: tuple[Any, Any]
  mesh: jax.sharding.Mesh
  token_width: int | None
  work: dict[str, float]


def rows(
  path: str,
  overrides: list[str],
  *,
  topology: str,
  devices: Sequence[Any],
  encoder: str | None = None,
) -> Iterator[dict[str, Any]]:
  """Compiles the step of a config file.

  Args:
    path: as `tokjax train` takes it, with `:argument` or without.
    overrides: words such as `--config.data.batch_size=64`.
    topology: name of the devices.
    devices: from `topologies.devices_of`.
    encoder: see `abstract_checkpoint`.

  Yields:
    One row, see `compile_fit.compile_row`.

  Raises:
    ValueError: for a config that cannot be read or does not fit the devices.
  """
  run = train.settings(path, overrides)
  step = training_step(run, devices, encoder=encoder)
  sheet = data_sheets.find(topology)
  with jax.set_mesh(step.mesh):
    yield compile_fit.compile_row(
      step.function,
      step.args,
      topology=topology,
      devices=devices,
      bound=sheet and data_sheets.bound(sheet, **step.work),
      unit="step",
      program=pathlib.Path(path.split(":")[0]).stem,
      mesh=dict(step.mesh.shape),
      batch_size=run.data.batch_size,
      token_width=step.token_width,
    )


def training_step(
  run: retrieval_run.RetrievalRun,
  devices: Sequence[Any],
  *,
  encoder: str | None = None,
) -> TrainingStep:
  """The step of a run with shapes in place of arrays.

  The batch is the widest: documents of `document_length` tokens.

  Args:
    run: all settings.
    devices: what the mesh of the run is made of, real or for compiling only.
    encoder: see `abstract_checkpoint`.

  Returns:
    What to compile.

  Raises:
    ValueError: for settings that do not fit each other or the devices.
  """
  start = abstract_checkpoint(run.model, encoder=encoder)
  text = retrieval_run.text_config(run, start.config)
  model = _abstract_model(run, start)
  mesh = meshes.make_mesh(
    run.mesh.data, run.mesh.fsdp, run.mesh.tensor, devices=devices
  )
  rows_over = [mesh.shape[axis] for axis in meshes.BATCH_AXES]
  checks.divisible(int(np.prod(rows_over)), batch_size=run.data.batch_size)
  by_rows = jax.sharding.NamedSharding(mesh, jax.P(meshes.BATCH_AXES))
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows),
    abstract_batch(run, text, width=start.encoder.config.width),
  )
  transform = optimizer.make(run.trainer.optimizer, run.trainer.num_steps)
  init = functools.partial(
    steps.init_state,
    optimizer=transform,
    average=bool(run.trainer.average_decay),
  )
  state = jax.eval_shape(init, jax.random.key(run.seed), model)
  layout = rules.shardings(state, mesh)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    layout,
  )
  function = steps.make_step(
    late_interaction.make_loss(
      run.objective, late_interaction.text_rules(text, start.tokenizer)
    ),
    transform,
    compute_dtype=run.trainer.compute_dtype,
    num_microbatches=run.trainer.num_microbatches,
    remat=run.trainer.remat,
    state_shardings=layout,
    average_decay=run.trainer.average_decay,
  )
  width = None
  if run.objective.method != "colberter":
    hidden = jax.ShapeDtypeStruct((1, start.encoder.config.width), jnp.float32)
    width = jax.eval_shape(lambda head, x: head(x), model.head, hidden).shape[1]
  return TrainingStep(
    function,
    (state, batch),
    mesh,
    width,
    _work(run, text, model.encoder.config, state, mesh, width),
  )


def abstract_checkpoint(
  model: str, *, encoder: str | None = None
) -> checkpoints.Checkpoint:
  """Where a run starts; shapes only, where the checkpoint is not here.

  Args:
    model: folder, weights package or hub name, as in the config of a run.
    encoder: key of `ENCODERS` to take instead of looking for the checkpoint.

  Returns:
    The checkpoint as it was loaded; else an encoder of the named public
    shape without a head, its texts read as those of a plain encoder folder.

  Raises:
    ValueError: if it is not here and its name is not in `ENCODERS`.

  Example:
    >>> found = abstract_checkpoint("bert-base", encoder="bert-base-uncased")
    >>> found.encoder.words.embedding.shape
    (30522, 768)
  """
  if encoder is None:
    try:
      return checkpoints.load(model)
    except FileNotFoundError:
      if pathlib.Path(model).is_dir():
        raise
      encoder = model.split("/")[-1]
      if encoder not in ENCODERS:
        raise ValueError(
          f"checkpoint {model!r} is not on this machine: name a shape by "
          f"--encoder, one of {', '.join(ENCODERS)}"
        ) from None
  checks.one_of(tuple(ENCODERS), encoder=encoder)
  config = ENCODERS[encoder]
  no_words = tokenizers.models.WordLevel({"[UNK]": 0, "[MASK]": 1}, "[UNK]")
  return checkpoints.Checkpoint(
    encoder=jax.eval_shape(lambda: bert.Bert(config, rngs=nnx.Rngs(0))),
    head=None,
    tokenizer=tokenizers.Tokenizer(no_words),  # no other word is looked up
    config=colbert.ColbertConfig.zero_shot(min(256, config.max_positions)),
  )


def abstract_batch(
  run: retrieval_run.RetrievalRun, text: colbert.ColbertConfig, *, width: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """The widest batch of a run, see `tokjax.data.batches.build`.

  Whether a file of triples has a teacher's scores only its lines say; here a
  JSON file counts as one that does.

  Args:
    run: names method and data.
    text: has the lengths.
    width: of the encoder's hidden states.

  Returns:
    Shapes of the whole batch, over all processes.

  Example:
    >>> run = retrieval_run.RetrievalRun()
    >>> batch = abstract_batch(run, colbert.ColbertConfig(), width=384)
    >>> batch["document_ids"].shape
    (32, 1, 180)
  """
  size, listed = run.data.batch_size, 1 + run.data.num_negatives
  shapes = {
    "query": (size, text.query_length),
    "document": (size, listed, text.document_length),
  }
  array = jax.ShapeDtypeStruct
  batch = {
    "query_index": array((size,), jnp.int32),
    "document_index": array((size, listed), jnp.int32),
    "false_negative": array((size, size * listed), bool),
  }
  for name, shape in shapes.items():
    batch[f"{name}_ids"] = array(shape, jnp.int32)
    batch[f"{name}_mask"] = array(shape, bool)
    if run.words is not None:
      batch[f"{name}_words"] = array(shape, jnp.uint32)
    if run.frozen_layers:
      batch[f"{name}_hidden"] = array((*shape, width), jnp.float16)
  if run.data.dataset.endswith((".json", ".jsonl")):
    batch["teacher"] = array((size, listed), jnp.float32)
  return batch


def _abstract_model(run, start):
  """Encoder and head that are trained, as shapes."""

  def build(encoder):
    if run.frozen_layers:
      encoder = bert.split(encoder, run.frozen_layers)[1]
    head = retrieval_run.new_head(run, start, rngs=nnx.Rngs(0))
    return late_interaction.LateInteraction(encoder, head)

  return jax.eval_shape(build, start.encoder)


def _work(run, text, config, state, mesh, token_width):
  """What one device has to compute, move and receive, at least.

  Counted are the encoder's matrix products, forward and backward (twice as
  much), once more where the forward is repeated; and of ColBERT and XTR the
  products of all token vectors. Parameters and moments are read and written.
  The gradient of every parameter is summed over the devices; of ColBERT and
  XTR documents come from all devices, and their gradients go back.
  """
  num_parts = mesh.shape["data"] * mesh.shape["fsdp"]
  received = (num_parts - 1) / num_parts  # of what is gathered or summed
  rows = run.data.batch_size / num_parts
  num_documents = run.data.batch_size * (1 + run.data.num_negatives)
  texts = (
    (rows, text.query_length),
    (num_documents / num_parts, text.document_length),
  )
  width = config.width
  encoder_flops = sum(
    count * length * config.num_layers
    * (8 * width**2 + 4 * width * config.mlp_width + 4 * length * width)
    for count, length in texts
  )  # fmt: skip
  again = (run.objective.remat_encoder, run.trainer.remat) != (None, None)
  flops = encoder_flops * (4 if again else 3)
  itemsize = jnp.dtype(run.trainer.compute_dtype).itemsize
  num_parameters = sum(x.size for x in jax.tree.leaves(state.model))
  link_bytes = 2 * num_parameters * itemsize * received
  if run.objective.method in ("colbert", "xtr"):
    document_tokens = num_documents * text.document_length
    passes = 1 if itemsize == 2 else data_sheets.FLOAT32_PASSES
    pairs = rows * text.query_length * document_tokens
    flops += 3 * passes * 2 * pairs * token_width
    link_bytes += 2 * document_tokens * token_width * itemsize * received
  held = jax.tree.leaves((state.model, state.optimizer_state))
  state_bytes = sum(
    np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in held
  )
  return {
    "flops": float(flops),
    "memory_bytes": float(2 * state_bytes),
    "link_bytes": float(link_bytes),
  }
