"""A shard → its samples in order, up to its checked end. Any error while it is read is an error of that shard alone."""

import contextlib
import itertools
import posixpath
from collections.abc import Iterator
from typing import Any, Protocol, assert_never

import pyarrow as pa

from lora_embed.entries import Entry
from lora_embed.errors import MAKE_AGAIN, LoraEmbedError, ShardError, StorageError
from lora_embed.schema import WHOLE, Layout, Sample, Shard, ShardKind, Span, Wanted
from lora_embed.shards.beside import read_beside
from lora_embed.shards.compressed import COMPRESSED_TAR, Unpacked
from lora_embed.shards.parquet import read_parquet
from lora_embed.shards.places import with_places
from lora_embed.shards.references import read_references
from lora_embed.shards.tar import read_tar
from lora_embed.store.retry import LIBRARY_ERRORS
from lora_embed.store.store import Store
from lora_embed.text import in_one_line

MOST_KEY = 2**16  # characters of a key; paths on Linux have at most 4,096 bytes
MOST_UNPACKED = 2**29  # bytes of all images of a shard together
TIMES_UNPACKED = 100  # or so many times the shard's size, if that is more
CANNOT: dict[ShardKind, str] = {
    "tar": "incomplete or damaged tar, which cannot be read to its end",
    "parquet": "cannot be read as Parquet to its end",
    "images": "cannot be read to its end",
    "references": "cannot be read to its end",
}


class ReadSamples(Protocol):
    """`read_samples`, or the same in another process."""

    def __call__(
        self, shard: Shard, layout: Layout, options: dict[str, Any], wanted: Wanted, span: Span = WHOLE
    ) -> Iterator[Sample]: ...


def read_samples(shard: Shard, layout: Layout, options: dict[str, Any], wanted: Wanted, span: Span = WHOLE) -> Iterator[Sample]:
    """Yield every sample of a shard, or of a span of it. Without an error, the end of the shard or span was checked.

    Raises ShardError if the shard is cut short, is damaged, unpacks to far more than its size, or changed since it was
    listed. Raises StorageError, StoreUnavailable or an OSError with a number if its store fails.
    """
    assert shard.kind == "tar" or span == WHOLE, (shard.kind, span)
    store = Store(shard.root, options, follows_links=True)
    with _errors_of(shard):
        if shard.kind == "references":
            yield from _bounded(read_references(shard, options, wanted, layout.max_bytes), shard)
            return
        samples = _bounded(_read(store, shard, layout, wanted, span), shard)
        yield from with_places(samples, shard, {name for name, _ in layout.carry})


def count_samples(shard: Shard, layout: Layout, options: dict[str, Any], most: int) -> int:
    """The number of samples of a shard, counted up to `most` without reading their bytes."""
    samples = read_samples(shard, layout, options, wanted=lambda number: False)
    return sum(1 for _ in itertools.islice(samples, most))


@contextlib.contextmanager
def _errors_of(shard: Shard) -> Iterator[None]:
    """Turn any error of a reader, or of a library below it, into ShardError. It happens only here.

    A file that was made to harm can raise any kind of error, so a list of types would miss some. Errors of the machine or
    the store stay as they are.
    """
    try:
        yield
    except (LoraEmbedError, *LIBRARY_ERRORS):
        raise
    except Exception as error:
        if getattr(error, "errno", None) is not None:  # of the disk or the network; Arrow's own OSError has no number
            raise
        cause = f"{type(error).__name__}: {in_one_line(error)}".removesuffix(": ")
        raise ShardError(
            f"{shard.root}/{shard.name}: {CANNOT[shard.kind]} ({cause}). {_remedy(error)}; nothing of it is published."
        ) from error


def _remedy(error: Exception) -> str:
    """What helps where a reader, or a library below it, raised this error."""
    if isinstance(error, pa.ArrowNotImplementedError | pa.ArrowCapacityError):
        return "Write the file again with types and a compression that pyarrow reads, and with smaller row groups"
    if isinstance(error, UnicodeDecodeError):
        return f"{MAKE_AGAIN}, or write that column as binary if it is not UTF-8"
    return MAKE_AGAIN


