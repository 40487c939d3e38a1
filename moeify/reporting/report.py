"""One HTML page that says what was lost and gained by turning a dense model into a mixture of experts.

    moeify report RUN_DIR                  writes RUN_DIR/report.html, from what `moeify bench -o RUN_DIR` left there

The page needs no network and no other file: it can be sent around.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeify.benchmark.models.results import Interval
from moeify.command_line import command_line
from moeify.readable import Readable
from moeify.reporting.facts import Facts, active_parameters, facts_of, of_kind, parameters, speeds
from moeify.reporting.page import render
from moeify.reporting.reader import read_run
from moeify.reporting.verdict import Answers, answers
from moeify.results import check_writable, write_text

PAGE = "report.html"
# Says that a page was written by moeify.
GENERATOR = '<meta name="generator" content="moeify'


@dataclass(frozen=True)
class Headline:
    """The first screen of the report about one model.

    Args:
        model: its name in the benchmark.
        active_parameters, parameters, dense_parameters: of this model for a token, stored, and of the dense one.
        ratio: perplexity over the dense model's, over all texts; None if it was not measured.
        static_ratio: the same of the static control of the same active size; None without one.
        over_static: perplexity over that control's, from the same blocks of text; None if that was not measured.
        decode_speed, prefill_speed: least and largest multiple of the dense model's; None if not measured.
        memory_ratio, disk_ratio: peak memory and bytes on disk over the dense model's.
        answers: what was lost, what was gained, and whether to use it.
    """

    model: str
    active_parameters: int
    parameters: int
    dense_parameters: int
    ratio: Interval | None
    static_ratio: Interval | None
    over_static: Interval | None
    decode_speed: tuple[float, float] | None
    prefill_speed: tuple[float, float] | None
    memory_ratio: float | None
    disk_ratio: float | None
    answers: Answers


@dataclass(frozen=True, repr=False)
class ReportResult(Readable):
    """The page and its headlines.

    Args:
        out: the page.
        num_bytes: its size.
        headlines: one a mixture of experts, in the order of the benchmark.
        sources: kind of result -> file that it was taken from.
        notes: results that were left out, and why.
    """

    out: Path
    num_bytes: int
    headlines: tuple[Headline, ...]
    sources: Mapping[str, str]
    notes: tuple[str, ...]


def report(run_dir: str | Path, out: str | Path | None = None) -> ReportResult:
    """Write the page.

    Args:
        run_dir: a folder with the result of `moeify bench`, and whatever else moeify wrote there.
        out: the page; RUN_DIR/report.html if it is None. An earlier page is replaced.

    Raises:
        InputError: no such folder, no benchmark in it, a result that cannot be read, or a place that cannot be written.

    Example:
        print(moeify.report("my-bench").out)
    """
    folder = Path(run_dir)
    run = read_run(folder)
    out = folder / PAGE if out is None else Path(out)
    check_writable(out, GENERATOR)
    bench = run.bench.value
    subjects = [(facts, answers(facts)) for facts in (facts_of(bench, model) for model in of_kind(bench, "moe"))]
    page = render(run, subjects, command=command_line("report", str(folder), out=out))
    write_text(page, out, GENERATOR)
    headlines = tuple(_headline(*subject) for subject in subjects)
    return ReportResult(out, out.stat().st_size, headlines, run.sources, run.notes)


def _headline(facts: Facts, said: Answers) -> Headline:
    return Headline(
        model=facts.model.name,
        active_parameters=active_parameters(facts.model),
        parameters=parameters(facts.model),
        dense_parameters=parameters(facts.dense),
        ratio=facts.ratio,
        static_ratio=facts.control.ratio if facts.control else None,
        over_static=facts.over_control,
        decode_speed=speeds(facts.decode),
        prefill_speed=speeds(facts.prefill),
        memory_ratio=facts.memory,
        disk_ratio=facts.disk,
        answers=said,
    )
