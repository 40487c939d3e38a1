"""Options are written once: what a command has follows from its dataclasses, and a run's command gives it again."""

import dataclasses
import inspect
import random
import shlex
import subprocess
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from moeify.benchmark.layers.__main__ import parsed
from moeify.benchmark.options import BenchOptions, LayerBenchOptions
from moeify.cli.app import COMMANDS
from moeify.cli.options import Only, Output, expanded
from moeify.command_line import (
    Options,
    as_item,
    choices,
    command_line,
    fields,
    item_type,
    items,
    parse,
    quoted,
    value_name,
)
from moeify.errors import UsageError
from moeify.options import CompareOptions, EvalOptions, SplitOptions
from moeify.plugins import names_in
from moeify.training.options import FinetuneOptions

WORDS = ["plain", "two words", "quote's", 'double "quotes"', "$HOME", "a,b;c", "-x", "--json", "ä", "back\\slash", "#"]


def options_of(command: Callable[..., None]) -> dict[str, tuple[type[Options], list[str]]]:
    """Parameter -> the class of its options and the names of those that the command has."""
    found = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        kind, *further = get_args(hint) or (hint,)
        if isinstance(kind, type) and issubclass(kind, Options):
            names = [one for only in further if isinstance(only, Only) for one in only.names]
            found[name] = kind, names or [field.name for field in fields(kind)]
    return found


WITH_OPTIONS = [name for name, command in COMMANDS.items() if set(options_of(command)) > {"output"}]


def number_in(field: dataclasses.Field[Any], draw: random.Random) -> Any:
    low = field.metadata["least"] or field.metadata["above"] or 0
    if item_type(field) is int:
        return draw.randint(low, min(low + 1000, int(min(field.metadata["below"], 1e9)) - 1))
    return draw.uniform(low, min(field.metadata["below"], low + 9)) * draw.choice([1, 1e-6]) or 0.5


def value_of(field: dataclasses.Field[Any], draw: random.Random) -> Any:
    """A value that the type allows."""
    kind = item_type(field)
    if kind is bool:
        return draw.choice([True, False])

    def item() -> Any:
        if kind is str:
            folder = field.metadata["plugin"]
            return draw.choice(names_in(folder) if folder else WORDS)
        return draw.choice(choices(field)) if choices(field) else number_in(field, draw)

    if isinstance(field.default, tuple):
        return tuple(item() for _ in range(draw.randint(1 if field.default else 0, 3)))
    return item()


def some(kind: type[Options], names: list[str], draw: random.Random) -> Options:
    """Random options of a class, of which some keep their defaults."""
    while True:
        chosen = [field for field in fields(kind) if field.name in names and draw.random() < 0.7]
        try:
            return kind(**{field.name: value_of(field, draw) for field in chosen})
        except UsageError:
            # These contradict each other.
            continue


def run(name: str, line: str) -> dict[str, Any]:
    """What the command gets of the options on a command line."""
    command, seen = COMMANDS[name], []

    @wraps(command)
    def see(**values: Any) -> None:
        seen.append(values)

    app = typer.Typer()
    app.command(name)(expanded(see))
    app.command("other")(lambda: None)
    program, *arguments = shlex.split(line)
    assert program == "moeify"
    app(arguments, standalone_mode=False)
    (values,) = seen
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_a_rendered_command_gives_the_same_options(name: str, seed: int) -> None:
    draw = random.Random(f"{name} {seed}")
    command = COMMANDS[name]
    taken = {key: some(*kind, draw) for key, kind in options_of(command).items() if kind[0] is not Output}
    named: dict[str, dict[str, Any]] = {
        "bench": {"against": ["a b", "c"]},
        "finetune": {"teacher": "t's"},
        "verify": {"dense": "d"},
        "export": {"gguf": Path("a b.gguf")},
    }
    further = named.get(name, {})
    arguments = [key for key in inspect.signature(command).parameters if key in ("model", "models", "moe")]
    line = command_line(name, *("some model" for _ in arguments), *taken.values(), **further)
    values = run(name, line)
    assert {key: values[key] for key in taken} == taken
    assert {key: values[key] for key in further} == further
    assert values["output"] == Output()
    # What begins with a dash is no value for argparse.
    words = shlex.split(line)[2:]
    if name == "bench-layer" and not any(value.startswith("-") for value in words[1::2]):
        assert parsed(words) == (taken["options"], None, False)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_defaults_are_left_out_and_are_the_command_s_own(name: str) -> None:
    defaults = {key: kind() for key, (kind, _) in options_of(COMMANDS[name]).items()}
    assert command_line(name, *defaults.values()) == f"moeify {name}"


def test_further_options_are_rendered_by_their_kind() -> None:
    line = command_line("bench", "a b", BenchOptions(), against=["c", "d"], out="o", overwrite=True, baseline=None)
    assert line == "moeify bench 'a b' --against c --against d -o o --overwrite"
    assert command_line("split", "m", SplitOptions(refit=False, dense_layers=(0, 2))) == (
        "moeify split m --dense-layers 0,2 --no-refit"
    )


UNPRINTABLE = [
    "a\nb",
    "\x1b]0;x\x07",
    "'\t'",
    "\\\r",
    "\u202e",
    "\x9b",
    "\u2028",
    "\udc80\udcff",
    "ä\n",
    "\n1",
    "$(x)\n`y`",
]


@pytest.mark.parametrize("word", [*WORDS, *UNPRINTABLE], ids=ascii)
def test_a_shell_reads_the_words_back_from_one_line(word: str) -> None:
    line = quoted(["printf", "%s\\0", word, word + word])
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode(errors="surrogateescape").split("\0")[:-1] == [word, word + word]


