"""The report: what it concludes from numbers, what it puts into the page, and what it says about a wrong folder."""

import dataclasses
import fnmatch
import html
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import report_results as results
from report_results import bench

from moeify import words
from moeify.benchmark.models.results import ALL_TEXTS
from moeify.benchmark.models.verdicts import verdicts
from moeify.check.evaluate import Evaluation
from moeify.check.tasks_results import TaskResult
from moeify.cli.app import run_command
from moeify.convert.search import Point as Choice
from moeify.convert.search import SearchResult
from moeify.errors import InputError, UsageError
from moeify.layout import Layout
from moeify.reporting import drawings, experts, plots, tables
from moeify.reporting.facts import facts_of, quality_of
from moeify.reporting.provenance import split_command
from moeify.reporting.reader import read_run
from moeify.reporting.report import report
from moeify.results import to_json

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (0.0123, "0.0123"), (1.234, "1.23"), (99.96, "100.0"), (1234.5, "1,230")]
)
def test_numbers(value: float, expected: str) -> None:
    assert words.number(value) == expected


def test_words() -> None:
    assert (words.count(134_515_008), words.count(999)) == ("134.5 M", "999")
    assert (words.size(538e6), words.size(1.19e9), words.size(12)) == ("538 MB", "1.19 GB", "12 B")
    assert (words.factor(2.196), words.factor(0.01234)) == ("2.20", "0.0123")
    assert (words.percent(0.694), words.percent(0.024)) == ("69 %", "2.4 %")
    assert (words.listing([1, 2, 4]), words.listing([1]), words.listing([])) == ("1, 2 and 4", "1", "none")
    assert experts.visible(" a\n") == "\u2423a\u21b5"
    assert experts.visible("\0\ud800\u202e") == "\ufffd" * 3
    assert experts.visible("") == "\u2205"


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("values", [(1.0, 1.0), (0.97, 1.03), (0.5, 3.2), (1e-3, 4e4), (93.2, 134.5)])
def test_a_plot_shows_every_point_inside_its_axes(scale: plots.Scale, values: tuple[float, ...]) -> None:
    points = tuple(plots.Point(value, value, "told when pointed at", "a label") for value in values)
    axis = plots.Axis("value", scale)
    one = plots.Plot("key", "title", "words", axis, axis, (plots.Series("s", "moe", points),))
    drawing = ElementTree.fromstring(one.drawing())
    starts = [re.match(r"M([-\d.]+) ([-\d.]+)m", mark.attrib["d"]) for mark in drawing.iter("path") if len(mark)]
    marks = [(float(start[1]), float(start[2])) for start in starts if start]
    assert len(marks) == 2
    assert all(plots.LEFT <= x <= plots.RIGHT and plots.TOP <= y <= plots.BOTTOM for x, y in marks)
    ticks = [float(text.attrib["x"]) for text in drawing.iter("text") if text.get("text-anchor") == "middle"]
    assert 1 <= len(ticks) <= 9
    assert all(plots.LEFT - 0.1 <= at <= plots.RIGHT + 0.1 for at in ticks)
    if values[0] < values[1]:
        assert marks[0][0] < marks[1][0]
        assert marks[0][1] > marks[1][1]
    else:
        # Labels of points that lie on each other do not.
        labels = [float(text.attrib["y"]) for text in drawing.iter("text") if text.text == "a label"]
        assert abs(labels[0] - labels[1]) >= plots.LINE_HEIGHT


def test_a_plot_leaves_out_of_the_drawing_what_no_axis_can_show() -> None:
    points = (plots.Point(0.0, 1.0, "zero"), plots.Point(1.0, math.inf, "no end"), plots.Point(2.0, 2.0, "<both>"))
    one = plots.Plot(
        "key", "title", "words", plots.Axis("x", "log"), plots.Axis("y"), (plots.Series("s", "moe", points),)
    )
    assert [title.text for title in ElementTree.fromstring(one.drawing()).iter("title")] == ["<both>"]
    assert [row[4].text for row in one.table.rows] == ["zero", "no end", "<both>"]


