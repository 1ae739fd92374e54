"""An evaluation as one HTML page that needs nothing else. The templates in `templates/` fill its sections."""

from dataclasses import dataclass
from pathlib import Path

from lora_embed.evaluate.page.pictures import numbered_pictures
from lora_embed.evaluate.page.relations import measures_of
from lora_embed.evaluate.page.scores import class_changes, difference_of, most_judged, scores_by_task, verdicts
from lora_embed.evaluate.page.trials import best_of, curves, pair_charts
from lora_embed.evaluate.records import Evaluation
from lora_embed.evaluate.verdict import FEW_QUERIES, METRIC_NAMES, called, in_short, queries_of, warnings_of
from lora_embed.report.charts import percent, row_scale
from lora_embed.report.page import moment, page, shortened, write

SECTIONS = {
    "summary": "In short",
    "scores": "Figures and verdicts",
    "merged": "What was merged",
    "heads": "Heads kept",
    "classes": "Classes",
    "search": "Weights",
    "relations": "Relatedness",
    "neighbours": "Neighbours",
    "time": "Time and rejects",
    "lineage": "Provenance",
}
FEW = 4  # encoders up to which the summary says the verdict of each in words


@dataclass(frozen=True, kw_only=True)
class OfSearch:
    """What a search says of its winner, line by line as on a terminal, and on how many images it scored its trials."""

    says: tuple[str, ...]
    images: int


def write_report(evaluation: Evaluation, path: Path, search: OfSearch | None = None) -> None:
    """One HTML file that needs nothing else and runs no script. Raises StorageError when it cannot be written."""
    write(evaluation_page(evaluation, search), path)


def evaluation_page(evaluation: Evaluation, search: OfSearch | None = None) -> str:
    """The page's HTML. All text of the evaluation is escaped on its way in. `search`: of `tune`, which made it."""
    lead = [shortened(task.name, 40) for task in evaluation.tasks] or ["no task"]
    gaps = verdicts(evaluation)
    heads = [head for head in evaluation.retention if head.own]
    return page(
        "Evaluation of merged encoders",
        [*lead, moment(evaluation.created)],
        "evaluate/page/templates",
        SECTIONS,
        evaluation=evaluation,
        short=search.says if search is not None else in_short(evaluation),
        warnings=warnings_of(evaluation),
        searched=search.images if search is not None else None,
        judged=most_judged(evaluation),
        called=called,
        few_queries=FEW_QUERIES,
        queries_of=queries_of,
        pictures=numbered_pictures(evaluation),
        scores_by_task=scores_by_task(evaluation),
        difference_of=difference_of,
        metric_names=METRIC_NAMES,
        verdicts=gaps if len(gaps) <= FEW else {},
        worst_head=min(heads, key=lambda head: head.kept / head.own, default=None),
        class_changes=class_changes(evaluation),
        best=best_of(evaluation),
        trial_charts=[*curves(evaluation), *pair_charts(evaluation)],
        measures=measures_of(evaluation),
        row_scale=row_scale,
        percent=percent,
    )
