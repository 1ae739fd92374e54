"""A shard → its samples in order, to a proven end."""

import itertools
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lora_embed.errors import ShardError, StorageError
from lora_embed.fields import value_of
from lora_embed.plan import IMAGES
from lora_embed.schema import Layout, Shard
from lora_embed.storage import Entry, Store, explained

BLOCK = tarfile.BLOCKSIZE
MOST_FIELD = 16 * 2**20  # bytes of a text or JSON member that may be carried; JSON unpacks to 30 times its size
MOST_HEADER = 2**20  # bytes of a tar's header that only names what follows
MOST_PADDING = 2**20 + 2 * BLOCK  # tar pads with zeros to a record of 10 KiB, or of up to 1 MiB where it is told to
_IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "jpg", "png")
_KEY_COLUMNS = ("key", "__key__", "id", "path", "file_name")

Wanted = Callable[[int], bool]  # sample number in the shard → must its bytes be read


@dataclass
class Sample:
    """One image of a shard: encoded bytes, or None where there is none, it was not wanted, or it has too many (`excess`)."""

    key: str
    data: bytes | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    excess: int = 0  # bytes of an image that has more than are allowed
    begin: int | None = None  # byte of its first header in a tar; None where reading could not begin there
    end: int | None = None  # byte where the sample after it begins, or the tar's closing blocks


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes [begin, end) of a tar, which sample `first` begins at; without an end, up to the shard's, which is proven then."""

    first: int = 0
    begin: int = 0
    end: int | None = None


WHOLE = Span()


def read_samples(shard: Shard, layout: Layout, options: dict[str, Any], wanted: Wanted, span: Span = WHOLE) -> Iterator[Sample]:
    """Yield every sample of a shard, or of a span of it; to run out means that the shard's end is proven, or the span's there.

    Raises ShardError when the shard is cut short, damaged, or another one than was listed.
    """
    assert shard.kind == "tar" or span == WHOLE, (shard.kind, span)
    store = Store(shard.root, options, follows_links=True)
    if shard.kind == "images":
        yield from _read_images(store, shard, wanted, layout.max_bytes)
        return
    entry = shard.files[0]
    _check_unchanged(store, entry, shard)
    ahead = (span.end or entry.size) - span.begin
    try:
        with explained(store, entry.path), store.open(entry.path, ahead) as file:
            if shard.kind == "tar":
                yield from _read_tar(file, shard, layout, wanted, span)
            else:
                yield from _read_parquet(file, shard, layout, wanted)
    except (ShardError, StorageError):
        _check_unchanged(store, entry, shard)  # one that is being written looks cut short, or is another one by now
        raise
    _check_unchanged(store, entry, shard)


def count_samples(shard: Shard, layout: Layout, options: dict[str, Any], most: int) -> int:
    """Samples of a shard, counted up to `most` without reading their bytes."""
    samples = read_samples(shard, layout, options, wanted=lambda number: False)
    return sum(1 for _ in itertools.islice(samples, most))


def _check_unchanged(store: Store, listed: Entry, shard: Shard) -> None:
    now = store.info(listed.path)
    if now != listed:
        state = "is gone" if now is None else f"has {now.size} bytes and mark {now.etag}"
        raise ShardError(
            f"{shard.root}/{listed.path}: changed since it was listed with {listed.size} bytes and mark {listed.etag}: "
            f"it {state}. Run the same command again."
        )


def _read_images(store: Store, shard: Shard, wanted: Wanted, max_bytes: int) -> Iterator[Sample]:
    for number, entry in enumerate(shard.files):
        data = None
        if wanted(number) and entry.size > max_bytes:
            yield Sample(posixpath.basename(entry.path), excess=entry.size)
            continue
        if wanted(number):
            _check_unchanged(store, entry, shard)
            data = store.read(entry.path)
        if wanted(number) and (data is None or len(data) != entry.size):
            raise ShardError(f"{shard.root}/{entry.path}: changed while it was read. Run the same command again.")
        yield Sample(posixpath.basename(entry.path), data)


_NAMING = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}


