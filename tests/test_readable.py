"""Results at the prompt: under twenty lines, nothing cut out of a number; in a notebook: every row, escaped."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import MakeDense

import moeify
from moeify.layout import Layout
from moeify.options import SplitOptions
from moeify.readable import Readable, Rows, in_words
from moeify.results import KINDS, find_kind

WIDE, LINES = 80, 20


@dataclass(frozen=True)
class Part:
    name: str
    num_tokens: int
    peak_bytes: int | None
    share: float
    note: str = ""


@dataclass(frozen=True, repr=False)
class Whole(Readable):
    model: Path
    options: SplitOptions
    parts: tuple[Part, ...]
    others: tuple[Part, ...] = ()


def test_every_result_is_readable() -> None:
    kinds = [*map(find_kind, KINDS), moeify.SplitPlan, moeify.EvalResult]
    for kind in kinds:
        assert issubclass(kind, Readable)
        assert kind.__repr__ is Readable.__repr__, f"{kind} needs repr=False"


def test_results_of_a_real_split(make_dense: MakeDense, calibration_file: Path, tmp_path: Path) -> None:
    dense = make_dense("llama", intermediate_size=64, num_hidden_layers=12, max_position_embeddings=64)
    made = moeify.split(dense, tmp_path / "moe", experts=4, tokens=1536, calibration=calibration_file)
    checked = moeify.verify(tmp_path / "moe", dense)
    measured = moeify.evaluate([dense, tmp_path / "moe"], calibration_file, tokens=128)
    seen = [made, made.plan, made.plan.layers[0], checked, measured, moeify.inspect(dense), moeify.preview(dense)]
    for result in seen:
        text = repr(result)
        assert len(text.splitlines()) < LINES, text
        # A path is one word, however long.
        assert all(len(line) <= WIDE or str(tmp_path.parent) in line for line in text.splitlines()), text
        assert "tensor(" not in text
    assert "num_experts 4" in repr(made)
    assert "passed" in repr(checked)
    assert "layers: 12" in repr(made.plan)
    assert re.search(r"without \d+ more rows and 1 more column", repr(made.plan))
    assert made.plan._repr_html_().count("<tr>") > 12
    assert measured._repr_html_().count("<tr>") == 1 + 2
    assert repr(measured[0]).startswith("EvalResult\n")


def test_rows_and_columns_that_do_not_fit_are_counted() -> None:
    parts = tuple(Part("x" * 30, 123_456, 7_000_000, 0.12345, "y" * 60) for _ in range(40))
    whole = Whole(Path("/a/model"), SplitOptions(experts=8), parts, parts)
    lines = repr(whole).splitlines()
    assert len(lines) < LINES
    assert lines[:3] == ["Whole", "  model    /a/model", "  options  experts 8"]
    assert lines[3] == "  parts: 40"
    assert lines[5].split() == ["x" * 30, "123,456", "7.00", "MB", "0.123"]
    assert lines[-2].strip() == "without 28 more rows and 1 more column"
    assert lines[-1] == "  others: 40"
    assert whole._repr_html_().count("<tr>") == 2 + 2 * 41


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a\x1b]0;b\x07", "two\nlines"])
def test_names_are_names(name: str) -> None:
    rows = Rows([Part(name, 1, None, 0.5)])
    assert "<script" not in rows._repr_html_()
    for text in (repr(rows), rows._repr_html_(), repr(Whole(Path(name), SplitOptions(), tuple(rows)))):
        assert "\x1b" not in text
        assert "two\nlines" not in text


def test_rows_are_a_list() -> None:
    part = Part("a", 1, None, 0.5)
    assert Rows([part]) == [part]
    assert repr(Rows()) == "[]"
    assert "peak_bytes" not in repr(Rows([part]))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", 1_234_567, "1,234,567"),
        ("x_bytes", 1_234_567, "1.23 MB"),
        ("x", 0.000123456, "0.000123"),
        ("x", True, "yes"),
        ("x", None, "-"),
        ("x", torch.zeros(2, 3, dtype=torch.int16), "int16 of 2 x 3"),
        ("x", Layout(8, 2, 4), "num_experts 8, num_shared 2, num_active 4"),
        ("x", {"a": 1, "b": None}, "a 1"),
        ("x", ("a", "b"), "a, b"),
        ("x", SplitOptions(), "defaults"),
        ("x", tuple(range(10_000, 10_100)), ", ".join(f"{n:,}" for n in range(10_000, 10_017)) + " and 83 more"),
    ],
    ids=str,
)
def test_values_in_words(name: str, value: object, words: str) -> None:
    assert in_words(name, value) == words
