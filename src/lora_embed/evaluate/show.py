"""Show an evaluation on a terminal, or as Markdown: figures with intervals, heads, similarity of adapters."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from lora_embed.evaluate.records import METRICS, Difference, Evaluation, Figure, RelationKind
from lora_embed.evaluate.verdict import in_short, warnings_of
from lora_embed.text import number_of, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TITLES = {"knn": "kNN", "probe": "probe", "recall@1": "recall@1", "recall@5": "recall@5", "map": "mAP", "nmi": "NMI"}
MOST_COLUMNS = 10_000  # of a terminal
MARKS = {"better": " ▲", "worse": " ▼", "within noise": ""}


@dataclass(frozen=True)
class Cell:
    """A figure with its interval, if it has one, and a mark if it differs from the reference's."""

    mean: str
    low: str = ""
    high: str = ""
    mark: str = ""

    def __str__(self) -> str:
        interval = f"[{self.low}, {self.high}]" if self.low else "[no interval]"
        return f"{self.mean} {interval}{self.mark}"

    def in_a_line(self) -> str:
        """As wide with a mark as without."""
        return str(self) + " " * (2 - len(self.mark))

    def in_two_lines(self) -> str:
        interval = f"{self.low}–{self.high}" if self.low else "no interval"
        return f"{self.mark} {self.mean}\n{interval}".strip()


@dataclass(frozen=True)
class Part:
    """A sentence, and the table below it: its lines, the first of which is the head, and how many columns are words."""

    says: str
    lines: Sequence[Sequence[str | Cell]] = ()
    words: int = 1


def print_evaluation(evaluation: Evaluation) -> None:
    """Print all tables except those by class, layer and query, which only the JSON holds; Markdown if not on a terminal."""
    if not sys.stdout.isatty():
        print(to_markdown(evaluation))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for number, part in enumerate(_parts(evaluation)):
        console.print("\n" * (number > 0) + printable(part.says), markup=False)
        if part.lines:
            _print_table(console, part)


def to_markdown(evaluation: Evaluation) -> str:
    """The same tables as Markdown."""
    return "\n\n".join(block for part in _parts(evaluation) for block in (part.says, _markdown(part.lines)) if block)


def _parts(evaluation: Evaluation) -> list[Part]:
    short = [Part(f"In short: {sentence}") for sentence in in_short(evaluation)]
    warnings = [Part(f"Warning: {sentence}") for sentence in warnings_of(evaluation)]
    tasks = [_task(evaluation, task.name) for task in evaluation.tasks]
    parts = [_retention(evaluation), _relations(evaluation), _cost(evaluation)]
    return [
        _about(evaluation), *short, *warnings, *tasks, _legend(evaluation), *(part for part in parts if part is not None),
    ]  # fmt: skip


def _about(evaluation: Evaluation) -> Part:
    rejects = "".join(f", {number:,} {reason}" for reason, number in evaluation.rejects.items())
    decoded = f"{evaluation.decoded:,} decoded for {number_of(len(evaluation.candidates), 'candidate')}{rejects}"
    splits = f"{number_of(evaluation.splits, 'split')}, seed {evaluation.seed}"
    return Part(f"{number_of(evaluation.samples, 'sample')}, {decoded}; {splits}")


def _task(evaluation: Evaluation, task: str) -> Part:
    figures = {(row.candidate, row.metric): row for row in evaluation.figures if row.task == task}
    differences = {
        (row.candidate, row.metric): row
        for row in evaluation.differences
        if (row.task, row.reference) == (task, evaluation.reference)
    }
    task_row = next(row for row in evaluation.tasks if row.name == task)
    metrics = [metric for metric in METRICS if any(metric == measured for _, measured in figures)]
    lines: list[list[str | Cell]] = [["candidate", *(TITLES[metric] for metric in metrics)]]
    for row in evaluation.candidates:
        cells = [_cell(figures[row.name, metric], differences.get((row.name, metric))) for metric in metrics]
        lines.append([row.name, *cells])
    return Part(f"{task}: {number_of(len(task_row.classes), 'class')}, {number_of(task_row.images, 'image')}", lines)


