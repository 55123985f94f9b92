"""Settings of the compilers, and what is read out of a compiled program.

The compilers themselves run in tests/kernels/maxsim_compile_*_test.py; here
the CPU compiler stands in for them.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import compat
from tokjax.parallel import topologies


def test_compile_for_reports_memory_and_arithmetic():
  args = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2
  report = topologies.compile_for(jnp.matmul, args, devices=jax.devices())
  assert isinstance(report, topologies.CompileReport)
  assert report.argument_bytes == 2 * 64 * 64 * 4
  assert report.output_bytes == 64 * 64 * 4
  assert report.flops == pytest.approx(2 * 64**3, rel=0.01)
  assert report.collectives == {} and report.seconds > 0
  assert report.on_chip_bytes is None and "HloModule" in report.text


def test_compile_for_counts_collectives():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("chips",))
  total = jax.shard_map(
    lambda x: jax.lax.psum(x.sum(), "chips"),
    mesh=mesh,
    in_specs=jax.P("chips"),
    out_specs=jax.P(),
  )
  placed = jax.sharding.NamedSharding(mesh, jax.P("chips"))
  arg = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=placed)
  report = topologies.compile_for(total, [arg], devices=jax.devices()[:4])
  assert report.collectives == {"all-reduce": 1}


def test_steps_of_one_collective_count_once():
  gather = (
    "ROOT %all-gather.{} = bf16[8,4]{{1,0}} all-gather(%p), channel_id=1, "
    'metadata={{op_name="f" stack_frame_id={}}}'
  )
  text = "\n".join([
    gather.format(1, 7), gather.format(2, 7), gather.format(3, 8),
    "%all-reduce.1 = f32[] all-reduce-start(%p), channel_id=1",
    "%all-reduce.2 = f32[] all-reduce-start(%q), channel_id=1",
    "%done = f32[] all-reduce-done(%all-reduce.1)",
  ])  # fmt: skip
  assert topologies._collectives(text) == {"all-gather": 2, "all-reduce": 2}


def test_compile_for_takes_a_function_that_gives_arguments_away():
  function = jax.jit(lambda x: x + 1, donate_argnums=0)
  arg = jax.ShapeDtypeStruct((1000,), jnp.float32)
  report = topologies.compile_for(function, [arg], devices=jax.devices())
  assert report.alias_bytes == report.output_bytes == 4000
  assert report.total_bytes == 4000 + report.temp_bytes


@pytest.mark.parametrize("name", ["h100:0", "h100:many"])
def test_devices_of_names_what_it_takes(name):
  with pytest.raises(ValueError, match="'h100' or 'h100:8'"):
    topologies.devices_of(name)


def test_environment_keeps_flags_that_are_set(monkeypatch, tmp_path):
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin" / "ptxas").touch()
  (tmp_path / "nvvm" / "libdevice").mkdir(parents=True)
  monkeypatch.setenv("CUDA_HOME", str(tmp_path))
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=there")
  flags = topologies.environment("cuda")["XLA_FLAGS"]
  assert flags.startswith("--xla_dump_to=there ")
  assert f"--xla_gpu_cuda_data_dir={tmp_path} " in flags


def test_environment_names_the_platforms():
  with pytest.raises(ValueError, match="'tpu', 'cuda', got 'gpu'"):
    topologies.environment("gpu")


@pytest.mark.parametrize("topology, module", [
    (lambda: topologies.tpu_topology("v5e:2x2"), "libtpu"),
    (topologies.h100_topology, "jax_cuda13_plugin"),
])  # fmt: skip
def test_missing_compiler_says_what_to_install(topology, module, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda x: None if x == module else find(x)
  )
  with pytest.raises(ModuleNotFoundError, match=r'pip install -e ".\[aot\]"'):
    topology()


@pytest.mark.parametrize("check", [True, False])
def test_operands_vary_together_under_shard_map(check):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("chips",))

  def local(whole, cut):
    whole, cut = compat.varying_together(whole, cut)
    shape = compat.result_like((3,), jnp.int32, whole)
    if check:
      varying = frozenset({"chips"})
      assert jax.typeof(whole).manual_axis_type.varying == varying
      assert shape.manual_axis_type.varying == varying
    return cut + whole

  out = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(jax.P(), jax.P("chips")),
    out_specs=jax.P("chips"),
    check_vma=check,
  )(jnp.ones(2), jnp.zeros(8))
  np.testing.assert_array_equal(out, jnp.ones(8))
