"""How a model's folder says that images become its inputs: preprocessor_config.json, read by stock transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.errors import InputError, first_line
from moeify.models.config import load_config
from moeify.models.files import inside
from moeify.models.json_files import read_mapping
from moeify.models.stock import quiet

PROCESSOR_FILE = "preprocessor_config.json"
LIMIT_BYTES = 1 << 24


class ImageProcessor:
    """Makes a model's inputs of images; with pillow alone, so that the same image gives the same numbers everywhere.

    Args:
        path: the model's folder.

    Raises:
        InputError: the folder does not say how, or not in a way that stock transformers reads.
    """

    def __init__(self, path: Path) -> None:
        if not (path / PROCESSOR_FILE).exists():
            raise InputError(
                f"no {PROCESSOR_FILE} in {path}, which says how images become the model's inputs",
                "fetch it with the model, or write it with save_pretrained of the model's image processor",
            )
        read_mapping(inside(path, PROCESSOR_FILE), limit_bytes=LIMIT_BYTES)
        self._path, self._mode = path, "L" if getattr(load_config(path), "num_channels", 3) == 1 else "RGB"
        # Its public name needs torchvision in older versions, though this backend does not.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        self._stock = self._tried(
            lambda: AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        )

    def __call__(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """`pixel_values` of these images of pillow, float32.

        Raises:
            InputError: they cannot be made, or differ in size.
        """
        converted = [image.convert(self._mode) for image in images]
        made: Any = self._tried(lambda: self._stock(converted, return_tensors="pt"))
        return {"pixel_values": made["pixel_values"].to(torch.float32)}

    def _tried(self, make: Any) -> Any:
        try:
            with quiet():
                return make()
        except Exception as error:
            # Readers and processors raise whatever they stumble over.
            raise InputError(
                f"transformers cannot prepare images as {self._path / PROCESSOR_FILE} says: {first_line(error)}",
                "fetch the file again; inputs of one model have one size",
            ) from error
