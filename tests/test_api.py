"""`import moeify` as a user types it: names, examples, options by name, and what stands where a list is expected."""

import ast
import inspect
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDense

import moeify
from moeify.benchmark.options import BenchOptions
from moeify.command_line import Options, fields
from moeify.errors import UsageError
from moeify.options import EvalOptions, MachineOptions, SplitOptions, untracked

FUNCTIONS = [name for name in moeify.__all__ if inspect.isfunction(getattr(moeify, name))]
KEYWORDS: dict[str, Any] = {"experts": 4, "tokens": 1536, "track": untracked}


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=64, num_hidden_layers=2, max_position_embeddings=64)


@pytest.fixture(scope="module")
def moe(dense: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("api") / "moe"
    moeify.split(dense, out, calibration=calibration_file, **KEYWORDS)
    return out


def test_dir_lists_the_api_and_nothing_else() -> None:
    assert {name for name in dir(moeify) if not name.startswith("__")} | {"__version__"} == set(moeify.__all__)
    assert {"run", "inspect", "preview", "preview_run", "split", "plan_for_machine"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "untracked"])
def test_every_function_has_an_example_that_fits_its_signature(name: str) -> None:
    text = inspect.getdoc(getattr(moeify, name)) or ""
    assert "\nExample:\n" in text
    code = ast.parse(textwrap.dedent(text.split("\nExample:\n")[1]))
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call)]
    ours = [call for call in calls if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "moeify"]
    assert name in {ast.unparse(call.func).removeprefix("moeify.") for call in ours}
    for call in ours:
        function: Callable[..., Any] = getattr(moeify, ast.unparse(call.func).removeprefix("moeify."))
        signature = inspect.signature(function)
        values = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        bound = signature.bind(*call.args, **values)
        further = bound.arguments.get("choices", {})
        kind = options_of(function) if further else None
        # Made as a user makes them: names and values are checked.
        assert kind is None or kind(**{key: ast.literal_eval(value) for key, value in further.items()})


def options_of(function: Callable[..., Any]) -> type[Options]:
    (kind,) = (one for one in typing.get_args(typing.get_type_hints(function)["options"]) if one is not type(None))
    return kind  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "function",
    [getattr(moeify, name) for name in FUNCTIONS if "options" in inspect.signature(getattr(moeify, name)).parameters],
    ids=lambda function: function.__name__,
)
def test_a_function_with_options_takes_them_by_name(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert parameters["choices"].kind is inspect.Parameter.VAR_KEYWORD
    assert "choices: single options by name" in (function.__doc__ or "") or "choices: as of" in (function.__doc__ or "")
    needed = [one for one in parameters.values() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    with pytest.raises(UsageError, match="'seeed' is not an option of"):
        function(*("./nothing" for _ in needed), seeed=1)


def test_options_by_name_replace_those_of_the_object() -> None:
    options = SplitOptions(experts=8, active=6)
    assert SplitOptions.chosen(options, {"active": 4}) == SplitOptions(experts=8, active=4)
    assert SplitOptions.chosen(None, {}) == SplitOptions()
    with pytest.raises(UsageError, match="'expert' is not an option of SplitOptions") as caught:
        SplitOptions.chosen(None, {"expert": 8})
    assert caught.value.hint.startswith("did you mean experts? there are experts, ")
    with pytest.raises(UsageError, match="--static") as caught:
        SplitOptions.chosen(options, {"static": True, "shared": 2})


def test_a_split_with_names_writes_what_one_with_an_object_does(
    dense: Path, moe: Path, calibration_file: Path, tmp_path: Path
) -> None:
    options = SplitOptions(experts=4, tokens=1536, calibration=(str(calibration_file),))
    moeify.split(str(dense), str(tmp_path / "moe"), options)
    (weights,) = moe.glob("model*.safetensors")
    assert (tmp_path / "moe" / weights.name).read_bytes() == weights.read_bytes()


def test_single_items_and_paths_stand_for_lists(dense: Path, moe: Path, calibration_file: Path) -> None:
    (alone,) = moeify.evaluate(moe, calibration_file, tokens=128)
    listed = moeify.evaluate([str(dense), moe], [str(calibration_file)], tokens=128, dtype="float32")
    assert [result.model for result in listed] == [str(dense), str(moe)]
    assert alone.perplexity == listed[1].perplexity
    assert moeify.load_plan(str(moe)).layout.num_experts == 4
    assert moeify.generate(dense, "The", tokens=2).generations[0].model == str(dense)
    assert moeify.load(moe).config.model_type == "granitemoeshared"


def test_a_bench_takes_single_models(dense: Path, moe: Path, calibration_file: Path, tmp_path: Path) -> None:
    skip = ["memory", "speed", "experts"]
    result = moeify.bench(moe, dense, data=calibration_file, tokens=256, skip=skip, out=str(tmp_path / "bench"))
    assert [model.path for model in result.models] == [str(dense), str(moe)]
    assert moeify.load_bench(str(tmp_path / "bench")).quality == result.quality


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"calibration": "a.txt"}, {"calibration": ("a.txt",)}),
        ({"calibration": [Path("a.txt"), "b.txt"]}, {"calibration": ("a.txt", "b.txt")}),
        ({"plan": Path("a")}, {"plan": "a"}),
        ({"dense_layers": 3}, {"dense_layers": (3,)}),
        ({"dense_layers": range(2)}, {"dense_layers": (0, 1)}),
        ({"dense_layers": np.array([0, 1])}, {"dense_layers": (0, 1)}),
        ({"experts": np.int64(8)}, {"experts": 8}),
        ({"budget": np.float32(0.5)}, {"budget": 0.5}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"dtype": torch.float32}, {"dtype": "float32"}),
        ({"device": torch.device("cuda:1")}, {"device": "cuda:1"}),
    ],
    ids=str,
)
def test_options_take_the_values_that_python_has(given: dict[str, Any], plain: dict[str, Any]) -> None:
    options = SplitOptions(**given)
    assert options == SplitOptions(**plain)
    for name, value in plain.items():
        assert type(getattr(options, name)) is type(value)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (SplitOptions, {"experts": "8"}, "--experts is '8', expected a whole number"),
        (SplitOptions, {"experts": 8.0}, "--experts is 8.0, expected a whole number"),
        (SplitOptions, {"experts": True}, "--experts is True, expected a whole number"),
        (SplitOptions, {"tokens": None}, "--tokens is None, expected a whole number"),
        (SplitOptions, {"refit": "no"}, "--refit is 'no', expected True or False"),
        (SplitOptions, {"static": 1}, "--static is 1, expected True or False"),
        (SplitOptions, {"partition": 3}, "--partition is 3, expected a text"),
        (SplitOptions, {"budget": "half"}, "--budget is 'half', expected a number"),
        (SplitOptions, {"calibration": [1]}, "--calibration is 1, expected a text"),
        (SplitOptions, {"dtype": "float8"}, "float8"),
        (MachineOptions, {"vram": 6}, "--vram is 6, expected a text"),
        (EvalOptions, {"data": None}, "--data is None, expected a text"),
        (BenchOptions, {"batch": ["1"]}, "--batch is '1', expected a whole number"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_when_options_are_made(
    kind: type[Options], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        kind(**given)
    assert message in str(caught.value)


def test_every_option_takes_its_own_default() -> None:
    for kind in (
        SplitOptions,
        MachineOptions,
        EvalOptions,
        BenchOptions,
        moeify.FinetuneOptions,
        moeify.GenerateOptions,
    ):
        for field in fields(kind):
            assert getattr(kind(**{field.name: field.default}), field.name) == field.default
