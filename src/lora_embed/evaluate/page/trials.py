"""A search over weights and methods: curves of weight against score, and each trial's scores against each other."""

from itertools import combinations

from lora_embed.evaluate.page.scores import points, share
from lora_embed.evaluate.records import Evaluation, Trial
from lora_embed.report.charts import Axis, Point, Series, percent, plain, xy_chart
from lora_embed.report.page import Column, Section, brief, escaped, folded, name, shortened, table

MOST_CURVES, MOST_PAIRS = 12, 6
Group = tuple[str, str, float]  # method, options, sum of weights


def options_of(options: dict[str, object]) -> str:
    """As text, such as `density 0.5, seed 1`."""
    return ", ".join(f"{key} {value}" for key, value in options.items())


def weights_of(weights: dict[str, float]) -> str:
    """As HTML, an adapter a line."""
    return "<br>".join(f"{brief(adapter, 40)} {weight:g}" for adapter, weight in weights.items()) or "none"


def says(trial: Trial) -> str:
    """One trial as a line of text."""
    weights = ", ".join(f"{shortened(adapter, 24)} {weight:g}" for adapter, weight in trial.weights.items())
    scores = ", ".join(f"{shortened(task, 24)} {share(score)} %" for task, score in trial.scores.items())
    return f"trial {trial.number}: {trial.method} {options_of(trial.options)} ({weights}): {scores}"


def best_of(found: Evaluation) -> Trial | None:
    return max(found.trials, key=lambda trial: (trial.objective, -trial.number), default=None)


def search(found: Evaluation) -> Section:
    """Everything that `trials` tell."""
    best = best_of(found)
    if best is None:
        return Section(anchor="search", title="Weights", content="")
    about = (
        f"<p>{len(found.trials):,} recipes were tried in {sum(trial.seconds for trial in found.trials) / 60:,.1f} minutes, on "
        "images that no other figure of this report uses. The best by the search's own objective "
        f"({best.objective:.4g}) is trial {best.number}: {escaped(best.method)} {escaped(options_of(best.options))} with "
        f"{_inline(best.weights)}.</p>"
    )
    charts = [*_curves(found), *_pairs(found)]
    listed = folded(f"All {len(found.trials):,} trials", _trial_table(found, best))
    return Section(anchor="search", title="Weights", content=f'{about}<div class="charts">{"".join(charts)}</div>{listed}')


def _inline(weights: dict[str, float]) -> str:
    return ", ".join(f"{brief(adapter)} at {weight:g}" for adapter, weight in weights.items()) or "no adapter"


def _group(trial: Trial) -> Group:
    return trial.method, options_of(trial.options), round(sum(trial.weights.values()), 3)


def _curves(found: Evaluation) -> list[str]:
    """For each adapter (of two: the first, whose share says the other's) and method: its share against the tasks' scores."""
    adapters = list(dict.fromkeys(adapter for trial in found.trials for adapter in trial.weights))
    adapters = adapters[:1] if len(adapters) == 2 else adapters
    charts = []
    for adapter in adapters:
        for method in dict.fromkeys(trial.method for trial in found.trials):
            trials = [trial for trial in found.trials if trial.method == method and sum(trial.weights.values()) > 0]
            if len({_share_of(trial, adapter) for trial in trials}) > 1:
                charts.append(_curve(adapter, method, trials))
    return charts[:MOST_CURVES]


def _share_of(trial: Trial, adapter: str) -> float:
    return round(trial.weights.get(adapter, 0.0) / sum(trial.weights.values()), 6)


def _curve(adapter: str, method: str, trials: list[Trial]) -> str:
    """One series a task; joined only where all else is the same: options, sum of weights, and no third adapter moves."""
    tasks = list(dict.fromkeys(task for trial in trials for task in trial.scores))
    is_one_line = len({_group(trial) for trial in trials}) == 1 and max(len(trial.weights) for trial in trials) <= 2
    ordered = sorted(trials, key=lambda trial: _share_of(trial, adapter))
    series = [
        Series(
            name=task,
            points=tuple(
                Point(x=_share_of(trial, adapter), y=trial.scores[task], says=says(trial))
                for trial in ordered
                if task in trial.scores
            ),
            shade=shade,
            is_joined=is_one_line,
        )
        for shade, task in enumerate(tasks)
    ]
    title = f"{method}: share of {shortened(adapter, 40)}"
    about = f"Score of each task against the share of {adapter} in the sum of weights, {len(trials)} trials of {method}."
    return xy_chart(title, about, series, Axis(name="share of the weights", shows=plain), Axis(name="score, %", shows=percent))


def _pairs(found: Evaluation) -> list[str]:
    """Each trial's scores on two tasks, for each pair of tasks."""
    tasks = list(dict.fromkeys(task for trial in found.trials for task in trial.scores))
    return [_pair(found, one, other) for one, other in list(combinations(tasks, 2))[:MOST_PAIRS]]


def _pair(found: Evaluation, one: str, other: str) -> str:
    trials = [trial for trial in found.trials if one in trial.scores and other in trial.scores]
    front = {trial.number for trial in trials if not any(_beats(rival, trial, one, other) for rival in trials)}
    best = best_of(found)
    series = []
    for shade, method in enumerate(dict.fromkeys(trial.method for trial in trials)):
        of_method = [trial for trial in trials if trial.method == method]
        marks = tuple(
            Point(
                x=trial.scores[one],
                y=trial.scores[other],
                says=says(trial) + ("; no trial is better on both" if trial.number in front else ""),
                label=f"trial {trial.number}" if best is not None and trial.number == best.number else "",
            )
            for trial in of_method
        )
        series.append(Series(name=method, points=marks, shade=shade))
    title = f"{shortened(one, 30)} against {shortened(other, 30)}"
    about = f"Scores of {len(trials)} trials on both tasks; {len(front)} of them are beaten by none on both."
    x, y = Axis(name=f"{shortened(one, 30)}, %", shows=percent), Axis(name=f"{shortened(other, 30)}, %", shows=percent)
    return xy_chart(title, about, series, x, y)


def _beats(rival: Trial, trial: Trial, one: str, other: str) -> bool:
    gains = (rival.scores[one] - trial.scores[one], rival.scores[other] - trial.scores[other])
    return min(gains) >= 0 and max(gains) > 0


def _trial_table(found: Evaluation, best: Trial) -> str:
    tasks = list(dict.fromkeys(task for trial in found.trials for task in trial.scores))
    columns = [
        Column(head="Trial"),
        Column(head="Method"),
        Column(head="Weights"),
        *(Column(head=brief(task), is_number=True) for task in tasks),
        Column(head="Objective", is_number=True),
        Column(head="To the best", is_number=True),
        Column(head="Seconds", is_number=True),
    ]
    ordered = sorted(found.trials, key=lambda trial: (-trial.objective, trial.number))
    rows = [
        [
            str(trial.number),
            f"{name(trial.method)}<small>{escaped(options_of(trial.options))}</small>",
            weights_of(trial.weights),
            *(share(trial.scores[task]) if task in trial.scores else "–" for task in tasks),
            f"{trial.objective:.4g}",
            points(trial.objective - best.objective) if trial is not best else "best",
            f"{trial.seconds:,.1f}",
        ]
        for trial in ordered
    ]
    return table("All trials, best first; scores in percent", columns, rows, marked=0)
