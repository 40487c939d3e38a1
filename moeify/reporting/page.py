"""Puts the parts of a report into one HTML page.

Everything that comes from a result (tokens, paths, names) is escaped by jinja2; the policy in the page's head lets no
script run but its own, told by hash, and nothing be fetched.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moeify.reporting import drawings, grids, provenance, verdict
from moeify.reporting.experts import LETTERS, LOAD_SHADES, MIDDLE, STEP, ExpertsPart, experts_part
from moeify.reporting.facts import Facts, PhaseSpeed, active_parameters, facts_of, of_kind
from moeify.reporting.plots import Plot
from moeify.reporting.reader import RunFolder
from moeify.reporting.verdict import Answers
from moeify.reporting.words import count, factor, number, percent, size
from moeify.version import __version__

if TYPE_CHECKING:
    from moeify.training.finetune import FinetuneHistory

TEMPLATE = "report.html.j2"
LEVELS = {"yes": "Yes", "partly": "In part", "no": "No", "unknown": "Cannot say"}


@dataclass(frozen=True)
class Subject:
    """One mixture of experts that the report is about."""

    facts: Facts
    answers: Answers


@dataclass(frozen=True)
class Tile:
    """A headline number: what, how much, and what it is compared with."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class TrainingPart:
    """The fine-tuning of one checkpoint."""

    file: str
    plot: Plot | None
    grid: grids.Grid


def render(run: RunFolder, subjects: Sequence[Subject], *, command: str) -> str:
    """The page as text.

    Args:
        run: all results.
        subjects: mixtures of experts, the main one first; not empty.
        command: that makes the page again.
    """
    bench = run.bench.value
    script = _asset("report.js")
    environment = Environment(
        loader=PackageLoader("moeify", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    others = [*(subject.facts for subject in subjects), *(facts_of(bench, model) for model in of_kind(bench, "static"))]
    return environment.get_template(TEMPLATE).render(
        version=__version__,
        style=Markup(_asset("report.css")),
        script=Markup(script),
        policy=_policy(script),
        bench=bench,
        run=run,
        subjects=subjects,
        levels=LEVELS,
        dense_name=Path(bench.models[0].path).name or bench.models[0].name,
        tiles=tiles(subjects[0].facts),
        rules=verdict.RULES,
        convention=verdict.CONVENTION,
        frontier=drawings.frontier(run),
        speeds=drawings.speeds(bench),
        sizes=grids.sizes(bench),
        qualities=grids.qualities(bench),
        parts=grids.parts(bench),
        verdicts=grids.verdicts(others),
        timings=grids.timings(bench),
        experts=_experts(run),
        letters={"letters": LETTERS, "middle": MIDDLE, "step": STEP},
        load_shades=LOAD_SHADES,
        trainings=[_training(index, source.file, source.value) for index, source in enumerate(run.tuned)],
        measurement=provenance.measurement(run),
        checkpoints=provenance.checkpoints(run),
        command=command,
    )


def _asset(name: str) -> str:
    return (resources.files("moeify.reporting") / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """What the browser may do with the page: run this very script, use its styles, fetch nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def tiles(facts: Facts) -> list[Tile]:
    """The headline numbers of a model; what was not measured says so."""
    model, dense = facts.model, facts.dense
    active, of = active_parameters(model), active_parameters(dense)
    found = [Tile("Active parameters", count(active), f"{percent(active / of)} of the dense model's {count(of)}")]
    if facts.quality is None:
        found.append(Tile("Perplexity / dense", "not measured", ""))
    else:
        ratio = facts.quality.ratio
        note = f"95 %: {factor(ratio.low)} to {factor(ratio.high)}; perplexity {number(facts.quality.perplexity)}"
        found.append(Tile("Perplexity / dense", f"\u00d7{factor(ratio.value)}", note))
    found += [_speed_tile("Decode speed", facts.decode), _speed_tile("Prefill speed", facts.prefill)]
    found.append(_size_tile("Peak memory", model.peak_memory_bytes, dense.peak_memory_bytes))
    found.append(_size_tile("On disk", model.bytes_on_disk, dense.bytes_on_disk))
    return found


def _speed_tile(label: str, speed: PhaseSpeed) -> Tile:
    if not speed.regimes:
        return Tile(label, "not measured", "")
    least, most = (factor(value) for value in speed.speeds)
    value = f"\u00d7{least}" if least == most else f"\u00d7{least}\u2013{most}"
    counts = [f"{len(speed.having(outcome))} {outcome}" for outcome in ("faster", "same", "slower")]
    counts = [words for words in counts if not words.startswith("0 ")]
    plural = "s" if len(speed.regimes) > 1 else ""
    return Tile(label, value, f"{len(speed.regimes)} batch size{plural}: {', '.join(counts)}")


def _size_tile(label: str, own: int | None, dense: int | None) -> Tile:
    if own is None:
        return Tile(label, "not measured", "")
    note = f"dense: {size(dense)} (\u00d7{factor(own / dense)})" if dense else ""
    return Tile(label, size(own), note)


def _experts(run: RunFolder) -> list[ExpertsPart]:
    found = run.bench.value.experts.items()
    return [experts_part(f"experts-{index}", name, layers) for index, (name, layers) in enumerate(found) if layers]


def _training(index: int, file: str, tuned: "FinetuneHistory") -> TrainingPart:
    rows = tuple(
        (
            grids.Cell(stage.stage),
            grids.Cell(figure.replace("_", " ")),
            grids.Cell(number(before), before),
            grids.Cell(number(stage.after[figure]), stage.after[figure]),
            grids.Cell(f"{stage.num_tokens:,}", stage.num_tokens),
        )
        for stage in tuned.stages
        for figure, before in stage.before.items()
        if figure in stage.after
    )
    key = f"training-{index}"
    columns = ("stage", "figure", "before", "after", "tokens")
    return TrainingPart(
        file, drawings.training(key, file, tuned), grids.Grid(f"{key}-table", f"Fine-tuning: {file}", columns, rows)
    )
