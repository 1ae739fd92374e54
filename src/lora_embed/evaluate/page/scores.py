"""How good each encoder is, beside the reference: figures with intervals, heads put back, classes that changed."""

from collections.abc import Iterable

from lora_embed.evaluate.records import HEADLINE, ClassChange, Difference, Evaluation, Figure, Retention, Task
from lora_embed.report.charts import Scale, interval, interval_axis, interval_scale, move, percent
from lora_embed.report.page import Column, Section, brief, escaped, folded, name, percentage, table

METRIC_NAMES = {
    "knn": "kNN accuracy",
    "probe": "linear probe",
    "recall@1": "recall@1",
    "recall@5": "recall@5",
    "map": "mean average precision",
    "nmi": "clusters (NMI)",
}
VERDICTS = {
    "better": '<span class="better">▲ better</span>',
    "worse": '<span class="worse">▼ worse</span>',
    "within noise": '<span class="noise">≈ within noise</span>',
}
MOST_CLASSES = 6  # losses and gains of a task that are shown without being asked for


def share(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * value:+.1f}".replace("-", "−")


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric)


def headline(found: Evaluation, task: str) -> str:
    """The metric that stands for a task: kNN accuracy, or the first that was measured."""
    metrics = [figure.metric for figure in found.figures if figure.task == task]
    return HEADLINE if HEADLINE in metrics or not metrics else metrics[0]


def figures_of(found: Evaluation, task: str, metric: str) -> dict[str, Figure]:
    """By candidate, in their order."""
    by_name = {figure.candidate: figure for figure in found.figures if (figure.task, figure.metric) == (task, metric)}
    return {one.name: by_name[one.name] for one in found.candidates if one.name in by_name}


def difference_of(found: Evaluation, task: str, metric: str, candidate: str) -> Difference | None:
    return next((d for d in found.differences if (d.task, d.metric, d.candidate) == (task, metric, candidate)), None)


def before_and_after(found: Evaluation) -> Section:
    """A table for each task: the metric that stands for it, then all others."""
    about = (
        f"<p>Each figure is a mean over {found.splits:,} seeded splits of the labelled images into a bank "
        f"({percentage(found.bank_share)}) and queries, with its 95 % interval. All encoders see the same splits, so that "
        f"differences to {brief(found.reference)} are paired. “Better” and “worse” are said only where the 95 % interval of "
        "the difference leaves out zero.</p>"
    )
    parts = [_task(found, task) for task in found.tasks]
    return Section(anchor="scores", title="Before and after", content=about + "".join(parts) if any(parts) else "")


def _task(found: Evaluation, task: Task) -> str:
    metric = headline(found, task.name)
    figures = figures_of(found, task.name, metric)
    if not figures:
        return ""
    others = [other for other in dict.fromkeys(f.metric for f in found.figures if f.task == task.name) if other != metric]
    head = (
        f'<h3>{brief(task.name, 90)}</h3><p class="soft">{task.images:,} labelled images of {len(task.classes):,} classes, '
        f"field {brief(task.label)}.</p>"
    )
    return head + _headline_table(found, task, metric, figures) + (_other_metrics(found, task, others) if others else "")


def _headline_table(found: Evaluation, task: Task, metric: str, figures: dict[str, Figure]) -> str:
    at = interval_scale([edge for figure in figures.values() for edge in (figure.low, figure.high)])
    reference = figures[found.reference].mean if found.reference in figures else None
    rows = []
    for candidate, figure in figures.items():
        gap = difference_of(found, task.name, metric, candidate)
        change = f"{points(gap.mean)}<small>{points(gap.low)} to {points(gap.high)}</small>" if gap else "–"
        rows.append(
            [
                candidate_name(found, candidate),
                f"{share(figure.mean)}<small>{share(figure.low)} to {share(figure.high)}</small>",
                change,
                VERDICTS[gap.verdict] if gap else "",
                interval(at, figure.low, figure.mean, figure.high, reference),
            ]
        )
    columns = [
        Column(head="Encoder"),
        Column(head="Percent", is_number=True),
        Column(head="Change", is_number=True),
        Column(head="Verdict"),
        Column(head=interval_axis(at, percent, "95 % interval")),
    ]
    caption = f"{escaped(metric_name(metric))} on {brief(task.name)}, percent; changes in points, with 95 % intervals"
    return table(caption, columns, rows, marked=_place(figures, found.reference))


def _other_metrics(found: Evaluation, task: Task, metrics: list[str]) -> str:
    columns = [Column(head="Encoder"), *(Column(head=escaped(metric_name(one)), is_number=True) for one in metrics)]
    by_metric = {metric: figures_of(found, task.name, metric) for metric in metrics}
    candidates = [one.name for one in found.candidates if any(one.name in figures for figures in by_metric.values())]
    rows = [
        [candidate_name(found, one), *(_cell(found, task.name, metric, by_metric[metric].get(one)) for metric in metrics)]
        for one in candidates
    ]
    caption = f"All other metrics on {brief(task.name)}, percent, with 95 % intervals and the change in points"
    return table(caption, columns, rows, marked=_place(candidates, found.reference))


