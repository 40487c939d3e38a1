"""Sound as a model's inputs, as its folder says."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeify.models.config import load_config
from moeify.models.heads import decoder_start
from moeify.models.preprocessor import Preprocessor


class SoundProcessor:
    """Makes a model's inputs of sound.

    Args:
        path: the model's folder.

    Raises:
        InputError: the folder does not say how, or not in a way that stock transformers reads.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoFeatureExtractor

        self._made = Preprocessor(
            path,
            "sound",
            "feature extractor",
            lambda: AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False),
        )
        self._start = decoder_start(load_config(path))

    @property
    def rate(self) -> int:
        """Samples in a second that the model expects."""
        return int(self._made.stock.sampling_rate)

    @property
    def seconds(self) -> float:
        """What an input holds; what is shorter is filled with silence."""
        return float(self._made.stock.chunk_length)

    def __call__(self, samples: Any) -> dict[str, Tensor]:
        """Inputs of one piece of sound: features, and the token that a text begins with.

        Args:
            samples: from -1 to 1, `rate` of them a second, no longer than `seconds`.
        """
        made = self._made(np.asarray(samples, np.float32), sampling_rate=self.rate)
        features = made["input_features"].to(torch.float32)
        return {"input_features": features, "decoder_input_ids": torch.full((len(features), 1), self._start)}
