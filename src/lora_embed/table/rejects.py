"""Rejects by reason, with a few examples of each, from files of rejects or from staged parts."""

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from lora_embed.monitor.record import EXAMPLES, RejectExample
from lora_embed.schema import FORGOTTEN, REJECT_SCHEMA
from lora_embed.store.store import Store
from lora_embed.table.parquet import count_values, file_batches
from lora_embed.text import printable, without_secrets

MOST_FILES = 64  # that are read
MOST_SHOWN = 200  # characters of an id or a detail in an example
NOT_READ = "in more files than a report reads"
_COLUMNS = pa.schema([REJECT_SCHEMA.field(name) for name in ("id", "reason", "detail")])


def read_rejects(store: Store, files: Iterable[tuple[str, int]]) -> tuple[dict[str, int], tuple[RejectExample, ...]]:
    """Rejects by reason, and a few examples of each; `files` are paths, and how many rejects each holds.

    Only the first `MOST_FILES` are read; the rejects of others are counted as `NOT_READ`.
    """
    counts: Counter[str] = Counter()
    by_reason: dict[str, list[RejectExample]] = {}
    for number, (path, rejects) in enumerate(files):
        if number >= MOST_FILES:
            counts[NOT_READ] += rejects
            continue
        for batch in file_batches(store, path, _COLUMNS):
            counts.update(count_reasons(batch))
            for example in examples_of(batch):
                if len(by_reason.setdefault(example.reason, [])) < EXAMPLES:
                    by_reason[example.reason].append(example)
    return dict(counts), tuple(example for examples in by_reason.values() for example in examples)


def count_reasons(rows: pa.Table | pa.RecordBatch) -> dict[str, int]:
    """Number of rejects by reason, among the rows of a part or a chunk's samples."""
    return dict(count_values(rows.column("reason").drop_null()))


def examples_of(rows: pa.Table | pa.RecordBatch) -> list[RejectExample]:
    """The first rejects of each reason, among rows that have an id."""
    examples = []
    for reason in sorted(count_reasons(rows).keys() - {FORGOTTEN}):
        of_reason = rows.filter(pc.equal(rows.column("reason"), reason)).slice(0, EXAMPLES).select(_COLUMNS.names)
        examples += [
            RejectExample(id=row["id"][:MOST_SHOWN], reason=reason, detail=without_secrets((row["detail"] or "")[:MOST_SHOWN]))
            for row in of_reason.to_pylist()
        ]
    return examples


def describe_rejects(counts: dict[str, int]) -> str:
    """`2 not_an_image, 1 empty`, the most frequent reason first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number:,} {reason}" for reason, number in ordered)


def describe_examples(examples: Iterable[RejectExample], most: int = 3) -> list[str]:
    """A line for each of a few rejects, of as many reasons as possible."""
    by_turn: dict[str, int] = Counter()
    turns = []
    for example in examples:
        turns.append((by_turn[example.reason], example))
        by_turn[example.reason] += 1
    first = [example for _, example in sorted(turns, key=lambda turn: turn[0])[:most]]
    return [printable(f"{example.id}: {example.reason}" + f", {example.detail}" * bool(example.detail)) for example in first]
