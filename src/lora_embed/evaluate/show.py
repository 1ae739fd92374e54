"""Format an evaluation as Markdown, for a terminal or a page: figures with intervals, heads, similarity of adapters."""

from collections.abc import Sequence
from typing import get_args

from lora_embed.evaluate.records import METRICS, Difference, Evaluation, Figure, RelationKind

TITLES = {"knn": "kNN", "probe": "probe", "recall@1": "recall@1", "recall@5": "recall@5", "map": "mAP", "nmi": "NMI"}
MARKS = {"better": " ▲", "worse": " ▼", "within noise": ""}


def to_markdown(evaluation: Evaluation) -> str:
    """All tables except those by class, layer and query, which only the JSON holds."""
    parts = [_about(evaluation), *(_task_table(evaluation, task.name) for task in evaluation.tasks), _legend(evaluation)]
    return "\n\n".join(part for part in [*parts, _retention(evaluation), _relations(evaluation), _cost(evaluation)] if part)


def _about(evaluation: Evaluation) -> str:
    rejects = "".join(f", {number:,} {reason}" for reason, number in evaluation.rejects.items())
    decoded = f"{evaluation.decoded:,} decoded for {len(evaluation.candidates)} candidates{rejects}"
    return f"{evaluation.samples:,} samples, {decoded}; {evaluation.splits} splits, seed {evaluation.seed}"


def _task_table(evaluation: Evaluation, task: str) -> str:
    figures = {(row.candidate, row.metric): row for row in evaluation.figures if row.task == task}
    differences = {(row.candidate, row.metric): row for row in evaluation.differences if row.task == task}
    task_row = next(row for row in evaluation.tasks if row.name == task)
    lines = [["candidate", *(TITLES[metric] for metric in METRICS)]]
    for row in evaluation.candidates:
        cells = [_cell(figures[row.name, metric], differences.get((row.name, metric))) for metric in METRICS]
        lines.append([row.name, *cells])
    return f"{task}: {len(task_row.classes)} classes, {task_row.images:,} images\n\n{_table(lines)}"


def _cell(figure: Figure, difference: Difference | None) -> str:
    mark = MARKS[difference.verdict] if difference is not None else ""
    return f"{100 * figure.mean:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]{mark}"


def _legend(evaluation: Evaluation) -> str:
    return (
        f"Percent, mean and 95 % interval. ▲ ▼: the paired difference to {evaluation.reference} has a 95 % interval "
        "above or below 0; the interval is for one comparison, not for the whole table."
    )


def _retention(evaluation: Evaluation) -> str:
    if not evaluation.retention:
        return ""
    lines = [["head of", "task", "on", "correct", "on its own adapter", "difference, points", "images"]]
    for head in evaluation.retention:
        points = [f"{100 * value:+.1f}".replace("-", "−") for value in (head.kept - head.own, head.low, head.high)]
        difference = f"{points[0]} [{points[1]}, {points[2]}]"
        on_adapter, on_candidate = f"{100 * head.own:.1f}", f"{100 * head.kept:.1f}"
        lines.append([head.adapter, head.task, head.candidate, on_candidate, on_adapter, difference, f"{head.images:,}"])
    return f"Adapters' own heads: percent of labelled images that they classify correctly\n\n{_table(lines)}"


def _relations(evaluation: Evaluation) -> str:
    over_all: dict[tuple[str, str, str], float] = {
        (relation.one, relation.other, relation.kind): relation.value
        for relation in evaluation.relations
        if relation.layer is None
    }
    if not over_all:
        return ""
    pairs = list(dict.fromkeys((first, second) for first, second, _ in over_all))
    kinds = [kind for kind in get_args(RelationKind) if any(kind == key[2] for key in over_all)]
    lines = [["adapters", *(kind.replace("_", " ") for kind in kinds)]]
    for first, second in pairs:
        cells = [over_all.get((first, second, kind)) for kind in kinds]
        lines.append([f"{first}, {second}", *("–" if value is None else f"{value:.3f}" for value in cells)])
    return f"Similarity of the adapters' changes, over all layers\n\n{_table(lines)}"


def _cost(evaluation: Evaluation) -> str:
    lines = [["candidate", "space", "dimensions", "MB", "build, s", "forward, s"]]
    for candidate in evaluation.candidates:
        sizes = [
            f"{candidate.dimension:,}",
            f"{candidate.encoder_bytes / 1e6:.1f}",
            f"{candidate.build_s:.1f}",
            f"{candidate.forward_s:.1f}",
        ]
        lines.append([candidate.name, candidate.space_id, *sizes])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns, so that it is readable as plain text too."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    rows = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
