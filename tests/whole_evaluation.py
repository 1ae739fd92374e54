"""The evaluation for tests with figures of every metric, as a real one has them."""

from dataclasses import replace

from evaluations import Naming, evaluation
from lora_embed.evaluate.records import METRICS, Evaluation


def whole_evaluation(called: Naming = str) -> Evaluation:
    """`evaluation`, whose figures by kNN stand for the metrics that it lacks."""
    some = evaluation(called)
    lacking = [metric for metric in METRICS if metric not in {figure.metric for figure in some.figures}]
    figures = [replace(figure, metric=metric) for figure in some.figures if figure.metric == "knn" for metric in lacking]
    return replace(some, figures=(*some.figures, *figures))
