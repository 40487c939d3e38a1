"""Methods side by side: that all of them run, what the columns mean, and that a run goes on where it was stopped."""

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify.check.compare import Comparison, Row
from moeify.check.compare_entries import DENSE, options_at
from moeify.check.methods import REFERENCE, Method, methods
from moeify.check.trials import Trials
from moeify.cli.app import run_command
from moeify.cli.tables.compare import compare_tables
from moeify.convert.pipeline import split
from moeify.convert.prepare import prepare
from moeify.convert.search import Point, SearchResult
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError, UsageError
from moeify.layout import Layout
from moeify.models.builtin import builtin_documents
from moeify.models.dense import open_dense
from moeify.options import SplitOptions
from moeify.results import write

compare_module = importlib.import_module("moeify.check.compare")
compare = compare_module.compare

BUDGET = 0.75
STEPS = 60

Run = Callable[..., Comparison]


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt a little, so that what it loses is loss."""
    untrained = make_dense("llama", intermediate_size=128)
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    model = AutoModelForCausalLM.from_pretrained(untrained)
    ids = tokenizer(calibration_file.read_text(), verbose=False)["input_ids"]
    ids_BC = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch_BC = ids_BC[torch.randint(len(ids_BC), (8,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch_BC, labels=batch_BC).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("heldout")
    text = "\n\n".join(builtin_documents(heldout=True))
    for name, part in (("one", text[:8000]), ("two", text[8000:20000])):
        (folder / f"{name}.txt").write_text(part)
    return [str(folder / "one.txt"), str(folder / "two.txt")]


@pytest.fixture(scope="module")
def options(calibration_file: Path) -> SplitOptions:
    return SplitOptions(calibration=(str(calibration_file),), tokens=1024)


@pytest.fixture(scope="module")
def run(dense: Path, texts: list[str], options: SplitOptions) -> Run:
    """run(**arguments of compare): one budget, two texts of up to 1,024 tokens."""

    def call(**changed: Any) -> Comparison:
        arguments = {"budgets": [BUDGET], "data": texts, "options": options, "tokens": 1024, **changed}
        found: Comparison = compare(str(dense), **arguments)
        return found

    return call


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """Every method at one budget, and the file."""
    out = tmp_path_factory.mktemp("compare") / "new" / "all.json"
    return run(out=out), out


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The kinds of measurements from here on; nothing was measured before."""
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    seen: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        really = getattr(Trials, name)

        def call(self: Trials, how: Any) -> Any:
            seen.append(name)
            return really(self, how)

        return call

    for name in ("control", "split"):
        monkeypatch.setattr(Trials, name, noting(name))
    return seen


def by_name(found: Comparison) -> dict[str, Row]:
    return {row.method: row for row in found.rows}


def test_every_method_gives_a_finite_row(whole: tuple[Comparison, Path], texts: list[str]) -> None:
    found, _ = whole
    assert [row.method for row in found.rows] == [DENSE, *methods(8)]
    for row in found.rows:
        numbers = (row.value, row.low, row.high, row.ratio, row.ratio_low, row.ratio_high, row.gap_closed)
        assert all(map(math.isfinite, (*numbers, *row.texts.values(), *row.diagnostics.values()))), row
        assert list(row.texts) == texts
        assert row.budget == (1 if row.method == DENSE else BUDGET)
    assert found.evaluation == {"tokens": dict.fromkeys(texts, 1024), "context": 64}
    assert found.calibration["num_tokens"] == 1024


def test_what_the_columns_mean(whole: tuple[Comparison, Path]) -> None:
    rows = by_name(whole[0])
    dense, reference = rows[DENSE], rows[REFERENCE]
    assert (reference.ratio, reference.ratio_low, reference.ratio_high, reference.gap_closed) == (1, 1, 1, 0)
    assert dense.gap_closed == pytest.approx(1)
    assert dense.ratio < 1
    for row in rows.values():
        assert row.ratio == pytest.approx(row.value / reference.value)
        gap = math.log(reference.value / row.value) / math.log(reference.value / dense.value)
        assert row.gap_closed == pytest.approx(gap, abs=1e-6)
        # Both texts are equally long.
        assert row.value == pytest.approx(math.sqrt(math.prod(row.texts.values())))


def test_the_intervals_hold_the_estimates(whole: tuple[Comparison, Path]) -> None:
    for row in whole[0].rows:
        assert row.low < row.value < row.high
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert (row.ratio_low < row.ratio_high) == (row.method != REFERENCE)


def test_the_ratio_is_known_better_than_from_independent_draws(whole: tuple[Comparison, Path]) -> None:
    rows = by_name(whole[0])
    reference = rows[REFERENCE]
    for name in ("moeify 8 experts", "static", "neuron oracle"):
        row = rows[name]
        paired = math.log(row.ratio_high / row.ratio_low)
        independent = math.hypot(math.log(row.high / row.low), math.log(reference.high / reference.low))
        assert paired < 0.7 * independent, name


