"""Sound in, a model's inputs out. A SOURCE of sound is one of

    folder/       all .wav below it, sorted; what is said in a.wav stands in a.txt beside it, where that is known
    table.csv     columns path (relative to the table) and text
    speech.wav    one recording

Files are read by the standard library: whole numbers of 8 to 32 bits, any rate, channels are averaged.

Shapes: B pieces of sound, C positions that a model makes of one.
"""

import csv
import hashlib
import random
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeify.data.records import draw
from moeify.data.text import Provenance
from moeify.errors import InputError, first_line
from moeify.models.sound_processor import SoundProcessor

KINDS = "a folder of .wav files, a .wav file, or a .csv with the columns path and text"
# numpy's types of whole numbers of so many bytes; of three bytes there is none.
WIDTHS = {1: "u1", 2: "<i2", 4: "<i4"}
THREE_BYTES = 3


@dataclass(frozen=True)
class Recording:
    """A file, and what is said in it, if that is known."""

    path: Path
    text: str | None


@dataclass(frozen=True)
class SoundBlocks:
    """Inputs made of B pieces of sound, each a block."""

    inputs: dict[str, Tensor]
    provenance: Provenance


def sound_blocks(
    sources: Sequence[str], processor: SoundProcessor, *, num_pieces: int, block_tokens: int, seed: int
) -> SoundBlocks:
    """Draw recordings at random, cut in pieces that the model takes, the same number from every source (to within one).

    Same recordings, seed and processor: the same inputs.

    Args:
        sources: see the top of this file.
        processor: the model's.
        num_pieces: B.
        block_tokens: C.
        seed: of the order.

    Raises:
        UsageError: no source, one named twice, or fewer pieces than sources.
        InputError: a source cannot be read or is too short.
    """
    made = draw(
        sources,
        lambda source: _pieces(source, processor, seed),
        num_pieces,
        block_tokens=block_tokens,
        seed=seed,
        kind="sound",
        items="pieces of sound",
        hint=KINDS,
    )
    return _joined(made, " + ".join(sources), block_tokens, seed)


def all_sound(source: str, processor: SoundProcessor, most: int, block_tokens: int) -> SoundBlocks:
    """At most so many pieces of sound of one source, in its order."""
    return _joined(list(islice(_pieces(source, processor, None), most)), source, block_tokens, 0)


def _joined(made: Sequence[dict[str, Tensor]], source: str, block_tokens: int, seed: int) -> SoundBlocks:
    if not made:
        raise InputError(f"{source} holds no sound, its recordings are empty", f"a source is {KINDS}")
    inputs = {name: torch.cat([one[name] for one in made]) for name in made[0]}
    digest = hashlib.sha256(inputs["input_features"].numpy().astype("<f4").tobytes()).hexdigest()
    provenance = Provenance(source, digest, len(made) * block_tokens, len(made), block_tokens, seed)
    return SoundBlocks(inputs, provenance)


def _pieces(source: str, processor: SoundProcessor, seed: int | None) -> Iterator[dict[str, Tensor]]:
    found = recordings(source)
    if seed is not None:
        random.Random(seed).shuffle(found)
    length = round(processor.seconds * processor.rate)
    for recording in found:
        samples = samples_of(recording.path, processor.rate)
        for start in range(0, len(samples), length):
            yield processor(samples[start : start + length])


def recordings(source: str) -> list[Recording]:
    """The recordings of a source, in order; no sound is read.

    Raises:
        InputError: nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() == ".wav" and file.is_file()]
        found = [Recording(file, _beside(file)) for file in files]
    elif path.suffix.lower() == ".csv" and path.is_file():
        found = _of_table(path)
    elif path.suffix.lower() == ".wav" and path.is_file():
        found = [Recording(path, _beside(path))]
    else:
        raise InputError(f"there is no source of sound {source}", f"a source is {KINDS}")
    if not found:
        raise InputError(f"{source} holds no recording", f"a source is {KINDS}")
    return found


def _beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    return _text(text).strip() if text.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}", "write it again, in UTF-8") from error


def _of_table(path: Path) -> list[Recording]:
    rows = csv.DictReader(_text(path).splitlines())
    if not {"path", "text"} <= set(rows.fieldnames or ()):
        raise InputError(
            f"{path} has the columns {', '.join(rows.fieldnames or ()) or 'of an empty file'}, expected path and text",
            "its first line is path,text",
        )
    found = [Recording(path.parent / row["path"], row["text"] or "") for row in rows if row["path"]]
    if missing := [recording.path for recording in found if not recording.path.is_file()]:
        raise InputError(f"{path} names {missing[0]}, which is not there", "paths are relative to the table")
    return found


def samples_of(path: Path, rate: int) -> Any:
    """The sound of a file, float32 from -1 to 1, so many samples a second.

    Raises:
        InputError: it is no .wav of whole numbers.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, found = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
        numbers = _numbers(raw[: len(raw) // (width * channels) * width * channels], width)
    except (wave.Error, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is not a .wav file of whole numbers: {first_line(error)}", "ffmpeg -i FILE -c:a pcm_s16le OUT.wav"
        ) from error
    samples = numbers.reshape(-1, channels).mean(axis=1)
    if found != rate and len(samples):
        from scipy.signal import resample_poly

        common = gcd(found, rate)
        samples = resample_poly(samples, rate // common, found // common)
    return samples.astype(np.float32)


def _numbers(raw: bytes, width: int) -> Any:
    """From -1 to 1."""
    if width == THREE_BYTES:
        # As the upper bytes of four.
        bytes_N4 = np.zeros((len(raw) // width, 4), np.uint8)
        bytes_N4[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, width)
        raw, width = bytes_N4.tobytes(), 4
    numbers = np.frombuffer(raw, WIDTHS[width]).astype(np.float64)
    return (numbers - 128) / 128 if width == 1 else numbers / (1 << (8 * width - 1))
