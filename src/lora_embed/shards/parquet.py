"""A Parquet file → its samples, up to its checked end. The sizes of values are checked before they are converted."""

import itertools
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from lora_embed.errors import MAKE_AGAIN, ShardError
from lora_embed.images.recognise import is_image
from lora_embed.schema import Layout, Sample, Shard, Wanted
from lora_embed.shards.cells import Value, image_bytes, lists_in, values_in
from lora_embed.shards.checked_parquet import ParquetFile
from lora_embed.shards.class_names import class_labels, namings_of
from lora_embed.shards.columns import ROWS, Columns, choose_columns, column_of, to_read
from lora_embed.shards.fields import values_of
from lora_embed.text import number_of

FREE_ROWS, BYTES_PER_ROW = 1_000_000, 64  # a file may have so many rows, or one row for so many of its bytes
_URL = re.compile(r"[a-z][a-z0-9+.-]{1,9}://", re.IGNORECASE)


def read_parquet(file: BinaryIO, shard: Shard, layout: Layout, wanted: Wanted) -> Iterator[Sample]:
    """Yield each row as a sample, and each image of a row that holds a list of images.

    Raises ShardError for a file that cannot be used, and any error of Arrow if it is damaged.
    """
    where = f"{shard.root}/{shard.name}"
    source = ParquetFile(file, shard.size, where)
    columns = choose_columns(source.schema, layout, where)
    reader = _Reader(columns, source.schema, layout)
    _check_rows(source.num_rows, shard, where)
    row = number = 0  # of the next row, and of the next sample
    for group, rows in enumerate(source.rows):
        _check_rows(row + rows, shard, where)
        needed = columns.holds_lists or any(wanted(number + step) for step in range(rows))
        images = [columns.image] if layout.max_bytes or columns.holds_lists else []  # 0: the fields alone are read
        names = to_read(source.schema, [*filter(None, [columns.key]), *([*images, *columns.carried] if needed else [])])
        if not names:
            yield from (Sample(f"{row + step:010d}") for step in range(rows))
            row, number = row + rows, number + rows
            continue
        for batch in source.batches(group, names, ROWS):
            if columns.is_text and images and needed and not row:
                _check_text(batch.column(columns.image), columns, source.schema, where)
            for sample in reader.samples(batch, row) if needed else map(Sample, reader.keys(batch, row)):
                yield sample
                number += 1
            row += batch.num_rows
            _check_rows(number, shard, where)
    if row != source.num_rows:
        raise ShardError(f"{where}: has {number_of(row, 'row')}, but its footer says {source.num_rows}. {MAKE_AGAIN}.")


def _check_rows(rows: int, shard: Shard, where: str) -> None:
    if rows > max(FREE_ROWS, shard.size // BYTES_PER_ROW):
        raise ShardError(
            f"{where}: has {rows} rows in {shard.size} bytes; at most {FREE_ROWS}, or one for {BYTES_PER_ROW} bytes, are "
            "allowed. Leave out rows that have no image or repeat one."
        )


def _check_text(column: pa.Array, columns: Columns, schema: pa.Schema, where: str) -> None:
    """Raises ShardError for a column of text if none of its first values is base64 text of an image."""
    found = itertools.chain.from_iterable(lists_in(column)) if columns.holds_lists else values_in(column)
    values = [value for value in found if value is not None]
    if not values or any(is_image(image_bytes(value)) for value in values):
        return
    example = str(values[0] if isinstance(values[0], str) else bytes(memoryview(values[0])[:99]).decode("utf-8", "replace"))[
        :80
    ]
    kind = "URLs" if _URL.match(example) else "paths" if re.search(r"\.\w{2,5}$|/", example) else "text"
    binary = [field.name for field in schema if pa.types.is_binary(field.type)]
    help_ = (
        f"Set image_column to {binary[0]!r}, which is binary"
        if binary
        else f"Set reference_column to {columns.image!r} if it names images"
    )
    raise ShardError(
        f"{where}: column {columns.image!r} holds {kind}, such as {example!r}, not the bytes of images or base64 text of them. "
        f"{help_}, or write the bytes of the images into the column."
    )


class _Reader:
    """Turns batches of rows, in order, into samples."""

    def __init__(self, columns: Columns, schema: pa.Schema, layout: Layout) -> None:
        self._columns, self._max_bytes = columns, layout.max_bytes
        self._namings = namings_of(schema, [name for name, kind in layout.carry if kind == "string"])
        self._class_labels = class_labels(schema, [name for name, kind in layout.carry if kind == "int64"])
        self._times: dict[str, int] = {}  # how often a key was seen, where keys may repeat

    def samples(self, batch: pa.RecordBatch, start: int) -> Iterator[Sample]:
        """The batch's samples; `start` is the number of its first row. Images in a list get their row's key and a number."""
        columns, max_bytes = self._columns, self._max_bytes
        values = [self._field(batch, name) for name in columns.carried]
        fields = (
            (dict(zip(columns.carried, row, strict=True)) for row in zip(*values, strict=True)) if values else iter(dict, None)
        )
        is_read = max_bytes and columns.image in batch.schema.names
        column = batch.column(columns.image) if is_read else pa.nulls(batch.num_rows, pa.binary())
        if not columns.holds_lists:
            for name, of_row, value in zip(self.keys(batch, start), fields, values_in(column), strict=False):
                yield _sample(self._begin(name, of_row), value, max_bytes, is_text=columns.is_text)
            return
        for name, of_row, cell in zip(self.keys(batch, start), fields, lists_in(batch.column(columns.image)), strict=False):
            for place, value in enumerate(cell):
                yield _sample(self._begin(f"{name}#{place}", of_row), value, max_bytes, is_text=columns.is_text)
            if not cell:
                yield self._begin(name, of_row)

    def _begin(self, key: str, fields: dict[str, Any]) -> Sample:
        return Sample(key, fields=fields, class_labels=self._class_labels)

    def _field(self, batch: pa.RecordBatch, name: str) -> list[Any]:
        values = values_of(column_of(batch, name))
        return list(map(naming, values)) if (naming := self._namings.get(name)) else values

    def keys(self, batch: pa.RecordBatch, start: int) -> Iterator[str]:
        """The rows' keys. Rows without one are numbered; where keys may repeat, a second `x.jpg` is `x.jpg#2`."""
        key, may_repeat = self._columns.key, self._columns.key_may_repeat
        for row, name in enumerate(values_of(column_of(batch, key)) if key else [None] * batch.num_rows, start):
            if name is None or (may_repeat and not name):
                text = f"{row:010d}"
            else:
                text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
            yield self._distinct(text) if may_repeat else text

    def _distinct(self, key: str) -> str:
        distinct = key
        while distinct in self._times:
            self._times[key] += 1
            distinct = f"{key}#{self._times[key]}"
        self._times[distinct] = 1
        return distinct


def _sample(sample: Sample, value: Value, max_bytes: int, *, is_text: bool) -> Sample:
    """The sample with its image, unless that has more than `max_bytes`: then it is not copied."""
    size = 0 if value is None else len(value) * 3 // 4 if is_text else len(value)
    if size > max_bytes:
        sample.excess = size
    elif value is not None:
        sample.data = image_bytes(value)
    return sample
