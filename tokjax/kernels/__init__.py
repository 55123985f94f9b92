"""Hot paths, each with a plain reference beside it.

One package per operation; `api.py` holds the public functions, `reference.py`
the definition of truth, `xla.py` the fast plain-JAX version and `pallas_*.py`
the hand-written kernels. Of `ring_attention` the public function, and the plain
version, is `tokjax.parallel.ring_attention`. Nothing here imports flax.
"""

__all__: list[str] = []
