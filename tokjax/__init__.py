"""tokjax: sets of tokens in JAX.

Functions people import most stand here; the rest is one area away:

- `tokjax.ops`: arrays in, arrays out, no weights.
- `tokjax.kernels`: MaxSim, attention received by keys, greedy selection,
  nearest codes, with a reference beside every implementation.
- `tokjax.retrieval`: ColBERT encoding, MUVERA, codecs, indexes and search.
- `tokjax.reduction`: fewer tokens: selected, merged, mixed.
- `tokjax.tokenizers`: quantizers with learned codes, their state passed along.
- `tokjax.models`: encoders of text and images, and the weights they load.
- `tokjax.data`, `tokjax.eval`: data sets and ranking metrics.
- `tokjax.train`, `tokjax.checkpoint`: one loop, sharded and resumable.

Everything is imported when it is first used: `import tokjax` costs little
more than `import jax`.
"""

import importlib

import jax  # noqa: F401  (what a user of tokjax has loaded anyway)

__version__ = "0.1.0"

# everyday function -> the module it lives in
_FUNCTIONS = {
  "maxsim": "tokjax.kernels.maxsim",
  "maxsim_alignment": "tokjax.kernels.maxsim",
  "maxsim_packed": "tokjax.kernels.maxsim",
  "maxsim_pairs": "tokjax.kernels.maxsim",
  "streaming_top_k": "tokjax.ops.selection",
}
_AREAS = (
  "benchmarks",
  "checkpoint",
  "data",
  "eval",
  "kernels",
  "models",
  "ops",
  "parallel",
  "reduction",
  "retrieval",
  "tokenizers",
  "train",
)

__all__ = [*_FUNCTIONS, *_AREAS]  # noqa: PLE0604


def __getattr__(name: str):
  if name in _FUNCTIONS:
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)
  if name in _AREAS:
    return importlib.import_module(f"tokjax.{name}")
  raise AttributeError(f"module 'tokjax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
