"""Recordings: formats of .wav, what is said in them, pieces that a model takes; a small Whisper on the whole road."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeDense
from tiny_sound import RATE, make_whisper, tone, write

from moeify import evaluate
from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.data.audio import recordings, samples_of, sound_blocks
from moeify.errors import InputError, UsageError
from moeify.models import stock
from moeify.models.dense import open_dense
from moeify.models.sound_processor import SoundProcessor
from moeify.options import SplitOptions


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    for number in range(40):
        write(folder / f"{number:02d}.wav", tone(hertz=100 + 60 * number))
        (folder / f"{number:02d}.txt").write_text(f"This is tone {number}.\n")
    return folder


@pytest.fixture(scope="module")
def whisper(make_dense: MakeDense) -> Path:
    return make_whisper(make_dense)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_width_is_read_to_its_precision(width: int, channels: int, tmp_path: Path) -> None:
    samples = samples_of(write(tmp_path / "a.wav", tone(), width, channels=channels), RATE)
    assert samples.dtype == np.float32
    assert np.abs(samples - tone()).max() < 2.0 ** (2 - 8 * min(width, 3))


def test_another_rate_is_the_same_sound(tmp_path: Path) -> None:
    samples = samples_of(write(tmp_path / "a.wav", tone(rate=22_050), rate=22_050), RATE)
    assert len(samples) == len(tone())
    # Both ends ring.
    assert np.abs(samples - tone())[500:-500].max() < 1e-3


def test_what_is_said_stands_beside_or_in_a_table(speech: Path, tmp_path: Path) -> None:
    found = recordings(str(speech))
    assert [one.text for one in found[:2]] == ["This is tone 0.", "This is tone 1."]
    write(tmp_path / "a.wav", tone())
    (tmp_path / "set.csv").write_text('path,text\na.wav,"Hello, world."\n')
    assert [(one.path, one.text) for one in recordings(str(tmp_path / "set.csv"))] == [
        (tmp_path / "a.wav", "Hello, world.")
    ]
    assert recordings(str(tmp_path / "a.wav"))[0].text is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.wav", b"RIFF", "not a .wav file of whole numbers"),
        ("a.csv", b"file,words\n", "has the columns file, words"),
        ("a.csv", b"", "has the columns of an empty file"),
        ("a.csv", b"path,text\nb.wav,x\n", "which is not there"),
        ("a.csv", b"path,text\n", "holds no recording"),
        ("a.csv", b"\xff\xfe\x00", "cannot read"),
        ("a.mp3", b"", "there is no source of sound"),
    ],
)
def test_what_is_no_recording_is_said(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        for recording in recordings(str(tmp_path / name)):
            samples_of(recording.path, RATE)


def test_long_recordings_are_cut_and_seeds_repeat(whisper: Path, tmp_path: Path) -> None:
    write(tmp_path / "long.wav", tone(seconds=2.5))
    processor = SoundProcessor(whisper)
    made = [sound_blocks([str(tmp_path)], processor, num_pieces=3, block_tokens=32, seed=seed) for seed in (0, 0, 1)]
    assert made[0].inputs["input_features"].shape == (3, 8, 64)
    assert made[0].inputs["decoder_input_ids"].tolist() == [[5]] * 3
    assert made[0].provenance == made[1].provenance
    assert made[0].provenance.sha256 != made[2].provenance.sha256
    with pytest.raises(InputError, match="has 3 pieces of sound, 4 were asked for"):
        sound_blocks([str(tmp_path)], processor, num_pieces=4, block_tokens=32, seed=0)
    with pytest.raises(UsageError, match="no source of sound is named"):
        sound_blocks([], processor, num_pieces=4, block_tokens=32, seed=0)


def test_a_whisper_is_cut_verified_and_listens(whisper: Path, speech: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = split(str(whisper), out, SplitOptions(experts=8, calibration=(str(speech),), tokens=1024))
    assert (result.target, result.plan.calibration["num_documents"]) == ("moeify", 32)
    report = verify(str(out), str(whisper))
    assert report.passed, report.checks
    assert (out / "preprocessor_config.json").read_bytes() == (whisper / "preprocessor_config.json").read_bytes()
    dense, state = open_dense(str(whisper)), stock.load(out).state_dict()
    for part in ("encoder", "decoder"):
        assert f"model.{part}.layers.1.fc1.experts.up_proj" in state
    ffns = {name for layer in range(dense.num_layers) for name in dense.ffn_names(layer)}
    for name, tensor in dense.get(set(dense.shapes) - ffns).items():
        assert torch.equal(state[name], tensor), name


def test_a_model_that_hears_is_measured_by_its_words(whisper: Path, speech: Path, tmp_path: Path) -> None:
    pytest.importorskip("jiwer", reason="pip install 'moeify[audio]'")
    few = tmp_path / "few"
    few.mkdir()
    for number in range(2):
        for suffix in ("wav", "txt"):
            (few / f"{number}.{suffix}").write_bytes((speech / f"0{number}.{suffix}").read_bytes())
    (row,) = evaluate([str(whisper)], str(few))
    assert (row.measure, row.num_examples) == ("word error rate", 2)
    # Nobody taught it a word.
    assert row.value > 0.5
    write(few / "0.wav", tone(seconds=1.5))
    with pytest.raises(InputError, match="lasts 2 s, the model listens for 1 s"):
        evaluate([str(whisper)], str(few))
    for text in few.glob("*.txt"):
        text.unlink()
    with pytest.raises(InputError, match="has no recording whose text is known"):
        evaluate([str(whisper)], str(few))
