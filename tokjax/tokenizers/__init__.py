"""Tokenizers: images, shapes, items and text to sets of tokens and back.

- `tokjax.tokenizers.vector_quantizer`: the nearest code of one table;
  `residual_quantizer`: a sum of codes, coarse to fine.
- `tokjax.tokenizers.codebook`: tables of codes and how they learn.
- `tokjax.tokenizers.types`: what every quantizer returns; `measures`: means
  and usage over all devices.
"""

__all__ = [
  "codebook",
  "measures",
  "residual_quantizer",
  "types",
  "vector_quantizer",
]
