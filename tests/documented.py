"""The Python blocks of pages in docs, run on a table of a test."""

import json
import re
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jobs import ROOT
from lora_embed import Table


def expected_ids(table: Table) -> list[str]:
    return [str(name) for path in table.files for name in pq.read_table(path, columns=["id"]).column("id").to_pylist()]


def bits(vectors: Any) -> bytes:
    return np.ascontiguousarray(vectors).tobytes()


def documented(heading: str) -> list[str]:
    """The Python blocks of a section of docs/readers.md."""
    return blocks_of("readers.md", heading)


def blocks_of(page: str, heading: str) -> list[str]:
    """The Python blocks of a section of a page in docs, from its heading to the next one."""
    sections = re.split(r"^#+ (.*)$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    section = sections[sections.index(heading) + 1]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def run_documented(block: str, table: Table, names: dict[str, Any] | None = None, **paths: str) -> dict[str, Any]:
    """What a block of the page leaves in its variables; its table and paths are replaced by those of the test."""
    for name, path in {'"tables/products"': json.dumps(table.store.uri), **paths}.items():
        block = block.replace(name, path)
    namespace = dict(names or {})
    exec(block, namespace)
    return namespace
