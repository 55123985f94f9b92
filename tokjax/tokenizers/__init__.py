"""Tokenizers: images, shapes, items and text to sets of tokens and back.

Published systems:

- `titok`, `one_d_piece`: an image as a row of tokens, of which any beginning
  is an image; `two_stage`: the same over the codes of a `vqgan`.
- `hiera_tok`: continuous tokens on several scales; `ming` with `flow_head`: on
  one, to understand and to generate.
- `token_flow` (with `dual_quantizer`): one index for meaning and looks.
- `illume`, `illume_plus`: codes of features, and of features and pixels.
- `seed`: causal queries as codes; `slot_mllm`: competing slots as residual
  codes; `q_former`, `slot_attention`: what they are made of; `language_ids`:
  codes as ids of a language model.
- `lavit`: as many tokens as an image has to say.
- `vat`: point sets to tokens to occupancy.
- `setrec`: an item as a set of vectors, answered at once; `sasrec`:
  collaborative embeddings of items.
- `unicode_tokens`: every code point a token; `unicode_glyphs`: frozen rows made
  of pictures of tokens; `glyph_language_model`: a model that reads them.
- `quantizers`: all quantizers at one width and number of bits.

Quantizers:

- `vector_quantizer`: the nearest code of one table; `residual_quantizer`: a
  sum of codes, coarse to fine; `multi_scale_quantizer`: of maps or rows of
  growing size.
- `grouped_quantizer`: any of them over groups of channels;
  `product_quantizer`: groups with a table each; `additive_quantizer`: a sum of
  codes chosen together.
- `lookup_free`: FSQ, LFQ and BSQ; `graph_tokens`: nodes as anchors and
  relations; `gaussian`: latents with mean and variance.
- `codebook`: tables of codes and how they learn; `code_resets`: dead codes
  brought back.

Parts: `transformer`, `conv`: trunks; `discriminator`, `adversarial`: the losses
of a discriminator; `types`: what every quantizer and tokenizer returns;
`measures`: means and usage over all devices.
"""

__all__ = [
  "additive_quantizer",
  "adversarial",
  "code_resets",
  "codebook",
  "conv",
  "discriminator",
  "dual_quantizer",
  "flow_head",
  "gaussian",
  "glyph_language_model",
  "graph_tokens",
  "grouped_quantizer",
  "hiera_tok",
  "illume",
  "illume_plus",
  "language_ids",
  "lavit",
  "lookup_free",
  "measures",
  "ming",
  "multi_scale_quantizer",
  "one_d_piece",
  "product_quantizer",
  "q_former",
  "quantizers",
  "residual_quantizer",
  "sasrec",
  "seed",
  "setrec",
  "slot_attention",
  "slot_mllm",
  "titok",
  "token_flow",
  "transformer",
  "two_stage",
  "types",
  "unicode_glyphs",
  "unicode_tokens",
  "vat",
  "vector_quantizer",
  "vqgan",
]
