"""Values of a Parquet image column → encoded bytes of images: also from lists, dictionaries, structs and base64 text."""

import base64
import binascii
import itertools
import re
from collections.abc import Iterator
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from lora_embed.images.recognise import is_image

MOST_AT_ONCE = 2**25  # bytes of images that are converted to Python at once
Value: TypeAlias = bytes | str | pa.Buffer | None
_DATA_URI = re.compile(rb"data:[a-z0-9.+/=;-]{0,99};base64,", re.IGNORECASE)
_MAY_BE_TEXT = re.compile(rb"\s*[A-Za-z0-9+/_-]{4}|data:", re.IGNORECASE)
_BASE64 = re.compile(rb"[A-Za-z0-9+/_=\s-]{1,64}")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def lists_in(column: pa.Array) -> Iterator[list[Value]]:
    """The images of each row of a column of lists; none for an empty list."""
    values = values_in(column.flatten())  # without those of null lists
    for length in pc.fill_null(pc.list_value_length(column), 0).to_pylist():
        yield list(itertools.islice(values, length))


def values_in(values: pa.Array) -> Iterator[Value]:
    """The image of each row. Large values are buffers, which are not copied yet."""
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, "bytes")  # null where the struct is
    if pa.types.is_dictionary(values.type):  # not unpacked: a list may name one large image a million times
        indices = values.indices.to_pylist()
        # Once each, because this copies a value; and not all, because rows may name few of many.
        entries = {index: values.dictionary[index].as_buffer() for index in set(indices) if index is not None}
        yield from (None if index is None else entries[index] for index in indices)
        return
    is_view = pa.types.is_binary_view(values.type)  # a type whose `nbytes` pyarrow 21 does not know
    size = values.get_total_buffer_size() if is_view else values.nbytes
    yield from values.to_pylist() if size <= MOST_AT_ONCE else (value.as_buffer() for value in values)


def image_bytes(value: bytes | str | pa.Buffer) -> bytes:
    """An image's bytes, also from base64 text of them, with or without `data:image/png;base64,`; other text as it is."""
    data = value if isinstance(value, bytes) else value.encode() if isinstance(value, str) else value.to_pybytes()
    if not _MAY_BE_TEXT.match(data):  # as good as every image
        return data
    prefix = _DATA_URI.match(data)
    start = prefix.end() if prefix else 0
    if not _BASE64.fullmatch(data, start, min(len(data), start + 64)):
        return data
    text = b"".join(data[start:].split()).translate(_URL_SAFE).rstrip(b"=")
    try:
        decoded = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return data
    return decoded if is_image(decoded) else data
