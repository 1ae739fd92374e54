"""The page of a run: what was merged, how the run ended, where the time went. Templates in `templates/run/` fill it."""

from itertools import groupby
from typing import Any

from lora_embed.monitor.record import Bin, RunRecord, bins_of, starting_s, workers_of
from lora_embed.monitor.stages import STAGES
from lora_embed.report.charts import Axis, Chart, Point, Series, Stack, StackedChart
from lora_embed.report.page import moment, page
from lora_embed.text import number_of, size_of

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
LEAST_BINS = 2  # with fewer, a chart says no more than the figures above it
LEAST_PHASE = 0.05  # of the run's time


def run_page(record: RunRecord) -> str:
    """The page's HTML. All text of the record is escaped on its way in."""
    bins = bins_of(record)
    busy = [period for period in bins if period.bound.by != "start"]
    lead = [record.job.get("table", ""), moment(record.started)]
    return page(
        f"Run {record.run_id}",
        lead,
        "report/templates/run",
        SECTIONS,
        record=record,
        outcome=OUTCOMES[record.outcome].format(version=record.version),
        elapsed_s=record.readings[-1].elapsed_s if record.readings else 0.0,
        layout={key: setting(key, value) for key, value in record.layout.items() if key != "format"},
        workers=workers_of(record),
        phases=phases(busy),
        starting_s=starting_s(record),
        charts=[rate_chart(busy), busy_chart(bins)] if len(busy) >= LEAST_BINS else None,
    )


def setting(key: str, value: Any) -> str:
    """A value of the layout as people read it."""
    if value in (None, [], ()):
        return "not set"
    if key == "carry":
        return ", ".join(f"{field} ({kind})" for field, kind in value)
    if key == "max_bytes":
        return size_of(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def phases(bins: list[Bin]) -> list[tuple[str, float]]:
    """What bounded the run, and until which second, one phase after the other; none where there are too many to read.

    A phase shorter than `LEAST_PHASE` of the run is left out, and the one before it lasts until the next.
    """
    groups = [list(group) for _, group in groupby(bins, key=lambda period: period.bound.by)]
    least_s = LEAST_PHASE * (bins[-1].end_s - bins[0].start_s) if bins else 0.0
    kept = [group for group in groups if group[-1].end_s - group[0].start_s >= least_s]
    ends = [*(group[0].start_s for group in kept[1:]), *(period.end_s for period in bins[-1:])]
    of_stage = groupby(zip(kept, ends, strict=True) if kept else (), key=lambda phase: phase[0][0].bound.by)
    said = [(stage, [end_s for _, end_s in phase][-1]) for stage, phase in of_stage]
    return said if len(said) <= MOST_PHASES else []


def rate_chart(bins: list[Bin]) -> Chart:
    """Images per second since the first worker began."""
    axis, seconds = time_axis(bins)
    rates = [period.samples / (period.end_s - period.start_s) for period in bins]
    marks = tuple(
        Point(x=(period.start_s + period.end_s) / 2 / seconds, y=rate, says=f"{rate:,.1f} images/s, bound by {period.bound.by}")
        for period, rate in zip(bins, rates, strict=True)
    )
    return Chart(
        title="Throughput",
        says=f"Images per second in {number_of(len(bins), 'period')} of the run, at most {max(rates):,.1f}.",
        x=axis,
        y=Axis(name="images/s", from_zero=True),
        series=(Series(name="images/s", points=marks, is_joined=True),),
    )


def busy_chart(bins: list[Bin]) -> StackedChart:
    """What workers were busy with over the run."""
    axis, seconds = time_axis(bins)
    names = [stage for stage in STAGES if any(period.busy.get(stage) for period in bins)]
    return StackedChart(
        title="What workers were busy with",
        says="Number of workers that were busy with each stage, on average over each period of the run.",
        x=axis,
        y=Axis(name="workers"),
        stacks=tuple(
            Stack(
                start=period.start_s / seconds,
                end=period.end_s / seconds,
                heights={stage: period.busy.get(stage, 0.0) for stage in names},
            )
            for period in bins
        ),
    )


def time_axis(bins: list[Bin]) -> tuple[Axis, float]:
    """The axis of a run's time, and the seconds of its unit."""
    unit, seconds = ("minutes", 60.0) if bins[-1].end_s > 240 else ("seconds", 1.0)
    return Axis(name=f"{unit} since the beginning", from_zero=True), seconds
