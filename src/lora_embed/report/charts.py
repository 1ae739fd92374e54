"""Charts as inline SVG: drawn for 340 pixels, so that they are as readable on a phone as in a column of a wide page.

Series differ by shape as well as by colour. What comes in as text is escaped here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_embed.report.page import brief, escaped, shortened

WIDTH, HEIGHT = 340.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 14.0, 26.0, 40.0  # margins: for the figures at the axes and their names
INSET = 8.0  # between the axis and the first mark
ROW_WIDTH, ROW_HEIGHT = 240.0, 22.0  # an interval in a table's row
SHADES = 8  # colours that the style has for series
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
        """Pixels; what lies outside is put at the edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def scale(values: Sequence[float], start: float, end: float, *, from_zero: bool = False, most: int = 5) -> Scale:
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


@dataclass(frozen=True, kw_only=True)
class Point:
    """One mark; `says` is shown by a pointer that rests on it, `label` beside it."""

    x: float
    y: float
    says: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind. Joined ones are drawn as a line in the order given."""

    name: str
    points: tuple[Point, ...]
    shade: int
    is_joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis shows: its name with the unit, and how its figures are written."""

    name: str
    shows: Format = plain
    from_zero: bool = False


def xy_chart(title: str, says: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """A figure of points and lines over two axes; `title` is its caption, `says` what it shows, for a reader."""
    points = [point for one in series for point in one.points]
    across = scale([point.x for point in points], LEFT + INSET, WIDTH - RIGHT, from_zero=x.from_zero)
    up = scale([point.y for point in points], HEIGHT - BOTTOM, TOP, from_zero=y.from_zero)
    drawn = [_axes(across, up, x, y)]
    for one in series:
        at = [(across.at(point.x), up.at(point.y)) for point in one.points]
        if one.is_joined and len(at) > 1:
            path = "M" + "L".join(f"{left} {top}" for left, top in at)
            drawn.append(f'<path class="line l{one.shade % SHADES}" d="{path}"/>')
        many = len(at) > 40
        for (left, top), point in zip(at, one.points, strict=True):
            drawn.append(f"<g><title>{escaped(point.says)}</title>{mark(left, top, one.shade, 2.2 if many else 4.2)}</g>")
    drawn += [_label(across.at(point.x), up.at(point.y), point.label) for point in points if point.label]
    key = [(one.name, one.shade) for one in series] if len(series) > 1 else []
    return figure(title, says, "".join(drawn), key=key)


def stacked_chart(
    title: str, says: str, stacks: Sequence[tuple[float, float, dict[str, float]]], x: Axis, y: Axis, names: Sequence[str]
) -> str:
    """A figure of stacked bars, each from one x to another with a height for each name."""
    across = scale([edge for start, end, _ in stacks for edge in (start, end)], LEFT, WIDTH - RIGHT, from_zero=True)
    up = scale([sum(parts.values()) for _, _, parts in stacks], HEIGHT - BOTTOM, TOP, from_zero=True)
    drawn = [_axes(across, up, x, y)]
    for start, end, parts in stacks:
        left, width, under = across.at(start), max(across.at(end) - across.at(start) - 0.5, 0.5), 0.0
        shown = ", ".join(f"{part} {y.shows(value)}" for part, value in parts.items())
        boxes = []
        for shade, part in enumerate(names):
            top, bottom = up.at(under + parts.get(part, 0.0)), up.at(under)
            under += parts.get(part, 0.0)
            boxes.append(
                f'<rect class="f{shade % SHADES}" x="{left}" y="{top}" width="{width:.1f}" height="{bottom - top:.1f}"/>'
            )
        drawn.append(f"<g><title>{escaped(f'{x.shows(start)} to {x.shows(end)}: {shown}')}</title>{''.join(boxes)}</g>")
    return figure(title, says, "".join(drawn), key=[(part, shade) for shade, part in enumerate(names)])


def bar_chart(title: str, says: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """A figure of horizontal bars from zero: name, value, and the value as it is written."""
    most, step = max((value for _, value, _ in bars), default=0.0) or 1.0, 38.0
    drawn = []
    for number, (name, value, shown) in enumerate(bars):
        top, width = number * step, max(round(value / most * (WIDTH - 4), 1), 1.0)
        drawn.append(
            f'<text x="2" y="{top + 13}">{escaped(shortened(name, 34))}</text>'
            f'<text class="soft" x="{WIDTH - 2}" y="{top + 13}" text-anchor="end">{escaped(shown)}</text>'
            f'<rect class="f0" x="2" y="{top + 18}" width="{width}" height="10" rx="2"/>'
        )
    return figure(title, says, "".join(drawn), height=max(len(bars) * step, 20.0))


def figure(title: str, says: str, drawn: str, *, key: Sequence[tuple[str, int]] = (), height: float = HEIGHT) -> str:
    """A captioned figure around what is drawn."""
    items = "".join(
        f'<li><svg viewBox="-8 -8 16 16" aria-hidden="true">{mark(0, 0, shade, 5)}</svg>{brief(name, 40)}</li>'
        for name, shade in key
    )
    keyed = f'<ul class="key">{items}</ul>' if items else ""
    return (
        f'<figure><figcaption>{brief(title, 90)}</figcaption><svg viewBox="0 0 {WIDTH:g} {height:g}" role="img">'
        f"<title>{escaped(title)}</title><desc>{escaped(says)}</desc>{drawn}</svg>{keyed}</figure>"
    )


def mark(x: float, y: float, shade: int, size: float) -> str:
    """A series' shape at a place: four shapes, full for the first eight series and hollow for the next."""
    hollow = f" hollow l{shade % SHADES}" if shade % (2 * SHADES) >= SHADES else " mark"
    kind = f'class="f{shade % SHADES}{hollow}"'
    match shade % 4:
        case 0:
            return f'<circle {kind} cx="{x}" cy="{y}" r="{size:g}"/>'
        case 1:
            side = size * 0.92
            return f'<rect {kind} x="{x - side:.1f}" y="{y - side:.1f}" width="{2 * side:.1f}" height="{2 * side:.1f}"/>'
        case 2:
            size *= 1.2
            corners = f"M{x:g} {y - size:.1f}L{x + size:.1f} {y + size * 0.8:.1f}L{x - size:.1f} {y + size * 0.8:.1f}Z"
        case _:
            size *= 1.3
            corners = f"M{x:g} {y - size:.1f}L{x + size:.1f} {y:g}L{x:g} {y + size:.1f}L{x - size:.1f} {y:g}Z"
    return f'<path {kind} d="{corners}"/>'


def interval(at: Scale, low: float, mean: float, high: float, reference: float | None) -> str:
    """A mean with its interval on a scale, for a table's row whose other cells say the figures."""
    middle, end = ROW_HEIGHT / 2, at.at(high)
    drawn = "".join(f'<path class="grid" d="M{at.at(tick)} 0V{ROW_HEIGHT:g}"/>' for tick in at.ticks)
    if reference is not None:
        drawn += f'<path class="ref" d="M{at.at(reference)} 0V{ROW_HEIGHT:g}"/>'
    drawn += f'<path class="line l0" d="M{at.at(low)} {middle:g}H{end}"/>'
    drawn += "".join(f'<path class="line l0" d="M{at.at(edge)} {middle - 4:g}v8"/>' for edge in (low, high))
    return _row(drawn + mark(at.at(mean), middle, 0, 4.2))


def move(at: Scale, before: float, after: float) -> str:
    """From before, a ring, to after, a dot, on a scale, for a table's row whose other cells say the figures."""
    middle, start, end = ROW_HEIGHT / 2, at.at(before), at.at(after)
    kind = "good" if after > before else "bad" if after < before else "f7"
    drawn = "".join(f'<path class="grid" d="M{at.at(tick)} 0V{ROW_HEIGHT:g}"/>' for tick in at.ticks)
    drawn += f'<path class="line {kind}" d="M{start} {middle:g}H{end}"/>'
    drawn += f'<circle class="{kind} hollow" cx="{start}" cy="{middle:g}" r="4"/>'
    return _row(f'{drawn}<circle class="{kind}" cx="{end}" cy="{middle:g}" r="4.2"/>')


def interval_axis(at: Scale, shows: Format, name: str) -> str:
    """The figures of that scale, for the head of the column, whose name is read out alone."""
    drawn = "".join(
        f'<path class="axis" d="M{at.at(tick)} 17v5"/>'
        f'<text class="soft" x="{at.at(tick)}" y="13" text-anchor="middle">{escaped(shows(tick))}</text>'
        for tick in at.ticks
    )
    return f'<span class="hid">{escaped(name)}</span>{_row(drawn)}'


def interval_scale(values: Sequence[float]) -> Scale:
    """A scale over the width of such a row."""
    return scale(values, 16, ROW_WIDTH - 16, most=4)


def _row(drawn: str) -> str:
    return f'<svg class="row" viewBox="0 0 {ROW_WIDTH:g} {ROW_HEIGHT:g}" aria-hidden="true">{drawn}</svg>'


def _axes(across: Scale, up: Scale, x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    drawn = []
    for tick in up.ticks:
        drawn.append(
            f'<path class="grid" d="M{LEFT:g} {up.at(tick)}H{right:g}"/>'
            f'<text class="soft" x="{LEFT - 6:g}" y="{up.at(tick) + 4:g}" text-anchor="end">{escaped(y.shows(tick))}</text>'
        )
    for tick in across.ticks:
        drawn.append(
            f'<path class="axis" d="M{across.at(tick)} {bottom:g}v4"/>'
            f'<text class="soft" x="{across.at(tick)}" y="{bottom + 17:g}" text-anchor="middle">{escaped(x.shows(tick))}</text>'
        )
    return (
        f'{"".join(drawn)}<path class="axis" d="M{LEFT:g} {bottom:g}H{right:g}"/>'
        f'<text x="2" y="12">{escaped(shortened(y.name, 48))}</text>'
        f'<text x="{right:g}" y="{HEIGHT - 5:g}" text-anchor="end">{escaped(shortened(x.name, 48))}</text>'
    )


def _label(left: float, top: float, text: str) -> str:
    """Text beside a point, on the side where there is room."""
    shown = shortened(text, 24)
    is_left = left + 7 + 6.5 * len(shown) > WIDTH - 2
    anchor, shift = ("end", -10.0) if is_left else ("start", 10.0)
    return (
        f'<circle class="ring" cx="{left}" cy="{top}" r="7.5"/>'
        f'<text class="halo" x="{left + shift:g}" y="{max(top - 5, TOP - 2):g}" text-anchor="{anchor}">{escaped(shown)}</text>'
    )
