"""Vectors that a version already holds of the images of a shard, so that these images are not embedded again."""

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lora_embed.schema import REJECT_SCHEMA, data_schema
from lora_embed.store.store import Store
from lora_embed.table.parquet import opened_file, take_columns

GROUPS_AT_ONCE = 4  # row groups of vectors that are kept in memory; each has at most 4 MiB of them
_DIGEST = 32  # bytes of a SHA-256
Files = tuple[tuple[str, frozenset[str]], ...]  # path of a file of the table, names of the shards whose rows count


@dataclass(frozen=True, kw_only=True)
class KnownRows:
    """Rows of a version that may be of images that a shard holds: those of some shards in some of its files."""

    store: Store
    dimension: int
    vector_type: str
    files: Files  # of data
    rejects: Files = ()
    is_same_shard: bool = False  # then the shard's samples are these rows and rejects, in their order

    @property
    def schema(self) -> pa.Schema:
        return data_schema(self.dimension, self.vector_type, ())


@dataclass(frozen=True, kw_only=True)
class KnownImage:
    """A row of a version that is of the same image."""

    row: int  # number in the index
    width: int
    height: int
    digest: bytes  # SHA-256


@dataclass(frozen=True, kw_only=True)
class KnownReject:
    """A sample that a version has among its rejects."""

    reason: str
    detail: str | None


@dataclass(frozen=True, kw_only=True)
class _Index:
    """All rows of `KnownRows`, in the order of their files."""

    digests: NDArray[np.uint8]  # (n, 32)
    sizes: NDArray[np.int32]  # (n, 2): width, height
    places: NDArray[np.int64]  # (n, 3): numbers of the file, of the row group in it and of the row in that
    order: NDArray[np.int64]  # sorts the rows by the first eight bytes of their digests
    heads: NDArray[np.uint64]  # these bytes, in that order
    keys: tuple[str, ...] = ()  # of the same shard


_LAST_INDEX: list[tuple[KnownRows, _Index]] = []  # of this process: the ranges of a list follow each other and share one


class KnownVectors:
    """Looks up images among `KnownRows`, and reads their vectors; a context manager, which holds the files open.

    The index takes some 80 bytes a row. Raises VerificationFailed for a file that is missing or damaged.
    """

    def __init__(self, rows: KnownRows) -> None:
        self._rows = rows
        self._index = _index_of(rows)
        self._opened = contextlib.ExitStack()
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups: dict[tuple[int, int], pa.FixedSizeListArray] = {}
        self._rejects = _rejects_by_key(rows)
        self._next = 0

    def __enter__(self) -> "KnownVectors":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def find(self, digest: bytes) -> KnownImage | None:
        """A row whose image has this SHA-256; None if there is none."""
        index, head = self._index, np.frombuffer(digest, np.uint64, 1)[0]
        place = int(np.searchsorted(index.heads, head))
        while place < len(index.heads) and index.heads[place] == head:
            image = self._image(int(index.order[place]))
            if image.digest == digest:
                return image
            place += 1
        return None

    def follow(self, key: str) -> KnownImage | KnownReject | None:
        """What the version has of the same shard's next sample, given its key; None if it has another sample there."""
        if self._next < len(self._index.keys) and self._index.keys[self._next] == key:
            self._next += 1
            return self._image(self._next - 1)
        return self._rejects[key].popleft() if self._rejects.get(key) else None

    def vectors(self, images: list[KnownImage]) -> list[bytes]:
        """The vector of each image as it is stored: `dimension` numbers of `vector_type`."""
        found: list[bytes] = []
        for image in images:
            number, group, row = self._index.places[image.row].tolist()
            found.append(self._group(number, group).slice(row, 1).flatten().to_numpy(zero_copy_only=False).tobytes())
        return found

    def _image(self, row: int) -> KnownImage:
        width, height = self._index.sizes[row].tolist()
        return KnownImage(row=row, width=width, height=height, digest=self._index.digests[row].tobytes())

    def _group(self, number: int, group: int) -> pa.FixedSizeListArray:
        """The vectors of a row group."""
        if number not in self._files:
            column = pa.schema([self._rows.schema.field("embedding")])
            file = opened_file(self._rows.store, self._rows.files[number][0], column)
            self._files[number] = self._opened.enter_context(file)
        if (number, group) not in self._groups:
            while len(self._groups) >= GROUPS_AT_ONCE:
                del self._groups[next(iter(self._groups))]
            column = self._files[number].read_row_group(group, columns=["embedding"])["embedding"]
            self._groups[number, group] = column.combine_chunks()
        return self._groups[number, group]


