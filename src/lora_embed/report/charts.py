"""What a chart shows, and the scales that it is drawn by. `templates/charts.html` draws it as inline SVG.

The plane of a chart is `ACROSS` by `UP` pixels, so that it is as readable on a phone as in a column of a wide page.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

ACROSS, UP = 286.0, 174.0
INSET = 8.0  # between the axis and the first mark
ROW_WIDTH = 240.0  # of an interval in a table's row
Format = Callable[[float], str]


def percent(value: float) -> str:
    """A share in percent, without needless digits."""
    return f"{100 * value:.3g}"


def plain(value: float) -> str:
    """A number for an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Values → pixels, with round values to mark."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Pixels; a value outside the scale is put at its edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def scale(values: Iterable[float], start: float, end: float, *, from_zero: bool = False, most: int = 5) -> Scale:
    """A scale over finite values that begins and ends at round ones."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = (0.0 if from_zero else min(finite)), max(finite)
    if high - low < 1e-9:
        low, high = (low, low + 1.0) if from_zero else (low - 0.01, high + 0.01)
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(number * step, 12) for number in range(first, last + 1))
    return Scale(low=ticks[0], high=ticks[-1], start=start, end=end, ticks=ticks)


def row_scale(values: Iterable[float]) -> Scale:
    """A scale over the width of an interval in a table's row."""
    return scale(values, 16, ROW_WIDTH - 16, most=4)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis shows: its name with the unit, and how its figures are written."""

    name: str
    shows: Format = plain
    from_zero: bool = False


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mark at two values. A pointer that rests on it shows `says`; `label` stands beside it."""

    x: float
    y: float
    says: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind; `is_joined` draws a line through them in the order given."""

    name: str
    points: tuple[Point, ...]
    is_joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Points and lines over two axes; `title` is the caption, `says` tells a reader who cannot see it what it shows."""

    title: str
    says: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]

    @cached_property
    def across(self) -> Scale:
        values = [point.x for series in self.series for point in series.points]
        return scale(values, INSET, ACROSS, from_zero=self.x.from_zero)

    @cached_property
    def up(self) -> Scale:
        values = [point.y for series in self.series for point in series.points]
        return scale(values, UP, 0, from_zero=self.y.from_zero)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A bar from one x to another, with a height for each name, stacked in the order of the names."""

    start: float
    end: float
    heights: dict[str, float]

    def lower_edges(self) -> list[tuple[str, float, float]]:
        """Each name, where its part begins, and its height."""
        total, edges = 0.0, []
        for name, height in self.heights.items():
            edges.append((name, total, height))
            total += height
        return edges


@dataclass(frozen=True, kw_only=True)
class StackedChart:
    """Stacked bars side by side, all with the same names."""

    title: str
    says: str
    x: Axis
    y: Axis
    stacks: tuple[Stack, ...]

    @cached_property
    def across(self) -> Scale:
        return scale([edge for stack in self.stacks for edge in (stack.start, stack.end)], 0, ACROSS, from_zero=True)

    @cached_property
    def up(self) -> Scale:
        return scale([sum(stack.heights.values()) for stack in self.stacks], UP, 0, from_zero=True)
