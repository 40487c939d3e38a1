"""The embedded ViT: made once, the same every time, and better than chance."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from moeify.models.builtin_vit import VitRecipe, builtin_vit, digits, prepared
from moeify.models.image_processor import ImageProcessor

TINY = VitRecipe(hidden_size=32, intermediate_size=80, num_layers=1, patch_size=4, steps=60, warmup_steps=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builtin_vit(tmp_path_factory.mktemp("cache"), recipe=TINY)


def test_it_is_made_once_and_the_same(folder: Path, tmp_path: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    assert builtin_vit(folder.parent, recipe=TINY) == folder
    again = builtin_vit(tmp_path, recipe=TINY)
    assert again.name == folder.name
    assert (again / "model.safetensors").read_bytes() == weights


@torch.no_grad()
def test_it_has_learned_something(folder: Path) -> None:
    images, labels = digits(heldout=True)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    right = model(prepared(images)).logits.argmax(1) == torch.from_numpy(labels)
    assert right.float().mean() > 0.3


def test_its_processor_prepares_as_training_did(folder: Path) -> None:
    images, _ = digits(heldout=True)
    found = ImageProcessor(folder)([Image.fromarray(pixels) for pixels in images[:5]])["pixel_values"]
    torch.testing.assert_close(found, prepared(images[:5]))
