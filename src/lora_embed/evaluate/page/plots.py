"""An evaluation as matplotlib figures, for notebooks and papers: `pip install 'lora-embed[evaluation]'`.

Each function returns a new `matplotlib.figure.Figure`, which a notebook shows and `.savefig` writes.
"""

from typing import TYPE_CHECKING, Any

from lora_embed.evaluate.page.scores import METRIC_NAMES, difference_of, figures_of, headline
from lora_embed.evaluate.records import Evaluation, Relation, Trial
from lora_embed.report.page import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = "osD^vP*X"


def scores(found: Evaluation, metric: str | None = None) -> "Figure":
    """A panel for each task: each encoder's mean with its 95 % interval, in percent, and the reference as a line.

    `metric` is the one that stands for a task unless it is given. Raises ValueError for one that was not measured.
    """
    figure, panels = _panels(len(found.tasks), height=0.4 * len(found.candidates) + 1.2)
    for panel, task in zip(panels, found.tasks, strict=True):
        chosen = metric or headline(found, task.name)
        figures = figures_of(found, task.name, chosen)
        if not figures:
            known = ", ".join(sorted({one.metric for one in found.figures if one.task == task.name})) or "none"
            raise ValueError(f"metric {chosen!r} was not measured on task {task.name!r}; there are: {known}")
        for place, (candidate, one) in enumerate(figures.items()):
            gap = difference_of(found, task.name, chosen, candidate)
            spread = [[100 * max(one.mean - one.low, 0)], [100 * max(one.high - one.mean, 0)]]
            is_apart = gap is not None and gap.verdict != "within noise"
            panel.errorbar(100 * one.mean, place, xerr=spread, fmt="o" if is_apart else "s", color="C0", capsize=3)
        if found.reference in figures:
            panel.axvline(100 * figures[found.reference].mean, color="grey", linestyle="--", linewidth=1)
        panel.set_yticks(range(len(figures)), [_text(candidate) for candidate in figures])
        panel.invert_yaxis()
        panel.set(title=_text(task.name), xlabel=f"{METRIC_NAMES.get(chosen, chosen)}, %")
    return figure


def weight_curves(found: Evaluation, adapter: str) -> "Figure":
    """A panel for each method of the search: tasks' scores in percent against an adapter's share of the weights."""
    methods = list(dict.fromkeys(trial.method for trial in found.trials))
    figure, panels = _panels(len(methods))
    for panel, method in zip(panels, methods, strict=True):
        trials = [trial for trial in found.trials if trial.method == method and sum(trial.weights.values()) > 0]
        trials.sort(key=lambda trial: _share(trial, adapter))
        for number, task in enumerate(_scored(found)):
            across = [_share(trial, adapter) for trial in trials if task in trial.scores]
            up = [100 * trial.scores[task] for trial in trials if task in trial.scores]
            panel.plot(across, up, marker=MARKS[number % len(MARKS)], linestyle="", label=_text(task))
        panel.set(title=_text(method), xlabel=f"share of {_text(adapter)}", ylabel="score, %")
        panel.legend()
    return figure


def trial_scores(found: Evaluation, one: str, other: str) -> "Figure":
    """All trials' scores on two tasks against each other, in percent, a mark for each method."""
    figure, (panel,) = _panels(1)
    for number, method in enumerate(dict.fromkeys(trial.method for trial in found.trials)):
        trials = [trial for trial in found.trials if trial.method == method and {one, other} <= set(trial.scores)]
        across, up = [100 * trial.scores[one] for trial in trials], [100 * trial.scores[other] for trial in trials]
        panel.plot(across, up, marker=MARKS[number % len(MARKS)], linestyle="", label=_text(method))
    panel.set(xlabel=f"{_text(one)}, %", ylabel=f"{_text(other)}, %")
    panel.legend()
    return figure


def class_changes(found: Evaluation, task: str, candidate: str) -> "Figure":
    """Each class's change in points, the largest loss at the top."""
    changes = [change for change in found.classes if (change.task, change.candidate) == (task, candidate)]
    changes.sort(key=lambda change: change.after - change.before)
    figure, (panel,) = _panels(1, height=0.22 * len(changes) + 1.2)
    gains = [100 * (change.after - change.before) for change in changes]
    panel.barh(range(len(changes)), gains, color=["C3" if gain < 0 else "C0" for gain in gains])
    panel.set_yticks(range(len(changes)), [_text(change.label) for change in changes])
    panel.invert_yaxis()
    panel.set(title=f"{_text(candidate)} on {_text(task)}", xlabel="change, points")
    return figure


def relations(found: Evaluation, kind: str) -> "Figure":
    """The matrix of one kind of relation over all layers, and where there are layers, their course."""
    whole = [one for one in found.relations if one.kind == kind and one.layer is None]
    layered = [one for one in found.relations if one.kind == kind and one.layer is not None]
    figure, panels = _panels(1 + bool(layered))
    names = list(dict.fromkeys(end for one in whole for end in (one.one, one.other)))
    values = {pair: one.value for one in whole for pair in ((one.one, one.other), (one.other, one.one))}
    grid = [[values.get((one, other), float("nan")) for other in names] for one in names]
    if names:
        image = panels[0].imshow(grid, cmap="cividis")
        figure.colorbar(image, ax=panels[0])
    panels[0].set_xticks(range(len(names)), [_text(one) for one in names], rotation=30, ha="right")
    panels[0].set_yticks(range(len(names)), [_text(one) for one in names])
    panels[0].set(title=kind.replace("_", " "))
    if layered:
        _draw_layers(panels[1], layered)
    return figure


def _draw_layers(panel: "Axes", layered: list[Relation]) -> None:
    layers = {layer: place for place, layer in enumerate(dict.fromkeys(one.layer for one in layered), 1)}
    for one, other in dict.fromkeys((relation.one, relation.other) for relation in layered):
        of_pair = [relation for relation in layered if (relation.one, relation.other) == (one, other)]
        across = [layers[relation.layer] for relation in of_pair]
        panel.plot(across, [relation.value for relation in of_pair], marker=".", label=f"{_text(one)} · {_text(other)}")
    panel.set(xlabel="layer, in the model's order", title="by layer")
    panel.legend()


def _panels(count: int, height: float = 3.6) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * max(count, 1), max(height, 2.4)), layout="constrained")
    return figure, list(figure.subplots(1, max(count, 1), squeeze=False)[0])


def _scored(found: Evaluation) -> list[str]:
    return list(dict.fromkeys(task for trial in found.trials for task in trial.scores))


def _share(trial: Trial, adapter: str) -> float:
    return trial.weights.get(adapter, 0.0) / sum(trial.weights.values())


def _text(name: str) -> str:
    """A name as matplotlib shows it: short, and no dollar begins a formula."""
    return shortened(name, 36).replace("$", r"\$")
