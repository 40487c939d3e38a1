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
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import report_results as results

from moeify import words
from moeify.benchmark.models.results import ModelBench, Phase
from moeify.benchmark.models.verdicts import verdicts
from moeify.cli.app import run_command
from moeify.convert.search import Point as Choice
from moeify.convert.search import SearchResult
from moeify.errors import InputError
from moeify.plan import Layout
from moeify.reporting import drawings, experts, plots, tables
from moeify.reporting.facts import Facts, facts_of, quality_of
from moeify.reporting.provenance import split_command
from moeify.reporting.reader import read_run
from moeify.reporting.report import report
from moeify.reporting.verdict import advise, answers, is_beaten

ROOT = Path(__file__).parents[2]


def bench(
    *,
    moe: float | None = 60.0,
    static: float | None = 80.0,
    speeds: Mapping[tuple[Phase, int], float] | None = None,
    static_speed: float = 1.3,
    spread: float = 0.02,
    paired: float | None = 0.01,
    moe_changes: Mapping[str, Any] | None = None,
) -> ModelBench:
    """A dense model of perplexity 50, a mixture of experts and a static control with these perplexities and speeds."""
    speeds = {("decode", 1): 1.2, ("decode", 8): 1.1, ("prefill", 1): 1.1} if speeds is None else speeds
    found = dataclasses.replace(results.smollm2(2, 4), models=[], quality=[], speed=[], verdicts=[], experts={})
    found.models = [results.model("dense", "dense"), results.model("moe", "moe", 0.5, **(moe_changes or {}))]
    found.quality = [results.quality("dense", 50.0, 50.0)]
    if moe is not None:
        over = {"static": results.over(moe / static, paired)} if static is not None and paired is not None else {}
        found.quality.append(results.quality("moe", moe, 50.0, spread=spread, **over))
    if static is not None:
        found.models.append(results.model("static", "static", 0.5, 0.5))
        found.quality.append(results.quality("static", static, 50.0, spread=spread))
        found.verdicts += [results.verdict("static", phase, batch, 512, static_speed) for phase, batch in speeds]
    found.verdicts += [results.verdict("moe", phase, batch, 512, times) for (phase, batch), times in speeds.items()]
    return found


def facts(**changes: Any) -> Facts:
    found = bench(**changes)
    return facts_of(found, found.models[1])


SLOW: Mapping[tuple[Phase, int], float] = {("decode", 1): 0.8, ("prefill", 1): 0.7}
MIXED: Mapping[tuple[Phase, int], float] = {("decode", 1): 1.2, ("decode", 8): 0.9, ("prefill", 1): 0.7}
ADVICE = {
    "faster and as good": (dict(moe=50.1), "yes", "Use it: faster for decode everywhere, and prefill at batch 1"),
    "faster and hardly worse": (dict(moe=51.2, spread=0.005), "yes", "perplexity is 2.4 % higher"),
    "better": (dict(moe=45.0), "yes", "perplexity is 10 % lower"),
    "faster here, slower there": (
        dict(moe=50.1, speeds=MIXED),
        "partly",
        "Use it where it gains (faster for decode at batch 1); keep the dense model for decode at batch 8, and prefill",
    ),
    "faster and worse": (dict(moe=60.0), "partly", "Only if the gain is worth the loss: faster for decode everywhere"),
    "perhaps hardly worse": (dict(moe=51.5, spread=0.025), "partly", "Only if the gain is worth the loss"),
    "faster and much worse": (dict(moe=110.0, static=150.0), "no", "Not as it is: faster for decode everywhere"),
    "slower and worse": (dict(moe=60.0, speeds=SLOW), "no", "Do not use it: nowhere faster than the dense model"),
    "slower and as good": (dict(moe=50.0, speeds=SLOW), "no", "No reason to use it"),
    "beaten by the control": (dict(moe=60.0, static=52.0), "no", "Do not use it: plain pruning to the same active"),
    "no quality": (dict(moe=None), "unknown", "Its quality was not measured"),
    "no speed": (dict(speeds={}), "unknown", "Its speed was not measured"),
}


