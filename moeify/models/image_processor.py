"""Images as a model's inputs, as its folder says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.models.config import load_config
from moeify.models.preprocessor import Preprocessor


class ImageProcessor:
    """Makes a model's inputs of images; with pillow alone, so that the same image gives the same numbers everywhere.

    Args:
        path: the model's folder.

    Raises:
        InputError: the folder does not say how, or not in a way that stock transformers reads.
    """

    def __init__(self, path: Path) -> None:
        # Its public name needs torchvision in older versions, though this backend does not.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        self._made = Preprocessor(
            path,
            "images",
            "image processor",
            lambda: AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False),
        )
        self._mode = "L" if getattr(load_config(path), "num_channels", 3) == 1 else "RGB"

    def __call__(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """`pixel_values` of these images of pillow, float32.

        Raises:
            InputError: they cannot be made, or differ in size.
        """
        made = self._made([image.convert(self._mode) for image in images])
        return {"pixel_values": made["pixel_values"].to(torch.float32)}