def _bounded(samples: Iterator[Sample], shard: Shard) -> Iterator[Sample]:
    """The samples, with ShardError for keys or images that are too large, so that a small file cannot cause endless work."""
    most = _most_unpacked(shard) if shard.kind != "references" else float("inf")
    for sample in samples:
        most -= len(sample.data or b"")
        if most < 0:
            raise ShardError(
                f"{shard.root}/{shard.name}: its {shard.size} bytes unpack to more than {TIMES_UNPACKED} times as many bytes "
                f"of images, and more than {MOST_UNPACKED >> 20} MiB. Put fewer repeated images into one file."
            )
        if len(sample.key) > MOST_KEY:
            raise ShardError(
                f"{shard.root}/{shard.name}: a sample's key has {len(sample.key)} characters; at most {MOST_KEY} are allowed. "
                f"It begins with {sample.key[:40]!r}. Rename it."
            )
        yield sample


def _most_unpacked(shard: Shard) -> int:
    """How many bytes a shard may unpack to."""
    return max(MOST_UNPACKED, TIMES_UNPACKED * shard.size)


def _read(store: Store, shard: Shard, layout: Layout, wanted: Wanted, span: Span) -> Iterator[Sample]:
    assert shard.kind != "references"
    if shard.kind == "images":
        yield from _read_images(store, shard, layout, wanted)
        return
    (entry,) = shard.files
    _check_unchanged(store, entry, shard)
    ahead = (span.end or entry.size) - span.begin
    try:
        with store.explained(entry.path), store.open(entry.path, ahead) as file, _errors_of(shard):
            if shard.kind == "tar":
                most, is_compressed = _most_unpacked(shard), entry.path.lower().endswith(COMPRESSED_TAR)
                content: Any = Unpacked(file, entry.path, most, f"{shard.root}/{shard.name}") if is_compressed else file
                yield from read_tar(content, shard, layout, wanted, span)
            elif shard.kind == "parquet":
                yield from read_parquet(file, shard, layout, wanted)
            else:
                assert_never(shard.kind)
    except (ShardError, StorageError):
        _check_unchanged(store, entry, shard)  # a file that is still being written looks cut short
        raise
    _check_unchanged(store, entry, shard)


def _check_unchanged(store: Store, listed: Entry, shard: Shard) -> None:
    now = store.info(listed.path)
    if now != listed:
        state = "is gone" if now is None else f"has {now.size} bytes and etag {now.etag}"
        raise ShardError(
            f"{shard.root}/{listed.path}: changed since it was listed with {listed.size} bytes and etag {listed.etag}: "
            f"now it {state}. Run the same command again."
        )


def _read_images(store: Store, shard: Shard, layout: Layout, wanted: Wanted) -> Iterator[Sample]:
    names = {name for name, _ in layout.carry}
    fields_of = (
        read_beside(store, shard, names, lambda entry: _check_unchanged(store, entry, shard)) if shard.sidecars else None
    )
    for number, entry in enumerate(shard.files):
        data, key = None, posixpath.basename(entry.path)
        fields = fields_of(entry) if fields_of is not None and wanted(number) else {}
        if entry.broken:
            if wanted(number):
                _check_unchanged(store, entry, shard)
            yield Sample(key, fields=fields, missing=entry.broken)
            continue
        if wanted(number) and entry.size > layout.max_bytes:
            yield Sample(key, fields=fields, excess=entry.size)
            continue
        if wanted(number):
            _check_unchanged(store, entry, shard)
            data = store.read(entry.path)
        if wanted(number) and (data is None or len(data) != entry.size):
            raise ShardError(f"{shard.root}/{entry.path}: changed while it was read. Run the same command again.")
        yield Sample(key, data, fields)