def test_a_path_that_begins_like_an_option_stays_a_path() -> None:
    assert command_line("split", "-x", SplitOptions()) == "moeify split ./-x"


LISTS = {"--batch 1,8 --batch 2": (1, 8, 2), "--batch 1 --batch 8": (1, 8), "--batch ' 1, 8,'": (1, 8)}


@pytest.mark.parametrize(("words", "batch"), LISTS.items(), ids=LISTS)
def test_a_list_is_repeated_or_has_commas(words: str, batch: tuple[int, ...]) -> None:
    assert run("bench", f"moeify bench m --against d {words}")["options"] == BenchOptions(batch=batch)


def test_a_text_with_a_comma_stands_in_double_quotes() -> None:
    values = run("eval", "moeify eval m --data 'a,\"b,c\"' --data ' d e , f'")
    assert values["options"] == EvalOptions(data=("a", "b,c", "d e", "f"))


@pytest.mark.parametrize("item", [*WORDS, 'a"', '"a"', '"a",b', '""', " a", "a\n,b"], ids=ascii)
def test_an_item_is_read_back(item: str) -> None:
    assert items([as_item(item)]) == [item]
    assert items([",".join([as_item(item), "x", as_item(item)])]) == [item, "x", item]


def test_every_list_says_that_it_is_one() -> None:
    for command in COMMANDS.values():
        for kind, _ in options_of(command).values():
            for field in fields(kind):
                assert value_name(field).endswith(",...") == isinstance(field.default, tuple), field.name


REFUSED: list[tuple[type[Options], Mapping[str, Any], str, str]] = [
    (SplitOptions, {"temperature": 0.0}, "--temperature 0.0 is out of range", "--temperature takes more than 0"),
    (SplitOptions, {"temperature": float("nan")}, "--temperature nan is out of range", "more than 0"),
    (SplitOptions, {"seed": 1 << 31}, "--seed 2147483648 is out of range", "--seed takes 0 to 2,147,483,647"),
    (
        SplitOptions,
        {"dtype": "int8"},
        "'int8' is not a value of --dtype",
        "--dtype takes auto, float32, bfloat16, float16",
    ),
    (FinetuneOptions, {"warmup": 1.0}, "--warmup 1.0 is out of range", "--warmup takes 0 or more and less than 1"),
    (FinetuneOptions, {"kl": float("inf")}, "--kl inf is out of range", "--kl takes 0 or more"),
    (SplitOptions, {"budget": float("nan")}, "--budget nan is out of range", "more than 0 and less than 1"),
    (SplitOptions, {"budget": 60.0}, "--budget 60.0 is out of range", "did you mean 0.6? --budget takes more than 0"),
    (CompareOptions, {"budget": (0.5, 75.0)}, "--budget 75.0 is out of range", "did you mean 0.75?"),
    (SplitOptions, {"budget": 101.0}, "--budget 101.0 is out of range", "--budget takes more than 0"),
    (SplitOptions, {"partition": "kmean"}, "'kmean' is not a partition", "did you mean kmeans? there are contiguous"),
    (SplitOptions, {"router": "MLP"}, "'MLP' is not a router", "did you mean mlp?"),
    (SplitOptions, {"target": "qwen2moe"}, "'qwen2moe' is not a target", "did you mean qwen2_moe?"),
    (SplitOptions, {"mixing": "sofmax"}, "'sofmax' is not a value of --mixing", "did you mean softmax?"),
    (SplitOptions, {"experts": 1}, "--experts 1 is out of range", "--experts takes 2 or more"),
    (SplitOptions, {"experts": 1 << 31}, "--experts 2147483648 is out of range", "takes less than 2,147,483,648"),
    (SplitOptions, {"tokens": 10**5000}, "--tokens of 16,610 bits is out of range", "takes less than 2,147,483,648"),
    (SplitOptions, {"plan": " "}, "--plan ' ': expected a text that is not empty", "leave --plan out"),
    (
        SplitOptions,
        {"calibration": ("a", "b\0")},
        "--calibration 'b\\x00': expected a text without NUL",
        "leave --calib",
    ),
    (SplitOptions, {"device": "meta"}, "'meta' is not a value of --device", "cpu, cuda, cuda:1"),
    (FinetuneOptions, {"stage": ()}, "--stage is empty", "--stage takes one value or more"),
    (
        FinetuneOptions,
        {"stage": ("all",)},
        "'all' is not a value of --stage",
        "--stage takes layers, router, lora, full",
    ),
    (BenchOptions, {"batch": (1, 0)}, "--batch 0 is out of range", "--batch takes 1 or more"),
]


@pytest.mark.parametrize(("kind", "values", "message", "hint"), REFUSED, ids=[message for *_, message, _ in REFUSED])
def test_a_value_out_of_range_is_refused(kind: type[Options], values: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        kind(**values)
    assert str(caught.value).startswith(message)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("tokens", ["1", "many"], "--tokens 1 many: expected whole numbers"),
        ("limit_seconds", ["soon"], "--limit-seconds soon: expected a number"),
    ],
)
def test_a_word_that_is_no_number_is_refused(name: str, words: list[str], message: str) -> None:
    (field,) = (field for field in fields(LayerBenchOptions) if field.name == name)
    with pytest.raises(UsageError, match=message) as caught:
        parse(field, words)
    assert caught.value.hint.startswith("write --")


def test_options_of_a_json_object() -> None:
    values = {"experts": 4, "dense_layers": [0, 2], "unknown": 1}
    assert SplitOptions.of(values) == SplitOptions(experts=4, dense_layers=(0, 2))
