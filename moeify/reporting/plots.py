"""Line and point plots as SVG, for the report's page and as files of their own.

Classes give every mark its colour, so that plot.css draws them in the reader's light or dark theme.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from markupsafe import Markup

from moeify.reporting.tables import Cell, Table, cell
from moeify.words import number, printable

# The drawing's own units; the page scales it. Narrow enough that text can be read on a phone.
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 404, 26, 222
# Least distance of two labels' base lines, and width of one letter of a label.
LINE_HEIGHT, LETTER_WIDTH = 14, 6.6
# How far a label may move to be free, nearest first.
MOVES = sorted(range(-60, 62, 2), key=abs)

Scale = Literal["linear", "log"]
Shape = Literal["circle", "square", "diamond", "dot"]
# Paths that begin in the middle of the mark.
SHAPES: dict[Shape, str] = {
    "circle": "m-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "square": "m-4.5-4.5h9v9h-9z",
    "diamond": "m0-6l6 6l-6 6l-6-6z",
    "dot": "m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0z",
}


@dataclass(frozen=True)
class Point:
    """One measured value.

    Args:
        x, y: in the units of the axes.
        title: its description, told when it is pointed at.
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
        style: CSS class: dense, moe, static, search or other.
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
    """One axis: its quantity, its scale, and values that it must reach or mark."""

    label: str
    scale: Scale = "linear"
    include: tuple[float, ...] = ()
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plot:
    """A drawing, a description of it in words, and its numbers.

    Args:
        key: unique in the page.
        title, description: for those who cannot see it, and for the caption.
        x, y: the axes; values that a scale cannot show are left out of the drawing, not of the table.
        series: the most important last, which lies on top.
    """

    key: str
    title: str
    description: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]

    @property
    def table(self) -> Table:
        """All numbers."""
        columns = ("series", self.x.label, self.y.label, "95 % interval", "point")
        rows = tuple(
            (
                *(Cell(series.name), cell(point.x), cell(point.y)),
                *(Cell(" to ".join(map(number, point.interval or ()))), Cell(point.title)),
            )
            for series in self.series
            for point in series.points
        )
        return Table(f"{self.key}-table", self.title, columns, rows)

    def drawing(self) -> Markup:
        """For a page with a title and a description under the ids KEY-title and KEY-words."""
        names = f"{self.key}-title {self.key}-words"
        return _element("svg", *_inside(self), class_="plot", role="img", aria_labelledby=names, viewBox=_box(self))

    def file(self) -> str:
        """An SVG file that needs no other."""
        style = (resources.files("moeify.reporting") / "plot.css").read_text(encoding="utf-8")
        words = (_element("title", self.title), _element("desc", self.description), _element("style", Markup(style)))
        paper = _element("rect", class_="paper", width="100%", height="100%")
        xmlns = "http://www.w3.org/2000/svg"
        svg = _element(
            "svg", *words, paper, *_inside(self), xmlns=xmlns, role="img", viewBox=_box(self), data_generator="moeify"
        )
        return f"{svg}\n"


def _element(tag: str, *inner: str, **attributes: object) -> Markup:
    """One element; text is escaped, `class_` is class, and attributes that are None are left out."""
    words = [
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), f"{value:g}" if type(value) is float else value)
        for name, value in attributes.items()
        if value is not None
    ]
    # XML has no place for control characters, however they are written.
    parts = (part if isinstance(part, Markup) else printable(part) for part in inner)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), Markup("").join(words), Markup("").join(parts))


def _inside(plot: Plot) -> Iterator[Markup]:
    """Axes, lines, marks, labels, legend: what comes later lies on top."""
    points = [point for series in plot.series for point in series.points]
    to_x = _Scale(plot.x, [point.x for point in points], LEFT, RIGHT)
    to_y = _Scale(plot.y, [y for point in points for y in (point.y, *(point.interval or ()))], BOTTOM, TOP)
    yield from _axes(plot, to_x, to_y)
    placed = []
    for series in plot.series:
        drawn = [point for point in series.points if to_x.shows(point.x) and to_y.shows(point.y)]
        placed.append((series, [(point, to_x(point.x), to_y(point.y)) for point in drawn]))
    for series, marks in placed:
        if series.line and len(marks) > 1:
            path = "M" + "L".join(f"{x:g} {y:g}" for _, x, y in marks)
            yield _element("path", class_=f"line {series.style}", d=path)
    for series, marks in placed:
        for point, x, y in marks if series.shape else ():
            edges = [to_y(edge) for edge in point.interval or () if to_y.shows(edge)]
            if len(edges) == 2:
                yield _element("path", class_=f"bar {series.style}", d=f"M{x:g} {edges[0]:g}V{edges[1]:g}")
            yield _mark(series, x, y, point.title)
    yield from _labels([(point.label, x, y) for _, marks in placed for point, x, y in marks if point.label])
    for series, x, y in _legend(plot):
        if series.line:
            yield _element("path", class_=f"line {series.style}", d=f"M{x:g} {y - 4:g}h24")
        if series.shape:
            yield _mark(series, x + 12, y - 4, "")
        yield _element("text", series.name, x=x + 30, y=y)


