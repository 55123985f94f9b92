"""Array annotations used across tokjax.

Axis letters mean one thing everywhere: B batch, N tokens, Q query tokens,
K kept or retrieved, D width, Nq queries, Nd documents, V codebook size.
"""

from typing import Literal

from jaxtyping import Array, Bool, Float, Int, Int32, Key, UInt8

__all__ = [
  "Array",
  "Bool",
  "Float",
  "Implementation",
  "Int",
  "Int32",
  "Key",
  "UInt8",
]

# How a kernel runs; None lets the platform that lowers the program choose.
Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
