"""One HTML page that says what was lost and gained by turning a dense model into a mixture of experts.

    moeify report RUN_DIR                  writes RUN_DIR/report.html, from what `moeify bench -o RUN_DIR` left there
    moeify report RUN_DIR -o summary.md    the first screen as Markdown, for a pull request

The page needs no network and no other file: it can be sent around.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

from moeify.benchmark.models.results import Interval
from moeify.command_line import command_line
from moeify.errors import UsageError
from moeify.readable import Readable
from moeify.reporting.answers import Answers, answers
from moeify.reporting.facts import Facts, demonstration, facts_of, of_kind, speeds
from moeify.reporting.page import render
from moeify.reporting.reader import read_run
from moeify.results import check_writable, write_text

PAGE, PAGES, SUMMARY = "report.html", (".html", ".htm"), ".md"
# Say that a page, or a summary, was written by moeify.
GENERATOR, SUMMARY_GENERATOR = '<meta name="generator" content="moeify', "<!-- written by moeify report -->"


@dataclass(frozen=True)
class Headline:
    """The first screen of the report about one model.

    Args:
        model: its name in the benchmark.
        ratio: perplexity over the dense model's, over all texts; None if it was not measured.
        static_ratio: the same of the static control of the same active size; None without one.
        over_static: perplexity over that control's, from the same blocks of text; None if that was not measured.
        decode_speed, prefill_speed: least and largest multiple of the dense model's in transformers, engine_speed in
            llama.cpp; None if not measured.
        forward_speed: the same of encoders, and likeness, static_likeness what stayed of their work, by Facts.likeness.
        memory_ratio, disk_ratio: peak memory and bytes on disk over the dense model's.
        answers: what was lost, what was gained, and whether to use it.
    """

    model: str
    ratio: Interval | None
    static_ratio: Interval | None
    over_static: Interval | None
    decode_speed: tuple[float, float] | None
    prefill_speed: tuple[float, float] | None
    engine_speed: tuple[float, float] | None
    memory_ratio: float | None
    disk_ratio: float | None
    answers: Answers
    forward_speed: tuple[float, float] | None = None
    likeness: float | None = None
    static_likeness: float | None = None


@dataclass(frozen=True, repr=False)
class ReportResult(Readable):
    """The page and its headlines.

    Args:
        out: the page.
        num_bytes: its size.
        headlines: one a mixture of experts, in the order of the benchmark.
        sources: kind of result -> file that it was taken from.
        notes: whether it is a demonstration, and results that were left out, and why.
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
        out: the page; RUN_DIR/report.html if it is None. An earlier page is replaced. The summary for a pull request
            if its name ends in .md.

    Raises:
        UsageError: the page's name ends in something else.
        InputError: no such folder, no benchmark in it, a result that cannot be read, or a place that cannot be written.

    Example:
        print(moeify.report("my-bench").out)
    """
    folder, command = Path(run_dir), command_line("report", str(run_dir), out=out)
    run = read_run(folder)
    out = folder / PAGE if out is None else Path(out)
    markdown = out.suffix == SUMMARY
    if out.suffix not in (SUMMARY, *PAGES):
        raise UsageError(f"{out} is not the name of a page", "-o takes FILE.html, or FILE.md for a pull request")
    bench, generator = run.bench.value, SUMMARY_GENERATOR if markdown else GENERATOR
    check_writable(out, generator)
    moes = [facts_of(bench, model) for model in of_kind(bench, "moe")]
    subjects = [(facts, answers(facts, bench.command, run.path)) for facts in moes]
    page = render(run, subjects, command=command, markdown=markdown)
    write_text(page, out, generator)
    notes = (*filter(None, [demonstration(bench)]), *run.notes)
    return ReportResult(out, out.stat().st_size, tuple(starmap(_headline, subjects)), run.sources, notes)


def _headline(facts: Facts, said: Answers) -> Headline:
    static = facts.control.ratio if facts.control else None
    decode, prefill, engine = map(speeds, (facts.decode, facts.prefill, facts.engine))
    ratios = (facts.ratio, static, facts.over_control)
    own, other = facts.likeness, facts.control.likeness if facts.control else None
    return Headline(
        facts.model.name,
        *ratios,
        decode,
        prefill,
        engine,
        facts.memory,
        facts.disk,
        said,
        forward_speed=speeds(facts.forward),
        likeness=own.value if own else None,
        static_likeness=other.value if other else None,
    )
