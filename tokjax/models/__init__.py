"""Encoders with weights, as plain pytrees, and how to load published ones."""

from tokjax.models.bert import Bert, BertConfig
from tokjax.models.checkpoints import Checkpoint, load
from tokjax.models.saving import save

__all__ = ["Bert", "BertConfig", "Checkpoint", "load", "save"]