def test_known_orders(whole: tuple[Comparison, Path]) -> None:
    """What must hold of any model."""
    rows = by_name(whole[0])
    assert rows["neuron oracle"].value < rows["static"].value
    assert rows["moeify 8 experts"].value < rows["random"].value


def test_the_file(whole: tuple[Comparison, Path], dense: Path) -> None:
    found, out = whole
    written = json.loads(out.read_text())
    assert written["schema"] == "moeify.compare/1"
    assert written["model"] == found.model == str(dense)
    assert [row["value"] for row in written["rows"]] == [row.value for row in found.rows]
    assert set(written) == {"schema", "model", "rows", "calibration", "evaluation", "tasks", "measure"}


def test_a_few_methods_are_those_of_the_whole_table(run: Run, whole: tuple[Comparison, Path]) -> None:
    found = run(only=["moeify 8 experts", "neuron oracle"])
    assert [row.method for row in found.rows] == [DENSE, "neuron oracle", REFERENCE, "moeify 8 experts"]
    assert all(row == by_name(whole[0])[row.method] for row in found.rows)


def test_a_row_is_what_a_plain_evaluation_finds(
    run: Run, dense: Path, texts: list[str], options: SplitOptions, tmp_path: Path, whole: tuple[Comparison, Path]
) -> None:
    """The written checkpoint, stock transformers, the same blocks."""
    split(str(dense), tmp_path / "out", replace(options, active=6))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    for folder, method in ((dense, DENSE), (tmp_path / "out", "moeify 8 experts")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for text in texts:
            ids_BC = evaluation_tokens(text, tokenizer, num_tokens=1024).ids_T.view(-1, 64)
            with torch.no_grad():
                expected = math.exp(float(model(input_ids=ids_BC, labels=ids_BC).loss))
            assert by_name(whole[0])[method].texts[text] == pytest.approx(expected, rel=2e-3)


def test_several_budgets_have_a_reference_each(run: Run) -> None:
    found = run(budgets=[0.5, 0.75], only=["static"])
    assert [(row.method, row.budget) for row in found.rows] == [
        (DENSE, 1.0),
        ("static", 0.5),
        (REFERENCE, 0.5),
        ("static", 0.75),
        (REFERENCE, 0.75),
    ]
    assert [row.ratio for row in found.rows if row.method == REFERENCE] == [1, 1]
    assert found.rows[2].value > found.rows[4].value


def test_further_rows(run: Run) -> None:
    further = {"mine": {"active": 4, "shared": 1, "dense_layers": (1,)}, "its like": {"active": 6}}
    found = by_name(run(only=["moeify 8 experts"], further=further))
    controls = [f"{REFERENCE}, layers of mine", f"{REFERENCE}, layers of its like"]
    assert list(found) == [DENSE, REFERENCE, "moeify 8 experts", "mine", controls[0], "its like", controls[1]]
    assert found["mine"].budget == found["its like"].budget == 0.75
    assert found["its like"].value == pytest.approx(found["moeify 8 experts"].value, rel=1e-6)
    assert found["mine"].value != found["its like"].value


def test_a_stopped_run_goes_on(run: Run, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    only = ["neuron oracle", "static"]

    def stop(items: Any, label: str, total: int) -> Any:
        for done, item in enumerate(items):
            if done == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        run(only=only, out=out, track=stop)
    assert not out.exists()
    assert measured == ["control", "control"]
    measured.clear()
    found = run(only=only, out=out)
    assert measured == ["split", "split"]
    assert out.is_file()
    # Another run finds all of them, and a run that finds none measures the same.
    measured.clear()
    assert run(only=only) == found
    assert not measured
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "other cache"))
    assert run(only=only) == found
    assert len(measured) == 4


def test_a_damaged_entry_is_measured_again(run: Run, tmp_path: Path, measured: list[str]) -> None:
    before = run(only=["static"])
    files = sorted((tmp_path / "cache" / "compare").iterdir())
    assert len(files) == len(measured) == 3
    files[0].write_text(files[0].read_text()[:-10])
    files[1].write_text("")
    measured.clear()
    assert run(only=["static"]) == before
    assert len(measured) == 2


