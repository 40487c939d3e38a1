"""Recipes: every one that comes with moeify is valid, mistakes are named, what is finished is not done again."""

import importlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import MakeDense
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from moeify.check.evaluate import Evaluation
from moeify.check.perplexity import EvalResult
from moeify.cli.app import run_command
from moeify.errors import InputError, MoeifyError, UsageError
from moeify.options import EvalOptions, SplitOptions
from moeify.plugin_list import recipe_folders
from moeify.recipes.model import Recipe, control_options, find_recipe, load_recipe
from moeify.recipes.run import run

# The package binds the name `split` to the function.
stages_module = importlib.import_module("moeify.recipes.run")

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

Write = Callable[..., Path]


@pytest.fixture
def text(calibration_file: Path, tmp_path: Path) -> Path:
    """Calibration text that a test may change."""
    return Path(shutil.copy(calibration_file, tmp_path / "text.txt"))


@pytest.fixture
def write(make_dense: MakeDense, text: Path, tmp_path: Path) -> Write:
    """write(**sections) -> a small recipe; None leaves a section out."""

    def make(**sections: Any) -> Path:
        values = {
            "version": 1,
            "model": str(make_dense("llama", intermediate_size=128, max_position_embeddings=64)),
            "out": str(tmp_path / "runs"),
            "split": {"experts": 8, "tokens": 1024, "calibration": [str(text)]},
            **sections,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False)
        )
        return path

    return make


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, SplitOptions]]:
    """(folder name, options) of every split that was really made."""
    made = []
    really_split = stages_module.split

    def split(model: str, out: Path, options: SplitOptions, **arguments: Any) -> Any:
        made.append((Path(out).name, options))
        return really_split(model, out, options, **arguments)

    monkeypatch.setattr(stages_module, "split", split)
    return made


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart"}
    assert recipe_folders() == [RECIPES[0].parent]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_found_by_name(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe == load_recipe(find_recipe(path.stem))
    assert recipe.out.name == path.stem
    assert path.read_text().startswith("# ")
    for name, control in recipe.controls.items():
        options = control_options(recipe, name, control)
        assert options != recipe.split


def test_a_recipe_holds_the_defaults_of_the_command_line(write: Write) -> None:
    assert load_recipe(write(split=None)).split == SplitOptions()


@pytest.mark.parametrize(
    ("sections", "pattern"),
    [
        ({"splitt": {}}, "splitt"),
        ({"split": {"expert": 8}}, "'expert' is not a key of split"),
        ({"eval": {"datas": []}}, "'datas' is not a key of eval"),
        ({"limits": {"max_ration": 1}}, "'max_ration' is not a key of limits"),
        ({"controls": {"static": {"statik": True}}}, r"'statik' is not a key of controls\.static"),
        ({"split": {"experts": "eight"}}, r"split\.experts.*'eight'"),
        ({"split": {"tokens": None}}, r"split\.tokens"),
        ({"split": {"dtype": "int8"}}, r"split\.dtype.*'int8'"),
        ({"split": [8]}, "split"),
        ({"eval": {"tokens": 1}}, "eval: --tokens 1 is out of range"),
        ({"limits": {"max_ratio": 0}}, r"limits\.max_ratio"),
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({"model": None}, "model"),
        ({"out": None}, "out"),
        ({"split": {"static": True, "shared": 2}}, "split: --static"),
        ({"limits": {"max_ratio": 2}}, "eval"),
        ({"limits": {"beats": ["static"]}, "eval": {}}, "static"),
        ({"limits": {"max_logit_difference": 1e-5}, "verify": False}, "max_logit_difference"),
        ({"limits": {"max_decode_time": 1}}, "measures speed"),
        ({"limits": {"max_decode_time": 1}, "bench": {"engine": ["llama.cpp"]}}, "measures speed in transformers"),
        ({"controls": {"moe": {}}}, "'moe'"),
        ({"controls": {"dense": {}}}, "'dense'"),
        ({"controls": {"../moe": {}}}, r"\.\./moe"),
    ],
)
def test_a_mistake_is_named(write: Write, sections: dict[str, Any], pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern) as caught:
        load_recipe(write(**sections))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("sections", "question"),
    [
        ({"splitt": {}}, "did you mean split? there are version, "),
        ({"split": {"exprts": 8}}, "did you mean experts? there are experts, shared, "),
        ({"bench": {"bacth": [1]}}, "did you mean batch? there are data, "),
        ({"limits": {"beat": []}}, "did you mean beats? there are max_ratio, "),
        ({"controls": {"a": {"partitoin": "x"}}}, "did you mean partition? there are experts, "),
        (
            {"controls": {"static": {"static": True}}, "finetune_controls": ["statc"], "finetune": {}},
            "did you mean static? ",
        ),
        ({"split": {"partition": "kmean"}}, "did you mean kmeans? there are contiguous, "),
        ({"split": {"mixing": "sofmax"}}, "did you mean softmax? `moeify split --help` says "),
        ({"finetune": {"stage": "layer"}}, "did you mean layers? `moeify finetune --help` says "),
        ({"split": {"budget": 60}}, "did you mean 0.6? --budget takes "),
        ({"model": None}, "every recipe has version, model and out"),
    ],
)
def test_what_was_mistyped_is_asked_back(write: Write, sections: dict[str, Any], question: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(write(**sections))
    assert caught.value.hint.startswith(question)


def test_one_item_is_a_list_of_one(write: Write) -> None:
    recipe = load_recipe(write(eval={"data": "a.txt"}, bench={"batch": 1}, controls={"c": {"calibration": "b.txt"}}))
    assert recipe.eval is not None
    assert recipe.bench is not None
    assert (recipe.eval.data, recipe.bench.batch) == (("a.txt",), (1,))
    assert control_options(recipe, "c", recipe.controls["c"]).calibration == ("b.txt",)


@pytest.mark.parametrize("content", ["", "- a\n- b", "a: [", "\x00", "just words"])
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(InputError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", ["no-such-recipe", "no-such-recipe.yaml", "/no/such.yaml"])
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match="no recipe at") as caught:
        load_recipe(find_recipe(name))
    assert "moeify ls recipes" in caught.value.hint
    with pytest.raises(InputError) as caught:
        load_recipe(find_recipe("quikstart"))
    assert caught.value.hint.startswith("did you mean quickstart? ")


def test_code_in_a_recipe_is_never_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (tmp_path / "recipe.yaml").write_text(f"model: !!python/object/apply:pathlib.Path.touch [{proof}]\n")
    with pytest.raises(InputError, match="not YAML"):
        load_recipe(tmp_path / "recipe.yaml")
    assert not proof.exists()


def test_overrides(write: Write) -> None:
    path = write(eval=None)
    overrides = ["split.experts=4", "split.calibration=[a.txt, self]", "eval.tokens=64", "verify=false", "out=there"]
    recipe = load_recipe(path, [*overrides, "controls.static.static=true", "split.dtype=bfloat16"])
    assert (recipe.split.experts, recipe.split.calibration) == (4, ("a.txt", "self"))
    assert recipe.split.tokens == 1024
    assert recipe.eval is not None
    assert (recipe.eval.tokens, recipe.verify, recipe.out) == (64, False, Path("there"))
    assert recipe.controls == {"static": {"static": True}}


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("split.experts", "split.experts"),
        ("split.expert=4", "'expert' is not a key of split"),
        ("split.experts=many", r"split\.experts.*'many'"),
        ("split.experts.more=4", r"split\.experts"),
        ("model.name=x", "model"),
        ("split.experts=[", r"split\.experts"),
        ("=4", "--set"),
        ("split..experts=4", "split"),
    ],
)
def test_an_override_that_does_not_fit(write: Write, override: str, pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern):
        load_recipe(write(), [override])


