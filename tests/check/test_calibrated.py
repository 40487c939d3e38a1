"""A model that is measured on the kind of text that it was calibrated on: said in every result, and warned of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense

import moeify
from moeify.check.calibrated import calibrated_on, of_one_kind, warn_of_kind
from moeify.check.evaluate import measure
from moeify.cli.tables.eval import eval_table
from moeify.convert.estimate import estimate
from moeify.convert.prepare import prepare
from moeify.convert.texts import default_texts
from moeify.errors import MoeifyWarning
from moeify.models.dense import open_dense
from moeify.options import EvalOptions, SplitOptions

SIZES: dict[str, Any] = {"intermediate_size": 64, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def moe(make_dense: MakeDense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "moe"
    options = SplitOptions(experts=4, calibration=(str(calibration_file),), tokens=1024)
    moeify.split(make_dense("llama", **SIZES), out, options, track=moeify.untracked)
    return out


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("builtin", "builtin-heldout", True),
        ("builtin", "builtin", True),
        ("builtin", "wiki.txt", False),
        ("self", "wiki.txt", False),
        ("texts/wiki.txt", "texts", True),
        ("texts", "texts/../texts/wiki.txt", True),
        ("texts/wiki.txt", "texts/moby.txt", False),
        ("org/name", "org/name", True),
    ],
)
def test_texts_of_one_kind(text: str, other: str, same: bool) -> None:
    assert of_one_kind(text, other) is same
    assert of_one_kind(other, text) is same


def test_a_record_names_the_texts_and_others_have_none(moe: Path, calibration_file: Path, tmp_path: Path) -> None:
    assert calibrated_on(moe) == (str(calibration_file),)
    for damaged in ("", "[]", '{"schema": "moeify.record/1"}', '{"schema": "moeify.record/1", "job": []}'):
        (tmp_path / "moeify.json").write_text(damaged)
        assert calibrated_on(tmp_path) == ()
    assert calibrated_on(tmp_path / "nothing") == ()


def test_the_same_text_is_warned_of_and_another_is_not(moe: Path, calibration_file: Path) -> None:
    own = f"moe was calibrated on .*, and {calibration_file} is text of that kind"
    with pytest.warns(MoeifyWarning, match=own):
        warn_of_kind({"moe": calibrated_on(moe)}, [str(calibration_file)])
    # One text of another kind is enough to tell; the embedded model has no other.
    warn_of_kind({"moe": calibrated_on(moe)}, [str(calibration_file), "builtin-heldout"])
    warn_of_kind({"moe": ("builtin",), "builtin": ()}, ["builtin-heldout"])


def test_eval_says_what_each_model_was_calibrated_on(moe: Path, calibration_file: Path) -> None:
    options = EvalOptions((str(calibration_file), "builtin-heldout"), tokens=128)
    evaluation = measure([str(moe)], options, track=moeify.untracked)
    assert {row.calibrated_on for row in evaluation.results} == {(str(calibration_file),)}
    assert f"moe was calibrated on {calibration_file}" in str(eval_table(evaluation.results).caption)


def test_a_split_on_the_embedded_text_alone_is_warned_of(make_dense: MakeDense, tmp_path: Path) -> None:
    with pytest.warns(MoeifyWarning, match="is calibrated on Python's reference alone, and loses more on other text"):
        moeify.split(
            make_dense("llama", **SIZES),
            tmp_path / "moe",
            experts=4,
            tokens=1024,
            calibration="builtin",
            track=moeify.untracked,
        )


def test_half_of_the_default_is_the_models_own_text(make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = open_dense(str(make_dense("llama", **SIZES)))
    assert prepare(dense, SplitOptions(experts=4)).options.calibration == ("self", "builtin")
    assert prepare(dense, SplitOptions(experts=4, calibration=("builtin",))).options.calibration == ("builtin",)
    # Not of the embedded model, of too few tokens, or of a model that takes long to write.
    assert default_texts(replace(dense, name="builtin"), SplitOptions()) == ("builtin",)
    assert default_texts(dense, SplitOptions(tokens=64)) == ("builtin",)
    monkeypatch.setattr("moeify.convert.texts.OWN_TEXT_PARAMETERS", 1000)
    assert default_texts(dense, SplitOptions()) == ("builtin",)


def test_its_own_text_takes_time(make_dense: MakeDense) -> None:
    dense = open_dense(str(make_dense("llama", **SIZES)))
    own, other = (
        estimate(prepare(dense, SplitOptions(experts=4, calibration=texts))) for texts in (("self",), ("builtin",))
    )
    assert own.duration_s > other.duration_s