def test_a_search_is_drawn_into_a_file_of_its_own() -> None:
    layout = Layout(8, 1, 5, (0,))
    points = [Choice(name, 0.5, active, layout, 0.1, 0.2, perplexity) for name, active, perplexity in CHOICES]
    result = SearchResult("a <model>", 0.7, points[0], points[1], tuple(points[2:]), 28.5, {})
    text = drawings.search_plot(result).file()
    assert text == drawings.search_plot(result).file()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    (title, description, style) = root[:3]
    assert title.text == "Search under a budget: a <model>"
    assert "knapsack" in (description.text or "")
    assert "prefers-color-scheme: dark" in (style.text or "")
    labels = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"chosen: knapsack", "search, every layer alike", "active parameters (million)"} <= labels
    marks = [mark for mark in root.iter() if len(mark) and mark is not root]
    assert len(marks) == len(points)
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")


CHOICES = (
    *(("knapsack", 550_000, 31.0), ("uniform", 560_000, 34.0)),
    *(("greedy", 700_000, 30.0), ("greedy", 540_000, 32.0), ("greedy", 400_000, 40.0)),
)


def test_headline_verdict_chart_and_table_name_the_same_fastest_implementation(tmp_path: Path) -> None:
    """The machine drifted: by its time alone another implementation is ahead, by the ratio to dense it is not."""
    found = results.smollm2(2, 4)
    regime = ("decode", 1, 512)
    kept = [row for row in found.speed if row.model != "moe-50" or (row.phase, row.batch, row.prompt_tokens) != regime]
    ahead = results.speed("moe-50", "decode", 1, 512, 1.3, "grouped_mm")
    other = results.speed("moe-50", "decode", 1, 512, 1.1, "eager")
    assert ahead.ms_p50 is not None
    found.speed = [*kept, dataclasses.replace(ahead, ms_p50=10 * ahead.ms_p50), other]
    found.verdicts = verdicts(found.models, found.speed)
    decode = facts_of(found, found.models[1]).decode
    assert (decode[0].implementation, 1 / decode[0].time_over_dense) == ("grouped_mm", pytest.approx(1.3))
    plots_ = drawings.speeds([facts_of(found, model) for model in found.models])
    plot = next(one for one in plots_ if one.key == "speed-decode-512")
    points = next(series.points for series in plot.series if series.name == "moe-50")
    assert [point.y for point in points] == pytest.approx([1 / row.time_over_dense for row in decode])
    assert "grouped_mm" in points[0].title
    results.write(tmp_path, found)
    done = report(tmp_path)
    assert done.headlines[0].decode_speed == (min(point.y for point in points), max(point.y for point in points))
    text = Page(done.out.read_text()).text
    assert all(words.factor(point.y) in text for point in points)


class Page(HTMLParser):
    """Elements and attributes of a page as a browser's parser sees them, and its text without scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 layers with 32 experts, with everything else that a run can hold."""
    path = tmp_path_factory.mktemp("run")
    results.write(path, results.smollm2())
    results.write_others(path)
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(report(folder).out.read_text())


def test_the_page_of_a_whole_model_is_small(folder: Path) -> None:
    found = report(folder)
    assert found.out == folder / "report.html"
    assert found.num_bytes == found.out.stat().st_size < 500_000
    assert not list(folder.glob("*.tmp"))


def test_the_page_stands_alone(page: Page) -> None:
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "onclick", "onload", "style"}
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object", "form", "base", "script"}
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    assert "http" not in policy


def test_the_page_says_it_all(page: Page) -> None:
    for text in (
        *("Should I use it?", "What did I lose?", "What did I gain?", "Not as it is", "2.20"),
        *(
            "Where do you run it?",
            "A CPU (transformers)",
            "The advice above.",
            "moeify plan smollm2-135m.gguf --vram 6GB",
        ),
        *("What they write", "Call me", " a moe-50, <says> it.", "kmeans", "3.80", "1,990", "gap to dense closed"),
        *(
            "Which experts each text prefers",
            "choices of its own",
            "What training bought",
            "tokens trained on (million)",
        ),
        *("moe-50", "smollm2-135m.gguf", "How this verdict is made", "The first rule that applies gives the advice."),
        *("CMoE", "chosen: greedy", "perplexity on held-out text", "FAILED: perplexity under static"),
        *("moeify split smollm2-135m.gguf --experts 32 --active 16 --no-refit -o "),
        *("grouped_mm", "needs a CUDA device", "made up", "liger none", "Layer 29"),
    ):
        assert text in page.text, text


