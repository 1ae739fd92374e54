"""An evaluation as matplotlib figures, for notebooks and papers; they need the extra `evaluation`.

Each function returns a new `matplotlib.figure.Figure`, which a notebook shows and `.savefig` writes.
"""

from typing import TYPE_CHECKING, Any

from lora_embed.evaluate.page.relations import measure_of
from lora_embed.evaluate.page.scores import difference_of, figures_of, metrics_of
from lora_embed.evaluate.page.trials import methods_of, scored_tasks, share_of, weighted_trials
from lora_embed.evaluate.records import HEADLINE, Evaluation
from lora_embed.evaluate.verdict import METRIC_NAMES
from lora_embed.report.page import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = "osD^vP*X"


def scores(evaluation: Evaluation, metric: str | None = None) -> "Figure":
    """A panel for each task: each encoder's mean with its 95 % interval, in percent, and the reference as a line.

    `metric` is the one that stands for a task unless it is given. Raises ValueError for one that was not measured.
    """
    figure, panels = _panels(len(evaluation.tasks), height=0.4 * len(evaluation.candidates) + 1.2)
    for panel, task in zip(panels, evaluation.tasks, strict=True):
        measured = metrics_of(evaluation, task.name)
        shown_metric = metric or (measured[0] if measured else HEADLINE)
        figures = figures_of(evaluation, task.name, shown_metric)
        if not figures:
            measured_names = ", ".join(sorted(measured)) or "none"
            raise ValueError(f"metric {shown_metric!r} was not measured on task {task.name!r}; there are: {measured_names}")
        for place, score in enumerate(figures.values()):
            gap = difference_of(evaluation, score)
            spread = [[100 * max(score.mean - score.low, 0)], [100 * max(score.high - score.mean, 0)]]
            is_apart = gap is not None and gap.verdict != "within noise"
            panel.errorbar(100 * score.mean, place, xerr=spread, fmt="o" if is_apart else "s", color="C0", capsize=3)
        if evaluation.reference in figures:
            panel.axvline(100 * figures[evaluation.reference].mean, color="grey", linestyle="--", linewidth=1)
        panel.set_yticks(range(len(figures)), [_text(candidate) for candidate in figures])
        panel.invert_yaxis()
        panel.set(title=_text(task.name), xlabel=f"{METRIC_NAMES.get(shown_metric, shown_metric)}, %")
    return figure


def weight_curves(evaluation: Evaluation, adapter: str) -> "Figure":
    """A panel for each method of the search: tasks' scores in percent against an adapter's share of the weights."""
    methods = methods_of(evaluation.trials)
    figure, panels = _panels(len(methods))
    for panel, method in zip(panels, methods, strict=True):
        trials = sorted(weighted_trials(evaluation, method), key=lambda trial: share_of(trial, adapter))
        for number, task in enumerate(scored_tasks(evaluation.trials)):
            scored = [trial for trial in trials if task in trial.scores]
            across, up = [share_of(trial, adapter) for trial in scored], [100 * trial.scores[task] for trial in scored]
            panel.plot(across, up, marker=MARKS[number % len(MARKS)], linestyle="", label=_text(task))
        panel.set(title=_text(method), xlabel=f"share of {_text(adapter)}", ylabel="score, %")
        panel.legend()
    return figure


def trial_scores(evaluation: Evaluation, task: str, other_task: str) -> "Figure":
    """All trials' scores on two tasks against each other, in percent, a mark for each method."""
    figure, (panel,) = _panels(1)
    for number, method in enumerate(methods_of(evaluation.trials)):
        trials = [trial for trial in evaluation.trials if trial.method == method and {task, other_task} <= set(trial.scores)]
        across, up = [100 * trial.scores[task] for trial in trials], [100 * trial.scores[other_task] for trial in trials]
        panel.plot(across, up, marker=MARKS[number % len(MARKS)], linestyle="", label=_text(method))
    panel.set(xlabel=f"{_text(task)}, %", ylabel=f"{_text(other_task)}, %")
    panel.legend()
    return figure


def class_changes(evaluation: Evaluation, task: str, candidate: str) -> "Figure":
    """Each class's change in points, the largest loss at the top."""
    changes = [change for change in evaluation.classes if (change.task, change.candidate) == (task, candidate)]
    changes.sort(key=lambda change: change.after - change.before)
    figure, (panel,) = _panels(1, height=0.22 * len(changes) + 1.2)
    gains = [100 * (change.after - change.before) for change in changes]
    panel.barh(range(len(changes)), gains, color=["C3" if gain < 0 else "C0" for gain in gains])
    panel.set_yticks(range(len(changes)), [_text(change.label) for change in changes])
    panel.invert_yaxis()
    panel.set(title=f"{_text(candidate)} on {_text(task)}", xlabel="change, points")
    return figure


def relations(evaluation: Evaluation, kind: str) -> "Figure":
    """The matrix of one kind of relation over all layers and, where it was measured by layer, its course over the layers."""
    measure = measure_of(kind, [relation for relation in evaluation.relations if relation.kind == kind])
    figure, panels = _panels(1 + bool(measure.layers))
    names = [_text(name) for name in measure.names]
    if names:
        grid = [[measure.whole.get((row, column), float("nan")) for column in measure.names] for row in measure.names]
        figure.colorbar(panels[0].imshow(grid, cmap="cividis"), ax=panels[0])
    panels[0].set_xticks(range(len(names)), names, rotation=30, ha="right")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set(title=kind.replace("_", " "))
    if measure.layers:
        for pair in measure.pairs:
            course = [(place, values[pair]) for place, values in enumerate(measure.layers.values(), 1) if pair in values]
            panels[1].plot(*zip(*course, strict=True), marker=".", label=" · ".join(map(_text, pair)))
        panels[1].set(xlabel="layer, in the model's order", title="by layer")
        panels[1].legend()
    return figure


def _panels(count: int, height: float = 3.6) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * max(count, 1), max(height, 2.4)), layout="constrained")
    return figure, list(figure.subplots(1, max(count, 1), squeeze=False)[0])


def _text(name: str) -> str:
    """A name as matplotlib shows it: short, and no dollar begins a formula."""
    return shortened(name, 36).replace("$", r"\$")
