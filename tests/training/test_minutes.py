"""A stated time settles how much is trained, as many tokens give the same bits, and nothing is left over."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file
from tiny_images import make_model
from tiny_sound import make_whisper, tone, write

from moeify.check.evaluate import evaluate
from moeify.convert.pipeline import split
from moeify.convert.texts import tokens_of_image
from moeify.errors import InputError, UsageError
from moeify.models.dense import open_dense
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.training import rate, within
from moeify.training.finetune import finetune
from moeify.training.options import FinetuneOptions
from moeify.training.within import split_within

OPTIONS = FinetuneOptions(stage=("full",), context=64, batch=8, eval_tokens=1024, precision="float32")
SPLIT = SplitOptions(experts=8, tokens=4096, context=64, calibration=("builtin",))
# Of one step, if the clock is not asked.
STEP_S = 1.5


@pytest.fixture(scope="module")
def moe(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minutes") / "moe"
    split(str(taught), folder, replace(SPLIT, active=4))
    return folder


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take STEP_S seconds."""
    monkeypatch.setattr(rate, "_step_seconds", lambda *_, **__: STEP_S)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("model-*")) for name, tensor in load_file(file).items()}


def settled(folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = json.loads((folder / "moeify.json").read_text())["job"]["options"]
    return options


@pytest.mark.usefixtures("steady")
def test_minutes_become_tokens_and_those_tokens_give_the_same_bits(moe: Path, taught: Path, tmp_path: Path) -> None:
    result = finetune(str(moe), str(taught), tmp_path / "timed", replace(OPTIONS, minutes=0.6))
    found = settled(tmp_path / "timed")
    steps = found["tokens"] / (OPTIONS.batch * 64)
    # Text, models and evaluations take some of the 36 seconds.
    assert 12 <= steps <= 0.6 * 60 / STEP_S
    assert result.stages[0].num_tokens == found["tokens"]
    assert found["every"] == steps
    explicit = replace(OPTIONS, tokens=found["tokens"], every=found["every"])
    finetune(str(moe), str(taught), tmp_path / "explicit", explicit)
    one, other = weights(tmp_path / "timed"), weights(tmp_path / "explicit")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_is_timed_and_leaves_nothing(moe: Path, taught: Path, tmp_path: Path) -> None:
    before = weights(moe)
    finetune(str(moe), str(taught), tmp_path / "out", replace(OPTIONS, minutes=0.15, eval_tokens=128))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert settled(tmp_path / "out")["tokens"] >= rate.FEWEST_STEPS * OPTIONS.batch * 64
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(moe).items())


@pytest.mark.parametrize(("seconds", "timed"), [(1, rate.TIMED_STEPS), (5, 2), (20, 1)])
def test_long_steps_are_timed_less_often(seconds: float, timed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now, clock = [0.0], rate._Clock(enough_s=12)
    monkeypatch.setattr(rate.time, "perf_counter", lambda: now[0])
    with pytest.raises(rate._EnoughError):
        for _ in clock.track(range(9), "", 9):
            now[0] += seconds
    # The first of all is not timed.
    assert clock.times == [seconds * (1 + step) for step in range(timed + 1)]


@pytest.mark.usefixtures("steady")
def test_a_run_that_goes_on_keeps_what_it_settled(moe: Path, taught: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, minutes=0.6, device="cpu")
    kept = replace(options, tokens=5120, every=7)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "job.json").write_text(json.dumps({"options": asdict(kept)}))
    assert rate._earlier(tmp_path / "out", options) == kept
    assert rate._earlier(tmp_path / "out", replace(options, seed=1)) is None
    assert rate._earlier(tmp_path / "other", options) is None


@pytest.mark.usefixtures("steady")
def test_a_short_text_is_seen_more_often_and_too_few_minutes_are_said(moe: Path, taught: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"line {number} of a text that is short and says the same again" for number in range(900))
    )
    options = replace(OPTIONS, minutes=2, data=(str(text),))
    finetune(str(moe), str(taught), tmp_path / "out", options)
    found = settled(tmp_path / "out")
    assert 2 <= found["epochs"] <= rate.MOST_EPOCHS
    with pytest.raises(UsageError, match=r"are too few for 8 steps: one takes 2 s here") as error:
        finetune(str(moe), str(taught), tmp_path / "few", replace(OPTIONS, minutes=0.15))
    assert "--minutes takes 1 or more" in str(error.value.hint)
    assert not (tmp_path / "few.partial").exists()
    with pytest.raises(UsageError, match="stage layers has none"):
        replace(OPTIONS, stage=("layers", "full"), minutes=1)


