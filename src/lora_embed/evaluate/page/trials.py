"""A search over weights and methods as charts: weight against score, and the scores on two tasks against each other."""

from itertools import combinations

from lora_embed.evaluate.records import Evaluation, Trial
from lora_embed.report.charts import Axis, Chart, Point, Series, percent
from lora_embed.report.page import share, shortened
from lora_embed.text import number_of

MOST_CURVES, MOST_PAIRS = 12, 6


def best_of(evaluation: Evaluation) -> Trial | None:
    """The trial with the best objective; of equal ones the first."""
    return max(evaluation.trials, key=lambda trial: (trial.objective, -trial.number), default=None)


def scored_tasks(trials: tuple[Trial, ...] | list[Trial]) -> list[str]:
    """The tasks that trials have scores on, in their order."""
    return list(dict.fromkeys(task for trial in trials for task in trial.scores))


def methods_of(trials: tuple[Trial, ...] | list[Trial]) -> list[str]:
    """The methods of trials, in their order."""
    return list(dict.fromkeys(trial.method for trial in trials))


def weighted_trials(evaluation: Evaluation, method: str) -> list[Trial]:
    """The trials of a method in which an adapter has a share."""
    return [trial for trial in evaluation.trials if trial.method == method and sum(trial.weights.values()) > 0]


def share_of(trial: Trial, adapter: str) -> float:
    """An adapter's share of the sum of weights."""
    return round(trial.weights.get(adapter, 0.0) / sum(trial.weights.values()), 6)


def options_of(trial: Trial) -> str:
    """As text, such as `density 0.5, seed 1`."""
    return ", ".join(f"{key} {value}" for key, value in trial.options.items())


def describe(trial: Trial) -> str:
    """A trial as a line of text."""
    weights = ", ".join(f"{shortened(adapter, 24)} {weight:g}" for adapter, weight in trial.weights.items())
    scores = ", ".join(f"{shortened(task, 24)} {share(score)} %" for task, score in trial.scores.items())
    return f"trial {trial.number}: {trial.method} {options_of(trial)} ({weights}): {scores}"


def curves(evaluation: Evaluation) -> list[Chart]:
    """A chart for each adapter and method. Of two adapters only the first has charts: its share determines the other's."""
    adapters = list(dict.fromkeys(adapter for trial in evaluation.trials for adapter in trial.weights))
    charts = []
    for adapter in adapters[:1] if len(adapters) == 2 else adapters:
        for method in methods_of(evaluation.trials):
            trials = sorted(weighted_trials(evaluation, method), key=lambda trial: share_of(trial, adapter))
            if len({share_of(trial, adapter) for trial in trials}) > 1:
                charts.append(_curve(adapter, method, trials))
    return charts[:MOST_CURVES]


def _curve(adapter: str, method: str, trials: list[Trial]) -> Chart:
    """A series for each task. Its points are joined only if options, sum of weights and all other adapters stay the same."""
    settings = {(options_of(trial), round(sum(trial.weights.values()), 3)) for trial in trials}
    is_joined = len(settings) == 1 and max(len(trial.weights) for trial in trials) <= 2
    series = []
    for task in scored_tasks(trials):
        scored = [trial for trial in trials if task in trial.scores]
        points = tuple(Point(x=share_of(trial, adapter), y=trial.scores[task], says=describe(trial)) for trial in scored)
        series.append(Series(name=task, points=points, is_joined=is_joined))
    return Chart(
        title=f"{method}: share of {shortened(adapter, 40)}",
        says=f"Score on each task against the share of {adapter} in the sum of weights, {number_of(len(trials), 'trial')} of "
        f"{method}.",
        x=Axis(name="share of the weights"),
        y=Axis(name="score, %", shows=percent),
        series=tuple(series),
    )


def pair_charts(evaluation: Evaluation) -> list[Chart]:
    """For each pair of tasks, the scores of all trials on both."""
    pairs = list(combinations(scored_tasks(evaluation.trials), 2))[:MOST_PAIRS]
    return [_pair_chart(evaluation, across, up) for across, up in pairs]


def _pair_chart(evaluation: Evaluation, across: str, up: str) -> Chart:
    """A series for each method; the best trial has a label."""
    trials = [trial for trial in evaluation.trials if across in trial.scores and up in trial.scores]
    front = {trial.number for trial in trials if not any(_beats(rival, trial, across, up) for rival in trials)}
    best = best_of(evaluation)
    marks = {
        trial.number: Point(
            x=trial.scores[across],
            y=trial.scores[up],
            says=describe(trial) + ("; no trial is better on both tasks" if trial.number in front else ""),
            label=f"trial {trial.number}" if trial == best else "",
        )
        for trial in trials
    }
    return Chart(
        title=f"{shortened(across, 30)} against {shortened(up, 30)}",
        says=f"Scores of {number_of(len(trials), 'trial')} on both tasks. For {len(front)} of them no other trial is better on "
        "both.",
        x=Axis(name=f"{shortened(across, 30)}, %", shows=percent),
        y=Axis(name=f"{shortened(up, 30)}, %", shows=percent),
        series=tuple(
            Series(name=method, points=tuple(marks[trial.number] for trial in trials if trial.method == method))
            for method in methods_of(trials)
        ),
    )


def _beats(rival: Trial, trial: Trial, across: str, up: str) -> bool:
    """Better on one task, and no worse on the other."""
    gains = (rival.scores[across] - trial.scores[across], rival.scores[up] - trial.scores[up])
    return min(gains) >= 0 and max(gains) > 0
