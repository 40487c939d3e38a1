"""Recordings of tones, and a Whisper that hears a second of them."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
from conftest import MakeDense

RATE = 16_000


def write(path: Path, samples: Any, width: int = 2, rate: int = RATE, channels: int = 1) -> Path:
    """A .wav of samples from -1 to 1, every channel the same."""
    whole = np.rint(np.asarray(samples) * ((1 << (8 * width - 1)) - 1)).astype(np.int64)
    if width == 1:
        whole = whole + 128
    raw = whole.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.repeat(raw, channels, axis=0).tobytes())
    return path


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440) -> Any:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def make_whisper(make_dense: MakeDense) -> Path:
    from transformers import WhisperFeatureExtractor

    folder = make_dense("whisper", decoder_start_token_id=5)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=250).save_pretrained(folder)
    return folder