@pytest.mark.usefixtures("steady")
def test_a_timed_split_searches_trains_and_is_better(taught: Path, tmp_path: Path) -> None:
    result = split_within(str(taught), tmp_path / "moe", SPLIT, minutes=1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]
    assert [work for work in result.seconds if "layers" in work] == ["scoring layers", "splitting layers"]
    assert result.seconds["training full"] > 0
    assert result.plan.options.budget == within.BUDGET
    assert (
        result.plan.layout.model_share(len(result.plan.layers), len(result.plan.options.drop_layers)) <= within.BUDGET
    )
    plain = replace(
        SPLIT, **{name: getattr(result.plan.options, name) for name in ("active", "shared", "dense_layers")}
    )
    split(str(taught), tmp_path / "plain", plain)
    folders = [str(tmp_path / name) for name in ("plain", "moe")]
    before, after = [row.perplexity for row in evaluate(folders, tokens=4096, context=64)]
    assert after < before


@pytest.mark.usefixtures("steady")
def test_a_timed_split_goes_on_from_its_finished_split(taught: Path, tmp_path: Path) -> None:
    options = replace(SPLIT, active=4)
    split(str(taught), tmp_path / "moe.untrained", options)
    (tmp_path / "moe.untrained").rename(tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", tmp_path / "moe.untrained")
    result = split_within(str(taught), tmp_path / "moe", options, minutes=1.5)
    assert "splitting layers" not in result.seconds
    assert not (tmp_path / "moe.untrained").exists()
    shutil.copytree(tmp_path / "kept", tmp_path / "other.untrained")
    with pytest.raises(InputError, match="differs in: seed"):
        split_within(str(taught), tmp_path / "other", replace(options, seed=3), minutes=1.5)
    # Nothing of the other run is gone.
    assert load_plan(tmp_path / "other.untrained").options.seed == 0
    other = split_within(str(taught), tmp_path / "other", replace(options, seed=3), minutes=1.5, overwrite=True)
    assert other.plan.options.seed == 3


def test_in_the_own_architecture_what_loses_less_is_taken(taught: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = replace(SPLIT, target="moeify", experts=None)
    split_within(str(taught), tmp_path / "moe", options, minutes=0.01, announce=lines.append)
    layout = load_plan(tmp_path / "moe").layout
    assert layout.num_experts > 8
    assert layout.model_share(len(load_plan(tmp_path / "moe").layers)) <= 0.75
    (said,) = [line for line in lines if "loses less than" in line]
    assert said.startswith("as many experts as a token needs") == layout.is_adaptive


def test_a_range_of_experts_is_taken_without_a_search(taught: Path, tmp_path: Path) -> None:
    options = replace(SPLIT, target="moeify", max_active=7)
    split_within(str(taught), tmp_path / "moe", options, minutes=0.01, announce=lambda _: None)
    layout = load_plan(tmp_path / "moe").layout
    assert (layout.num_active, layout.max_active, layout.dense_layers) == (6, 7, ())


def test_without_time_to_train_the_split_stands_alone(taught: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    result = split_within(str(taught), tmp_path / "moe", replace(SPLIT, active=4), minutes=0.01, announce=lines.append)
    assert result.finetune is None
    assert load_plan(tmp_path / "moe").trained == ()
    assert any("no time is left to train" in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]


@pytest.mark.usefixtures("steady")
@pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")
def test_images_are_searched_split_and_trained_in_a_time(tmp_path: Path) -> None:
    dense = str(make_model(tmp_path / "dense", "vit", "ViTForImageClassification"))
    options = SplitOptions(experts=4, tokens=1024, calibration=("digits",))
    result = split_within(dense, tmp_path / "moe", options, minutes=2)
    works = ["cutting layers alike", "scoring layers", "splitting layers"]
    assert [work for work in result.seconds if "layers" in work] in (works, [works[0], works[2]])
    assert result.finetune is not None
    assert set(result.finetune.stages[0].after) >= {"kl", "agreement"}
    found = settled(tmp_path / "moe")
    assert found["tokens"] * found["epochs"] >= rate.FEWEST_STEPS * 4 * tokens_of_image(open_dense(dense))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


@pytest.mark.usefixtures("steady")
def test_few_recordings_are_heard_more_often(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, speech = str(make_whisper(make_dense)), tmp_path / "speech"
    speech.mkdir()
    for number in range(11):
        write(speech / f"{number:02d}.wav", tone(hertz=100 + 60 * number))
    split(dense, tmp_path / "moe", SplitOptions(experts=4, active=2, calibration=(str(speech),), tokens=320))
    options = FinetuneOptions(stage=("full",), data=(str(speech),), minutes=0.5)
    finetune(str(tmp_path / "moe"), dense, tmp_path / "timed", options)
    found = settled(tmp_path / "timed")
    # One of eleven is held out, and each of the others is seen as often as is allowed.
    assert (found["tokens"], found["epochs"]) == (10 * 32, rate.MOST_EPOCHS)
    with pytest.raises(UsageError, match="there is no recording in moeify"):
        finetune(str(tmp_path / "moe"), dense, tmp_path / "other", replace(options, data=FinetuneOptions.data))