def _index_of(rows: KnownRows) -> _Index:
    if not _LAST_INDEX or _LAST_INDEX[0][0] != rows:
        _LAST_INDEX[:] = [(rows, _read_index(rows))]
    return _LAST_INDEX[0][1]


def _read_index(rows: KnownRows) -> _Index:
    names = ("shard", "width", "height", "sha256", *(["key"] if rows.is_same_shard else []))
    digests, sizes, places = [np.empty((0, _DIGEST), np.uint8)], [np.empty((0, 2), np.int32)], [np.empty((0, 3), np.int64)]
    keys: list[str] = []
    for number, (group, numbers, chosen) in _chosen_rows(rows.store, rows.files, pa.schema(map(rows.schema.field, names))):
        digests.append(np.frombuffer(b"".join(chosen["sha256"].to_pylist()), np.uint8).reshape(-1, _DIGEST))
        sizes.append(np.stack([_numbers(chosen["width"]), _numbers(chosen["height"])], axis=1))
        places.append(np.stack([np.full(len(numbers), number), np.full(len(numbers), group), numbers], axis=1))
        keys += chosen["key"].to_pylist() if rows.is_same_shard else []
    joined = np.concatenate(digests)
    heads = joined[:, :8].copy().view(np.uint64)[:, 0]
    order = np.argsort(heads, kind="stable")
    return _Index(
        digests=joined,
        sizes=np.concatenate(sizes),
        places=np.concatenate(places),
        order=order,
        heads=heads[order],
        keys=tuple(keys),
    )


def _rejects_by_key(rows: KnownRows) -> dict[str, deque[KnownReject]]:
    """The rejects of the same shard by key, each key's in the order of the shard."""
    found: dict[str, deque[KnownReject]] = defaultdict(deque)
    for _, (_, _, chosen) in _chosen_rows(rows.store, rows.rejects, REJECT_SCHEMA):
        for row in chosen.select(["key", "reason", "detail"]).to_pylist():
            found[row["key"]].append(KnownReject(reason=row["reason"], detail=row["detail"]))
    return found


def _chosen_rows(
    store: Store, files: Files, schema: pa.Schema
) -> Iterator[tuple[int, tuple[int, NDArray[np.int64], pa.Table]]]:
    """For each row group that has rows of the shards: number of the file, (number of the group, of the rows in it, rows).

    Rows without a SHA-256, of tables of an older release, are left out.
    """
    for number, (path, shards) in enumerate(files):
        names = pa.array(sorted(shards), pa.string())
        with opened_file(store, path, schema) as file:
            for group in range(file.num_row_groups):
                if not _may_hold(file.metadata.row_group(group), shards):
                    continue
                table = take_columns(file.read_row_group(group, columns=schema.names), schema)
                is_chosen = pc.is_in(table["shard"].cast(pa.string()), value_set=names)
                if "sha256" in schema.names:
                    is_chosen = pc.and_(is_chosen, pc.is_valid(table["sha256"]))
                rows = np.flatnonzero(is_chosen.to_numpy())
                yield number, (group, rows, table.filter(is_chosen))


def _may_hold(group: pq.RowGroupMetaData, shards: frozenset[str]) -> bool:
    """Whether a row group can have rows of these shards, by the smallest and the largest name that its statistics give."""
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema == "shard" and column.statistics is not None and column.statistics.has_min_max:
            lowest, highest = column.statistics.min, column.statistics.max
            return any(lowest <= name <= highest for name in shards)
    return True


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    return pc.fill_null(column, 0).to_numpy().astype(np.int32)  # type: ignore[no-any-return]