@pytest.mark.parametrize(("changes", "level", "sentence"), ADVICE.values(), ids=ADVICE)
def test_advice(changes: dict[str, Any], level: str, sentence: str) -> None:
    found = advise(facts(**changes))
    assert (found.level, sentence in found.sentence) == (level, True), found


def test_a_control_must_be_certainly_better_and_no_slower() -> None:
    assert is_beaten(facts(moe=60.0, static=52.0))
    # An interval of the ratio that holds one proves nothing; one that does not proves it where those to dense overlap.
    assert not is_beaten(facts(moe=60.0, static=59.0, paired=0.02))
    assert is_beaten(facts(moe=60.0, static=59.0, spread=0.02, paired=0.005))
    # Nor does a run that did not compare the two on the same blocks.
    assert not is_beaten(facts(moe=60.0, static=52.0, paired=None))
    assert not is_beaten(facts(moe=52.0, static=60.0))
    # A control that is slower than the mixture in most regimes leaves it a reason to be.
    assert not is_beaten(facts(moe=60.0, static=52.0, static_speed=0.9))
    # Without speeds quality decides.
    assert is_beaten(facts(moe=60.0, static=52.0, speeds={}))


def test_a_control_of_another_size_is_none() -> None:
    found = bench(moe=60.0, static=52.0)
    found.models[2] = results.model("static", "static", 0.75, 0.75)
    assert facts_of(found, found.models[1]).control is None
    assert advise(facts_of(found, found.models[1])).level == "partly"


def test_what_was_lost_and_gained() -> None:
    found = answers(facts(moe=60.0, static=80.0, speeds=MIXED))
    assert found.lost[0] == "Perplexity is 20 % higher (95 % interval of the ratio: 1.18 to 1.22)."
    assert any(
        line.startswith("Slower for decode at batch 8, and prefill at batch 1, down to 0.70x") for line in found.lost
    )
    assert "Faster for decode at batch 1, up to 1.20x." in found.gained
    closed = 1 - math.log(1.2) / math.log(1.6)
    assert any(line.startswith("Better than plain pruning") and f"{closed:.0%}"[:-1] in line for line in found.gained)
    worse = answers(facts(moe=60.0, static=52.0, speeds=SLOW))
    assert "No speed: nowhere faster than the dense model." in worse.gained
    assert any(line.startswith("Worse than plain pruning") for line in worse.lost)
    # Not shown to be better is no loss.
    same = answers(facts(moe=60.0, static=60.0))
    assert not any("plain pruning" in line for line in same.lost)
    said = "Not shown to be better than plain pruning to the same active size: perplexity is 1.000 times its"
    assert same.gained[-1] == f"{said} (0.990 to 1.010)."
    alone = answers(facts(moe=60.0, static=60.0, paired=None))
    assert not any("plain pruning" in line for line in (*alone.lost, *alone.gained))


def test_a_run_that_cannot_tell_says_so() -> None:
    found = bench(moe=60.0, speeds=SLOW)
    found.verdicts = [dataclasses.replace(row, outcome="cannot tell") for row in found.verdicts]
    said = answers(facts_of(found, found.models[1]))
    assert "No speed: nowhere shown to be faster than the dense model." in said.gained
    assert "nowhere shown to be faster than the dense model" in said.advice.sentence
    assert not any("lower" in line for line in said.lost)