class _Member(tarfile.TarInfo):
    """A tar's header; those that only name what follows are read whole, one within the other, so they are bounded."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in _NAMING and member.size > MOST_HEADER:
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member


def _read_tar(file: BinaryIO, shard: Shard, layout: Layout, wanted: Wanted, span: Span = WHOLE) -> Iterator[Sample]:
    """WebDataset: consecutive members that share a name up to the first dot of its last part are one sample.

    A member that the sample already has begins a sample of the same key, so that no image goes uncounted.
    """
    where = f"{shard.root}/{shard.name}"
    size = shard.files[0].size
    if size == 0:
        raise ShardError(f"{where}: is an empty file, not a tar; an empty tar has an end of its own")
    current: Sample | None = None
    taken: set[str] = set()  # extensions of the current sample
    number = span.first
    file.seek(span.begin)
    try:
        # Names that are not UTF-8 are escaped: an id must be UTF-8, and the same on every machine.
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member, encoding="utf-8", errors="backslashreplace") as tar:
            for member in _members(tar, span.end):
                key, extension = _split_name(member.name)
                if not member.isreg() or posixpath.basename(member.name).startswith("."):  # macOS adds ._name to each
                    continue
                if current is None or key != current.key or extension in taken:
                    begin = None if tar.pax_headers else member.offset  # headers for the whole tar stand at its beginning
                    if current is not None:
                        current.end = begin
                        yield current
                        number += 1
                    current, taken = Sample(key, begin=begin), set()
                taken.add(extension)
                if not member.issparse() and member.offset_data + member.size > size:  # before memory is taken for it
                    raise tarfile.ReadError("unexpected end of data")
                if wanted(number):
                    _add_field(current, tar, member, extension, layout)
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:  # of damaged headers
        if size >= BLOCK and current is None and not span.begin and not _begins_with_header(file):
            raise ShardError(f"{where}: is not a tar, whatever its name says") from None
        raise ShardError(_cut_short(where, size, str(error))) from None
    if span.end is None:
        _prove_end(file, end, size, where)
    elif end != span.end:
        raise ShardError(f"{where}: damaged tar: its members end at byte {end}, expected {span.end}. Upload it again.")
    if current is not None:
        current.end = end
        yield current


def _begins_with_header(file: BinaryIO) -> bool:
    file.seek(0)
    try:
        tarfile.TarInfo.frombuf(file.read(BLOCK), encoding="utf-8", errors="backslashreplace")
    except tarfile.HeaderError:
        return False
    return True


def _members(tar: tarfile.TarFile, end: int | None) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # a tar of a million members need not be remembered
        if member.size < 0:  # tarfile would go back by it, and on for ever
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        yield member
        if tar.offset == end:
            return


def _split_name(name: str) -> tuple[str, str]:
    folder, base = posixpath.split(name.removeprefix("./"))
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def _add_field(sample: Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, layout: Layout) -> None:
    """The first image member is the sample's image; JSON keys and text members are fields that may be carried."""
    names = {name for name, _ in layout.carry}
    is_image = f".{extension}" in IMAGES and sample.data is None and not sample.excess
    if not is_image and extension != "json" and extension not in names:
        return
    if member.size > (layout.max_bytes if is_image else MOST_FIELD):  # also of a sparse member, which is short in the file
        sample.excess = member.size if is_image else sample.excess
        return
    stream = tar.extractfile(member)
    assert stream is not None
    data = stream.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    if is_image:
        sample.data = data
    elif extension in names:
        sample.fields[extension] = data.decode("utf-8", "replace").strip()
    elif names:
        sample.fields.update(_json_fields(data, names))


def _json_fields(data: bytes, names: set[str]) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return {name: values[name] for name in names & set(values)} if isinstance(values, dict) else {}


def _prove_end(file: BinaryIO, end: int, size: int, where: str) -> None:
    """`tarfile` ends silently on a cut archive; a whole one ends in two blocks of zeros and zeros up to its size."""
    file.seek(end)
    rest = 0
    while data := file.read(1 << 20):
        if data.count(0) != len(data):
            raise ShardError(
                f"{where}: incomplete or damaged tar: its members end at byte {end} of {size} without the closing blocks of "
                "a tar. Upload it again; none of it is published."
            )
        rest += len(data)
    if rest > MOST_PADDING:
        raise ShardError(
            f"{where}: incomplete or damaged tar: its members end at byte {end} of {size}, and zeros follow, as where space "
            "was reserved and never filled. Upload it again; none of it is published."
        )
    if rest < 2 * BLOCK or end + rest != size:
        raise ShardError(_cut_short(where, size, f"members end at byte {end} without the two closing blocks of a tar"))


