"""Checkpoints: what comes back, onto which devices, and what is refused."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from tokjax import checkpoint
from tokjax.parallel import meshes, rules


def state_of(seed=0):
  model = nnx.Linear(16, 32, rngs=nnx.Rngs(seed))
  moments = optax.adam(1e-3).init(model)
  moments = jax.tree.map(lambda x: x + seed, moments)
  key = jax.random.key(seed)
  return {"model": model, "optimizer": moments, "key": key}


def layout_of(num_devices, kind=AxisType.Auto, state=None):
  state = jax.eval_shape(state_of) if state is None else state
  mesh = meshes.make_mesh(
    1, num_devices, devices=jax.devices()[:num_devices], axis_types=kind
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(state_of),
    rules.shardings(state, mesh),
  )


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert g.dtype == w.dtype
    if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
      g, w = jax.random.key_data(g), jax.random.key_data(w)
    np.testing.assert_array_equal(np.asarray(g), np.asarray(w))


@pytest.fixture
def folder(tmp_path):
  """A run of three saves, of which two are kept."""
  with checkpoint.Checkpoints(tmp_path / "run", keep=2) as saves:
    for seed in (1, 2, 3):
      saves.save(
        10 * seed,
        state_of(seed),
        iterator_state={"next": seed, "parent": {"epoch": np.int64(4)}},
        config={"name": "tiny", "sizes": [1, 2]},
      )
  return tmp_path / "run"


def test_latest_comes_back_with_all_that_was_beside_it(folder):
  with checkpoint.Checkpoints(folder) as saves:
    assert saves.latest_step() == 30
    got = saves.restore(state_of())
  assert got.step == 30
  assert_equal(got.state, state_of(3))
  assert isinstance(got.state["model"], nnx.Linear)
  assert got.iterator_state == {"next": 3, "parent": {"epoch": 4}}
  assert got.config == {"name": "tiny", "sizes": [1, 2]}
  draw = jax.random.uniform(got.state["key"])
  assert draw == jax.random.uniform(jax.random.key(3))


def test_keeps_the_newest(folder):
  with checkpoint.Checkpoints(folder, keep=2) as saves:
    assert_equal(saves.restore(state_of(), step=20).state, state_of(2))
    with pytest.raises(FileNotFoundError, match=r"run has no checkpoint 10, "):
      saves.restore(state_of(), step=10)
    with pytest.raises(ValueError, match="step 30 already exists"):
      saves.save(30, state_of())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_opens_on_meshes_of_other_sizes(tmp_path, kind):
  want = state_of(5)
  mesh = meshes.make_mesh(1, 8, axis_types=kind)
  with checkpoint.Checkpoints(tmp_path) as saves:
    saves.save(1, rules.shard(want, mesh))
    for num_devices in (8, 4, 1):
      like = layout_of(num_devices, kind)
      got = saves.restore(like).state
      assert_equal(got, want)
      for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
        assert g.sharding == w.sharding
      assert len(got["model"].kernel[...].sharding.device_set) == num_devices


def test_part_of_a_checkpoint(folder):
  like = {"model": state_of()["model"]}
  with checkpoint.Checkpoints(folder) as saves:
    got = saves.restore(like, partial=True)
    assert_equal(got.state, {"model": state_of(3)["model"]})
    with pytest.raises(
      ValueError, match=r"run/30 does not fit: has beside .*key"
    ):
      saves.restore(like)


def test_arrays_that_do_not_fit_are_listed(folder):
  like = state_of()
  like["head"] = jnp.ones(3)
  like["model"] = nnx.Linear(16, 31, rngs=nnx.Rngs(0))
  with checkpoint.Checkpoints(folder) as saves:
    with pytest.raises(ValueError) as error:
      saves.restore(like)
  message = str(error.value)
  assert "lacks head" in message and "has beside" not in message
  assert "model/kernel is float32[16, 32], wanted float32[16, 31]" in message


def test_save_holds_the_values_of_the_call(tmp_path):
  """The buffers are given away to the next step while orbax writes."""
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = step(jnp.zeros(1 << 22))
  with checkpoint.Checkpoints(tmp_path) as saves:
    saves.save(1, {"x": x})
    for _ in range(20):
      x = step(x)
    saves.wait()
    got = saves.restore({"x": x}).state["x"]
  assert float(x[0]) == 21.0
  np.testing.assert_array_equal(np.unique(np.asarray(got)), [1.0])


def test_iterator_state_may_be_bytes(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as saves:
    saves.save(1, {"x": jnp.ones(1)}, iterator_state=b"\xff\x00{")
    assert saves.restore({"x": jnp.ones(1)}).iterator_state == b"\xff\x00{"
    with pytest.raises(TypeError, match="iterator state holds a set"):
      saves.save(2, {"x": jnp.ones(1)}, iterator_state={1, 2})


def test_half_written_checkpoint_is_not_seen(folder):
  """It may belong to a live run, so only the next save removes it."""
  whole = sorted(folder.iterdir())[-1]
  half = folder / "40.orbax-checkpoint-tmp-1"
  shutil.copytree(whole, half)
  with checkpoint.Checkpoints(folder) as saves:
    assert saves.latest_step() == 30
    assert_equal(saves.restore(state_of()).state, state_of(3))
  assert half.exists()
  with checkpoint.Checkpoints(folder) as saves:
    saves.save(40, state_of(4))
    assert_equal(saves.restore(state_of()).state, state_of(4))
  assert not half.exists()


def test_folder_without_checkpoint(tmp_path):
  with checkpoint.Checkpoints(tmp_path / "none") as saves:
    assert saves.latest_step() is None
    with pytest.raises(FileNotFoundError, match="none holds no checkpoint"):
      saves.restore(state_of())


def _remove_data(path):
  for file in path.glob("arrays/**/d/*"):
    file.unlink()


def _cut_data(path):
  for file in path.glob("arrays/**/d/*"):
    file.write_bytes(file.read_bytes()[:20])


DAMAGES = {
  "no arrays": lambda path: shutil.rmtree(path / "arrays"),
  "no metadata": lambda path: (path / "arrays" / "_METADATA").unlink(),
  "no meta": lambda path: shutil.rmtree(path / "meta"),
  "meta cut": lambda path: (path / "meta" / "metadata").write_text("{"),
  "data removed": _remove_data,
  "data cut": _cut_data,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damage_names_the_folder_and_spares_the_rest(folder, damage):
  damage(pathlib.Path(folder) / "30")
  with checkpoint.Checkpoints(folder) as saves:
    with pytest.raises(ValueError, match=r"run/30 cannot be read"):
      saves.restore(state_of())
    assert_equal(saves.restore(state_of(), step=20).state, state_of(2))


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(ValueError, match="keep must lie in 1"):
    checkpoint.Checkpoints(tmp_path, keep=0)