def test_a_place_that_cannot_be_written_is_found_first(run: Run, tmp_path: Path, measured: list[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write") as caught:
        run(only=["static"], out=tmp_path / "file" / "found.json")
    assert "-o" in caught.value.hint
    assert not measured


@pytest.mark.parametrize("changed", [{"seed": 3}, {"tokens": 2048}, {"refit_to": "stream"}], ids=str)
def test_a_changed_option_is_measured_again(
    run: Run,
    options: SplitOptions,
    tmp_path: Path,
    measured: list[str],
    changed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = run(only=["static"])
    measured.clear()
    after = run(only=["static"], options=replace(options, **changed))
    assert "split" in measured
    # The same as a run gives that finds nothing.
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "other cache"))
    assert after == run(only=["static"], options=replace(options, **changed))
    assert after != before


def test_other_evaluation_text_is_measured_again(run: Run, texts: list[str], measured: list[str]) -> None:
    run(only=["static"])
    measured.clear()
    assert run(only=["static"], data=texts[:1]).rows[0].texts.keys() == {texts[0]}
    assert len(measured) == 3


def test_an_unknown_method(run: Run, measured: list[str]) -> None:
    with pytest.raises(UsageError, match="'wish' is not a method") as caught:
        run(only=["static", "wish"])
    assert all(name in caught.value.hint for name in methods(8))
    assert not measured


@pytest.mark.parametrize("budgets", [[], [0], [1], [0.5, 1.5], [-0.1], [math.nan]], ids=str)
def test_a_bad_budget(run: Run, measured: list[str], budgets: list[float]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        run(budgets=budgets)
    assert not measured


def test_a_text_shorter_than_a_block(run: Run, tmp_path: Path, measured: list[str]) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time.")
    with pytest.raises(InputError, match="less than a block of 64"):
        run(data=[str(tmp_path / "short.txt")])
    assert not measured


# With a target and without one, with a gate and without, fused and transposed matrices.
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "phi3"])
@pytest.mark.parametrize("budget", [0.125, 0.5, 0.95])
def test_every_method_suits_every_family(make_dense: MakeDense, family: str, budget: float) -> None:
    """Also where no target could hold it, and experts as narrow as a neuron."""
    model = open_dense(make_dense(family, intermediate_size=128))
    base = SplitOptions(experts=8, dtype="float32")
    for name, method in methods(8).items():
        if method.control:
            continue
        layout = prepare(model, options_at(budget, base, method), writable=False).layout
        assert layout.is_static == (name in ("static", REFERENCE)), name
        assert layout.active_share == pytest.approx(budget, abs=0.5 / 8 + 1e-9), name


def test_experts_that_do_not_divide_are_left_out(make_dense: MakeDense, run: Run, options: SplitOptions) -> None:
    model = make_dense("llama", intermediate_size=96)
    only = ["moeify 8 experts", "static"]
    found = compare(str(model), [0.75], ["builtin-heldout"], options, tokens=128)
    names = {row.method for row in found.rows}
    assert {*only, "moeify 32 experts"} <= names
    assert "moeify 128 experts" not in names
    with pytest.raises(InputError, match="do not divide into 128 experts"):
        compare(str(model), [0.75], ["builtin-heldout"], options, tokens=128, only=["moeify 128 experts"])


def test_methods_are_named_after_their_experts() -> None:
    assert "moeify 16 experts" in methods(16)
    assert {"moeify 8 experts", "moeify 32 experts", "moeify 128 experts"} <= set(methods(16))
    assert all(isinstance(method, Method) for method in methods(8).values())


def test_the_table_has_every_row(whole: tuple[Comparison, Path]) -> None:
    tables = compare_tables(whole[0])
    for table in tables:
        assert table.row_count == len(whole[0].rows)
        assert list(table.columns[0].cells) == [row.method for row in whole[0].rows]
    assert [str(column.header) for column in tables[1].columns][-2:] == ["one", "two"]


def test_the_command_prints_one_object(
    dense: Path,
    texts: list[str],
    options: SplitOptions,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    point = Point("greedy", 0.6, 1, Layout(8, 1, 4, (0,)), 0.1, 0.1, 9.0)
    write(SearchResult(str(dense), 0.6, point, point, (), 8.0, {}), tmp_path / "searched.json")
    command = ["compare", str(dense), "--method", "static", "--data", texts[0], "--data-tokens", "512"]
    command += ["--calibration", options.calibration[0], "--tokens", "1024", "--budget", "0.75"]
    command += ["--searched", str(tmp_path / "searched.json"), "-o", str(tmp_path / "found.json")]
    capfd.readouterr()
    assert run_command([*command, "--json"]) == 0
    out, _ = capfd.readouterr()
    found = json.loads(out)
    assert found["schema"] == "moeify.compare/1"
    assert found == json.loads((tmp_path / "found.json").read_text())
    names = [row["method"] for row in found["rows"]]
    searched = "moeify 8 experts searched (searched)"
    assert names == [DENSE, "static", REFERENCE, searched, f"{REFERENCE}, layers of {searched}"]
    assert found["evaluation"]["tokens"] == {texts[0]: 512}
    assert run_command(command) == 0
    out, err = capfd.readouterr()
    assert "gap closed" in out
    assert all(f"\n{name} " in out for name in names)
    assert "error" not in err
    assert run_command([*command, "--quiet"]) == 0
    assert "next:" not in capfd.readouterr().out
