"""Writes codes.npz; needs torch, einops and vector-quantize-pytorch.

    python tests/golden/make_codes.py

What vector-quantize-pytorch 1.32.0 computes on fixed random features: FSQ in
both variants, ResidualFSQ, LFQ with its losses, spherical LFQ (which is BSQ)
and the rotation trick with its gradient.
"""

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent
LEVELS = (8, 5, 4)
NUM_STAGES = 3
INVERSE_TEMPERATURE = 2.0
NUM_BITS = 6


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
  """Three features for FSQ, six for signs; q and cotangents to rotate."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    "z": 1.5 * normal(2, 16, 3),
    "x": normal(2, 8, NUM_BITS),
    "q": normal(2, 8, NUM_BITS),
    "cotangent": normal(2, 8, NUM_BITS),
  }


def outputs(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  import torch
  import vector_quantize_pytorch as vq
  from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

  found = {}
  arrays = {name: torch.tensor(value) for name, value in x.items()}
  for name in ("shifted", "symmetric"):
    quantizer = vq.FSQ(list(LEVELS), preserve_symmetry=name == "symmetric")
    z = arrays["z"].clone().requires_grad_()
    codes, index = quantizer(z)
    codes.sum().backward()
    found |= {f"{name}_codes": codes, f"{name}_index": index}
    found[f"{name}_gradient"] = z.grad
  quantizer = vq.ResidualFSQ(levels=list(LEVELS), num_quantizers=NUM_STAGES)
  codes, index = quantizer(arrays["z"])
  found |= {"residual_codes": codes, "residual_index": index}
  for name in ("lfq", "bsq"):
    quantizer = vq.LFQ(
      dim=NUM_BITS, spherical=name == "bsq", commitment_loss_weight=0.25
    ).train()
    (codes, index, _), losses = quantizer(
      arrays["x"],
      inv_temperature=INVERSE_TEMPERATURE,
      return_loss_breakdown=True,
    )
    found |= {f"{name}_codes": codes, f"{name}_index": index}
    found[f"{name}_losses"] = torch.stack(list(losses))
  source = arrays["x"].clone().requires_grad_()
  turned = rotate_to(source, arrays["q"])
  turned.backward(arrays["cotangent"])
  found |= {"rotated": turned, "rotated_gradient": source.grad}
  return {name: value.detach().numpy() for name, value in found.items()}


def main() -> None:
  arrays = inputs()
  np.savez_compressed(GOLDEN / "codes.npz", **arrays, **outputs(arrays))


if __name__ == "__main__":
  main()
