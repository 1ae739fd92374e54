"""Which columns of a Parquet file hold images, keys and fields; a file that cannot be used says what it has instead.

A name may be that of a part of a struct, with dots: `image.path`. A column of just that name comes first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from lora_embed.errors import ColumnError, ShardError
from lora_embed.schema import Layout
from lora_embed.shards.checked_parquet import MOST_REPEATED, extensions

ROWS = 64  # rows of a batch
READING = "paths and names of classes"  # how keys and fields are read: what is kept of Parquet input says so
NUMBERED = "none"  # as `key_column`: rows are numbered
_IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "jpg", "png", "images")
KEY_COLUMNS = ("key", "__key__", "id", "path", "file_name")
_SHOWN = 20  # columns that a message names
_MANY = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns."""

    image: str
    key: str | None  # None: rows are numbered
    key_may_repeat: bool  # nobody chose it, and file names repeat: those that do get numbers
    carried: list[str]
    holds_lists: bool  # each row of the image column may hold several images
    is_text: bool  # the image column is text: base64


def choose_columns(schema: pa.Schema, layout: Layout, where: str) -> Columns:
    """The configured columns, or those with usual names. Raises ColumnError for a file that lacks one, and ShardError
    for one that has it twice."""
    image, key = _image_of(schema, layout, where), _key_of(schema, layout, where)
    carried = [name for name, _ in layout.carry if _has(schema, name)]
    path = f"{image}.path"
    key_may_repeat = key is None and layout.key_column is None and _has(schema, path)
    if key_may_repeat:  # as Hugging Face datasets write images
        key = path
    for name in filter(None, (image, key, *carried)):
        check_column(schema, name, where)
    kind = _without_dictionary(schema.field(image).type)
    return Columns(
        image=image,
        key=key,
        key_may_repeat=key_may_repeat,
        carried=carried,
        holds_lists=_is_list(kind),
        is_text=_is(_single(kind), *_TEXT),
    )


def column_of(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column, or a part of a column of structs; null where the struct is."""
    if name in batch.schema.names:
        return batch.column(name)
    top, *parts = name.split(".")
    return pc.struct_field(batch.column(top), parts)


def to_read(schema: pa.Schema, names: Iterable[str]) -> list[str]:
    """Each name once, without parts of columns that are read whole."""
    distinct = list(dict.fromkeys(names))
    return [name for name in distinct if name in schema.names or name.partition(".")[0] not in distinct]


def _has(schema: pa.Schema, name: str) -> bool:
    return _field_at(schema, name) is not None


def _field_at(schema: pa.Schema, name: str) -> pa.Field | None:
    """The field of a column, or of a part of a struct; None if there is none, or if a struct has several of that name."""
    if name in schema.names:
        return schema.field(schema.names.index(name))
    top, *parts = name.split(".")
    if not parts or top not in schema.names:
        return None
    field = schema.field(schema.names.index(top))
    for part in parts:
        place = field.type.get_field_index(part) if pa.types.is_struct(field.type) else -1
        if place < 0:
            return None
        field = field.type.field(place)
    return field


def _is_list(kind: pa.DataType) -> bool:
    """True for a type whose values hold several images."""
    return _is(kind, *_MANY)


def _image_of(schema: pa.Schema, layout: Layout, where: str) -> str:
    if layout.image_column is not None:
        if layout.image_column not in schema.names:
            raise ColumnError(
                f"{where}: has no image column {layout.image_column!r}, found {_listed(schema)}. Correct image_column in the "
                "job."
            )
        names: tuple[str, ...] = (layout.image_column,)
    else:
        names = tuple(name for name in _IMAGE_COLUMNS if name in schema.names)
    usable = [name for name in names if _can_hold_image(schema.field(schema.names.index(name)).type)]
    plain = [name for name in usable if _is_plain(schema.field(schema.names.index(name)).type)]
    if not usable:
        raise ColumnError(f"{where}: {_no_image(schema, names, is_named=layout.image_column is not None)}")
    return (plain or usable)[0]


def _no_image(schema: pa.Schema, names: tuple[str, ...], *, is_named: bool) -> str:
    """What a file without a usable image column has instead, and what helps."""
    if names:
        kind = schema.field(schema.names.index(names[0])).type
        return (
            f"column {names[0]!r} is of type {kind}, expected the bytes of image files (such as JPEG or PNG), or base64 text "
            f"of them. Write such bytes into it{'' if is_named else ', or set image_column in the job'}. The columns are "
            f"{_listed(schema)}."
        )
    others = [field.name for field in schema if _is_plain(field.type)]
    texts = [field.name for field in schema if _is(_single(_without_dictionary(field.type)), *_TEXT)]
    expected = f"has no image column: expected one of {', '.join(_IMAGE_COLUMNS)} of binary type, found {_listed(schema)}."
    if others:
        return f"{expected} Set image_column in the job, for example to {others[0]!r}, which is binary."
    if texts:
        named = ", ".join(texts[:_SHOWN])
        return f"{expected} No column is binary. If one of {named} is base64 text of images, set image_column to it."
    return f"{expected} No column can hold an image. Leave this file out of the input."


def _key_of(schema: pa.Schema, layout: Layout, where: str) -> str | None:
    key = layout.key_column or next((name for name in KEY_COLUMNS if name in schema.names), None)
    if key is None or _has(schema, key):
        return key
    if key == NUMBERED:
        return None
    raise ColumnError(
        f"{where}: has no key column {key!r}, found {_listed(schema)}. Correct key_column in the job, or set it to {NUMBERED} "
        "to number the rows."
    )


def _listed(schema: pa.Schema) -> str:
    more = f" and {len(schema.names) - _SHOWN} more" if len(schema.names) > _SHOWN else ""
    return f"{schema.names[:_SHOWN]}{more}"


def check_column(schema: pa.Schema, name: str, where: str) -> None:
    """Refuse Ray's Arrow types, whose values may be pickles: opening a pickle runs the code in it."""
    top = name if name in schema.names else name.partition(".")[0]
    if (count := schema.names.count(top)) > 1:
        raise ShardError(f"{where}: has {count} columns named {top!r}, expected one. Rename the others.")
    field = _field_at(schema, name)
    assert field is not None, name
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


def _is(kind: pa.DataType, *tests: Callable[[pa.DataType], bool]) -> bool:
    return any(test(kind) for test in tests)


def _without_dictionary(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _single(kind: pa.DataType) -> pa.DataType:
    """The type of one image's bytes: without a list around it, or the struct with `bytes` that Hugging Face datasets write."""
    if _is_list(kind):
        kind = _without_dictionary(kind.value_type)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = _without_dictionary(kind.field("bytes").type)
    return kind


def _is_plain(kind: pa.DataType) -> bool:
    """True for binary, and for the struct with `bytes`; of several columns with usual names, such a one is taken first."""
    return not _is_list(kind) and _is(_single(kind), *_BYTES)


def _can_hold_image(kind: pa.DataType) -> bool:
    return _is(_single(_without_dictionary(kind)), *_BYTES, *_TEXT, pa.types.is_fixed_size_binary)
