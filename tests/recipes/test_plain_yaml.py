"""Recipes of any content: plain YAML is read, everything else is refused at once and by its place."""

import time
from pathlib import Path

import pytest

from moeify.cli.app import run_command
from moeify.errors import InputError, MoeifyError
from moeify.recipes.model import load_recipe
from moeify.recipes.plain_yaml import MAX_BYTES, MAX_DEPTH, load_yaml

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED: dict[str, tuple[bytes | str, str]] = {
    "bomb": (BOMB, "line 2: an alias"),
    "recursion": ("a: &a [*a]", "an alias"),
    "merge": ("<<: {a: 1}", "a key that is no word"),
    "tag": ("a: !!python/object/apply:os.system [true]", "the tag"),
    "tag without a value": ("a: !!bool maybe", "the tag"),
    "timestamp tag": ("a: !!timestamp x", "the tag"),
    "own tag": ("a: !x 1", "the tag !x"),
    "twice": ("a: 1\nb: 2\na: 3", "line 3: the key 'a' twice"),
    "twice inside": ("a: {b: 1, b: 2}", "the key 'b' twice"),
    "list for a key": ("? [a]\n: 1", "a key that is no word"),
    "deep": ("[" * 5000, f"more than {MAX_DEPTH} levels"),
    "deep blocks": ("- " * 3000, f"more than {MAX_DEPTH} levels"),
    "deep mappings": ("{a: " * 500 + "1" + "}" * 500, f"more than {MAX_DEPTH} levels"),
    "digits": ("a: " + "9" * 5000, "4300"),
    "no such day": ("a: 2001-99-99", "month"),
    "two documents": ("a: 1\n---\nb: 2", "line 2"),
    "not UTF-8": (b"a: \xff", "utf-8"),
    "UTF-16": ("a: 1".encode("utf-16"), "utf-8"),
    "NUL": (b"a: \0", "not YAML"),
    "escape": ("a: \x1b[2J", "not YAML"),
    "large": (b" " * (MAX_BYTES + 1), "1,000,001 bytes"),
    "tab": ("\t", "not YAML"),
}


@pytest.mark.parametrize(("text", "pattern"), REFUSED.values(), ids=REFUSED)
def test_refused_at_once(text: bytes | str, pattern: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=pattern):
        load_yaml(text if isinstance(text, bytes) else text.encode(), "r.yaml")
    assert time.monotonic() - began < 2


def test_plain_values_are_what_yaml_says() -> None:
    text = "\ufeffa: {b: [1, 2.5, x, null, true], c: 'a: b'}\nd: |\n  e\n"
    assert load_yaml(text.encode(), "r") == {"a": {"b": [1, 2.5, "x", None, True], "c": "a: b"}, "d": "e\n"}
    assert load_yaml(("[" * MAX_DEPTH + "]" * MAX_DEPTH).encode(), "r")


# Lines in the place of those of a good recipe, by their keys.
MUTATIONS = [
    *(
        'out: ""',
        "out: /",
        "out: null",
        "out: 5",
        "out: [a]",
        'out: "a\\0b"',
        "out: {}",
        "out: .nan",
        "out: 2001-01-01",
    ),
    *('model: ""', "model: null", "model: 5", 'model: "a\\0b"', "model: [a]"),
    *("version: 2", "version: '1'", "version: null", "version: .nan", f"version: {'9' * 30}"),
    *("split: {experts: .nan}", "split: {experts: .inf}", "split: {experts: 8.5}", f"split: {{experts: {'9' * 400}}}"),
    *("split: {tokens: 1.0e+30}", "split: {budget: .nan}", "split: {budget: .inf}", "split: {temperature: -.inf}"),
    *("split: {calibration: ['']}", 'split: {calibration: ["a\\0b"]}', "split: {plan: ''}"),
    *("split: {calibration: [[a]]}", "split: {device: ''}", "split: {device: meta}", "split: {seed: -1}", "split: 5"),
    *("split: {dense_layers: [a]}", f"split: {{dense_layers: [{'9' * 30}]}}", "split: {target: ' '}", "split: {0: 1}"),
    *("controls: {a: {}, A: {}}", "controls: {1: {}}", "controls: {null: {}}", "controls: {a: null}", "controls: [a]"),
    *("controls: {a: {static: 7}}", "controls: {a: {temperature: .nan}}", "controls: {a: {b: {c: {}}}}"),
    *("limits: {max_ratio: .nan}", "limits: {max_ratio: .inf}", "limits: {beats: [..]}", "limits: 5"),
    *("eval: {tokens: 99999999999}", "eval: {data: []}", "eval: {stride: 0}", "verify: 2", "finetune: {kl: .nan}"),
    *("finetune: {learning_rate: .inf}", "bench: {seconds_per_row: .inf}", "compare: {budget: [.nan]}"),
]


@pytest.mark.parametrize("line", MUTATIONS, ids=[line[:40] for line in MUTATIONS])
def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path, line: str) -> None:
    key = line.split(":", maxsplit=1)[0]
    lines = {"version": "version: 1", "model": "model: m", "out": f"out: {tmp_path / 'runs'}"}
    (tmp_path / "r.yaml").write_text("\n".join({**lines, key: line}.values()))
    with pytest.raises(MoeifyError, match=rf"(r\.yaml: |^){key}[:. ]") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert caught.value.exit_code in (2, 3)
    assert len(str(caught.value)) < 700


OVERRIDES = ["split.x=&a [*a]", "out=", "out=/", "split.experts=.nan", f"split.experts={'9' * 5000}", "limits=!!bool x"]


@pytest.mark.parametrize("override", [*OVERRIDES, "split=[" * 2, "controls={'..': {}}", "model=\udc80", "a\nb=1", "="])
def test_the_same_of_an_override(tmp_path: Path, override: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\nmodel: m\nout: runs\n")
    assert run_command(["run", str(tmp_path / "r.yaml"), "--set", override]) in (2, 3)
    assert "bug" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["x" * 300 + ".yaml", "x" * 5000, ".", "/", "/dev/null"])
def test_a_name_that_is_no_file(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", name]) == 3
    assert "bug" not in capfd.readouterr().err