def _cell(figure: Figure, difference: Difference | None) -> Cell:
    mean, low, high = (f"{100 * value:.1f}" for value in (figure.mean, figure.low, figure.high))
    mark = MARKS[difference.verdict] if difference is not None else ""
    return Cell(mean, low, high, mark) if figure.has_interval else Cell(mean, mark=mark)


def _legend(evaluation: Evaluation) -> Part:
    return Part(
        f"Percent, mean and 95 % interval. ▲ ▼: the paired difference to {evaluation.reference} has a 95 % interval "
        "above or below 0; the interval is for one comparison, not for the whole table."
    )


def _retention(evaluation: Evaluation) -> Part | None:
    if not evaluation.retention:
        return None
    lines = [["head of", "task", "on", "correct", "on its own adapter", "difference, points", "images"]]
    for head in evaluation.retention:
        points = [f"{100 * value:+.1f}".replace("-", "−") for value in (head.kept - head.own, head.low, head.high)]
        difference = f"{points[0]} [{points[1]}, {points[2]}]" if head.has_interval else points[0]
        on_adapter, on_candidate = f"{100 * head.own:.1f}", f"{100 * head.kept:.1f}"
        lines.append([head.adapter, head.task, head.candidate, on_candidate, on_adapter, difference, f"{head.images:,}"])
    return Part("Adapters' own heads: percent of labelled images that they classify correctly", lines, words=3)


def _relations(evaluation: Evaluation) -> Part | None:
    over_all: dict[tuple[str, str, str], float] = {
        (relation.one, relation.other, relation.kind): relation.value
        for relation in evaluation.relations
        if relation.layer is None
    }
    if not over_all:
        return None
    pairs = list(dict.fromkeys((first, second) for first, second, _ in over_all))
    kinds = [kind for kind in get_args(RelationKind) if any(kind == key[2] for key in over_all)]
    lines = [["adapters", *(kind.replace("_", " ") for kind in kinds)]]
    for first, second in pairs:
        cells = [over_all.get((first, second, kind)) for kind in kinds]
        lines.append([f"{first}, {second}", *("–" if value is None else f"{value:.3f}" for value in cells)])
    return Part("Similarity of the adapters' changes, over all layers", lines)


def _cost(evaluation: Evaluation) -> Part:
    lines = [["candidate", "space", "dimensions", "MB", "build, s", "forward, s"]]
    for candidate in evaluation.candidates:
        sizes = [
            f"{candidate.dimension:,}",
            f"{candidate.encoder_bytes / 1e6:.1f}",
            f"{candidate.build_s:.1f}",
            f"{candidate.forward_s:.1f}",
        ]
        lines.append([candidate.name, candidate.space_id, *sizes])
    return Part("Size of each encoder, and how long it took to build it and to embed the images with it", lines)


def _print_table(console: "Console", part: Part) -> None:
    """Print a table that fits the terminal: where a line has no room for both, intervals stand below their figures.

    On a terminal that is too narrow even for that, the terminal breaks the lines, so that no figure is cut.
    """
    wide, table = console.options.update(width=MOST_COLUMNS), _rich_table(part, Cell.in_a_line)
    if console.measure(table, options=wide).maximum > console.width:
        table = _rich_table(part, Cell.in_two_lines)
    needs = console.measure(table, options=wide).minimum
    console.print(table, width=max(needs, console.width), soft_wrap=needs > console.width)


def _rich_table(part: Part, write: Callable[[Cell], str]) -> "Table":
    """Words are on the left and may be folded; figures are on the right and are never cut."""
    from rich.table import Table
    from rich.text import Text

    head, *rows = [[Text(write(cell) if isinstance(cell, Cell) else printable(cell)) for cell in line] for line in part.lines]
    is_tall = any("\n" in cell.plain for row in rows for cell in row)
    table = Table(box=None, padding=(0, 2, int(is_tall), 0), pad_edge=False)
    for number, title in enumerate(head):
        if number < part.words:
            table.add_column(title, overflow="fold")
        else:
            figures = [line for row in rows for line in row[number].plain.split("\n")]
            widest = max(map(len, [*figures, *title.plain.split()]))
            table.add_column(title, justify="right", min_width=widest)
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(lines: Sequence[Sequence[str | Cell]]) -> str:
    """A Markdown table with padded columns, so that it is readable as plain text too."""
    if not lines:
        return ""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    rows = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
