"""Line and point plots as plain geometry: the template draws it as SVG, whose colours follow the page's theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moeify.reporting.words import number

# The drawing's own units; the page scales it. Narrow enough that text can be read on a phone.
WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 26, 38
# Least distance of two labels' base lines, and width of one letter of a label.
LINE_HEIGHT, LETTER_WIDTH = 14, 6.2
# How far a label may move to be free, nearest first.
OFFSETS = tuple(sorted(range(-60, 62, 2), key=abs))

Scale = Literal["linear", "log"]
Shape = Literal["circle", "square", "diamond", "dot"]


@dataclass(frozen=True)
class Point:
    """One measured value.

    Args:
        x, y: in the units of the axes.
        title: what it is, shown when pointed at.
        label: written beside it; empty for none.
        interval: of y, drawn as a bar; None if there is none.
    """

    x: float
    y: float
    title: str = ""
    label: str = ""
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Args:
        name: of the legend.
        style: CSS class: dense, moe, static, other, floor.
        points: in the order of the line.
        shape: of their marks; None draws the line alone.
        line: whether they are joined.
    """

    name: str
    style: str
    points: tuple[Point, ...]
    shape: Shape | None = "circle"
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """One axis: what it measures, how it is scaled, and values that it must reach or mark."""

    label: str
    scale: Scale = "linear"
    include: tuple[float, ...] = ()
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """The numbers behind a drawing."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point in the drawing's units; the label stands at (label_x, label_y) and ends there if `end`.

    The bar is the path of the interval, empty if there is none.
    """

    x: float
    y: float
    title: str
    label: str
    label_x: float
    label_y: float
    end: bool
    bar: str


@dataclass(frozen=True)
class Trace:
    """A series in the drawing's units."""

    name: str
    style: str
    shape: Shape | None
    path: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Plot:
    """A drawing, what it shows in words, and its numbers."""

    key: str
    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    traces: tuple[Trace, ...]
    table: Table
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM

    @property
    def legend(self) -> tuple[Trace, ...]:
        """One series for each name."""
        return tuple({trace.name: trace for trace in self.traces}.values())


def plot(key: str, title: str, description: str, axes: tuple[Axis, Axis], series: Sequence[Series]) -> Plot:
    """Lay out a plot; values that a scale cannot show are left out of the drawing, not of the table.

    Args:
        key: unique in the page.
        title, description: for those who cannot see it, and for the caption.
        axes: x and y.
        series: what is drawn, the most important last, which lies on top.
    """
    x_axis, y_axis = axes
    to_x = _Map(x_axis, [point.x for one in series for point in one.points], LEFT, WIDTH - RIGHT)
    heights = [value for one in series for point in one.points for value in (point.y, *(point.interval or ()))]
    to_y = _Map(y_axis, heights, HEIGHT - BOTTOM, TOP)
    traces = [_trace(one, to_x, to_y) for one in series]
    rows = [
        (one.name, number(point.x), number(point.y), _interval_words(point), point.title)
        for one in series
        for point in one.points
    ]
    return Plot(
        key=key,
        title=title,
        description=description,
        x_label=x_axis.label,
        y_label=y_axis.label,
        x_ticks=to_x.ticks,
        y_ticks=to_y.ticks,
        traces=tuple(_spread(traces)),
        table=Table(("series", x_axis.label, y_axis.label, "95 % interval", "point"), tuple(rows)),
    )


class _Map:
    """From values to the drawing's units."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self._log = axis.scale == "log"
        self._start, self._end = start, end
        shown = [value for value in (*values, *axis.include, *axis.ticks) if self.shows(value)] or [1.0]
        low, high = min(shown), max(shown)
        marks = axis.ticks or (_log_ticks(low, high) if self._log else _linear_ticks(low, high))
        low, high = min(low, *marks), max(high, *marks)
        if low == high:
            low, high = (low / 2, high * 2) if self._log else (low - 1, high + 1)
        # Linear axes end at a tick; at the end of others marks would be cut in half.
        space = 0.04 if axis.ticks or self._log else 0.0
        self._low, self._high = self._warp(low), self._warp(high)
        margin = space * (self._high - self._low)
        self._low, self._high = self._low - margin, self._high + margin
        self.ticks = tuple(Tick(self(value), f"{value:,.10g}") for value in marks)

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self._log)

    def _warp(self, value: float) -> float:
        return math.log(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._warp(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Four to seven round numbers that enclose the values."""
    span = (high - low) or abs(high) or 1.0
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 12) for index in range(first, max(last, first + 1) + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """At most eight round numbers within the values, as fine as it takes for three; equal steps where all are close."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for nice in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8),
    ):
        values = [round(factor * 10.0**power, 9 - power) for power in powers for factor in nice]
        found = [value for value in values if low * 0.999 <= value <= high * 1.001]
        if len(found) >= 3:
            return tuple(found[:: -(-len(found) // 8)])
    close = tuple(value for value in _linear_ticks(low, high) if low * 0.999 <= value <= high * 1.001)
    return close or tuple(found) or (low,)


def _trace(series: Series, to_x: _Map, to_y: _Map) -> Trace:
    marks = []
    for point in series.points:
        if not (to_x.shows(point.x) and to_y.shows(point.y)):
            continue
        x, y = to_x(point.x), to_y(point.y)
        # On the side where the label fits.
        end = x + 10 + LETTER_WIDTH * len(point.label) > WIDTH
        edges = [to_y(edge) for edge in point.interval or () if to_y.shows(edge)]
        bar = f"M{x:g} {edges[0]:g}V{edges[1]:g}" if len(edges) == 2 else ""
        marks.append(Mark(x, y, point.title, point.label, x - 9 if end else x + 9, y + 4, end, bar))
    path = "M" + "L".join(f"{mark.x:g} {mark.y:g}" for mark in marks) if series.line and len(marks) > 1 else ""
    return Trace(series.name, series.style, series.shape, path, tuple(marks))


def _interval_words(point: Point) -> str:
    return "" if point.interval is None else f"{number(point.interval[0])} to {number(point.interval[1])}"


def _spread(traces: Sequence[Trace]) -> list[Trace]:
    """Move each label up or down to the nearest place where it lies on no other."""
    placed: list[Mark] = []
    spread = []
    for trace in traces:
        marks = []
        for mark in trace.marks:
            moves = (replace(mark, label_y=mark.label_y + offset) for offset in OFFSETS)
            free = next((one for one in moves if not any(_overlap(one, other) for other in placed)), mark)
            marks.append(free)
            placed += [free] if free.label else []
        spread.append(replace(trace, marks=tuple(marks)))
    return spread


def _overlap(one: Mark, other: Mark) -> bool:
    def span(mark: Mark) -> tuple[float, float]:
        width = LETTER_WIDTH * len(mark.label)
        return (mark.label_x - width, mark.label_x) if mark.end else (mark.label_x, mark.label_x + width)

    (left, right), (other_left, other_right) = span(one), span(other)
    return left < other_right and other_left < right and abs(one.label_y - other.label_y) < LINE_HEIGHT
