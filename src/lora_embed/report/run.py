"""The page of a run: what was merged, how the run ended, where the time went. Templates in `templates/run/` fill it."""

import json
from itertools import groupby
from typing import Any

from lora_embed.monitor.record import Bin, RunRecord, bins_of, workers_of
from lora_embed.monitor.stages import STAGES
from lora_embed.report.charts import Axis, Chart, Point, Series, Stack, StackedChart
from lora_embed.report.page import moment, page

OUTCOMES = {
    "published": "Published as version {version}",
    "current": "Version {version} was up to date",
    "not published": "Embedded, not published",
    "failed": "Ended before it was complete",
}
SECTIONS = {
    "summary": "In short",
    "merged": "What was merged, and the proof",
    "time": "Throughput and bottleneck",
    "checks": "Checks",
    "rejects": "Rejects",
    "lineage": "Lineage",
}
MOST_PHASES = 8  # that a sentence lists


def run_page(record: RunRecord) -> str:
    """The page's HTML. All text of the record is escaped on its way in."""
    bins = bins_of(record)
    lead = [record.job.get("table", ""), moment(record.started)]
    return page(
        f"Run {record.run_id}",
        lead,
        "report/templates/run",
        SECTIONS,
        record=record,
        outcome=OUTCOMES[record.outcome].format(version=record.version),
        elapsed_s=record.readings[-1].elapsed_s if record.readings else 0.0,
        layout={key: setting(value) for key, value in record.layout.items() if key != "format"},
        workers=workers_of(record),
        phases=phases(bins),
        charts=[rate_chart(bins), busy_chart(bins)] if len(bins) > 1 else None,
    )


def setting(value: Any) -> str:
    """A value of the layout as text."""
    if value in (None, [], ()):
        return "not set"
    return value if isinstance(value, str) else json.dumps(value)


def phases(bins: list[Bin]) -> list[tuple[str, float]]:
    """What bounded the run, and until which second, one stretch after the other; none where there are too many to read."""
    groups = groupby(bins, key=lambda stretch: stretch.bound.by)
    ends = [(stage, list(stretches)[-1].end_s) for stage, stretches in groups]
    return ends if len(ends) <= MOST_PHASES else []


def rate_chart(bins: list[Bin]) -> Chart:
    """Images per second over the run."""
    axis, seconds = time_axis(bins)
    rates = [stretch.samples / max(stretch.end_s - stretch.start_s, 1e-9) for stretch in bins]
    marks = tuple(
        Point(
            x=(stretch.start_s + stretch.end_s) / 2 / seconds,
            y=rate,
            says=f"{rate:,.1f} images/s, bound by {stretch.bound.by}",
        )
        for stretch, rate in zip(bins, rates, strict=True)
    )
    return Chart(
        title="Throughput",
        says=f"Images per second in {len(bins)} stretches of the run, at most {max(rates):,.1f}.",
        x=axis,
        y=Axis(name="images/s", from_zero=True),
        series=(Series(name="images/s", points=marks, is_joined=True),),
    )


def busy_chart(bins: list[Bin]) -> StackedChart:
    """What workers were busy with over the run."""
    axis, seconds = time_axis(bins)
    names = [stage for stage in STAGES if any(stretch.busy.get(stage) for stretch in bins)]
    return StackedChart(
        title="What workers were busy with",
        says="Number of workers that were busy with each stage, on average over each stretch of the run.",
        x=axis,
        y=Axis(name="workers"),
        stacks=tuple(
            Stack(
                start=stretch.start_s / seconds,
                end=stretch.end_s / seconds,
                heights={stage: stretch.busy.get(stage, 0.0) for stage in names},
            )
            for stretch in bins
        ),
    )


def time_axis(bins: list[Bin]) -> tuple[Axis, float]:
    """The axis of a run's time, and the seconds of its unit."""
    unit, seconds = ("minutes", 60.0) if bins[-1].end_s > 240 else ("seconds", 1.0)
    return Axis(name=f"{unit} since the beginning", from_zero=True), seconds
