"""Tables fit: at any width every number is whole, every column is there, and every row says which it is."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table

from moeify.benchmark.grid import Grid
from moeify.check.compare import Comparison, Row
from moeify.check.perplexity import EvalResult
from moeify.cli.render import PlainConsole, Renderer
from moeify.cli.tables.bench import _grid_tables
from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.compare import compare_tables
from moeify.cli.tables.eval import eval_table
from moeify.cli.tables.split import LAYER_COLUMNS, layers_table
from moeify.cli.tables.words import active_rows, key_value_table, layout_words
from moeify.layout import Layout
from moeify.options import SplitOptions
from moeify.plan import LayerPlan, SplitPlan
from moeify.words import DEFINITIONS

WIDTHS = (24, 40, 60, 80, 120, 250)
Shown = Callable[..., str]

names = st.text(st.sampled_from("abc [/]:é日"), min_size=1, max_size=30)
numbers = st.integers(0, 10**7).map(lambda value: f"{value / 1000:,.3f}")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """shown(table, width): the command's output, without a terminal."""
    return lambda table, width: printed(table, width, monkeypatch)


def printed(table: Table, width: int, patch: pytest.MonkeyPatch) -> str:
    renderer, console = Renderer(), PlainConsole()
    console.file, console.width = io.StringIO(), width
    patch.setattr(renderer, "_out", console)
    renderer.result(None, table)
    return console.file.getvalue()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(names, names, st.lists(numbers, min_size=6, max_size=6)), min_size=1, max_size=3),
    width=st.integers(20, 140),
)
def test_numbers_are_whole_at_any_width(rows: list[tuple[str, str, list[str]]], width: int) -> None:
    columns = [f"figure {letter}" for letter in "uvwxyz"]
    table = DataTable("title", ("name", "on", *columns), words=("name", "on"), num_keys=2)
    for name, on, values in rows:
        table.add_row(name, on, *values)
    with pytest.MonkeyPatch.context() as patch:
        text = printed(table, width, patch)
    assert "\u2026" not in text
    words = text.split()
    for _, _, values in rows:
        assert all(words.count(value) >= values.count(value) for value in values)
    assert {letter for letter in "uvwxyz" if letter in words} == set("uvwxyz")


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal(width: int, shown: Shown) -> None:
    table = DataTable("a title", ("model", "text", "perplexity", "ratio", "tokens"), words=("model", "text"))
    table.add_row("a/path/to/a/model/that/is/long", "builtin-heldout and more words", "1,234.567", "1.000", "8,160")
    lines = shown(table, width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(value in "\n".join(lines) for value in ("1,234.567", "1.000", "8,160"))


def test_a_band_repeats_the_columns_that_name_a_row(shown: Shown) -> None:
    table = DataTable("t", ("model", "on", *(f"figure{n}" for n in range(8))), words=("model", "on"), num_keys=2)
    table.add_row("my-moe", "eager", *(f"{n}.12345" for n in range(8)))
    rows = [line for line in shown(table, 60).splitlines() if "my-moe" in line]
    assert len(rows) == 2
    assert all(row.split()[:2] == ["my-moe", "eager"] for row in rows)
    # Neither is left with a single column.
    assert [len(row.split()) for row in rows] == [6, 6]


def test_names_with_markup_are_plain_text_in_every_form(shown: Shown) -> None:
    name = "[bold]a[/b][red]"
    table = DataTable(name, (name, "value"), words=(name,), notes=name)
    table.add_row(name, "1.0")
    for width in WIDTHS:
        assert shown(table, width).count(name) == 4
        assert name in shown(key_value_table("facts", [("what", name)]), width)


def test_the_layers_of_a_split_at_80_columns(shown: Shown) -> None:
    values = {name: 0.9 + 0.001 * place for place, name in enumerate(LAYER_COLUMNS)}
    labels_F = torch.zeros(16, dtype=torch.int16)
    layers = tuple(LayerPlan(n, labels_F, None, diagnostics=values) for n in range(30))
    plan = SplitPlan(Layout(8, 1, 4), layers, "", "", "", SplitOptions(), {}, "", 1.0)
    text = shown(layers_table(plan), 80)
    assert all(text.count(f"{value:.3f}") == 30 for value in values.values())
    assert max(map(len, text.splitlines())) <= 80
    # What the header says is explained below.
    assert all(f"\n{word}: {DEFINITIONS[word][:20]}" in text for word in ("oracle", "static", "gain reached"))


def comparison(num_texts: int) -> Comparison:
    texts = {f"text{n}.txt": 8970.0 for n in range(num_texts)}
    methods = ("dense", "energy clusters + refit", "static + refit, layers of moeify, 128 experts")
    rows = tuple(Row(name, 0.5, 8966.7, 8123.4, 9234.5, 96.253, 79.983, 116.567, -2.42, texts, {}) for name in methods)
    evaluation = {"tokens": dict.fromkeys(texts, 8192), "context": 256}
    return Comparison("model", rows, {}, evaluation)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_keeps_all_its_columns(width: int, shown: Shown) -> None:
    (table,) = compare_tables(comparison(1))
    text = shown(table, width)
    assert all(text.count(value) == 3 for value in ("8,966.70", "96.253", "79.983 116.6", "-242%")), text
    assert len(compare_tables(comparison(2))) == 2


def test_a_table_of_a_benchmark_is_cut_by_its_own_keys(shown: Shown) -> None:
    columns = ("model", "on", *(f"number{n}" for n in range(9)))
    grid = Grid("prefill", columns, (("m", "eager", *["1.5"] * 9),), ("model", "on"), num_keys=2)
    (table,) = _grid_tables([grid])
    assert shown(table, 50).count("eager") == 3


def test_the_share_that_a_budget_bounds_is_not_that_of_all_parameters() -> None:
    rows = dict(active_rows(Layout(8, 1, 3, (0,)), (4, 0), 750_720, 1_250_432, 0.6))
    assert rows["active of the FFNs"] == "53 % of their parameters; --budget 0.6 allows 60 %"
    assert rows["active of all"] == "750,720 of 1,250,432 parameters, 60 %"
    # Layers that were dropped belong to what the share is of.
    assert dict(active_rows(Layout(8, 1, 4), (3, 1), 7, 9))["active of the FFNs"] == "38 % of their parameters"
    assert dict(active_rows(Layout(8, 4, 4), (4, 0), 7, 7)) == {
        "kept of the FFNs": "50 % of their parameters",
        "parameters": "7",
    }
    assert layout_words(Layout(8, 1, 3, (0,))).endswith("= 38 % active; dense layers: 0")
    assert layout_words(Layout(2, 2, 2), (1, 2)) == (
        "without layers 1-2, their attention, keys and values; every FFN whole"
    )


def test_a_perplexity_says_how_the_text_was_cut() -> None:
    result = EvalResult("m", "t", 20.0, 8160, 1.0, "", 256, 256)
    assert "here blocks of 256 tokens" in str(eval_table([result]).caption)
    assert "here windows of 256 tokens, 128 apart" in str(eval_table([replace(result, stride=128)]).caption)
    # Results of earlier versions did not say.
    assert "here" not in str(eval_table([replace(result, context=None, stride=None)]).caption)


def test_words_are_defined_once_and_in_order() -> None:
    assert list(DEFINITIONS) == sorted(DEFINITIONS, key=str.lower)
    assert {"expert", "shared", "routed", "refit", "oracle", "gap closed"} <= set(DEFINITIONS)
    package = "".join(path.read_text() for path in Path(__file__).parents[2].glob("moeify/cli/tables/*.py"))
    assert all(meaning not in package for meaning in DEFINITIONS.values())