def test_an_override_in_a_section_that_stands_empty(write: Write) -> None:
    path = write()
    path.write_text(path.read_text() + "eval:\ncontrols:\n")
    recipe = load_recipe(path, ["eval.tokens=64", "controls.static.static=true"])
    assert recipe.eval is not None
    assert recipe.eval.tokens == 64


def test_controls_inherit_the_options_of_the_main_split(write: Write, splits: list[tuple[str, SplitOptions]]) -> None:
    main = {"experts": 4, "shared": 1, "active": 2, "seed": 3, "tokens": 1024, "partition": "contiguous", "context": 48}
    controls = {"static": {"static": True}, "plain": {"refit": False}, "other": {"experts": 8, "active": 4}}
    recipe = load_recipe(write(split=main, controls=controls, verify=False))
    run(recipe)
    assert [name for name, _ in splits] == ["moe", *controls]
    made = dict(splits)
    assert made["moe"] == SplitOptions(**main)
    inherited = {key: value for key, value in main.items() if key != "shared"}
    assert made["static"] == SplitOptions(**inherited, static=True)
    assert made["plain"] == SplitOptions(**inherited, refit=False)
    assert made["other"] == SplitOptions(**{**inherited, "experts": 8, "active": 4})


def test_what_is_written(write: Write, tmp_path: Path) -> None:
    result = run(load_recipe(write(controls={"static": {"static": True}}, eval={"tokens": 256})))
    out = tmp_path / "runs"
    assert (result.out, result.skipped, result.passed) == (out, (), True)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"moe", "static"}
    again = load_recipe(out / "recipe.yaml")
    assert isinstance(again, Recipe)
    assert again == load_recipe(tmp_path / "recipe.yaml")
    stored = json.loads((out / "run.json").read_text())
    assert [entry["model"] for entry in stored["evals"]] == [again.model, str(out / "moe"), str(out / "static")]
    assert all(entry["perplexity"] > 1 for entry in stored["evals"])
    assert [limit["name"] for limit in stored["limits"]] == ["verify"]