def _cut_short(where: str, size: int, detail: str) -> str:
    return f"{where}: incomplete tar, cut short at {size} bytes ({detail}). Upload it again; none of it is published."


def _read_parquet(file: BinaryIO, shard: Shard, layout: Layout, wanted: Wanted) -> Iterator[Sample]:
    where = f"{shard.root}/{shard.name}"
    try:
        source = pq.ParquetFile(file)
        image, key = _columns(source.schema_arrow, layout, where)
        carried = [name for name, _ in layout.carry if name in source.schema_arrow.names]
        for name in filter(None, (image, key, *carried)):
            _refuse_objects(source.schema_arrow.field(name), where)
        number = 0
        for group in range(source.num_row_groups):
            rows = source.metadata.row_group(group).num_rows
            needed = any(wanted(number + row) for row in range(rows))
            columns = ([key] if key else []) + ([image, *carried] if needed else [])
            if not columns:
                yield from (Sample(f"{number + row:010d}") for row in range(rows))
                number += rows
                continue
            for batch in source.iter_batches(batch_size=64, row_groups=[group], columns=columns):
                for sample in _rows(batch, image if needed else None, key, carried, number):
                    if sample.data is not None and len(sample.data) > layout.max_bytes:
                        sample = Sample(sample.key, excess=len(sample.data))
                    yield sample
                number += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:  # the disk's or the network's; Arrow's own has no number
            raise
        raise ShardError(f"{where}: cannot be read as Parquet to its end ({_line(error)}). Upload it again.") from None
    if number != source.metadata.num_rows:
        raise ShardError(f"{where}: holds {number} rows, its footer says {source.metadata.num_rows}. Upload it again.")


def _columns(schema: pa.Schema, layout: Layout, where: str) -> tuple[str, str | None]:
    """The image column and the key column, as configured or by their usual names; no key column: rows are numbered."""
    holding = {name for name in schema.names if _holds_bytes(schema.field(name).type)}
    image = layout.image_column or next((name for name in _IMAGE_COLUMNS if name in holding), None)
    if image is None or image not in holding:
        wanted = f"column {layout.image_column!r}" if layout.image_column else f"one of {', '.join(_IMAGE_COLUMNS)}"
        raise ShardError(
            f"{where}: has no image bytes: expected {wanted} of binary type, found {schema.names}. Set image_column in the job."
        )
    key = layout.key_column or next((name for name in _KEY_COLUMNS if name in schema.names), None)
    if key is not None and key not in schema.names:
        raise ShardError(f"{where}: has no column {key!r} to take keys from, found {schema.names}. Set key_column in the job.")
    return image, key


def _refuse_objects(field: pa.Field, where: str) -> None:
    """Ray gives Arrow a type whose values are pickles, and opening a pickle runs what is in it."""
    if _holds_objects(field.type):
        raise ShardError(
            f"{where}: column {field.name!r} is of type {field.type}, expected Arrow's own types: values of others may be "
            "pickles, which are never opened. Write it as text, bytes or numbers."
        )


def _holds_objects(kind: pa.DataType) -> bool:
    """Is it, or a part of it, of a type that a library made in Python?"""
    parts = [kind.value_type] if pa.types.is_dictionary(kind) else [kind.field(part).type for part in range(kind.num_fields)]
    return isinstance(kind, pa.ExtensionType) or any(map(_holds_objects, parts))


def _holds_bytes(kind: pa.DataType) -> bool:
    """Binary, or the struct with `bytes` that Hugging Face datasets write."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _rows(batch: pa.RecordBatch, image: str | None, key: str | None, carried: list[str], start: int) -> Iterator[Sample]:
    images = batch.column(image) if image else None
    if images is not None and pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")  # null where the struct is
    for row in range(batch.num_rows):
        name = value_of(batch.column(key)[row]) if key else None
        if name is None:  # also where a key column holds null
            name = f"{start + row:010d}"
        elif isinstance(name, bytes):
            name = name.decode("utf-8", "backslashreplace")
        data = images[row].as_py() if images is not None else None
        yield Sample(str(name), data, {field: value_of(batch.column(field)[row]) for field in carried} if image else {})


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
