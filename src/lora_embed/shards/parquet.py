"""A Parquet file → its samples, up to its checked end. The sizes of values are checked before they are converted."""

import itertools
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from lora_embed.errors import ShardError
from lora_embed.schema import Layout, Sample, Shard, Wanted
from lora_embed.shards.checked_parquet import ParquetFile, extensions
from lora_embed.shards.fields import values_of

ROWS = 64  # rows of a batch
MOST_REPEATED = 2**28  # bytes that the rows of a batch may take in memory beyond their size in the file
MOST_AT_ONCE = 2**25  # bytes of images that are converted to Python at once
FREE_ROWS, BYTES_PER_ROW = 1_000_000, 64  # a file may have so many rows, or one row for so many of its bytes
_IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "jpg", "png")
KEY_COLUMNS = ("key", "__key__", "id", "path", "file_name")


def read_parquet(file: BinaryIO, shard: Shard, layout: Layout, wanted: Wanted) -> Iterator[Sample]:
    """Yield each row as a sample. Raises ShardError for a file that cannot be used, and any error of Arrow if it is damaged."""
    where = f"{shard.root}/{shard.name}"
    source = ParquetFile(file, shard.size, where)
    image, key = _columns(source.schema, layout, where)
    carried = [name for name, _ in layout.carry if name in source.schema.names]
    for name in filter(None, (image, key, *carried)):
        check_column(source.schema, name, where)
    _check_rows(source.num_rows, shard, where)
    number = 0
    for group, rows in enumerate(source.rows):
        _check_rows(number + rows, shard, where)
        needed = any(wanted(number + row) for row in range(rows))
        columns = ([key] if key else []) + ([image, *carried] if needed else [])
        if not columns:
            yield from (Sample(f"{number + row:010d}") for row in range(rows))
            number += rows
            continue
        for batch in source.batches(group, columns, ROWS, MOST_REPEATED):
            yield from _rows(batch, image if needed else None, key, carried, number, layout.max_bytes)
            number += batch.num_rows
    if number != source.num_rows:
        raise ShardError(f"{where}: has {number} rows, but its footer says {source.num_rows}. Upload it again.")


def _columns(schema: pa.Schema, layout: Layout, where: str) -> tuple[str, str | None]:
    """The image column and the key column, configured or with a usual name. Without a key column, rows are numbered."""
    holding = {field.name for field in schema if _holds_bytes(field.type)}
    image = layout.image_column or next((name for name in _IMAGE_COLUMNS if name in holding), None)
    if image is None or image not in holding:
        expected = f"column {layout.image_column!r}" if layout.image_column else f"one of {', '.join(_IMAGE_COLUMNS)}"
        raise ShardError(
            f"{where}: has no image column: expected {expected} of binary type, found {schema.names}. Set image_column in the "
            "job."
        )
    key = layout.key_column or next((name for name in KEY_COLUMNS if name in schema.names), None)
    if key is not None and key not in schema.names:
        raise ShardError(f"{where}: has no key column {key!r}, found {schema.names}. Correct key_column in the job.")
    return image, key


def check_column(schema: pa.Schema, name: str, where: str) -> None:
    """Refuse Ray's Arrow types, whose values may be pickles: opening a pickle runs the code in it."""
    if (count := schema.names.count(name)) > 1:
        raise ShardError(f"{where}: has {count} columns named {name!r}, expected one. Rename the others.")
    field = schema.field(name)
    if foreign := [extension for extension in extensions(field) if extension.startswith("ray.")]:
        raise ShardError(
            f"{where}: column {name!r} is of type {foreign[0]}, expected one of Arrow's own types: values of other types may "
            "be pickles, which are never opened. Write the column as text, bytes or numbers."
        )
    if pa.types.is_fixed_size_binary(field.type) and field.type.byte_width * ROWS > MOST_REPEATED:
        raise ShardError(
            f"{where}: column {name!r} has values of {field.type.byte_width} bytes each, which is too large for a type of "
            "fixed size. Write the column as binary."
        )


def _check_rows(rows: int, shard: Shard, where: str) -> None:
    if rows > max(FREE_ROWS, shard.size // BYTES_PER_ROW):
        raise ShardError(
            f"{where}: has {rows} rows in {shard.size} bytes; at most {FREE_ROWS}, or one for {BYTES_PER_ROW} bytes, are "
            "allowed. Leave out rows that have no image or repeat one."
        )


def _holds_bytes(kind: pa.DataType) -> bool:
    """True for binary, and for the struct with `bytes` that Hugging Face datasets write."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _rows(
    batch: pa.RecordBatch, image: str | None, key: str | None, carried: list[str], start: int, max_bytes: int
) -> Iterator[Sample]:
    """Samples of a batch. An image of more than `max_bytes` is not copied."""
    keys = values_of(batch.column(key)) if key else [None] * batch.num_rows
    fields = {field: values_of(batch.column(field)) for field in carried} if image else {}
    images = _images(batch, image) if image else itertools.repeat(None)
    for row, (name, data) in enumerate(zip(keys, images, strict=False)):
        if name is None:  # without a key column, or where it holds null
            name = f"{start + row:010d}"
        elif isinstance(name, bytes):
            name = name.decode("utf-8", "backslashreplace")
        sample = Sample(str(name), fields={field: values[row] for field, values in fields.items()})
        if data is not None and len(data) > max_bytes:
            sample.excess = len(data)
        elif data is not None:
            sample.data = data if isinstance(data, bytes) else data.to_pybytes()
        yield sample


def _images(batch: pa.RecordBatch, image: str) -> Iterator[bytes | pa.Buffer | None]:
    """The column's values; as buffers, which are not copied yet, if copies would take much memory."""
    images = batch.column(image)
    if pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")  # null where the struct is
    is_view = pa.types.is_binary_view(images.type)  # a type whose `nbytes` pyarrow 21 does not know
    size = images.get_total_buffer_size() if is_view else images.nbytes
    return iter(images.to_pylist()) if size <= MOST_AT_ONCE else (value.as_buffer() for value in images)
