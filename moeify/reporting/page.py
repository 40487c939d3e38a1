"""Puts the parts of a report into one HTML page, or into a summary in Markdown.

Everything that comes from a result (tokens, paths, names) is escaped, control characters and those that turn the
direction of text are spelled out; the policy in the page's head lets no script run and nothing be fetched.
"""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moeify.benchmark.models import table as benchmark
from moeify.reporting import drawings, experts, provenance, tables, verdict
from moeify.reporting.answers import Answers
from moeify.reporting.facts import Facts, demonstration, facts_of
from moeify.reporting.reader import RunFolder
from moeify.version import __version__
from moeify.words import on_one_line, printable

LEVELS = {"yes": "Yes", "partly": "In part", "no": "No", "unknown": "Cannot say"}
# What Markdown, and GitHub's mentions and issue numbers, take for more than text.
MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~@&!])")


def render(run: RunFolder, subjects: Sequence[tuple[Facts, Answers]], *, command: str, markdown: bool = False) -> str:
    """The page as text.

    Args:
        run: all results.
        subjects: mixtures of experts and the answers about them, the main one first; not empty.
        command: that makes the page again.
        markdown: the summary for a pull request instead.
    """
    bench, files = run.bench.value, resources.files("moeify.reporting")
    measured = [facts_of(bench, model) for model in bench.models]
    environment = Environment(
        loader=PackageLoader("moeify", "reporting"),
        autoescape=not markdown,
        finalize=_markdown if markdown else _spelled_out,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("summary.md.j2" if markdown else "report.html.j2").render(
        version=__version__,
        style=Markup("".join((files / name).read_text(encoding="utf-8") for name in ("plot.css", "report.css"))),
        bench=bench,
        subjects=subjects,
        levels=LEVELS,
        demonstration=demonstration(bench),
        dense_name=Path(bench.models[0].path).name or bench.models[0].name,
        rules=verdict.RULES,
        convention=verdict.CONVENTION,
        models=tables.models(measured),
        evaluations=tables.evaluations(run),
        comparison=tables.comparison(run),
        loops=tables.loops(run),
        scores=tables.scores(run),
        tasks=tables.of_grid("tasks", benchmark.tasks(bench)),
        verdicts=tables.verdicts(measured),
        frontier=drawings.frontier(run),
        speeds=drawings.speeds(measured),
        experts=experts.experts_parts(bench),
        curves=drawings.training(run),
        training=tables.training(run.tuned),
        numbers=tables.all_numbers(bench),
        notes=[*run.notes, *benchmark.notes(bench)[1:]],
        limits=[
            f"{'Holds' if limit.passed else 'FAILED'}: {limit.name}: {limit.measured}, allowed {limit.allowed}"
            for limit in (run.ran.value.limits if run.ran else ())
        ],
        measurement=provenance.measurement(run),
        again=[*provenance.again(run), command],
    )


def _spelled_out(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def _markdown(value: Any) -> Any:
    """On one line, with nothing in it that Markdown takes for more than text."""
    return MARKDOWN.sub(r"\\\1", on_one_line(value)) if type(value) is str else value
