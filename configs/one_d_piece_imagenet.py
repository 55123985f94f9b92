"""One-D-Piece at its published size, on ImageNet, in two stages; for a pod.

    tokjax train configs/one_d_piece_imagenet.py:proxy --out runs/proxy \\
      --config.proxy=vqgan.safetensors
    tokjax train configs/one_d_piece_imagenet.py:pixels --out runs/pixels \\
      --config.start=runs/proxy/model/tokenizer.safetensors

The first stage names the codes of a frozen VQGAN, which is a run of its own
(`tokenizer=vqgan.SHAPES["maskgit"]`); the second learns pixels from them. The
images are ImageNet as TFDS prepares it, or any folder with folders `train` and
`validation` (`--config.data=FOLDER`). `--config.mesh.fsdp=4` cuts parameters
over devices, `--config.perceptual=lpips.safetensors` adds that loss.

Rates, weights and numbers of steps are those of the published settings; ours is
the number of images a step, and LPIPS in place of their perceptual network.
Nobody has run this file to its end.
"""

from tokjax.data.image_crops import RandomResizedCrop
from tokjax.tokenizers import two_stage
from tokjax.tokenizers.adversarial import AdversarialConfig
from tokjax.tokenizers.two_stage import TwoStageConfig
from tokjax.train.loop import TrainConfig
from tokjax.train.optimizer import OptimizerConfig
from tokjax.train.tokenizer_run import TokenizerRun


def get_config(stage: str = "proxy") -> TokenizerRun:
  """The run of a stage, "proxy" or "pixels"."""
  stage = stage or "proxy"
  first = stage == "proxy"
  return TokenizerRun(
    tokenizer=TwoStageConfig(stage=stage),
    data="tfds:imagenet2012",
    crop=RandomResizedCrop(256, area=(0.8, 1.0), aspect=(1.0, 1.0)),
    splits=("train", "validation"),
    batch_size=1024,
    adversarial=None
    if first
    else AdversarialConfig(0.01, start_step=20_000, lecam_weight=0.001),
    perceptual_weight=0.1,
    trainer=TrainConfig(
      num_steps=1_000_000 if first else 500_000,
      optimizer=OptimizerConfig(
        learning_rate=1e-4,
        warmup_steps=10_000 if first else 5_000,
        final_ratio=0.1,
        b2=0.99 if first else 0.999,
        weight_decay=1e-4,
        frozen=two_stage.FROZEN[stage],
      ),
      compute_dtype="bfloat16",
      average_decay=0.999,
      save_every=5000,
      evaluate_every=5000,
    ),
  )
