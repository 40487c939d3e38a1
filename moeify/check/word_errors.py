"""Word error rate: how much of what is said a model writes down otherwise; by jiwer."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from moeify.check.features import on_device
from moeify.check.scores import Score
from moeify.data.audio import KINDS, Recording, recordings, samples_of
from moeify.errors import InputError
from moeify.models.sound_processor import SoundProcessor
from moeify.models.tokenizer import load_tokenizer
from moeify.options import EvalOptions, Track

WORD_ERRORS = "word error rate"


@dataclass(frozen=True)
class WordErrors:
    """The measure of models that write down what they hear.

    Args:
        paths: folders of the models.
        examples: recordings of every source whose text is known, and a hash of the texts.
    """

    paths: Mapping[str, Path]
    examples: Mapping[str, tuple[list[Recording], str]]

    @classmethod
    def open(cls, paths: Mapping[str, Path], options: EvalOptions) -> Self:
        """Find the recordings.

        Raises:
            InputError: there are none whose text is known, or jiwer is not installed.
        """
        try:
            import jiwer  # noqa: F401
        except ImportError as error:
            raise InputError("word error rates need the jiwer package", "pip install 'moeify[audio]'") from error
        return cls(paths, {source: _with_text(source) for source in options.data})

    def __call__(self, model: Any, name: str, source: str, track: Track[Any]) -> Score:
        """Have the model write down every recording, and compare words without case and punctuation."""
        import jiwer

        found, sha256 = self.examples[source]
        processor, tokenizer = SoundProcessor(self.paths[name]), load_tokenizer(self.paths[name])
        normal, began = BasicTextNormalizer(), time.perf_counter()
        written = [
            normal(tokenizer.decode(written_down(model, processor, recording), skip_special_tokens=True))
            for recording in track(found, f"{name} listens to {source}", len(found))
        ]
        elapsed = time.perf_counter() - began
        said = [normal(recording.text or "") for recording in found]
        return Score(name, source, WORD_ERRORS, jiwer.wer(said, written), len(found), len(found) / elapsed, sha256)


def _with_text(source: str) -> tuple[list[Recording], str]:
    found = [recording for recording in recordings(source) if BasicTextNormalizer()(recording.text or "").strip()]
    if not found:
        raise InputError(f"{source} has no recording whose text is known", f"expected {KINDS}; a.txt beside a.wav")
    digest = hashlib.sha256("\n".join(f"{one.path.name}\t{one.text}" for one in found).encode()).hexdigest()
    return found, digest


@torch.no_grad()
def written_down(model: Any, processor: SoundProcessor, recording: Recording) -> Tensor:
    """ids_C of what a model hears, the likeliest token each time.

    Raises:
        InputError: the recording is longer than the model listens.
    """
    samples = samples_of(recording.path, processor.rate)
    if len(samples) > processor.seconds * processor.rate:
        raise InputError(
            f"{recording.path} lasts {len(samples) / processor.rate:.0f} s, the model listens for "
            f"{processor.seconds:.0f} s",
            "cut it into pieces",
        )
    features = on_device({"input_features": processor(samples)["input_features"]}, model)
    written: Tensor = model.generate(**features, do_sample=False, num_beams=1)[0]
    return written
