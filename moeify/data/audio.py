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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from math import gcd
from pathlib import Path
from typing import Any, Literal

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
# Of so many pieces one is held out, where a source is both trained on and measured.
APART = 10
Part = Literal["all", "trained on", "held out"]


@dataclass(frozen=True)
class Recording:
    """A file, and what is said in it, if that is known."""

    path: Path
    text: str | None


@dataclass(frozen=True)
class Piece:
    """A part of a recording that a model takes at once.

    Args:
        path: of the recording.
        start: number of its first sample.
        text: what is said in it; None where nobody wrote that down, or the recording is of several pieces.
    """

    path: Path
    start: int
    text: str | None


@dataclass(frozen=True)
class SoundBlocks:
    """Inputs made of B pieces of sound, each a block, and what is said in each, where that is known."""

    inputs: dict[str, Tensor]
    provenance: Provenance
    texts: tuple[str | None, ...]


def sound_blocks(
    sources: Sequence[str],
    processor: SoundProcessor,
    *,
    num_pieces: int,
    block_tokens: int,
    seed: int,
    part: Part = "all",
) -> SoundBlocks:
    """Draw recordings at random, cut in pieces that the model takes, the same number from every source (to within one).

    Same recordings, seed and processor: the same inputs.

    Args:
        sources: see the top of this file.
        processor: the model's.
        num_pieces: B.
        block_tokens: C.
        seed: of the order.
        part: of each source.

    Raises:
        UsageError: no source, one named twice, or fewer pieces than sources.
        InputError: a source cannot be read or is too short.
    """
    drawn = draw(
        sources,
        lambda source: pieces(source, processor, seed=seed, part=part),
        num_pieces,
        block_tokens=block_tokens,
        seed=seed,
        kind="sound",
        items="pieces of sound",
        hint=KINDS,
    )
    return _blocks(drawn, processor, " + ".join(sources), block_tokens, seed)


def all_sound(
    source: str, processor: SoundProcessor, most: int, block_tokens: int, *, part: Part = "all"
) -> SoundBlocks:
    """At most so many pieces of sound of one source, in its order."""
    some = list(islice(pieces(source, processor, part=part), most))
    if not some and part == "held out":
        raise InputError(
            f"{source} has fewer than {APART} pieces of sound, of which one is held out", "--eval-data names others"
        )
    return _blocks(some, processor, source if part == "all" else f"{source}, {part}", block_tokens, 0)


def _blocks(some: Sequence[Piece], processor: SoundProcessor, source: str, block_tokens: int, seed: int) -> SoundBlocks:
    if not some:
        raise InputError(f"{source} holds no sound, its recordings are empty", f"a source is {KINDS}")
    length = round(processor.seconds * processor.rate)
    made: dict[int, dict[str, Tensor]] = {}
    # Each recording is read once.
    order = sorted(range(len(some)), key=lambda place: (some[place].path, some[place].start))
    for path, places in groupby(order, lambda place: some[place].path):
        samples = samples_of(path, processor.rate)
        for place in places:
            start = some[place].start
            made[place] = processor(samples[start : start + length])
    inputs = {name: torch.cat([made[place][name] for place in range(len(some))]) for name in made[0]}
    digest = hashlib.sha256(inputs["input_features"].numpy().astype("<f4").tobytes()).hexdigest()
    provenance = Provenance(source, digest, len(some) * block_tokens, len(some), block_tokens, seed)
    return SoundBlocks(inputs, provenance, tuple(piece.text for piece in some))


def pieces(source: str, processor: SoundProcessor, *, seed: int | None = None, part: Part = "all") -> Iterator[Piece]:
    """The pieces of a source, recording after recording; no sound is read.

    Args:
        source: see the top of this file.
        processor: the model's, which says how long a piece is.
        seed: of the order of the recordings; None leaves it as it is.
        part: `held out` are every tenth recording, and of a long one every tenth piece.

    Raises:
        InputError: nothing is there, or it is no sound.
    """
    numbered = list(enumerate(recordings(source)))
    if seed is not None:
        random.Random(seed).shuffle(numbered)
    length = round(processor.seconds * processor.rate)
    for number, recording in numbered:
        starts = range(0, _num_samples(recording.path, processor.rate), length)
        for place, start in enumerate(starts):
            is_apart = (number + place) % APART == APART - 1
            if part == "all" or is_apart == (part == "held out"):
                yield Piece(recording.path, start, recording.text if len(starts) == 1 else None)


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
    with _opened(path) as file:
        width, channels, found = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = file.readframes(file.getnframes())
        numbers = _numbers(raw[: len(raw) // (width * channels) * width * channels], width)
    samples = numbers.reshape(-1, channels).mean(axis=1)
    if found != rate and len(samples):
        from scipy.signal import resample_poly

        common = gcd(found, rate)
        samples = resample_poly(samples, rate // common, found // common)
    return samples.astype(np.float32)


def _num_samples(path: Path, rate: int) -> int:
    """How many samples `samples_of` gives, by what stands in front of the sound."""
    with _opened(path) as file:
        return -(-file.getnframes() * rate // file.getframerate())


@contextmanager
def _opened(path: Path) -> Iterator[wave.Wave_read]:
    try:
        with wave.open(str(path), "rb") as file:
            yield file
    except (wave.Error, EOFError, OSError, ValueError, KeyError, ZeroDivisionError) as error:
        raise InputError(
            f"{path} is not a .wav file of whole numbers: {first_line(error)}", "ffmpeg -i FILE -c:a pcm_s16le OUT.wav"
        ) from error


def _numbers(raw: bytes, width: int) -> Any:
    """From -1 to 1."""
    if width == THREE_BYTES:
        # As the upper bytes of four.
        bytes_N4 = np.zeros((len(raw) // width, 4), np.uint8)
        bytes_N4[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, width)
        raw, width = bytes_N4.tobytes(), 4
    numbers = np.frombuffer(raw, WIDTHS[width]).astype(np.float64)
    return (numbers - 128) / 128 if width == 1 else numbers / (1 << (8 * width - 1))