def test_drawings_have_names_words_and_numbers(page: Page) -> None:
    drawings = [attributes for tag, attributes in page.elements if tag == "svg" and "role" in attributes]
    assert len(drawings) == 5
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert len(ids) == sum("id" in attributes for _, attributes in page.elements)
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert set((drawing["aria-labelledby"] or "").split()) <= ids
    assert page.text.count("The numbers") == 5


def test_tables_say_what_they_are_without_their_looks(page: Page) -> None:
    """On a phone a row is a block: roles and names of columns must not depend on how it is drawn."""
    roles = {"table": "table", "thead": "rowgroup", "tbody": "rowgroup", "tr": "row", "td": "cell"}
    for tag, role in roles.items():
        assert {attributes.get("role") for name, attributes in page.elements if name == tag} == {role}
    heads = [attributes for name, attributes in page.elements if name == "th"]
    assert {(one["role"], one["scope"]) for one in heads} == {("columnheader", "col"), ("rowheader", "row")}
    assert all(attributes["data-name"] for name, attributes in page.elements if name == "td")
    # What scrolls can be reached by keyboard, and has a name.
    regions = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert len(regions) == sum(name == "table" for name, _ in page.elements)
    assert all(one["tabindex"] == "0" and one["aria-labelledby"] in ids for one in regions)


def test_headings_do_not_skip_a_level(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"'><b>&amp;{{7*7}}",
    "\ud800\0\u202e",
]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    found = results.smollm2(2, 4, [*HOSTILE, *results.WORDS])
    name = HOSTILE[1]
    found.models = [
        dataclasses.replace(model, name=model.name.replace("moe-50", name), path=HOSTILE[0] + model.path)
        for model in found.models
    ]
    found.quality = [dataclasses.replace(row, model=row.model.replace("moe-50", name)) for row in found.quality]
    found.verdicts = [
        dataclasses.replace(row, model=row.model.replace("moe-50", name), why=HOSTILE[0]) for row in found.verdicts
    ]
    tokens = tuple(HOSTILE)
    found.experts = {
        name: [dataclasses.replace(layer, top_tokens=(tokens,) * len(layer.load)) for layer in found.experts["moe-50"]]
    }
    found.machine = {"device": HOSTILE[0]}
    found.versions = {HOSTILE[1]: HOSTILE[2]}
    found.command = HOSTILE[1]
    results.write(tmp_path, found, name="<b>.json")
    text = report(tmp_path, tmp_path / "page.html").out.read_text()
    seen = Page(text)
    assert {tag for tag, _ in seen.elements}.isdisjoint({"img", "b>"})
    plain = Page(report(_plain(tmp_path / "plain")).out.read_text())
    assert seen.scripts == plain.scripts == []
    assert not any("onerror" in attributes for _, attributes in seen.elements)
    assert "{{7*7}}" in html.unescape(text)
    assert HOSTILE[0] in seen.text
    assert "\0" not in text
    assert "\u202e" not in text


def test_a_drawing_of_hostile_names_is_xml() -> None:
    point = plots.Point(1.0, 1.0, "]]>\x1b\0", HOSTILE[0])
    series = plots.Series(HOSTILE[2] + HOSTILE[3], "moe", (point,))
    plot = plots.Plot("key", HOSTILE[1], "\ufffe\u2028", plots.Axis("<x>"), plots.Axis("&y"), (series,))
    (title, description, *_) = ElementTree.fromstring(plot.file())
    assert (title.text, description.text) == (HOSTILE[1], "\\ufffe\\u2028")


