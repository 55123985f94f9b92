"""Sharding rules: which axis of which array goes where, and why not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from tokjax.parallel import meshes, rules


class Net(nnx.Module):
  """An embedding, two stacked layers and a norm."""

  def __init__(self, rngs):
    self.words = nnx.Embed(12, 8, rngs=rngs)
    keys = jax.random.split(rngs.params(), 2)
    self.blocks = jax.vmap(lambda k: nnx.Linear(8, 16, rngs=nnx.Rngs(k)))(keys)
    self.norm = nnx.LayerNorm(7, rngs=rngs)


RULES = (
  (r"blocks/kernel$", (None, "fsdp", "tensor")),
  (r"blocks/bias$", (None, ("fsdp", "tensor"))),
  (r"norm/", ("tensor",)),
)


@pytest.fixture
def net():
  return Net(nnx.Rngs(0))


def specs(tree, mesh, table=()):
  return {row.path: row for row in rules.placements(tree, mesh, table)}


def test_rules_decide_in_order_and_the_rest_gets_the_default(net):
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
  got = specs(net, mesh, RULES)
  assert {path: row.spec for path, row in got.items()} == {
    "blocks/bias": jax.P(None, ("fsdp", "tensor")),
    "blocks/kernel": jax.P(None, "fsdp", "tensor"),
    "norm/bias": jax.P(),
    "norm/scale": jax.P(),
    "words/embedding": jax.P("fsdp"),  # 12 rows beat width 8
  }
  assert got["norm/bias"].reason == (
    "rule 'norm/'; axis 0 replicated: 7 does not divide by tensor=2"
  )
  assert got["words/embedding"].reason == "default: axis 0 over fsdp"
  first = (("kernel", ()), *RULES)
  assert specs(net, mesh, first)["blocks/kernel"].spec == jax.P()


def test_default_takes_the_largest_axis_that_divides():
  mesh = meshes.make_mesh(data=2, fsdp=4)
  tree = {
    "largest": np.zeros((4, 8, 6)),
    "odd_largest": np.zeros((4, 9)),
    "tie": np.zeros((8, 8)),
    "none": np.zeros((5, 6)),
    "scalar": np.zeros(()),
  }
  got = specs(tree, mesh)
  assert {path: row.spec for path, row in got.items()} == {
    "largest": jax.P(None, "fsdp"),
    "odd_largest": jax.P("fsdp"),
    "tie": jax.P("fsdp"),
    "none": jax.P(),
    "scalar": jax.P(),
  }
  assert got["none"].reason == "no axis divides by fsdp=4"
  assert got["none"].shape == (5, 6)


def test_mesh_axes_of_size_one_are_left_out(net):
  mesh = meshes.make_mesh(data=4, tensor=2)
  got = specs(net, mesh, RULES)
  assert got["blocks/kernel"].spec == jax.P(None, None, "tensor")
  assert got["blocks/bias"].spec == jax.P(None, "tensor")
  assert got["words/embedding"].spec == jax.P()


def test_moments_live_with_their_parameters(net):
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
  state = {"model": net, "optimizer_state": optax.adamw(1e-3).init(net)}
  got = specs(state, mesh, RULES)
  for path, row in specs(net, mesh, RULES).items():
    assert got[f"model/{path}"].spec == row.spec
    assert got[f"optimizer_state/0/mu/{path}"].spec == row.spec
    assert got[f"optimizer_state/0/nu/{path}"].spec == row.spec
  assert got["optimizer_state/0/count"].spec == jax.P()


def test_rule_with_more_axes_than_the_array_replicates():
  mesh = meshes.make_mesh(fsdp=2)
  row = specs({"kernel": np.zeros(4)}, mesh, [("kernel", (None, "fsdp"))])
  assert row["kernel"].spec == jax.P()
  assert "2 axes for shape (4,)" in row["kernel"].reason


def test_unknown_mesh_axis_is_an_error():
  with pytest.raises(ValueError, match="rule 'x' names axis 'model'.*'tensor'"):
    rules.placements(
      {"x": np.zeros(4)}, meshes.make_mesh(), [("x", ("model",))]
    )


def test_shapes_alone_are_enough(net):
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
  shapes = jax.eval_shape(lambda: Net(nnx.Rngs(0)))
  assert rules.placements(shapes, mesh, RULES) == rules.placements(
    net, mesh, RULES
  )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shard_cuts_and_keeps_the_values(net, kind):
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2, axis_types=kind)
  got = rules.shard(net, mesh, RULES)
  want = jax.tree.leaves(rules.shardings(net, mesh, RULES))
  assert isinstance(got, Net)
  assert [x.sharding for x in jax.tree.leaves(got)] == want
  assert got.blocks.kernel[...].addressable_shards[0].data.shape == (2, 4, 8)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(net), strict=True):
    np.testing.assert_array_equal(g, w)


def test_paths_read_like_attributes(net):
  paths = [
    rules.leaf_path(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(net)
  ]
  assert paths[-1] == "words/embedding"
  leaf = jax.tree_util.tree_leaves_with_path({"value": 1.0})
  assert rules.leaf_path(leaf[0][0]) == "value"


def test_gather_makes_whole_over_fsdp_and_returns_parts():
  mesh = meshes.make_mesh(data=2, fsdp=4, axis_types=AxisType.Explicit)
  with jax.set_mesh(mesh):
    x = jax.device_put(jnp.arange(32.0).reshape(8, 4), jax.P("fsdp", "data"))

    def total(x):
      whole = rules.gather(x)
      assert jax.typeof(whole).sharding.spec == jax.P(None, "data")
      return jnp.sum(whole**2)

    gradient = jax.jit(jax.grad(total))(x)
  assert gradient.sharding.spec == jax.P("fsdp", "data")
  np.testing.assert_array_equal(gradient, 2 * np.arange(32.0).reshape(8, 4))
