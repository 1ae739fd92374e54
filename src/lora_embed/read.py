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
from lora_embed.plan import IMAGES
from lora_embed.schema import Layout, Shard
from lora_embed.storage import Entry, Store, explained

BLOCK = tarfile.BLOCKSIZE
MOST_PADDING = 2**20 + 2 * BLOCK  # tar pads with zeros to a record of 10 KiB, or of up to 1 MiB where it is told to
_IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "jpg", "png")
_KEY_COLUMNS = ("key", "__key__", "id", "path", "file_name")

Wanted = Callable[[int], bool]  # sample number in the shard → must its bytes be read


@dataclass
class Sample:
    """One image of a shard: encoded bytes, or None where there is none or it was not wanted."""

    key: str
    data: bytes | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def read_samples(shard: Shard, layout: Layout, options: dict[str, Any], wanted: Wanted) -> Iterator[Sample]:
    """Yield every sample of a shard; to run out means that the end is proven.

    Raises ShardError when the shard is cut short, damaged, or another one than was listed.
    """
    store = Store(shard.root, options)
    if shard.kind == "images":
        yield from _read_images(store, shard, wanted)
        return
    entry = shard.files[0]
    _check_unchanged(store, entry, shard)
    reader = _read_tar if shard.kind == "tar" else _read_parquet
    try:
        with explained(store, entry.path), store.open(entry.path) as file:
            yield from reader(file, shard, layout, wanted)
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


def _read_images(store: Store, shard: Shard, wanted: Wanted) -> Iterator[Sample]:
    for number, entry in enumerate(shard.files):
        data = None
        if wanted(number):
            _check_unchanged(store, entry, shard)
            data = store.read(entry.path)
        if wanted(number) and (data is None or len(data) != entry.size):
            raise ShardError(f"{shard.root}/{entry.path}: changed while it was read. Run the same command again.")
        yield Sample(posixpath.basename(entry.path), data)


def _read_tar(file: BinaryIO, shard: Shard, layout: Layout, wanted: Wanted) -> Iterator[Sample]:
    """WebDataset: consecutive members that share a name up to the first dot of its last part are one sample.

    A member that the sample already has begins a sample of the same key, so that no image goes uncounted.
    """
    where = f"{shard.root}/{shard.name}"
    size = shard.files[0].size
    if size == 0:
        raise ShardError(f"{where}: is an empty file, not a tar; an empty tar has an end of its own")
    current: Sample | None = None
    taken: set[str] = set()  # extensions of the current sample
    number = 0
    try:
        # Names that are not UTF-8 are escaped: an id must be UTF-8, and the same on every machine.
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # a tar of a million members need not be remembered
                key, extension = _split_name(member.name)
                if not member.isreg() or posixpath.basename(member.name).startswith("."):  # macOS adds ._name to each
                    continue
                if current is None or key != current.key or extension in taken:
                    if current is not None:
                        yield current
                        number += 1
                    current, taken = Sample(key), set()
                taken.add(extension)
                if not member.issparse() and member.offset_data + member.size > size:  # before memory is taken for it
                    raise tarfile.ReadError("unexpected end of data")
                if wanted(number):
                    _add_field(current, tar, member, extension, layout)
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError) as error:  # of damaged headers
        if size >= BLOCK and current is None and "invalid header" in str(error):
            raise ShardError(f"{where}: is not a tar, whatever its name says") from None
        raise ShardError(_cut_short(where, size, str(error))) from None
    _prove_end(file, end, size, where)
    if current is not None:
        yield current


def _split_name(name: str) -> tuple[str, str]:
    folder, base = posixpath.split(name.removeprefix("./"))
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def _add_field(sample: Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, layout: Layout) -> None:
    """The first image member is the sample's image; JSON keys and text members are fields that may be carried."""
    names = {name for name, _ in layout.carry}
    is_image = f".{extension}" in IMAGES and sample.data is None
    if not is_image and extension != "json" and extension not in names:
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
                yield from _rows(batch, image if needed else None, key, carried, number)
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
        name = batch.column(key)[row].as_py() if key else None
        if name is None:  # also where a key column holds null
            name = f"{start + row:010d}"
        elif isinstance(name, bytes):
            name = name.decode("utf-8", "backslashreplace")
        data = images[row].as_py() if images is not None else None
        yield Sample(str(name), data, {field: batch.column(field)[row].as_py() for field in carried} if image else {})


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
