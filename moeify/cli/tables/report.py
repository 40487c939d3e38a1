"""Tables of `moeify report`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.words import key_value_table
from moeify.words import size

if TYPE_CHECKING:
    from moeify.reporting.report import Headline, ReportResult


def report_tables(result: "ReportResult") -> tuple[Table, ...]:
    """The first screen of the page, a table a mixture of experts, and where it was written."""
    tables = []
    for headline in result.headlines:
        said = headline.answers
        measured = [one for one in said.readers if not one.command]
        rows = [
            ("should I use it?", said.advice.sentence),
            # One reader alone is told the same.
            *((one.reader, one.advice.sentence) for one in measured if len(measured) > 1),
            ("what did I lose?", "\n".join(said.lost)),
            ("what did I gain?", "\n".join(said.gained)),
            *(_of_encoder(headline) if headline.likeness is not None else _of_language_model(headline)),
        ]
        tables.append(key_value_table(headline.model, rows))
    rows = [("page", f"{result.out}, {size(result.num_bytes)}")]
    rows += [("note", note) for note in result.notes]
    return (*tables, key_value_table("moeify report", rows))


def _of_language_model(headline: "Headline") -> Iterator[tuple[str, str]]:
    ratio, static = headline.ratio, headline.static_ratio
    interval = "not measured" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
    yield "perplexity / dense", interval
    yield "the static control's", "none of this size" if static is None else f"{static.value:.3f}"
    yield "decode speed", _span(headline.decode_speed)
    yield "prefill speed", _span(headline.prefill_speed)
    yield "llama.cpp speed", _span(headline.engine_speed)


def _of_encoder(headline: "Headline") -> Iterator[tuple[str, str]]:
    static = headline.static_likeness
    yield "like the dense model", f"{headline.likeness:.3f}"
    yield "the static control", "none of this size" if static is None else f"{static:.3f}"
    yield "speed", _span(headline.forward_speed)


def _span(values: tuple[float, float] | None) -> str:
    return "not measured" if values is None else f"{values[0]:.2f} to {values[1]:.2f} times dense"
