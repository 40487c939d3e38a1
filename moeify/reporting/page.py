"""Puts the parts of a report into one HTML page.

Everything that comes from a result (tokens, paths, names) is escaped by jinja2, control characters and those that turn
the direction of text are spelled out; the policy in the page's head lets no
script run but its own, told by hash, and nothing be fetched.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moeify.benchmark.models.results import Outcome, Verdict
from moeify.reporting import drawings, experts, provenance, tables, verdict
from moeify.reporting.facts import Facts, active_parameters, facts_of, of_kind, speeds
from moeify.reporting.reader import RunFolder
from moeify.version import __version__
from moeify.words import count, factor, number, percent, printable, size

LEVELS = {"yes": "Yes", "partly": "In part", "no": "No", "unknown": "Cannot say"}


@dataclass(frozen=True)
class Tile:
    """A headline number: its name, its value, and a comparison."""

    label: str
    value: str = "not measured"
    note: str = ""


def render(run: RunFolder, subjects: Sequence[tuple[Facts, verdict.Answers]], *, command: str) -> str:
    """The page as text.

    Args:
        run: all results.
        subjects: mixtures of experts and the answers about them, the main one first; not empty.
        command: that makes the page again.
    """
    bench = run.bench.value
    script = _asset("report.js")
    loader = PackageLoader("moeify", "reporting")
    environment = Environment(
        loader=loader,
        autoescape=True,
        finalize=_spelled_out,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = [*(facts for facts, _ in subjects), *(facts_of(bench, model) for model in of_kind(bench, "static"))]
    return environment.get_template("report.html.j2").render(
        version=__version__,
        style=Markup(_asset("plot.css") + _asset("report.css")),
        script=Markup(script),
        policy=_policy(script),
        bench=bench,
        run=run,
        subjects=subjects,
        levels=LEVELS,
        dense_name=Path(bench.models[0].path).name or bench.models[0].name,
        tiles=tiles(subjects[0][0]),
        rules=verdict.RULES,
        convention=verdict.CONVENTION,
        frontier=drawings.frontier(run),
        speeds=drawings.speeds(bench),
        sizes=tables.sizes(bench),
        qualities=tables.qualities(bench),
        tasks=tables.tasks(bench),
        parts=tables.parts(bench),
        verdicts=tables.verdicts(measured),
        timings=tables.timings(bench),
        engines=tables.engines(bench),
        experts=experts.experts_parts(bench),
        letters={"letters": experts.LETTERS, "middle": experts.MIDDLE, "step": experts.STEP},
        load_shades=experts.LOAD_SHADES,
        trainings=[
            (drawings.training(f"training-{index}", source), tables.training(f"training-{index}", source))
            for index, source in enumerate(run.tuned)
        ],
        measurement=provenance.measurement(run),
        checkpoints=provenance.checkpoints(run),
        command=command,
    )


def _spelled_out(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def _asset(name: str) -> str:
    return (resources.files("moeify.reporting") / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Tells the browser to run this very script, to use the page's styles and to fetch nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def tiles(facts: Facts) -> list[Tile]:
    """The headline numbers of a model; those that were not measured say so."""
    model, dense = facts.model, facts.dense
    active, dense_active = active_parameters(model), active_parameters(dense)
    share = f"{percent(active / dense_active)} of the dense model's {count(dense_active)}"
    perplexity = Tile("Perplexity / dense")
    if facts.quality is not None and facts.ratio is not None:
        ends = f"{factor(facts.ratio.low)} to {factor(facts.ratio.high)}"
        note = f"95 %: {ends}; perplexity {number(facts.quality.perplexity)}"
        perplexity = Tile("Perplexity / dense", f"\u00d7{factor(facts.ratio.value)}", note)
    return [
        Tile("Active parameters", count(active), share),
        perplexity,
        _speed_tile("Decode speed", facts.decode),
        _speed_tile("Prefill speed", facts.prefill),
        _size_tile("Peak memory", model.peak_memory_bytes, dense.peak_memory_bytes),
        _size_tile("On disk", model.bytes_on_disk, dense.bytes_on_disk),
    ]


def _speed_tile(label: str, regimes: Sequence[Verdict]) -> Tile:
    span = speeds(regimes)
    if span is None:
        return Tile(label)
    value = "\u2013".join(dict.fromkeys(map(factor, span)))
    outcomes: tuple[Outcome, ...] = ("faster", "same", "slower", "cannot tell")
    counts = [(sum(regime.outcome == outcome for regime in regimes), outcome) for outcome in outcomes]
    words = ", ".join(f"{times} {outcome}" for times, outcome in counts if times)
    return Tile(label, f"\u00d7{value}", f"{len(regimes)} regime{'s' if len(regimes) > 1 else ''}: {words}")


def _size_tile(label: str, own: int | None, dense: int | None) -> Tile:
    if own is None:
        return Tile(label)
    return Tile(label, size(own), f"dense: {size(dense)} (\u00d7{factor(own / dense)})" if dense else "")
