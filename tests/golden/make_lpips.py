"""Writes lpips.npz; needs torch, torchvision and lpips 0.1.4.

    python tests/golden/make_lpips.py

What `lpips.LPIPS` computes for two pairs of random images with either of its
backbones, whose convolutions are replaced by narrow random ones: the forward
pass is the published one, the weights fit into a small file. The tensors bear
the names that torchvision and lpips give them.
"""

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent
NAMES = {"vgg16": "vgg", "alexnet": "alex"}
WIDTHS = {
  "vgg16": (4, 4, 5, 5, 6, 6, 6, 4, 4, 4, 3, 3, 3),
  "alexnet": (4, 5, 6, 4, 3),
}


def example(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Images in 0..1, [2, 40, 36, 3], and the same with noise."""
  rng = np.random.default_rng(seed)
  images = rng.random((2, 40, 36, 3))
  noisy = np.clip(images + 0.2 * rng.normal(size=images.shape), 0, 1)
  return images.astype(np.float32), noisy.astype(np.float32)


def narrow(backbone: str):
  """The published model with few channels, and its tensors by name."""
  import lpips
  import torch

  torch.manual_seed(0)
  model = lpips.LPIPS(
    net=NAMES[backbone], pretrained=False, pnet_rand=True, verbose=False
  )
  widths, before, tensors = iter(WIDTHS[backbone]), 3, {}
  for index, part in enumerate(model.net.children()):  # up to a compared layer
    for number, layer in part.named_children():
      if isinstance(layer, torch.nn.Conv2d):
        width = next(widths)
        layer = torch.nn.Conv2d(
          before, width, layer.kernel_size, layer.stride, layer.padding
        )
        torch.nn.init.kaiming_normal_(layer.weight)
        torch.nn.init.normal_(layer.bias, std=0.2)
        part.register_module(number, layer)
        tensors[f"features.{number}.weight"] = layer.weight
        tensors[f"features.{number}.bias"] = layer.bias
        before = width
    head = torch.nn.Conv2d(before, 1, 1, bias=False)
    torch.nn.init.uniform_(head.weight, 0, 1)
    model.lins[index].model[1] = head
    tensors[f"lin{index}.model.1.weight"] = head.weight
  return model.eval(), {k: x.detach().numpy() for k, x in tensors.items()}


def main() -> None:
  import torch

  images, noisy = example()
  arrays = {"images": images, "reconstructions": noisy}
  pixels = [
    torch.tensor(x.transpose(0, 3, 1, 2).copy()) for x in (images, noisy)
  ]
  for backbone in NAMES:
    model, tensors = narrow(backbone)
    with torch.inference_mode():
      distance = model(*pixels, normalize=True)
    arrays[f"{backbone}/distance"] = distance.numpy().reshape(-1)
    arrays |= {f"{backbone}/{name}": x for name, x in tensors.items()}
  np.savez_compressed(GOLDEN / "lpips.npz", **arrays)


if __name__ == "__main__":
  main()
