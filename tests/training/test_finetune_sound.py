"""Fine-tuning of what hears: towards what the dense model writes of what is said, be that known or not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from tiny_sound import make_whisper, tone, write

from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.data.pairs import dictation, without_gaps
from moeify.errors import InputError, UsageError
from moeify.models import stock
from moeify.models.dense import open_dense
from moeify.options import SplitOptions, untracked
from moeify.training.finetune import finetune
from moeify.training.inputs import open_inputs
from moeify.training.options import FinetuneOptions
from moeify.training.outputs import _writing_losses

pytestmark = pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")


@pytest.fixture(scope="module")
def whisper(make_dense: MakeDense) -> Path:
    return make_whisper(make_dense)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 40 recordings every other one has its text beside it."""
    folder = tmp_path_factory.mktemp("speech")
    for number in range(40):
        write(folder / f"{number:02d}.wav", tone(hertz=100 + 60 * number))
        if number % 2:
            (folder / f"{number:02d}.txt").write_text("the module " * (1 + number % 3))
    return folder


@pytest.fixture(scope="module")
def moe(whisper: Path, speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe") / "moe"
    few = SplitOptions(experts=4, active=1, shared=0, calibration=(str(speech),), tokens=1024, refit=False)
    split(str(whisper), out, few)
    return out


def make_other(whisper: Path, folder: Path) -> Path:
    """The same model, which hears other frequencies."""
    shutil.copytree(whisper, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_fft": 200}))
    return folder


def options(speech: Path, **choices: Any) -> FinetuneOptions:
    return FinetuneOptions(**{"data": (str(speech),), "tokens": 1024, "eval_tokens": 128, **choices})


def test_a_whisper_is_trained_towards_the_dense_one(moe: Path, whisper: Path, speech: Path, tmp_path: Path) -> None:
    # Nobody taught it a word, so that what is said would lead it away.
    chosen = options(speech, hidden=0.5, lm=0, batch=8, every=100, learning_rate=3e-4)
    layers, full = finetune(str(moe), str(whisper), tmp_path / "out", chosen).stages
    assert layers.after["layer_error"] < layers.before["layer_error"]
    assert full.after["kl"] < 0.95 * full.before["kl"]
    assert {"lm", "agreement", "perplexity"} < set(full.after)
    assert verify(str(tmp_path / "out"), str(whisper)).passed


def test_what_is_said_is_known_or_written_by_the_dense_model(moe: Path, whisper: Path, speech: Path) -> None:
    inputs = open_inputs(str(moe), str(whisper), options(speech), untracked)
    assert len(inputs.train["input_features"]) == 32
    # Every tenth recording, of which four are.
    assert inputs.provenance["eval"][0]["num_documents"] == len(inputs.held_out["input_features"]) == 4
    train, held = inputs.train["input_features"], inputs.held_out["input_features"]
    assert not any(torch.equal(one, other) for one in train for other in held)
    # With others to measure on all recordings may be trained on.
    apart = options(speech, eval_data=(str(speech / "00.wav"),))
    more = open_inputs(str(moe), str(whisper), replace(apart, tokens=40 * 32), untracked)
    assert len(more.train["input_features"]) == 40
    with pytest.raises(InputError, match="has 36 pieces of sound, 40 were asked for"):
        open_inputs(str(moe), str(whisper), options(speech, tokens=40 * 32), untracked)


def test_texts_lie_as_a_model_writes_them(whisper: Path) -> None:
    dense = open_dense(str(whisper))
    model, tokenizer = stock.load(dense.path).eval(), dense.tokenizer()
    features = {"input_features": torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0))}
    made = dictation(model, features, ["the module", None, "the"], tokenizer)
    ids_BL, mask_BL = made["decoder_input_ids"], made["decoder_attention_mask"]
    said = tokenizer(" the module", add_special_tokens=False)["input_ids"]
    assert ids_BL[0][mask_BL[0].bool()].tolist() == [5, *said]
    assert set(ids_BL[~mask_BL.bool()].tolist()) == {model.generation_config.eos_token_id}
    # Room for the end of the longest, too.
    assert mask_BL.sum(dim=1).max() == ids_BL.shape[1] - 1
    written = model.generate(**features, max_new_tokens=32, do_sample=False, force_unique_generate_call=True)[
        1
    ].tolist()
    assert ids_BL[1][mask_BL[1].bool()].tolist() == written[: int(mask_BL[1].sum())]
    packed = without_gaps(made, dense)
    assert "decoder_attention_mask" not in packed
    assert packed["decoder_input_ids"][0].tolist()[-len(said) - 1 :] == [5, *said]
    assert without_gaps(features, dense) == features


def test_losses_of_what_is_written_leave_out_what_is_masked() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, goal = torch.randn(2, 2, 5, 7, generator=generator)
    ids = torch.randint(7, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    losses = _writing_losses(logits, goal, {"decoder_input_ids": ids, "decoder_attention_mask": mask})
    for row, length in enumerate((3, 4)):
        short = {"decoder_input_ids": ids[row : row + 1, : length + 1]}
        alone = _writing_losses(logits[row : row + 1, : length + 1], goal[row : row + 1, : length + 1], short)
        # Its last token predicts the end, which predicts nothing.
        torch.testing.assert_close(losses[row, 1], alone[0, 1])
        kl = torch.nn.functional.kl_div(
            logits[row, :length].log_softmax(-1), goal[row, :length].log_softmax(-1), log_target=True, reduction="sum"
        )
        torch.testing.assert_close(losses[row, 0], kl / length)


def test_what_cannot_be_trained_on_is_said(moe: Path, whisper: Path, speech: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no recording in moeify"):
        finetune(str(moe), str(whisper), tmp_path / "out", FinetuneOptions())
    few = tmp_path / "few"
    few.mkdir()
    for number in range(3):
        write(few / f"{number}.wav", tone())
    with pytest.raises(InputError, match="fewer than 10 pieces of sound"):
        finetune(str(moe), str(whisper), tmp_path / "out", options(few, tokens=32))
    other = make_other(whisper, tmp_path / "other")
    with pytest.raises(InputError, match="hear or write differently"):
        finetune(str(moe), str(other), tmp_path / "out", options(speech))


def test_what_hears_is_trained_in_smaller_steps(speech: Path) -> None:
    assert options(speech).rate("full", hears=True) == pytest.approx(0.1 * options(speech).rate("full"))
    assert options(speech, learning_rate=1e-3).rate("full", hears=True) == 1e-3
