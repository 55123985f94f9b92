"""Training: one loop for every trained system, on one device or many.

- `tokjax.train.loop`: the loop, `train`, and its config.
- `tokjax.train.step`: the compiled step it calls; use it in a loop of yours.
- `tokjax.train.optimizer`: optimisers and schedules by name.
- `tokjax.train.gradient_cache`: large in-batch losses in pieces.
- `tokjax.train.late_interaction`: the losses of ColBERT, XTR, CRISP, ColBERTer.
- `tokjax.train.retrieval_run`: one run, from data to a model; `features`
  keeps the hidden states of frozen blocks.
- `tokjax.train.ranking_evaluation`: ranking quality while a run goes on.
- `tokjax.train.image_classification`: what is in an image, by a ViT.
- `tokjax.train.metrics`: terminal, JSON lines, TensorBoard.
- `tokjax.train.preemption`: stopping in time when the machine is taken.
"""

__all__ = [
  "features",
  "gradient_cache",
  "image_classification",
  "late_interaction",
  "loop",
  "metrics",
  "optimizer",
  "preemption",
  "ranking_evaluation",
  "retrieval_run",
  "step",
]
