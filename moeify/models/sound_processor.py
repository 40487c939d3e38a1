"""How a model's folder says that sound becomes its inputs: preprocessor_config.json, read by stock transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeify.errors import InputError, first_line
from moeify.models.config import load_config
from moeify.models.files import inside
from moeify.models.image_processor import LIMIT_BYTES, PROCESSOR_FILE
from moeify.models.json_files import read_mapping
from moeify.models.stock import quiet


class SoundProcessor:
    """Makes a model's inputs of sound.

    Args:
        path: the model's folder.

    Raises:
        InputError: the folder does not say how, or not in a way that stock transformers reads.
    """

    def __init__(self, path: Path) -> None:
        if not (path / PROCESSOR_FILE).exists():
            raise InputError(
                f"no {PROCESSOR_FILE} in {path}, which says how sound becomes the model's inputs",
                "fetch it with the model, or write it with save_pretrained of the model's feature extractor",
            )
        read_mapping(inside(path, PROCESSOR_FILE), limit_bytes=LIMIT_BYTES)
        self._path, self._start = path, int(load_config(path).decoder_start_token_id)
        from transformers import AutoFeatureExtractor

        self._stock = self._tried(lambda: AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False))

    @property
    def rate(self) -> int:
        """Samples in a second that the model expects."""
        return int(self._stock.sampling_rate)

    @property
    def seconds(self) -> float:
        """What an input holds; what is shorter is filled with silence."""
        return float(self._stock.chunk_length)

    def __call__(self, samples: Any) -> dict[str, Tensor]:
        """Inputs of one piece of sound: features, and the token that a text begins with.

        Args:
            samples: from -1 to 1, `rate` of them a second, no longer than `seconds`.
        """
        made: Any = self._tried(
            lambda: self._stock(np.asarray(samples, np.float32), sampling_rate=self.rate, return_tensors="pt")
        )
        features = made["input_features"].to(torch.float32)
        return {"input_features": features, "decoder_input_ids": torch.full((len(features), 1), self._start)}

    def _tried(self, make: Any) -> Any:
        try:
            with quiet():
                return make()
        except Exception as error:
            # Readers and processors raise whatever they stumble over.
            raise InputError(
                f"transformers cannot prepare sound as {self._path / PROCESSOR_FILE} says: {first_line(error)}",
                "fetch the file again",
            ) from error
