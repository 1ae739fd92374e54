"""A run of embedding as one self-contained HTML page: what was merged, what came of it, where the time went."""

import json
from typing import Any

from lora_embed.monitor.record import Bin, RunRecord, bins_of, workers_of
from lora_embed.monitor.stages import STAGES
from lora_embed.report.charts import Axis, Point, Series, bar_chart, plain, stacked_chart, xy_chart
from lora_embed.report.page import Column, Section, code, escaped, facts, moment, name, page, percentage, table

OUTCOMES = {
    "published": "Published as version {version}",
    "current": "Version {version} already holds all of it",
    "not published": "Embedded, not published",
    "failed": "Ended before it was complete",
}


def run_page(record: RunRecord) -> str:
    """The page's HTML. All that comes from data is escaped on its way in."""
    lead = f'<p class="lead">{name(record.job.get("table", ""), 120)} · {moment(record.started)}</p>'
    sections = [summary(record), merged(record), over_time(record), checks(record), rejects(record), lineage(record)]
    return page(f"Run {record.run_id}", lead, sections)


def span(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def summary(record: RunRecord) -> Section:
    """What came of it, in tiles and sentences."""
    busy = record.readings[-1].elapsed_s if record.readings else 0.0
    tiles = [
        ("Outcome", escaped(OUTCOMES[record.outcome].format(version=record.version)), ""),
        ("Embedded", f"{record.embedded:,}", "images, by this run"),
        ("Rate", f"{record.embedded / busy:,.1f}" if busy and record.embedded else "–", "images/s, start included"),
        ("Rejects", f"{record.rejected:,}", "of these images"),
        ("Took", span(record.seconds), "h:mm:ss, from the first work"),
    ]
    shown = "".join(f"<div><dt>{key}</dt><dd>{value}<small>{note}</small></dd></div>" for key, value, note in tiles)
    error = f'<p class="alert" role="note">{escaped_lines(record.error)}</p>' if record.error else ""
    held = ", ".join(f"{count:,} {escaped(what)}" for what, count in record.counts.items())
    said = [f"Version {record.version} holds {held}."] if held else []
    said += [escaped(_sentence(record.bound["says"]))] if record.bound else []
    sentences = f'<ul class="says">{"".join(f"<li>{one}</li>" for one in said)}</ul>' if said else ""
    return Section(anchor="summary", title="In short", content=f'<dl class="tiles">{shown}</dl>{error}{sentences}')


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def escaped_lines(text: str) -> str:
    """Text of several lines as HTML."""
    return "<br>".join(escaped(line) for line in text.splitlines())


def merged(record: RunRecord) -> Section:
    """The encoder's merge report: each model's adapters, and what was proven of the saved weights."""
    members = record.merge.get("members", [])
    content = "".join(_member(member, number, len(members)) for number, member in enumerate(members, 1))
    return Section(anchor="merged", title="What was merged, and the proof", content=content)


def _member(member: dict[str, Any], number: int, of: int) -> str:
    title = f"<h3>Model {number} of {of}</h3>" if of > 1 else ""
    if not member.get("adapters"):
        return f"{title}<p>The base alone: nothing was merged, and the saved weights equal the base's bit by bit.</p>"
    options = ", ".join(f"{key} {value}" for key, value in member.get("merge_options", {}).items())
    beyond = member.get("largest_error_beyond_rounding", 0.0)
    rounding = f"of which {beyond:.1e} is not due to rounding" if beyond else "all of it due to rounding to float32"
    about = (
        f"<p><b>{escaped(member.get('merge_method', ''))}</b>{f' ({escaped(options)})' if options else ''} changed "
        f"{member.get('weights_changed', 0):,} weights by {percentage(member.get('relative_change', 0.0), 2)} of their norm. "
        "The saved files were opened again and held against the change computed anew from the adapter files: the "
        f"largest error of a weight's change is {member.get('largest_error', 0.0):.1e} of that change, {rounding}. All "
        "other weights equal the base's bit by bit.</p>"
    )
    columns = [
        Column(head="Adapter"),
        Column(head="Weight", is_number=True),
        Column(head="Norm of its share", is_number=True),
        Column(head="Weights changed", is_number=True),
        Column(head="Trained on"),
        Column(head="Content"),
    ]
    rows = [
        [
            name(adapter["uri"]),
            f"{adapter['weight']:g}",
            f"{adapter['norm']:.3g}",
            f"{adapter['weights_changed']:,}",
            name(adapter["trained_on"] or "not said"),
            code(str(adapter["content_hash"])[:16]),
        ]
        for adapter in member["adapters"]
    ]
    return title + about + table("Adapters, as merge_report.json has them", columns, rows)


def over_time(record: RunRecord) -> Section:
    """Throughput and what workers were busy with, stretch by stretch."""
    if not record.embedded:
        return Section(anchor="time", title="Throughput and bottleneck", content="")
    bins, workers = bins_of(record), workers_of(record)
    charts = []
    if len(bins) > 1:
        unit, seconds = ("minutes", 60.0) if bins[-1].end_s > 240 else ("seconds", 1.0)
        x = Axis(name=f"{unit} since the beginning", from_zero=True)
        charts = [_rate_chart(bins, x, seconds), _busy_chart(bins, x, seconds)]
    bars = [(stage, spent, f"{spent:,.1f} s") for stage, spent in record.stages.items()]
    charts.append(bar_chart("Time by stage", "Seconds by stage, summed over the workers.", bars))
    kinds = f"{workers.actors:,} actors" + (f" and {workers.decoders:,} decoders" if workers.decoders else "")
    content = f'<p>{kinds}.{_phases(bins)}</p><div class="charts">{"".join(charts)}</div>'
    return Section(anchor="time", title="Throughput and bottleneck", content=content)


def _rate_chart(bins: list[Bin], x: Axis, unit: float) -> str:
    points = tuple(
        Point(x=(one.start_s + one.end_s) / 2 / unit, y=rate, says=f"{rate:,.1f} images/s, bound by {one.bound.by}")
        for one in bins
        for rate in [one.samples / max(one.end_s - one.start_s, 1e-9)]
    )
    best = max(point.y for point in points)
    about = f"Images per second in {len(bins)} stretches of the run, at most {best:,.1f}."
    series = [Series(name="images/s", points=points, shade=0, is_joined=True)]
    return xy_chart("Throughput", about, series, x, Axis(name="images/s", from_zero=True))


def _busy_chart(bins: list[Bin], x: Axis, unit: float) -> str:
    stacks = [(one.start_s / unit, one.end_s / unit, one.busy) for one in bins]
    names = [stage for stage in STAGES if any(one.busy.get(stage) for one in bins)]
    about = "Workers that were busy with each stage, on average over each stretch of the run."
    return stacked_chart("What workers were busy with", about, stacks, x, Axis(name="workers", shows=plain), names)


def _phases(bins: list[Bin]) -> str:
    """What bounded the run, one stretch after the other, as a sentence."""
    phases: list[tuple[str, float]] = []
    for one in bins:
        if phases and phases[-1][0] == one.bound.by:
            phases.pop()
        phases.append((one.bound.by, one.end_s))
    if not phases or len(phases) > 8:
        return ""
    return " Bound by " + ", then ".join(f"{escaped(by)} until {span(until)}" for by, until in phases) + "."


def checks(record: RunRecord) -> Section:
    """The gates of the version, each in its own words."""
    columns = [
        Column(head="Gate"),
        Column(head="Figure", is_number=True),
        Column(head="Limit", is_number=True),
        Column(head="Verdict"),
        Column(head="In words"),
    ]
    rows = [[name(gate), *_gate(found)] for gate, found in record.gates.items()]
    content = table(f"Checks of version {record.version} before it was published", columns, rows) if rows else ""
    return Section(anchor="checks", title="Checks", content=content)


def _gate(found: dict[str, Any]) -> list[str]:
    value = "not finite" if found.get("value") is None else f"{found['value']:.3g}"
    word = '<span class="better">✓ holds</span>'
    if not found.get("holds", True):
        word = f'<span class="worse">✕ let through</span><small>{escaped(found.get("accepted", ""))}</small>'
    limit = f"{'≥' if found.get('direction') == 'at least' else '≤'} {found.get('limit', 0.0):.3g}"
    return [value.replace("-", "−"), limit.replace("-", "−"), word, escaped(found.get("says", ""))]


def rejects(record: RunRecord) -> Section:
    """The version's rejects: how many for each reason, and a few of each."""
    if record.version is None:
        return Section(anchor="rejects", title="Rejects", content="")
    counts = [[name(reason), f"{count:,}"] for reason, count in sorted(record.rejects.items(), key=lambda pair: -pair[1])]
    if not counts:
        return Section(anchor="rejects", title="Rejects", content="<p>Every image has its vector.</p>")
    shown = [[name(example.id), name(example.reason), name(example.detail, 120)] for example in record.examples]
    content = table(
        "Images without a vector, by reason", [Column(head="Reason"), Column(head="Images", is_number=True)], counts
    )
    columns = [Column(head="Image"), Column(head="Reason"), Column(head="Detail")]
    return Section(anchor="rejects", title="Rejects", content=content + table("A few of each", columns, shown))


def lineage(record: RunRecord) -> Section:
    """Enough to do it again: the job, the encoder, the software."""
    pairs = [
        ("Run", code(record.run_id)),
        ("Space", code(record.encoder["space_id"])),
        ("Recipe", f"{name(record.job.get('recipe', ''), 120)}<br>{code(record.encoder['recipe_id'])}"),
        ("Base", name(record.merge.get("base", {}).get("uri", "not said"), 120)),
        ("Inputs", "<br>".join(name(one, 120) for one in record.job.get("input", []))),
        ("Dimension", f"{record.encoder['dimension']:,}"),
        *((_words(key), _shown(value)) for key, value in record.layout.items() if key != "format"),
        ("Software", ", ".join(f"{escaped(package)} {escaped(version)}" for package, version in record.software.items())),
    ]
    return Section(anchor="lineage", title="Lineage", content=facts(pairs))


def _words(key: str) -> str:
    return escaped(key.replace("_", " ").capitalize())


def _shown(value: Any) -> str:
    return name(value if isinstance(value, str) else json.dumps(value), 120) if value not in (None, [], ()) else "not set"
