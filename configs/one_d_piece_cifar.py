"""One-D-Piece on CIFAR-10, from nothing: pictures of 32 pixels in 32 tokens.

    tokjax train configs/one_d_piece_cifar.py:FOLDER --out runs/one_d_piece
    tokjax tokenize photo.jpg --config configs/one_d_piece_cifar.py \\
      --model runs/one_d_piece --tokens 4,8,32

FOLDER holds `cifar10.npz` or the binary batches, see `tokjax.data.cifar10`.
"""

from tokjax.tokenizers.codebook import CodebookConfig
from tokjax.tokenizers.one_d_piece import OneDPieceConfig
from tokjax.tokenizers.transformer import TransformerConfig
from tokjax.tokenizers.vector_quantizer import VQConfig
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.tokenizer_run import TokenizerRun


def get_config(arg: str = "cifar10") -> TokenizerRun:
  """The run; `arg` is the folder or file of the images."""
  trunk = TransformerConfig(
    width=128, num_layers=3, num_heads=4, init_scale=0.09
  )
  book = CodebookConfig(
    1024, 12, metric="cosine", learning="ema", reset="batch"
  )
  return TokenizerRun(
    tokenizer=OneDPieceConfig(
      image_size=32,
      patch_size=8,
      num_tokens=32,
      encoder=trunk,
      decoder=trunk,
      quantizer=VQConfig(book),
    ),
    data=arg or "cifar10",
    batch_size=64,
    trainer=TrainConfig(
      num_steps=600,
      optimizer=OptimizerConfig(
        name="muon",
        learning_rate=2e-3,
        warmup_steps=50,
        weight_decay=0.01,
      ),
      save_every=200,
    ),
  )
