"""Lists of references for tests, and the images that they name."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from samples import png


def images_in(folder: Path, count: int = 4) -> list[str]:
    """Images in `folder/images`, and their paths from `folder` on."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    return [f"images/{number}.png" for number in range(count)]


def write_list(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """A list in the format that its name says; JSON lines and CSV are written by hand, as other programs would."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path, **options)
    elif suffix in (".csv", ".tsv"):
        separator = "," if suffix == ".csv" else "\t"
        lines = [separator.join(columns)] + [separator.join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