def test_a_run_says_which_stage_is_finished_or_was_there(write: Write, text: Path, tmp_path: Path) -> None:
    path = write(controls={"static": {"static": True}}, eval={"data": [str(text)], "tokens": 128}, verify=False)
    lines: list[str] = []
    labels: list[str] = []

    def track(items: Any, label: str, total: int) -> Any:
        labels.append(label)
        return items

    run(str(path), "split.tokens=1536", track=track, announce=lines.append)
    model = str(load_recipe(path).model)
    assert lines[0] == f"{model} to {tmp_path / 'runs'}, 3 stages: moe, static, eval"
    assert [re.sub(r"\d+ s$", "N s", line) for line in lines[1:]] == [
        "1 of 3, moe: finished in N s",
        "2 of 3, static: finished in N s",
        "3 of 3, eval: finished in N s",
    ]
    assert labels[0] == "1 of 3, moe: splitting layers"
    assert labels[-1].startswith("3 of 3, eval: evaluating ")
    again: list[str] = []
    run(path, ["split.tokens=1536"], announce=again.append)
    assert again[1:3] == ["1 of 3, moe: is there already, skipped", "2 of 3, static: is there already, skipped"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_an_interrupted_run_says_what_is_kept(
    write: Write, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise kind

    recipe = load_recipe(write(eval={}))
    monkeypatch.setattr(stages_module, "measure", interrupted)
    with pytest.raises(kind) as caught:
        run(recipe)
    assert caught.value.__notes__ == ["kept: 2 of 3 stages, up to verify"]


@pytest.mark.parametrize(
    ("sections", "pattern"),
    [({"finetune": {"stage": ["lora"]}}, "peft"), ({"bench": {"engine": ["llama.cpp"]}}, r"llama")],
    ids=["peft", "llama.cpp"],
)
def test_what_a_later_stage_needs_is_missed_before_the_first(
    write: Write, splits: list[Any], monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], pattern: str
) -> None:
    monkeypatch.setattr("moeify.training.finetune.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MoeifyError, match=pattern):
        run(load_recipe(write(**sections)))
    assert not splits


def test_finished_stages_are_skipped(write: Write, splits: list[tuple[str, SplitOptions]]) -> None:
    path = write(controls={"static": {"static": True}}, verify=False)
    assert run(load_recipe(path)).skipped == ()
    assert run(load_recipe(path)).skipped == ("moe", "static")
    assert [name for name, _ in splits] == ["moe", "static"]


@pytest.mark.parametrize("override", ["split.seed=1", "split.experts=4", "split.dtype=bfloat16", "split.refit=false"])
def test_another_option_runs_them_again(
    write: Write, splits: list[tuple[str, SplitOptions]], override: str, tmp_path: Path
) -> None:
    path = write(controls={"static": {"static": True}}, verify=False)
    run(load_recipe(path))
    before = (tmp_path / "runs" / "moe" / "moeify.json").read_text()
    assert run(load_recipe(path, [override])).skipped == ()
    assert [name for name, _ in splits] == ["moe", "static"] * 2
    assert (tmp_path / "runs" / "moe" / "moeify.json").read_text() != before


def test_another_option_of_one_control_runs_only_that_again(
    write: Write, splits: list[tuple[str, SplitOptions]]
) -> None:
    path = write(controls={"static": {"static": True}}, verify=False)
    run(load_recipe(path))
    assert run(load_recipe(path, ["controls.static.active=5"])).skipped == ("moe",)
    assert [name for name, _ in splits] == ["moe", "static", "static"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_another_text_of_the_same_name_runs_them_again(
    write: Write, splits: list[tuple[str, SplitOptions]], text: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    part = Path(text.rename(folder / "part.txt"))
    source = part if kind == "file" else folder
    path = write(split={"tokens": 1024, "calibration": [str(source)]}, verify=False)
    run(load_recipe(path))
    assert run(load_recipe(path)).skipped == ("moe",)
    # Of the same length.
    part.write_text(part.read_text().swapcase())
    assert run(load_recipe(path)).skipped == ()
    if kind == "folder":
        (folder / "more.txt").write_text("more to read")
        assert run(load_recipe(path)).skipped == ()
    assert run(load_recipe(path)).skipped == ("moe",)


def test_another_model_of_the_same_name_runs_them_again(
    make_dense: MakeDense, write: Write, splits: list[tuple[str, SplitOptions]], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    sizes = {"intermediate_size": 128, "max_position_embeddings": 64}
    shutil.copytree(make_dense("llama", **sizes), model)
    path = write(model=str(model), verify=False)
    run(load_recipe(path))
    shutil.rmtree(model)
    shutil.copytree(make_dense("llama", seed=1, **sizes), model)
    assert run(load_recipe(path)).skipped == ()
    assert len(splits) == 2


@pytest.mark.parametrize("missing", ["moe", "moe/moeify.json"])
def test_a_result_that_is_gone_is_made_again(
    write: Write, splits: list[tuple[str, SplitOptions]], tmp_path: Path, missing: str
) -> None:
    path = write(verify=False)
    run(load_recipe(path))
    shutil.rmtree(tmp_path / "runs" / "moe")
    assert run(load_recipe(path)).skipped == ()
    assert len(splits) == 2


def test_a_result_of_another_split_is_replaced_only_when_that_is_said(
    write: Write, splits: list[tuple[str, SplitOptions]], text: Path, tmp_path: Path
) -> None:
    """Someone has put another checkpoint into its place."""
    path = write(verify=False)
    run(load_recipe(path))
    out, model = tmp_path / "runs" / "moe", load_recipe(path).model
    command = ["split", model, "-o", str(out), "--experts", "4", "--tokens", "1024", "--calibration", str(text)]
    assert run_command([*command, "--overwrite", "--quiet"]) == 0
    with pytest.raises(InputError, match="was put into the place of what this run made"):
        run(load_recipe(path))
    assert run(load_recipe(path), overwrite=True).skipped == ()
    assert len(splits) == 2


def test_an_interrupted_run_goes_on(
    write: Write, splits: list[tuple[str, SplitOptions]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(controls={"static": {"static": True}}, verify=False)
    counted = stages_module.split
    with monkeypatch.context() as patch:

        def split(model: str, out: Path, options: SplitOptions, **arguments: Any) -> Any:
            if options.static:
                raise KeyboardInterrupt
            return counted(model, out, options, **arguments)

        patch.setattr(stages_module, "split", split)
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(path))
    assert run(load_recipe(path)).skipped == ("moe",)
    assert [name for name, _ in splits] == ["moe", "static"]


PERPLEXITY = {"model": 10.0, "moe": 12.0, "good": 13.0, "bad": 11.0}


@pytest.fixture
def _known_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(models: list[str], options: EvalOptions, **_: Any) -> Evaluation:
        rows = [
            EvalResult(model, source, PERPLEXITY.get(Path(model).name, 10.0) + place, 100, 1.0, "")
            for place, source in enumerate(options.data)
            for model in models
        ]
        return Evaluation(tuple(rows))

    monkeypatch.setattr(stages_module, "measure", measure)


@pytest.mark.usefixtures("_known_perplexity")
@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({"max_ratio": 1.2}, True),
        ({"max_ratio": 1.19}, False),
        ({"beats": ["good"]}, True),
        ({"beats": ["bad"]}, False),
        ({"beats": ["good", "bad"], "max_ratio": 9}, False),
        ({"max_logit_difference": 1e-3}, True),
        ({"max_logit_difference": 1e-30}, False),
        ({}, True),
    ],
)
def test_gates(
    write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path, limits: dict[str, Any], passed: bool
) -> None:
    controls = {"good": {"seed": 1}, "bad": {"seed": 2}}
    path = write(limits=limits, controls=controls, eval={"data": ["one", "two"]})
    code = run_command(["run", str(path), "--json"])
    said = capsys.readouterr()
    assert code == (0 if passed else 4), said.err
    found = json.loads(said.out)
    assert found["schema"] == "moeify.run/1"
    assert found["passed"] is passed
    assert json.loads((tmp_path / "runs" / "run.json").read_text())["limits"] == found["limits"]
    failed = [limit["name"] for limit in found["limits"] if not limit["passed"]]
    assert bool(failed) is not passed
    assert all(name in said.err for name in failed)
    if "max_ratio" in limits:
        # Every text is checked.
        assert sum("perplexity / dense" in limit["name"] for limit in found["limits"]) == 2


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml"])
def test_the_result_is_stored_also_if_a_gate_fails(write: Write, tmp_path: Path, name: str) -> None:
    path = write(limits={"max_logit_difference": 1e-30})
    assert run_command(["run", str(path), "--quiet"]) == 4
    assert (tmp_path / "runs" / name).is_file()


def test_set_and_out_on_the_command_line(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "else where = 5"
    command = ["run", str(write()), "--set", "split.experts=4", "--set", "verify=false", "-o", str(elsewhere), "--json"]
    assert run_command(command) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(elsewhere)
    assert json.loads((elsewhere / "moe" / "moeify.json").read_text())["job"]["options"]["experts"] == 4
    assert not (tmp_path / "runs").exists()


def test_errors_of_a_stage_keep_their_exit_code(write: Write) -> None:
    assert issubclass(UsageError, MoeifyError)
    assert run_command(["run", str(write(split={"experts": 7}))]) == 3
    assert run_command(["run", str(write(split={"partition": "nothing"}))]) == 2


def test_methods_are_compared_in_a_run(write: Write, text: Path, tmp_path: Path) -> None:
    section = {"budget": [0.5], "method": ["static"], "data": [str(text)], "data_tokens": 128}
    path = write(compare=section, verify=False)
    run(load_recipe(path))
    found = json.loads((tmp_path / "runs" / "compare.json").read_text())
    assert found["schema"] == "moeify.compare/1"
    assert {row["method"] for row in found["rows"]} == {"dense", "static", "static + refit"}
    assert found["calibration"]["num_tokens"] == 1024


def test_a_run_is_benchmarked_once(write: Write, text: Path, tmp_path: Path) -> None:
    section = {"data": [str(text)], "tokens": 128, "prompt": [8], "batch": [1], "seconds_per_row": 0.01}
    section["skip"] = ["memory", "experts"]
    controls = {"static": {"static": True}, "random": {"partition": "random"}}
    never = {"max_decode_time": 1e-9, "max_prefill_time": 1e9}
    path = write(bench=section, controls=controls, verify=False, limits=never)
    first, second = run(load_recipe(path)), run(load_recipe(path))
    assert "bench" not in first.skipped
    assert "bench" in second.skipped
    assert first.limits == second.limits
    assert [(limit.name, limit.passed) for limit in first.limits] == [
        ("prefill time / dense at 1 x 8", True),
        ("decode time / dense at 1 x 8", False),
    ]
    found = json.loads((tmp_path / "runs" / "bench.json").read_text())
    assert [model["name"] for model in found["models"]] == ["dense", "moe", "static"]
    assert "bench" not in run(load_recipe(path, ["bench.tokens=192"])).skipped


def test_limits_on_times_want_times(write: Write) -> None:
    for bench in (None, {"skip": ["speed"]}):
        with pytest.raises(UsageError, match="limits on times need a bench section"):
            load_recipe(write(bench=bench, limits={"max_decode_time": 1.0}))


def test_a_dry_run_settles_everything_and_writes_nothing(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(controls={"static": {"static": True}}, finetune={"tokens": 1024}, eval={}))
    assert run_command(["run", path, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "moeify.run-preview/1"
    assert set(found["splits"]) == {"moe", "static"}
    assert found["splits"]["moe"]["layout"]["num_experts"] == 8
    assert found["splits"]["moe"]["estimate"]["duration_s"] > 0
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["moe", "static", "moe-finetuned", "verify", "eval"]
    assert all(stage["duration_s"] > 0 and stage["peak_memory_bytes"] > 0 for stage in stages.values())
    assert [name for name, stage in stages.items() if stage["disk_bytes"]] == ["moe", "static", "moe-finetuned"]
    assert found["duration_s"] == pytest.approx(sum(stage["duration_s"] for stage in stages.values()))
    assert found["disk_bytes"] < found["free_bytes"]
    assert not (tmp_path / "runs").exists()
    assert run_command(["run", path, "--dry-run", "--set", "split.experts=7"]) == 3
    run(load_recipe(Path(path), ["finetune=null", "eval=null", "verify=false"]))
    capsys.readouterr()
    assert run_command(["run", path, "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert table.count("finished") == 2
    # Below the title, which has a path.
    assert max(map(len, table.split("next:")[0].splitlines()[1:])) <= 80


@pytest.mark.parametrize("section", ["eval", "bench", "compare"])
def test_tasks_that_cannot_be_asked_are_found_before_the_work(
    section: str, write: Write, splits: list[tuple[str, SplitOptions]], tmp_path: Path
) -> None:
    path = write(**{section: {"tasks": [str(tmp_path / "none.jsonl")]}})
    with pytest.raises(InputError, match="cannot read the questions"):
        run(load_recipe(path))
    assert splits == []


LARGE: dict[str, Callable[[], Any]] = {
    "llama-3-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "qwen3-8b": lambda: Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
    ),
}


@pytest.mark.parametrize(("name", "billions", "share"), [("llama-3-8b", 8.03, 0.75), ("qwen3-8b", 8.19, 0.5)])
def test_recipes_of_large_models_fit_them(
    name: str, billions: float, share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of their shape, whose weights take no place on the disk: a dry run reads headers alone."""
    config = LARGE[name]()
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        file.truncate(8 + len(words) + end)
    here = [word for section in ("split", "finetune") for word in ("--set", f"{section}.device=cpu")]
    command = ["run", name, "--dry-run", "--set", f"model={tmp_path}", "-o", str(tmp_path / "out"), *here, "--json"]
    assert run_command(command) == 0
    said = capsys.readouterr()
    whole = json.loads(said.out)
    found = whole["splits"]
    if not torch.cuda.is_available():
        assert "warning: there is no cuda here" in said.err
        assert {stage["name"] for stage in whole["stages"] if stage["duration_s"] is None} == {"eval", "bench"}
    assert found["moe"]["num_parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
    assert found["moe"]["layout"]["num_active"] / found["moe"]["layout"]["num_experts"] == share
    assert found["static"]["num_active_parameters"] == pytest.approx(found["moe"]["num_active_parameters"], rel=2e-3)