def _axes(plot: Plot, to_x: "_Scale", to_y: "_Scale") -> Iterator[Markup]:
    for value in to_y.ticks:
        y = to_y(value)
        yield _element("path", class_="rule", d=f"M{LEFT} {y:g}H{RIGHT}")
        yield _element("text", f"{value:,.10g}", x=LEFT - 7, y=y + 4, text_anchor="end")
    for value in to_x.ticks:
        yield _element("text", f"{value:,.10g}", x=to_x(value), y=BOTTOM + 16, text_anchor="middle")
    yield _element("text", plot.y.label, x=2, y=12)
    yield _element("text", plot.x.label, x=RIGHT, y=HEIGHT - 4, text_anchor="end")


def _mark(series: Series, x: float, y: float, title: str) -> Markup:
    inner = [_element("title", title)] if title else []
    return _element("path", *inner, class_=f"mark {series.style}", d=f"M{x:g} {y:g}{SHAPES[series.shape or 'dot']}")


def _labels(labels: Sequence[tuple[str, float, float]]) -> Iterator[Markup]:
    """Each beside its point, on the side where it fits, moved up or down to where it lies on no other."""
    taken: list[tuple[float, float, float]] = []
    for label, x, y in labels:
        width = LETTER_WIDTH * len(label)
        end = x + 10 + width > WIDTH
        left = x - 9 - width if end else x + 9
        near = [base for other, wide, base in taken if left < other + wide and other < left + width]
        free = (y + 4 + move for move in MOVES if all(abs(y + 4 + move - base) >= LINE_HEIGHT for base in near))
        taken.append((left, width, next(free, y + 4)))
        anchor = "end" if end else None
        yield _element("text", label, class_="label", x=x - 9 if end else x + 9, y=taken[-1][2], text_anchor=anchor)


def _legend(plot: Plot) -> list[tuple[Series, float, float]]:
    """One series of each name and where its entry begins, in lines as wide as the drawing."""
    entries: list[tuple[Series, float, float]] = []
    x, y = 2.0, HEIGHT + 16.0
    for series in {series.name: series for series in plot.series}.values():
        width = 42 + LETTER_WIDTH * len(series.name)
        if x > 2 and x + width > WIDTH:
            x, y = 2.0, y + 18
        entries.append((series, x, y))
        x += width
    return entries


def _box(plot: Plot) -> str:
    return f"0 0 {WIDTH} {_legend(plot)[-1][2] + 8:g}"


class _Scale:
    """From values to the drawing's units."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self._log = axis.scale == "log"
        self._start, self._end = start, end
        drawn = [value for value in (*values, *axis.include, *axis.ticks) if self.shows(value)] or [1.0]
        low, high = min(drawn), max(drawn)
        self.ticks = axis.ticks or (_log_ticks(low, high) if self._log else _linear_ticks(low, high))
        low, high = min(low, *self.ticks), max(high, *self.ticks)
        if low == high:
            low, high = (low / 2, high * 2) if self._log else (low - 1, high + 1)
        low, high = self._warp(low), self._warp(high)
        # Linear axes end at a tick; at the end of others marks would be cut in half.
        margin = (high - low) * (0.04 if axis.ticks or self._log else 0.0)
        self._low, self._high = low - margin, high + margin

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self._log)

    def _warp(self, value: float) -> float:
        return math.log(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._warp(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Four to seven round numbers that enclose the values."""
    raw = ((high - low) or abs(high) or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 12) for index in range(first, max(last, first + 1) + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """At most eight round numbers within the values: equal steps where all are close, else 1, 2 and 5."""
    ticks = _linear_ticks(low, high)
    if high > 5 * low:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = tuple(round(nice * 10.0**power, 9 - power) for power in powers for nice in (1, 2, 5))
    inside = [value for value in ticks if low * 0.999 <= value <= high * 1.001] or [low]
    return tuple(inside[:: -(-len(inside) // 8)])
