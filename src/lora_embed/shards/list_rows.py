"""The rows of a list of references: Parquet, CSV, TSV or JSON lines → for each image its reference, its key and its fields."""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, BinaryIO

import pyarrow as pa

from lora_embed.errors import ConfigError
from lora_embed.schema import Shard
from lora_embed.shards.checked_parquet import ParquetFile
from lora_embed.shards.columns import KEY_COLUMNS, NUMBERED, check_column
from lora_embed.shards.fields import MOST_FIELD, values_of
from lora_embed.text import in_one_line, may_hold_secret, number_of, redacted

PARQUET, CSV, TSV, JSON_LINES = (".parquet", ".pq"), (".csv",), (".tsv",), (".jsonl", ".ndjson")
LISTS = PARQUET + CSV + TSV + JSON_LINES
MOST_LINE = MOST_FIELD  # characters
ROWS = 8192  # of Parquet, converted at once
_MAY_BE_SECRET = re.compile(r"[@?#;&%]")
Row = tuple[Any, ...]  # reference, key, and the values of the carried fields


@dataclass(frozen=True, kw_only=True)
class References:
    """What a job says of lists of references."""

    column: str
    key_column: str | None = None
    fields: tuple[str, ...] = ()  # carried
    roots: tuple[str, ...] = ()  # places that lists may name beside their own store and public web servers
    checks: bool = False  # True: the etag of each object is part of its shard's id
    rejects_unreachable: bool = False  # True: what a web server does not give within `retry_s` is a reject


def carrying(references: References | None, names: tuple[str, ...]) -> References | None:
    """The same lists, with other carried fields."""
    return None if references is None else replace(references, fields=tuple(dict.fromkeys(names)))


@dataclass(frozen=True, kw_only=True)
class ListRows:
    """The carried fields that a list has, their types, and its rows, each of which is one image."""

    fields: tuple[tuple[str, pa.DataType], ...]
    rows: Iterator[Row]


def read_list(file: BinaryIO, shard: Shard, references: References) -> ListRows:
    """Open a list. Raises ConfigError for one without the column, also while its rows are read."""
    where, name = f"{shard.root}/{shard.name}", shard.name.lower()
    if name.endswith(PARQUET):
        return _read_parquet(file, shard, references, where)
    return _read_text(_lines(file, where), references, where, name)


def _read_text(lines: Iterator[str], references: References, where: str, name: str) -> ListRows:
    """CSV, whose first line names the columns, or JSON lines, of which the first has all columns that are looked for."""
    if name.endswith(JSON_LINES):
        rows = _json_rows(lines, where)
        first = next(rows, None)
        columns, rows = list(first or ()), itertools.chain([] if first is None else [first], rows)
        fields = references.fields
    else:
        columns, rows = _csv_rows(lines, "\t" if name.endswith(TSV) else ",", where)
        fields = tuple(field for field in references.fields if field in columns)
    key = _key_column(columns, references, where) if columns else None
    told = ((row.get(references.column), row.get(key) if key else None, [_text(row.get(f)) for f in fields]) for row in rows)
    return ListRows(
        fields=tuple((field, pa.string()) for field in fields),
        rows=_images(told, is_numbered=references.key_column == NUMBERED and key is None),
    )


