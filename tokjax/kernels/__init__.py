"""Hot paths, each with a plain reference beside it.

One package per operation; `api.py` holds the public functions, `reference.py`
the definition of truth, `xla.py` the fast plain-JAX version and `pallas_*.py`
the hand-written kernels. Nothing here imports flax.
"""

__all__: list[str] = []
