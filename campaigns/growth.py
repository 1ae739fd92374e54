"""Does a figure grow? Its slope over time by least squares, with an interval, compared with a limit that is stated."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

BLOCKS = 12  # means of so many stretches are fitted: one after the other, single values are not independent
CONFIDENCE = 0.999  # a soak looks at some thirty figures, and is to cry wolf once in thirty soaks at most


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How a figure went after the warm-up. It grows where even the interval's lower end is above the limit."""

    name: str
    first: float  # means of the first and the last stretch
    last: float
    slope: float  # an hour
    low: float
    high: float
    most: float  # of all values
    limit: float | None  # an hour; None: told, not judged

    @property
    def grows(self) -> bool:
        return self.limit is not None and self.low > self.limit

    def row(self) -> str:
        """Of a Markdown table."""
        limit = "not judged" if self.limit is None else f"{self.limit:g}"
        ends = f"{self.first:,.1f} | {self.last:,.1f}"
        return (
            f"| {self.name} | {ends} | {self.slope:+,.2f} ({self.low:+,.2f} … {self.high:+,.2f}) | {limit} | {self.verdict} |"
        )

    @property
    def verdict(self) -> str:
        return "grows" if self.grows else "" if self.limit is None else "steady"


def find_trend(name: str, hours: list[float], values: list[float], limit: float | None, blocks: int = BLOCKS) -> Trend:
    """The trend of values (n) at these times (n), n at least three.

    The slope is that of a straight line through the means of consecutive stretches, its interval that of Student's t with
    two degrees of freedom less than there are stretches (Draper and Smith, Applied Regression Analysis, chapter 1).
    """
    parts = np.array_split(np.arange(len(hours)), min(blocks, len(hours)))
    x = np.array([np.mean([hours[i] for i in part]) for part in parts])
    y = np.array([np.mean([values[i] for i in part]) for part in parts])
    fit = stats.linregress(x, y)
    half = 0.0 if np.ptp(y) == 0 else float(stats.t.ppf((1 + CONFIDENCE) / 2, len(parts) - 2) * fit.stderr)
    slope = float(fit.slope)
    ends = {"first": float(y[0]), "last": float(y[-1]), "most": max(values)}
    return Trend(name=name, slope=slope, low=slope - half, high=slope + half, limit=limit, **ends)


def describe(trends: list[Trend]) -> str:
    """A Markdown table."""
    head = f"| figure | at first | at last | growth an hour ({CONFIDENCE:.1%} interval) | limit | |"
    return "\n".join([head, "| --- " * 6 + "|", *(trend.row() for trend in trends)])