def _plain(folder: Path) -> Path:
    results.write(folder, results.smollm2(2, 4))
    return folder


def test_only_a_benchmark_is_needed(tmp_path: Path) -> None:
    """Of one dense model and one mixture of experts, with nothing measured but sizes."""
    found = bench(moe=None, static=None, speeds={})
    found.quality, found.ceilings = [], None
    results.write(tmp_path, found, "anything.json")
    done = report(tmp_path)
    assert done.headlines[0].ratio is None
    assert done.headlines[0].answers.advice.level == "unknown"
    seen = Page(done.out.read_text())
    assert "Its quality was not measured." in seen.text
    assert "Perplexity against active parameters" not in seen.text
    assert "What they write" not in seen.text
    assert "What the experts do" not in seen.text


def test_of_several_texts_quality_is_that_of_all_blocks(tmp_path: Path) -> None:
    found = results.smollm2(2, 4)
    row = quality_of(found, "moe-50")
    assert row is not None
    assert row.data == ALL_TEXTS
    found.quality = [one for one in found.quality if one.data != ALL_TEXTS]
    results.write(tmp_path, found)
    with pytest.raises(InputError, match="written by an earlier moeify: 2 texts, expected quality over all texts"):
        report(tmp_path)
    # Of one text the numbers are that text's.
    assert quality_of(bench(), "static") == bench().quality[-1]
    assert quality_of(bench(), "nobody") is None


def test_a_run_of_a_recipe_is_done_again_by_its_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    results.write(folder, results.smollm2(2, 4))
    results.write_others(folder)
    assert "moeify run" not in Page(report(folder).out.read_text()).text
    (folder / "recipe.yaml").touch()
    text = Page(report(folder).out.read_text()).text
    again = text[text.index("Do it again") :].split("\n")[1:3]
    assert again == [f"moeify run '{folder}/recipe.yaml' -o '{folder}-again'", f"moeify report '{folder}'"]


def test_how_answers_end_is_shown_from_a_recipe_or_an_evaluation(tmp_path: Path) -> None:
    results.write(tmp_path, results.smollm2(2, 4))
    assert not tables.loops(read_run(tmp_path)).rows
    assert "without an end" not in Page(report(tmp_path).out.read_text()).text
    results.write_json(tmp_path / "eval.json", to_json(Evaluation((), loops=results.LOOPS)))
    alone = tables.loops(read_run(tmp_path))
    assert [[cell.text for cell in row] for row in alone.rows] == [
        ["smollm2-135m.gguf", "16", "19 %", "44 %", "29 %"],
        ["moe", "16", "56 %", "75 %", "52 %"],
    ]
    assert "without an end" in Page(report(tmp_path).out.read_text()).text
    results.write_others(tmp_path)
    (tmp_path / "eval.json").unlink()
    assert tables.loops(read_run(tmp_path)) == alone


def test_files_in_llama_cpp_have_rows_and_a_verdict(tmp_path: Path) -> None:
    results.write(tmp_path, results.in_llama_cpp(results.smollm2(2, 4), 0.74, 0.95))
    done = report(tmp_path)
    assert done.headlines[0].engine_speed == pytest.approx((1 / 0.95, 1 / 0.74))
    text = Page(done.out.read_text()).text
    for words_ in ("llama.cpp q8_0, 1 thread", "its interval is of all 3 rounds", "files in llama.cpp"):
        assert words_ in text


def test_what_each_hour_of_training_bought(tmp_path: Path) -> None:
    """Three hours and a half of equal steps, from the marker of a run."""
    results.write(tmp_path, results.smollm2(2, 4))
    results.write_others(tmp_path)
    (tmp_path / "moe-50-finetuned.done").write_text('{"schema": "moeify.stage/1", "seconds": 14400.0}')
    rows = [[cell.text for cell in row] for row in tables.training(read_run(tmp_path).tuned).rows]
    own = [row for row in rows if row[0] == "moe-50-finetuned"]
    assert [row[3] for row in own] == ["60 min", "2 h", "3 h", "4 h"]
    assert [row[2] for row in own] == ["1.0 k", "2.0 k", "3.1 k", "4.1 k"]
    assert [(row[5], row[6]) for row in own] == [("109", "106"), ("106", "103"), ("103", "99.9"), ("99.9", "96.9")]
    assert own[0][7] == "2.8 %"
    # Nobody knows how long the control took.
    assert {row[3] for row in rows if row[0] == "static-50-finetuned"} == {tables.MISSING}
    plot = drawings.training(read_run(tmp_path))
    assert plot is not None
    assert [(one.name, len(one.points)) for one in plot.series] == [
        ("moe-50-finetuned", 5),
        ("static-50-finetuned", 5),
    ]