def _cell(found: Evaluation, task: str, metric: str, figure: Figure | None) -> str:
    if figure is None:
        return "–"
    gap = difference_of(found, task, metric, figure.candidate)
    change = f"<small>{points(gap.mean)} {VERDICTS[gap.verdict]}</small>" if gap else ""
    return f"{share(figure.mean)}<small>{share(figure.low)} to {share(figure.high)}</small>{change}"


def _place(names: Iterable[str], wanted: str) -> int | None:
    return next((number for number, one in enumerate(names) if one == wanted), None)


def candidate_name(found: Evaluation, candidate: str) -> str:
    """As HTML, the reference marked."""
    return name(candidate) + (' <span class="tag">reference</span>' if candidate == found.reference else "")


def heads_kept(found: Evaluation) -> Section:
    """What each adapter's own head still gets right on each body."""
    rows = [_retained(found, one) for one in found.retention]
    columns = [
        Column(head="Task and adapter"),
        Column(head="On encoder"),
        Column(head="Own body", is_number=True),
        Column(head="This body", is_number=True),
        Column(head="Kept", is_number=True),
        Column(head="Change in points", is_number=True),
    ]
    about = (
        "<p>Each adapter's saved classification head is put back on each encoder: how many of the task's images it still gets "
        "right, beside what it gets right on the adapter alone. No head is trained anew.</p>"
    )
    caption = "Accuracy of the adapters' own heads, percent, with the 95 % interval of the change over the same images"
    return Section(anchor="heads", title="Heads kept", content=about + table(caption, columns, rows) if rows else "")


def _retained(found: Evaluation, one: Retention) -> list[str]:
    return [
        f"{name(one.task)}<small>{brief(one.adapter)}, {one.images:,} images</small>",
        candidate_name(found, one.candidate),
        share(one.own),
        share(one.kept),
        percentage(one.kept / one.own) if one.own else "–",
        f"{points(one.kept - one.own)}<small>{points(one.low)} to {points(one.high)}</small>",
    ]


def class_changes(found: Evaluation) -> Section:
    """For each task and encoder the classes that lost and gained most, and all of them."""
    pairs = dict.fromkeys((change.task, change.candidate) for change in found.classes)
    parts: list[str] = []
    for task, candidate in pairs:
        changes = [change for change in found.classes if (change.task, change.candidate) == (task, candidate)]
        changes.sort(key=lambda change: (change.after - change.before, change.label))
        parts.append(_class_pair(task, candidate, changes, is_open=not parts))
    about = (
        "<p>Share of a class's queries that find their own class, over all splits. Few images make for large steps: a class of "
        "ten changes by ten points where one image does.</p>"
    )
    return Section(anchor="classes", title="Classes", content=about + "".join(parts) if parts else "")


def _class_pair(task: str, candidate: str, changes: list[ClassChange], *, is_open: bool) -> str:
    lost = [change for change in changes if change.after < change.before]
    gained = [change for change in reversed(changes) if change.after > change.before]
    shown = [*lost[:MOST_CLASSES], *reversed(gained[:MOST_CLASSES])]
    rest = len(changes) - len(lost) - len(gained)
    summary = (
        f"<b>{brief(task)}</b>, {brief(candidate, 48)} against {brief(changes[0].reference, 48)}: {len(lost)} lost, "
        f"{len(gained)} gained, {rest} as before"
    )
    caption = f"Largest losses and gains on {brief(task)} with {brief(candidate, 48)}, percent"
    content = _class_table(caption, shown) if shown else "<p>No class changed.</p>"
    if len(changes) > len(shown):
        content += folded(
            f"All {len(changes)} classes",
            _class_table(f"All classes of {brief(task)} with {brief(candidate, 48)}, percent", changes),
        )
    return folded(summary, content, is_open=is_open)


def _class_table(caption: str, changes: list[ClassChange]) -> str:
    at = interval_scale([0.0, *(edge for change in changes for edge in (change.before, change.after))])
    columns = [
        Column(head="Class"),
        Column(head="Change", is_number=True),
        Column(head="Before", is_number=True),
        Column(head="After", is_number=True),
        Column(head=interval_axis(at, percent, "from before to after")),
        Column(head="Images", is_number=True),
    ]
    return table(caption, columns, [_class_row(at, change) for change in changes])


def _class_row(at: Scale, change: ClassChange) -> list[str]:
    return [
        name(change.label),
        points(change.after - change.before),
        share(change.before),
        share(change.after),
        move(at, change.before, change.after),
        f"{change.images:,}",
    ]
