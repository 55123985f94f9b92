"""Settings every test runs under; they must come before jax starts."""

import importlib.util
import itertools
import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = os.environ.get("TOKJAX_TEST_PLATFORM", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(tempfile.gettempdir()) / "tokjax_test_compilations"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from tokjax.parallel import topologies  # noqa: E402

CONTRACTS = pathlib.Path(__file__).parent / "contracts"
SHARED_DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> pathlib.Path:
  """Folder of the real data sets; skips where a clone does not have it."""
  if not SHARED_DATA.is_dir():
    if os.environ.get("CI"):
      pytest.fail(f"real data sets must be at {SHARED_DATA} in CI")
    pytest.skip(f"real data sets are not at {SHARED_DATA}")
  return SHARED_DATA


@pytest.fixture(scope="module", params=["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def tpus(request):
  """Four or eight chips that are not there, for tests marked `compile_tpu`."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip('libtpu is not installed: pip install -e ".[aot]"')
  # Read when the compiler starts, which is at its first use.
  os.environ.update(topologies.environment("tpu"))
  # A program found in the cache would be compiled by nobody.
  jax.config.update("jax_enable_compilation_cache", False)
  return topologies.tpu_topology(request.param)


@pytest.fixture(scope="module")
def h100s():
  """Four GPUs that are not there, for tests marked `compile_gpu`.

  Their assembler prints what it says of registers and spills.
  """
  os.environ.update(topologies.environment("cuda"))
  os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
  os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  jax.config.update("jax_enable_compilation_cache", False)
  return topologies.h100_topology(4)


_modules = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def bounded_caches():
  """Drops compiled programs now and then: thousands fill jax's caches."""
  yield
  if next(_modules) % 10 == 0:
    jax.clear_caches()


@pytest.fixture(autouse=True)
def expensive_checks(request):
  """Checks annotations and reuse of random keys, which slows tracing.

  In tests/contracts, which call every public function, or in all tests if
  TOKJAX_TEST_CHECKS is "all"; never in tests with the mark `unchecked`, which
  ask what tokjax itself says of an argument that its annotation forbids.
  """
  everywhere = os.environ.get("TOKJAX_TEST_CHECKS") == "all"
  marked = request.node.get_closest_marker("unchecked") is not None
  check = (everywhere or CONTRACTS in request.path.parents) and not marked
  jaxtyping.config.update("jaxtyping_disable", not check)
  with jax.debug_key_reuse(check):
    yield
  jaxtyping.config.update("jaxtyping_disable", False)
