"""Writes the stored vision encoders; needs torch and transformers.

    python tests/golden/make_vits.py

One folder per family: a random tiny model as transformers saves it, and what
transformers computes for two images (`hidden.npz`): all hidden states, the
attention of every layer and the output of the head, and the same for images of
another shape, where the family interpolates its positions. Beside them
`image_processors.npz`: a random image as each published processor prepares it,
the settings as JSON.
"""

import json
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent
SHAPE = {
  "hidden_size": 16,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "image_size": 16,
  "patch_size": 4,
}
DINOV2 = {**SHAPE, "mlp_ratio": 2}
del DINOV2["intermediate_size"]
KINDS = {
  "clip_tiny": ("CLIPVisionModelWithProjection", {"projection_dim": 12}),
  "siglip_tiny": ("SiglipVisionModel", {}),
  "dinov2_tiny": ("Dinov2Model", DINOV2),
  "dinov2_registers_tiny": (
    "Dinov2WithRegistersModel",
    {**DINOV2, "num_register_tokens": 3},
  ),
  "vit_tiny": ("ViTForImageClassification", {"num_labels": 5}),
  "deit_tiny": ("DeiTForImageClassificationWithTeacher", {"num_labels": 5}),
}
PROCESSORS = {
  "clip": ("CLIPImageProcessor", {"shortest_edge": 24}, 20),
  "siglip": ("SiglipImageProcessor", {"height": 18, "width": 18}, None),
  "dinov2": ("BitImageProcessor", {"shortest_edge": 24}, 20),
  "deit": ("DeiTImageProcessor", {"height": 24, "width": 24}, 20),
  "vit": ("ViTImageProcessor", {"height": 18, "width": 18}, None),
}


def torch_vit(name: str, seed: int, **changes):
  """A random transformers encoder with weights large enough to matter."""
  import torch
  import transformers

  torch.manual_seed(seed)
  kind, settings = KINDS[name]
  settings = {**settings, **changes}
  settings = settings if name.startswith("dinov2") else {**SHAPE, **settings}
  model_type = getattr(transformers, kind)
  config = model_type.config_class(**settings, attn_implementation="eager")
  model = model_type(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model.eval()


def example(seed: int = 0, height: int = 16, width: int = 16) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, height, width, 3)).astype(np.float32)


def torch_outputs(model, images: np.ndarray, **settings) -> dict:
  """Hidden states [L + 1, B, N, D], attentions [L, B, H, N, N], output."""
  import torch

  with torch.inference_mode():
    pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy())
    out = model(
      pixels, output_hidden_states=True, output_attentions=True, **settings
    )
  found = {
    "hidden": np.stack([x.numpy() for x in out.hidden_states]),
    "attention": np.stack([x.numpy() for x in out.attentions]),
  }
  for name in ("image_embeds", "logits", "pooler_output"):
    if getattr(out, name, None) is not None:
      found["output"] = getattr(out, name).numpy()
  return found


def main() -> None:
  import transformers

  for name in KINDS:
    model = torch_vit(name, seed=0)
    model.save_pretrained(GOLDEN / name, safe_serialization=True)
    arrays = {"images": example(), **torch_outputs(model, example())}
    if name.startswith("dinov2"):
      wide = example(1, 12, 24)
      arrays["wide_images"] = wide
      outputs = torch_outputs(model, wide)
      arrays["wide_output"] = outputs["output"]
      arrays["wide_hidden"] = outputs["hidden"][-1:]
    np.savez(GOLDEN / name / "hidden.npz", **arrays)
  rng = np.random.default_rng(2)
  image = rng.integers(0, 256, (31, 45, 3)).astype(np.uint8)
  arrays = {"image": image}
  for name, (kind, size, crop) in PROCESSORS.items():
    crops = (
      {} if crop is None else {"crop_size": {"height": crop, "width": crop}}
    )
    processor = getattr(transformers, kind)(size=size, **crops)
    for way, x in (("wide", image), ("high", image.transpose(1, 0, 2).copy())):
      pixels = processor(x, return_tensors="np")["pixel_values"][0]
      arrays[f"{name}_{way}"] = pixels.transpose(1, 2, 0)
    arrays[f"{name}_json"] = np.array(json.dumps(processor.to_dict()))
  np.savez(GOLDEN / "image_processors.npz", **arrays)


if __name__ == "__main__":
  main()