def test_a_text_prefers_the_experts_that_it_chooses_more_than_others_do() -> None:
    (layer,) = results.experts(1, 4)
    shares = {"prose": (0.4, 0.2, 0.2, 0.2), "code": (0.2, 0.2, 0.2, 0.4)}
    table = tables.preferences("key", [dataclasses.replace(layer, texts=shares)])
    assert table is not None
    (prose, code) = ([cell.text for cell in row] for row in table.rows)
    assert prose[:2] == ["prose", "10 %"]
    assert prose[2].startswith("layer 0, expert 0: 1.33x; ")
    assert code[2].startswith("layer 0, expert 3: 1.33x; ")
    assert tables.preferences("key", [dataclasses.replace(layer, texts={})]) is None


def test_a_summary_for_a_pull_request(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "summary.md"
    assert report(folder, out).out == out
    text = out.read_text()
    assert text.startswith("<!-- written by moeify report -->\n### moe-50 against smollm2-135m.gguf: No\n")
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| model | experts |"))
    cells = {line.count(" |") for line in lines[lines.index(head) : lines.index(head) + 5] if line.startswith("| ")}
    assert cells == {head.count(" |")}
    for expected in ("| kmeans | moby-dick |", "- FAILED: perplexity under static", "**Lost**", "Not as it is"):
        assert expected in text
    # It is replaced by the next one; what someone wrote is not.
    report(folder, out)
    out.write_text("my notes")
    with pytest.raises(InputError, match="not replaced"):
        report(folder, out)


def test_hostile_names_stay_text_in_markdown(tmp_path: Path) -> None:
    found = results.smollm2(2, 4)
    name = "</sub><img src=x>|`@someone` #1\n# head [a](b)"
    found.models = [dataclasses.replace(one, name=one.name.replace("moe-50", name)) for one in found.models]
    results.write(tmp_path, found)
    lines = report(tmp_path, tmp_path / "s.md").out.read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| ") and "someone" in line)
    assert re.sub(r"\\.", "", row).count("|") == re.sub(r"\\.", "", lines[lines.index(row) - 1]).count("|")
    assert "\\<img src=x\\>\\|\\`\\@someone\\` \\#1\\\\n\\# head \\[a\\](b)" in row
    assert not any(line.startswith("# head") for line in lines)


def test_numbers_that_nobody_measured_are_no_bug(tmp_path: Path) -> None:
    found = results.smollm2(2, 4)
    results.write_others(tmp_path)
    for name, value in (("run.json", "50.0"), ("search.json", "40.0")):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(re.sub(rf'erplexity": {value}', 'erplexity": 0.0', text))
    results.write(tmp_path, found)
    assert run_command(["report", str(tmp_path)]) == 0
    found.verdicts[0] = dataclasses.replace(found.verdicts[0], time_over_dense=0.0)
    results.write(tmp_path, found)
    with pytest.raises(InputError, match="has a ratio of 0, expected more than 0"):
        report(tmp_path)


def test_tasks_have_a_table_where_there_are_any(tmp_path: Path) -> None:
    found = results.smollm2(2, 4)
    for name, score in (("dense", 0.5), ("moe-50", 0.4)):
        task = TaskResult(
            name, "data/arc.jsonl", "acc", 200, score, score - 0.1, score + 0.1, score - 0.5, -0.15, -0.05, 0.25
        )
        found.tasks.append(task)
    results.write(tmp_path, found)
    for place in (None, tmp_path / "summary.md"):
        page = report(tmp_path, place).out.read_text().replace("\\", "")
        assert all(text in page for text in ("arc.jsonl acc", "0.400", "-0.100", "-0.150 -0.050"))
    found.tasks.clear()
    results.write(tmp_path, found)
    assert "arc.jsonl" not in report(tmp_path).out.read_text()


def test_a_page_has_a_name_of_its_kind(tmp_path: Path) -> None:
    results.write(tmp_path, results.smollm2(2, 4))
    with pytest.raises(UsageError, match=r"page.pdf is not the name of a page") as caught:
        report(tmp_path, tmp_path / "page.pdf")
    assert "FILE.html" in str(caught.value.hint)
    assert not (tmp_path / "page.pdf").exists()


def test_several_mixtures(tmp_path: Path) -> None:
    found = results.smollm2(2, 4)
    found.models.append(results.model("moe-75", "moe", 0.75))
    found.quality += [
        results.quality("moe-75", 52.0, data=data) for data in ("moby-dick", "state-of-the-union", ALL_TEXTS)
    ]
    found.verdicts.append(results.verdict("moe-75", "decode", 1, 512, 0.9))
    results.write(tmp_path, found)
    done = report(tmp_path)
    assert [headline.model for headline in done.headlines] == ["moe-50", "moe-75"]
    other = done.headlines[1].answers.advice.sentence
    assert f"moe-75: No. {other}" in Page(done.out.read_text()).text
    assert done.headlines[1].answers.advice.sentence.startswith("Do not use it: nowhere faster")


def test_the_newest_benchmark_counts(tmp_path: Path) -> None:
    results.write(tmp_path, results.smollm2(2, 4), "z.json", date="2026-01-01T00:00:00+00:00")
    results.write(tmp_path / "later", results.smollm2(2, 4), "a.json", date="2026-03-01T00:00:00")
    results.write(tmp_path / "later" / "too deep", results.smollm2(2, 4), date="2027-03-01T00:00:00+00:00")
    results.write(tmp_path / "half.partial", results.smollm2(2, 4), date="2027-03-01T00:00:00+00:00")
    run = read_run(tmp_path)
    assert run.bench.file == "later/a.json"
    assert run.notes == ("Of 2 results of bench the newest counts: later/a.json, not z.json.",)
    assert run.bench.value == dataclasses.replace(results.smollm2(2, 4), date="2026-03-01T00:00:00")


def test_of_results_without_a_date_the_file_s_counts(tmp_path: Path) -> None:
    results.write(tmp_path, results.smollm2(2, 4))
    results.write_others(tmp_path)
    old = tmp_path / "a-later-name.json"
    old.write_text((tmp_path / "compare.json").read_text())
    os.utime(old, (1e9, 1e9))
    assert read_run(tmp_path).sources["compare"] == "compare.json"


def test_other_results_are_named_and_other_files_left_alone(tmp_path: Path) -> None:
    results.write(tmp_path, results.smollm2(2, 4))
    (tmp_path / "layers.json").write_text('{"schema": "moeify.layer-bench/1"}')
    (tmp_path / "tokenizer.json").write_text("not JSON at all")
    (tmp_path / "list.json").write_text('["moeify.bench/1", 3]')
    assert read_run(tmp_path).notes == ("layers.json (moeify.layer-bench/1) is not shown.",)


WRONG: dict[str, tuple[str, str]] = {
    "no benchmark": ("{}", "no model benchmark"),
    "truncated": ('{"schema": "moeify.bench/1", "date": ', "is not JSON"),
    "other version": ('{"schema": "moeify.bench/2"}', "has schema moeify.bench/2, expected moeify.bench/1"),
    "fields missing": ('{"schema": "moeify.bench/1", "date": "2026-01-01"}', "command: Field required"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_read(tmp_path: Path, text: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench.json").write_text(text)
    assert run_command(["report", str(tmp_path)]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert err.splitlines()[1].startswith("hint: ")
    assert not (tmp_path / "report.html").exists()


def test_a_number_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = results.write(tmp_path, results.smollm2(2, 4))
    path.write_text(re.sub(r'"perplexity": [0-9.]+', '"perplexity": NaN', path.read_text(), count=1))
    with pytest.raises(InputError, match=r"quality\.0\.perplexity"):
        read_run(tmp_path)


def test_a_wrong_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        report(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        report(tmp_path / "file")
    with pytest.raises(InputError, match="no result of moeify") as caught:
        report(tmp_path)
    assert caught.value.hint == f"moeify bench MOE --against MODEL -o {tmp_path}"
    results.write(tmp_path, results.smollm2(2, 4))
    with pytest.raises(InputError, match="cannot write"):
        report(tmp_path, tmp_path / "file" / "page.html")


def test_a_benchmark_with_nothing_to_compare(tmp_path: Path) -> None:
    found = results.smollm2(2, 4)
    results.write(tmp_path, dataclasses.replace(found, models=[found.models[0], found.models[2]]))
    with pytest.raises(InputError, match="measured dense, static, expected a dense model first and a mixture"):
        report(tmp_path)
    found.experts["moe-50"][1] = dataclasses.replace(found.experts["moe-50"][1], top_tokens=())
    results.write(tmp_path, found)
    with pytest.raises(InputError, match="moe-50, layer 1 has tables of 0, 4 experts, expected 4"):
        report(tmp_path)


def test_the_command_prints_the_headline(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert run_command(["report", str(folder), "-o", str(out)]) == 0
    said = capfd.readouterr().out
    assert all(words in said for words in ("should I use it?", "Not as it is", "2.196", f"python -m webbrowser {out}"))
    assert run_command(["report", str(folder), "-o", str(out), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["schema"] == "moeify.report/1"
    assert (found["out"], found["num_bytes"]) == (str(out), out.stat().st_size)
    assert found["headlines"][0]["answers"]["advice"]["level"] == "no"
    assert found["headlines"][0]["ratio"]["value"] == pytest.approx(108.9 / 49.6)
    assert found["sources"] == {
        "bench": "bench.json",
        "compare": "compare.json",
        "search": "search.json",
        "run": "run.json",
    }


def test_the_command_of_a_split_is_told_again() -> None:
    options = {"experts": 16, "dense_layers": [0, 29], "refit": False, "static": False, "calibration": ["a b", "c"]}
    found = split_command({**options, "unknown": 3, "seed": 0, "budget": 0.5}, "some/model", Path("out"))
    assert found == ("moeify split some/model --experts 16 --dense-layers 0,29 --no-refit --calibration 'a b,c' -o out")


def test_everything_the_page_needs_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [path.name for path in (ROOT / "moeify" / "reporting").iterdir() if path.is_file() and path.suffix != ".py"]
    assert len(files) == 5
    assert not [file for file in files if file.endswith(".js")]
    assert all(any(fnmatch.fnmatch(file, one) for one in patterns["moeify.reporting"]) for file in files)


def test_reading_a_benchmark_imports_no_transformers(tmp_path: Path) -> None:
    """Other results import what made them, once there is one."""
    folder = _plain(tmp_path)
    code = (
        "import sys; from moeify.reporting.report import report\n"
        "report(sys.argv[1], None)\n"
        "print([name for name in ('transformers', 'sklearn', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_a_perplexity_that_was_not_finite_is_named_and_not_drawn(tmp_path: Path) -> None:
    results.write(tmp_path, results.smollm2(2, 4))
    results.write_others(tmp_path)
    for name, place, field in (("compare.json", "rows", "value"), ("search.json", "frontier", "perplexity")):
        values = json.loads((tmp_path / name).read_text())
        values[place][1][field] = None
        (tmp_path / name).write_text(json.dumps(values))
    run = read_run(tmp_path)
    assert run.compared is not None
    assert run.searched is not None
    assert math.isnan(run.compared.value.rows[1].value)
    assert math.isnan(run.searched.value.frontier[1].perplexity)
    page = Page(report(tmp_path).out.read_text())
    assert re.search(r"CMoE\s+50 %\s+nan", page.text)
