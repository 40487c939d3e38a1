"""Tiny models of images, with random weights, in folders as they are published."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import fill
from transformers import AutoConfig

from moeify import families

SIZE = 16
# As most models of images come: numbers from -1 to 1.
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
# Each family below all heads, and with one where it has one.
MODELS = [
    ("vit", "ViTModel"),
    ("vit", "ViTForImageClassification"),
    ("dinov2", "Dinov2Model"),
    ("dinov2", "Dinov2ForImageClassification"),
    ("siglip_vision_model", "SiglipVisionModel"),
]


def make_model(folder: Path, family: str, class_name: str, **overrides: Any) -> Path:
    """A model of this class in `folder`."""
    config = AutoConfig.for_model(family, **{**families.find(family).tiny_values, **overrides})
    model = getattr(transformers, class_name)(config).eval()
    fill(model, 0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def noise(num_images: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(num_images, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
