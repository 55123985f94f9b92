"""Benchmarks: one module per subject, each run with `python -m`.

Every row names the operation, who ran it, the shape, the dtype, the device and
the versions; see `timing.py`.
"""

__all__: list[str] = []
