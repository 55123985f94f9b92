"""Encoders with weights, as plain pytrees, and how to load published ones.

Texts: `Bert`, read with its tokenizer and head by `load`. Images:
`tokjax.models.vit`, shapes in `vit_shapes`, weights by `vit_weights`, pixels by
`images`; `reducing` says what a host shows of its layers and where reductions
work. `tokjax.models.biformer`, shapes in `biformer_shapes`, weights by
`biformer_weights`: a pyramid with bi-level routing attention. Language:
`tokjax.models.moe_transformer`, experts on one device or folded over many.
"""

from tokjax.models.bert import Bert, BertConfig
from tokjax.models.checkpoints import Checkpoint, load
from tokjax.models.saving import save

__all__ = ["Bert", "BertConfig", "Checkpoint", "load", "save"]
