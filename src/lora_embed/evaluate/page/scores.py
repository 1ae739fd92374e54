"""How good each encoder is beside the reference: its figures on each task, and the classes that changed."""

from dataclasses import dataclass

from lora_embed.evaluate.records import HEADLINE, ClassChange, Difference, Evaluation, Figure, Task

MOST_CLASSES = 6  # losses, and gains, of a task that are shown before its table is opened


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The figures of one task by metric and candidate. The first metric is the one that stands for the task."""

    task: Task
    metrics: dict[str, dict[str, Figure]]

    @property
    def headline(self) -> tuple[str, dict[str, Figure]]:
        return next(iter(self.metrics.items()))

    @property
    def others(self) -> dict[str, dict[str, Figure]]:
        return {metric: figures for metric, figures in self.metrics.items() if metric != self.headline[0]}


def scores_by_task(evaluation: Evaluation) -> list[TaskScores]:
    """For each task that has figures, in the order of the candidates."""
    scores = [
        TaskScores(task=task, metrics={metric: figures_of(evaluation, task.name, metric) for metric in metrics})
        for task in evaluation.tasks
        if (metrics := metrics_of(evaluation, task.name))
    ]
    return [of_task for of_task in scores if of_task.headline[1]]


def metrics_of(evaluation: Evaluation, task: str) -> list[str]:
    """The metrics that were measured on a task: kNN accuracy first, if it was."""
    measured = dict.fromkeys(figure.metric for figure in evaluation.figures if figure.task == task)
    return sorted(measured, key=lambda metric: metric != HEADLINE)


def figures_of(evaluation: Evaluation, task: str, metric: str) -> dict[str, Figure]:
    """The figures of one metric by candidate, in the order of the candidates."""
    by_name = {figure.candidate: figure for figure in evaluation.figures if (figure.task, figure.metric) == (task, metric)}
    return {candidate.name: by_name[candidate.name] for candidate in evaluation.candidates if candidate.name in by_name}


def difference_of(evaluation: Evaluation, figure: Figure) -> Difference | None:
    """The paired difference of a figure to the reference's; None where there is none, as for the reference itself."""
    key = (figure.task, figure.metric, figure.candidate, evaluation.reference)
    return next((gap for gap in evaluation.differences if (gap.task, gap.metric, gap.candidate, gap.reference) == key), None)


def verdicts(evaluation: Evaluation) -> dict[str, list[Difference]]:
    """The headline differences of each single adapter, and of other encoders that are no merge, to the reference by task."""
    merges = {candidate.name for candidate in evaluation.candidates if len(candidate.adapters) > 1}
    gaps: dict[str, list[Difference]] = {}
    for of_task in scores_by_task(evaluation):
        for candidate, figure in of_task.headline[1].items():
            gap = difference_of(evaluation, figure)
            if gap is not None and candidate not in merges:
                gaps.setdefault(candidate, []).append(gap)
    return gaps


def most_judged(evaluation: Evaluation) -> int:
    """The images that figures are of: those with a label of the task that has most."""
    return max((task.images for task in evaluation.tasks), default=0)


@dataclass(frozen=True, kw_only=True)
class ClassChanges:
    """How the classes of one task changed with one encoder; the largest loss comes first."""

    task: str
    candidate: str
    reference: str
    all: list[ClassChange]

    @property
    def lost(self) -> list[ClassChange]:
        return [change for change in self.all if change.after < change.before]

    @property
    def gained(self) -> list[ClassChange]:
        return [change for change in self.all if change.after > change.before]

    @property
    def largest(self) -> list[ClassChange]:
        """The largest losses, then gains up to the largest."""
        return [*self.lost[:MOST_CLASSES], *self.gained[-MOST_CLASSES:]]


def class_changes(evaluation: Evaluation) -> list[ClassChanges]:
    """For each task and encoder."""
    changes: dict[tuple[str, str, str], list[ClassChange]] = {}
    for change in sorted(evaluation.classes, key=lambda change: (change.after - change.before, change.label)):
        changes.setdefault((change.task, change.candidate, change.reference), []).append(change)
    order = dict.fromkeys((change.task, change.candidate, change.reference) for change in evaluation.classes)
    return [ClassChanges(task=key[0], candidate=key[1], reference=key[2], all=changes[key]) for key in order]
