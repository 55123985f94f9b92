"""A small vision transformer on CIFAR-10, from nothing.

    tokjax train configs/vit_cifar10.py:FOLDER --out runs/vit_cifar10

FOLDER holds `cifar10.npz` or the binary batches, see `tokjax.data.cifar10`.
"""

from tokjax.models.vit import VitConfig
from tokjax.train.image_classification import ImageRun
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig


def get_config(arg: str = "cifar10") -> ImageRun:
  """The run; `arg` is the folder or file of the images."""
  return ImageRun(
    model=VitConfig(
      image_size=32,
      patch_size=4,
      width=128,
      num_layers=4,
      num_heads=4,
      mlp_width=256,
      num_outputs=10,
    ),
    data=arg or "cifar10",
    batch_size=64,
    trainer=TrainConfig(
      num_steps=1700,
      optimizer=OptimizerConfig(
        name="muon",
        learning_rate=2e-3,
        warmup_steps=100,
        weight_decay=0.05,
        no_decay=("bias$", "scale$", "norm", "token$", "positions$"),
      ),
      evaluate_every=850,
      save_every=200,
    ),
  )
