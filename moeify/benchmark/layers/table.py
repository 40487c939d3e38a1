"""A layer benchmark as tables, for the terminal and for Markdown: one line a case, the peers side by side."""

from collections import Counter
from collections.abc import Mapping, Sequence

from moeify.benchmark.grid import Grid
from moeify.benchmark.layers.results import LayerBench, Row
from moeify.words import fixed

OURS = "moeify"
# Where ours is not ahead of every peer.
MARK = "*"
MISSING = {"failed": "-", "wrong": "wrong"}
DETAILS = ("TFLOP/s", "GB/s", "launch us", "first use s", "peak MB", "saved B/token", "error", "eager's error")


def grids(result: LayerBench) -> list[Grid]:
    """For every pass and routing the times of all peers, in microseconds, and then what else is known of ours."""
    peers = list(dict.fromkeys(row.peer for row in result.rows))
    by_case: dict[str, dict[str, Row]] = {}
    for row in result.rows:
        by_case.setdefault(row.case, {})[row.peer] = row
    groups: dict[tuple[str, str], list[dict[str, Row]]] = {}
    for rows in by_case.values():
        row = next(iter(rows.values()))
        groups.setdefault((row.pass_name, row.routing), []).append(rows)
    tables = []
    for (pass_name, routing), cases in groups.items():
        title = f"{pass_name}, {routing} routing"
        compared = ("/floor", "/dense", "ahead") if OURS in peers else ()
        columns = ("case", "T", "hit", "floor", *peers, *compared)
        tables.append(Grid(f"{title}, us", columns, tuple(_times(rows, peers) for rows in cases), num_keys=2))
        ours = [rows[OURS] for rows in cases if OURS in rows and rows[OURS].us is not None]
        if ours:
            details = tuple(_details(row) for row in ours)
            tables.append(Grid(f"{title}, {OURS}", ("case", "T", *DETAILS), details, num_keys=2))
    return tables


def notes(result: LayerBench) -> list[str]:
    """Where and how it was measured, what could not be, and what is not ahead."""
    ceilings = result.ceilings
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in result.versions.items())
    bandwidth, rate = ceilings.copy_bytes_per_second / 1e9, ceilings.matmul_flops_per_second / 1e12
    lines = [
        f"{result.machine['device']}, {result.dtype}, {result.date[:10]}, {packages}",
        f"measured in this run: copy {bandwidth:,.0f} GB/s, {ceilings.dtype} matrix product {rate:,.1f} TFLOP/s",
    ]
    if result.command:
        lines.append(result.command)
    reasons = Counter((row.peer, f"{row.status}: {row.reason}") for row in result.rows if row.status != "ok")
    reasons.update((row.peer, f"no graph (s): {row.method_reason}") for row in result.rows if row.method == "stream")
    lines += [f"{peer}, {_cases(count)}: {reason}" for (peer, reason), count in reasons.items()]
    ours = [row for row in result.rows if row.peer == OURS]
    if ours:
        ahead = sum(row.beaten_by == () for row in ours)
        lines.append(f"{OURS} is ahead of every peer on {ahead} of {_cases(len(ours))}, {MARK} marks the others")
    if result.not_run:
        lines.append(f"{_cases(len(result.not_run))} not run: {result.stopped or 'interrupted'}")
    return lines


def text(result: LayerBench) -> str:
    """Plain text."""
    parts = []
    for grid in grids(result):
        table = [grid.columns, *grid.lines]
        widths = [max(len(line[index]) for line in table) for index in range(len(grid.columns))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        parts.append("\n".join([grid.title, *(line.rstrip() for line in lines)]))
    return "\n\n".join([*parts, "\n".join(notes(result))])


def markdown(result: LayerBench) -> str:
    """For a README."""
    parts = []
    for grid in grids(result):
        table = [grid.columns, ["---"] + ["---:"] * (len(grid.columns) - 1), *grid.lines]
        lines = ["| " + " | ".join(cell.replace("*", "\\*") for cell in line) + " |" for line in table]
        parts.append("\n".join([f"{grid.title}:", "", *lines]))
    return "\n\n".join([*parts, "\n".join(f"* {note}" for note in notes(result))]) + "\n"


def _times(rows: Mapping[str, Row], peers: Sequence[str]) -> tuple[str, ...]:
    """The floor and the experts that are hit are those of the experts, not of the dense FFN."""
    known = next((row for row in rows.values() if row.experts_hit is not None), next(iter(rows.values())))
    head = (known.shape, str(known.tokens), fixed(known.experts_hit, 1), fixed(known.floor_us, 1))
    times = tuple(_time(rows[name]) if name in rows else "" for name in peers)
    if OURS not in peers:
        return (*head, *times)
    ours = rows[OURS]
    ahead = "yes" if ours.beaten_by == () else MARK
    return (*head, *times, fixed(ours.time_over_floor, 2), fixed(ours.time_over_dense, 2), ahead)


def _details(row: Row) -> tuple[str, ...]:
    peak = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 1e6
    return (
        row.shape,
        str(row.tokens),
        fixed(row.tflops_per_second, 1),
        fixed(row.gb_per_second, 0),
        fixed(row.launch_us, 1),
        fixed(row.first_use_seconds, 2),
        fixed(peak, 1),
        fixed(row.saved_bytes_per_token, 0),
        _errors(row.error, row.gradient_error),
        _errors(row.eager_error, row.eager_gradient_error),
    )


def _time(row: Row) -> str:
    """Behind a time, `s` says that the calls could not be held in a graph."""
    if row.status != "ok":
        return MISSING[row.status]
    return f"{fixed(row.us, 1)}{' s' if row.method == 'stream' else ''}"


def _errors(output: float | None, gradients: float | None) -> str:
    return " ".join(f"{error:.1e}" for error in (output, gradients) if error is not None)


def _cases(count: int) -> str:
    return f"{count} case{'' if count == 1 else 's'}"