def _read_parquet(file: BinaryIO, shard: Shard, references: References, where: str) -> ListRows:
    source = ParquetFile(file, shard.size, where)
    schema, column = source.schema, references.column
    key = _key_column(schema.names, references, where)
    names = [name for name in references.fields if name in schema.names]
    for name in {column, *filter(None, [key]), *names}:
        check_column(schema, name, where)
    kind = schema.field(column).type
    is_struct = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
    if not is_struct and not _is_text(kind):
        raise ConfigError(
            f"{where}: column {column!r} is of type {kind}, expected text, a list of text, or a struct with a field path. "
            "Correct reference_column in the job."
        )
    columns = list(dict.fromkeys([f"{column}.path" if is_struct else column, *filter(None, [key]), *names]))

    def rows() -> Iterator[tuple[Any, Any, list[Any]]]:
        for group in range(len(source.rows)):
            for batch in source.batches(group, columns, ROWS):
                found = values_of(batch.column(column))
                keys = itertools.repeat(None) if key is None else found if key == column else values_of(batch.column(key))
                fields = [values_of(batch.column(name)) for name in names]
                yield from zip(
                    found, keys, map(list, zip(*fields, strict=True)) if fields else itertools.repeat([]), strict=False
                )

    return ListRows(
        fields=tuple((name, _plain(schema.field(name).type)) for name in names),
        rows=_images(rows(), is_numbered=references.key_column == NUMBERED and key is None),
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary)
    return any(fits(kind) for fits in text)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _key_column(names: list[str], references: References, where: str) -> str | None:
    """The key column, configured or with a usual name. Raises ConfigError without it, or without the references' column."""
    key = references.key_column or next((name for name in KEY_COLUMNS if name in names), None)
    if key == NUMBERED and key not in names:
        key = None
    for setting, name in (("reference_column", references.column), ("key_column", key)):
        if name is not None and name not in names:
            raise ConfigError(f"{where}: has no column {name!r}, found {names}. Correct {setting} in the job.")
    return key


def _images(rows: Iterator[tuple[Any, Any, list[Any]]], *, is_numbered: bool) -> Iterator[Row]:
    """One row for each image: a list gives several, whose keys end with their number. Without a key, the reference is it."""
    for number, (value, key, fields) in enumerate(rows):
        references = _references_in(value)
        if is_numbered:
            key = f"{number:010d}"
        has_key = key is not None and key != "" and not isinstance(key, list | dict)
        for place, reference in enumerate(references):
            if has_key:
                own = _decoded(key) if len(references) == 1 else f"{_decoded(key)}#{place}"
            else:
                own = _key_of(reference) if reference else f"{number:010d}"
            yield (reference, own, *fields)


def _references_in(value: Any) -> list[str | None]:
    """The references in a column's value; one that is None where there is none."""
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, list):
        return [reference for item in value for reference in _references_in(item)] or [None]
    return [_decoded(value) if value not in (None, "") else None]


def _key_of(reference: str) -> str:
    """A reference as a key. It is written to tables, so what may be a password or a signature in it becomes a hash."""
    if not _MAY_BE_SECRET.search(reference) or not may_hold_secret(reference):  # the first test takes a tenth of the time
        return reference
    return f"{redacted(reference)}#{sha256(reference.encode()).hexdigest()[:12]}"


def _decoded(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    text = str(value)
    return (
        text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
    )  # JSON may hold halves of surrogate pairs


def _text(value: Any) -> str | None:
    """A value of a text list as text, as `fields.typed` reads it."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _lines(file: BinaryIO, where: str) -> Iterator[str]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    for number in itertools.count(1):
        try:
            line = text.readline(MOST_LINE)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}: line {number} is not UTF-8 ({error.reason}). Write the list as UTF-8.") from None
        if not line:
            return
        if len(line) == MOST_LINE:
            raise ConfigError(f"{where}: line {number} has more than {MOST_LINE} characters. Leave large columns out.")
        yield line


def _csv_rows(lines: Iterator[str], delimiter: str, where: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The names of the columns, and the rows."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    values = _csv_values(reader, where)
    names = next(values, [])
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"{where}: its first line is {names}, expected the names of its columns, each once. Correct it.")

    def rows() -> Iterator[dict[str, Any]]:
        for row in values:
            if row and len(row) != len(names):
                raise ConfigError(
                    f"{where}: line {reader.line_num} has {number_of(len(row), 'value')}, but the first line "
                    f"names {number_of(len(names), 'column')}. "
                    "Put quotes around values that hold the separator."
                )
            if row:
                yield dict(zip(names, row, strict=True))

    return names, rows()


def _csv_values(reader: Any, where: str) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ConfigError(f"{where}: line {reader.line_num} cannot be read as CSV ({error}). Correct it.") from None


def _json_rows(lines: Iterator[str], where: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: line {number} is not JSON ({error}). Write one JSON object on each line.") from None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{where}: line {number} is {in_one_line(json.dumps(row), 60)}, expected one JSON object on each line."
            )
        yield row