def test_memory_and_disk_count_in_both_directions() -> None:
    dense = results.model("dense", "dense")
    assert dense.peak_memory_bytes is not None
    less = facts(speeds=SLOW, moe_changes={"peak_memory_bytes": dense.peak_memory_bytes // 2})
    assert "50 % less memory" in advise(less).sentence
    assert "50 % less memory." in answers(less).gained
    more = answers(facts(moe_changes={"bytes_on_disk": 2 * dense.bytes_on_disk}))
    assert "The checkpoint is 2.00 times as large." in more.lost
    assert facts(moe_changes={"peak_memory_bytes": None}).memory is None


def test_several_prompt_lengths_are_told_apart() -> None:
    found = bench(moe=50.0)
    found.verdicts = [
        results.verdict("moe", "decode", batch, prompt, times)
        for batch, prompt, times in ((1, 128, 1.2), (8, 128, 1.1), (1, 2048, 1.3), (8, 2048, 0.8))
    ]
    sentence = advise(facts_of(found, found.models[1])).sentence
    assert "decode at batch 1 and 8 of 128 tokens, at batch 1 of 2,048 tokens" in sentence
    assert "keep the dense model for decode at batch 8 of 2,048 tokens" in sentence


def test_texts_are_pooled_by_their_tokens() -> None:
    found = bench(moe=100.0)
    second = dataclasses.replace(results.quality("moe", 50.0, 50.0, "other", spread=0.04), num_tokens=30_720)
    first = next(row for row in found.quality if row.model == "moe")
    found.quality.append(second)
    pooled = quality_of(found, "moe")
    assert pooled is not None
    assert pooled.num_tokens == 40_960
    assert pooled.perplexity == pytest.approx(math.exp((math.log(100) + 3 * math.log(50)) / 4))
    assert pooled.ratio == pytest.approx(math.exp(math.log(2) / 4))
    edge = math.hypot(0.02 / 4, 0.04 * 3 / 4)
    assert pooled.ratio_low == pytest.approx(pooled.ratio * math.exp(-edge))
    assert pooled.ratio_high == pytest.approx(pooled.ratio * math.exp(edge))
    assert pooled.kl_nats == pytest.approx(sum(row.kl_nats * row.num_tokens for row in (first, second)) / 40_960)
    # Of ratios to a static model only one that all texts have.
    assert pooled.over_static == {}
    # Of one text the numbers are that text's.
    assert quality_of(found, "static") == next(row for row in found.quality if row.model == "static")
    assert quality_of(found, "nobody") is None


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


def test_pairs_are_one_letter_each() -> None:
    coactivation = [[0.0, 1.0, -1.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]
    letters = experts.encode_pairs(coactivation)
    steps = [experts.LETTERS.index(letter) - experts.MIDDLE for letter in letters]
    # Twice as often is one in log2; never is the lowest; as chance is the middle.
    assert [round(step * experts.STEP, 6) for step in steps] == [1.0, -3.1, 0.0]
    assert len(set(experts.LETTERS)) == len(experts.LETTERS) == 2 * experts.MIDDLE + 1


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("values", [(1.0, 1.0), (0.97, 1.03), (0.5, 3.2), (1e-3, 4e4), (93.2, 134.5)])
def test_a_plot_shows_every_point_inside_its_axes(scale: plots.Scale, values: tuple[float, ...]) -> None:
    points = tuple(plots.Point(value, value, "told when pointed at", "a label") for value in values)
    axis = plots.Axis("value", scale)
    one = plots.Plot("key", "title", "words", axis, axis, (plots.Series("s", "moe", points),))
    drawing = ElementTree.fromstring(one.drawing())
    marks = [(float(mark.attrib["cx"]), float(mark.attrib["cy"])) for mark in drawing.iter("circle") if len(mark)]
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
    plot = next(one for one in drawings.speeds(found) if one.key == "speed-decode-512")
    points = next(series.points for series in plot.series if series.name == "moe-50")
    assert [point.y for point in points] == pytest.approx([1 / row.time_over_dense for row in decode])
    assert "grouped_mm" in points[0].title
    results.write(tmp_path, found)
    done = report(tmp_path)
    assert done.headlines[0].decode_speed == (min(point.y for point in points), max(point.y for point in points))
    assert "\u00d70.81\u20131.30" in Page(done.out.read_text()).text


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
    assert not tags & {"link", "img", "iframe", "object", "form", "base"}
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy
    assert "http" not in policy


def test_the_page_says_it_all(page: Page) -> None:
    for text in (
        *("Should I use it?", "What did I lose?", "What did I gain?", "Not as it is", "\u00d72.20"),
        *("moe-50", "smollm2-135m.gguf", "How this verdict is made", "The first rule that applies gives the advice."),
        *("CMoE at 50 %", "chosen: greedy", "perplexity on held-out text", "FAILED: perplexity under static"),
        *("moeify split smollm2-135m.gguf --experts 32 --active 16 --no-refit -o moe-50", "sha256 abc123"),
        *("grouped_mm", "needs a CUDA device", "made up", "liger none", "Layer 29"),
    ):
        assert text in page.text, text
    assert "Above 5.91 and not drawn: random at 50 %." in page.text


def test_drawings_have_names_words_and_numbers(page: Page) -> None:
    drawings = [attributes for tag, attributes in page.elements if tag == "svg" and "role" in attributes]
    assert len(drawings) == 5
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert len(ids) == sum("id" in attributes for _, attributes in page.elements)
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert set((drawing["aria-labelledby"] or "").split()) <= ids
    assert page.text.count("The numbers") == 5
    heat = [attributes for tag, attributes in page.elements if tag == "table" and attributes.get("class") == "heat"]
    assert len(heat) == 2
    for one in heat:
        assert set((one["aria-labelledby"] or "").split()) <= ids
    # A heat map of loads is a table: every number is in it, with the layer and the expert that it is of.
    assert (
        sum((attributes.get("class") or "").startswith("shade-") for tag, attributes in page.elements if tag == "td")
        == 960
    )


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
    assert len(seen.scripts) == len(plain.scripts)
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


def test_data_blocks_cannot_be_left(tmp_path: Path) -> None:
    found = results.smollm2(2, 4)
    results.write(tmp_path, found)
    seen = Page(report(tmp_path).out.read_text())
    data = [json.loads(script) for script in seen.scripts[:-1]]
    assert {"0", "1"} in [set(block) for block in data]
    assert all(len(line) == 6 for block in data for line in block.values() if set(block) == {"0", "1"})


def test_only_a_benchmark_is_needed(tmp_path: Path) -> None:
    """Of one dense model and one mixture of experts, with nothing measured but sizes."""
    found = bench(moe=None, static=None, speeds={})
    found.quality, found.ceilings = [], None
    results.write(tmp_path, found, "anything.json")
    done = report(tmp_path)
    assert done.headlines[0].ratio is None
    assert done.headlines[0].answers.advice.level == "unknown"
    seen = Page(done.out.read_text())
    assert seen.text.count("not measured") >= 3
    assert "Quality for size" not in seen.text
    assert "What the experts do" not in seen.text


def test_texts_are_called_by_their_last_part_unless_two_would_be_the_same() -> None:
    found = bench()
    for other, expected in (("x/other.txt", {"text.txt", "other.txt"}), ("b/text.txt", {"a/text.txt", "b/text.txt"})):
        found.quality = [results.quality("dense", 50.0, 50.0, data) for data in ("a/text.txt", other)]
        assert {row[1].text for row in tables.qualities(found).rows} == {*expected, "all texts"}


def test_several_mixtures(tmp_path: Path) -> None:
    found = results.smollm2(2, 4)
    found.models.append(results.model("moe-75", "moe", 0.75))
    found.quality += [results.quality("moe-75", 52.0, data=data) for data in ("moby-dick", "state-of-the-union")]
    found.verdicts.append(results.verdict("moe-75", "decode", 1, 512, 0.9))
    results.write(tmp_path, found)
    done = report(tmp_path)
    assert [headline.model for headline in done.headlines] == ["moe-50", "moe-75"]
    assert "The other models of this run" in done.out.read_text()
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
    found = split_command({**options, "unknown": 3, "seed": 0, "budget": 0.5}, "some/model", "out/moeify.json")
    assert found == ("moeify split some/model --experts 16 --dense-layers 0,29 --no-refit --calibration 'a b,c' -o out")


def test_everything_the_page_needs_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [path.name for path in (ROOT / "moeify" / "reporting").iterdir() if path.is_file() and path.suffix != ".py"]
    assert len(files) == 5
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
    for name, place in (("compare.json", "rows"), ("search.json", "frontier")):
        values = json.loads((tmp_path / name).read_text())
        values[place][1]["perplexity"] = None
        (tmp_path / name).write_text(json.dumps(values))
    run = read_run(tmp_path)
    assert run.compared is not None
    assert run.searched is not None
    assert math.isnan(run.compared.value.rows[1].perplexity)
    assert math.isnan(run.searched.value.frontier[1].perplexity)
    page = Page(report(tmp_path).out.read_text())
    assert "not drawn: CMoE at 50 %, random at 50 %" in page.text
