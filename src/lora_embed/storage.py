"""Local disks and object stores: the only user of fsspec.

A `Store` is a root URI; every path given to it is relative to that root, with `/` between its parts.
"""

import contextlib
import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import aiohttp
import botocore.exceptions  # type: ignore[import-untyped]
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from lora_embed.errors import StorageError

TEMPORARY = "_tmp"  # below a local root: files being written, hidden from listings
_NETWORK = (botocore.exceptions.BotoCoreError, aiohttp.ClientError)  # what fsspec lets through of its libraries


@dataclass(frozen=True)
class Entry:
    """One stored object: its path below the root, its size in bytes and what changes when its content does."""

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Store:
    """A root on a local disk or in an object store. Picklable: the connection is made where it is used."""

    uri: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_local(self) -> bool:
        return isinstance(self._connection[0], LocalFileSystem)

    @property
    def filesystem(self) -> Any:
        """The fsspec file system, for libraries that take one."""
        return self._connection[0]

    @property
    def _connection(self) -> tuple[Any, str]:
        return _connect(self.uri, tuple(sorted(self.options.items())) if self.options else ())

    def full_path(self, path: str) -> str:
        root = self._connection[1].rstrip("/")
        return f"{root}/{path}" if path else root or self._connection[1]

    def list_files(self, prefix: str = "") -> list[Entry]:
        """All objects below a folder, sorted by path; an absent folder is an empty one. Never from a cache.

        Raises StorageError when the store refuses the listing.
        """
        with explained(self, prefix):
            found = list(_walk_local(self, prefix) if self.is_local else _find(self, prefix))
        return sorted((e for e in found if not e.path.startswith(f"{TEMPORARY}/")), key=lambda entry: entry.path)

    def open(self, path: str) -> BinaryIO:
        """Open for reading at random. Raises StorageError when it cannot be opened, FileNotFoundError when it is gone."""
        fs, _ = self._connection
        with explained(self, path):
            return cast(BinaryIO, fs.open(self.full_path(path), "rb"))

    def read(self, path: str) -> bytes | None:
        """The whole object, or None where there is none."""
        fs, _ = self._connection
        with explained(self, path):
            try:
                return cast(bytes, fs.cat_file(self.full_path(path)))
            except FileNotFoundError:
                return None

    def info(self, path: str) -> Entry | None:
        """The object's size and etag as they are now, or None where there is none."""
        fs, _ = self._connection
        fs.invalidate_cache()
        with explained(self, path):
            try:
                if self.is_local:
                    return _local_entry(path, os.stat(self.full_path(path)))
                info = fs.info(self.full_path(path))
            except FileNotFoundError:
                return None
        return _entry(path, info) if info["type"] == "file" else None

    def is_directory(self, path: str = "") -> bool:
        fs, _ = self._connection
        with explained(self, path):
            return bool(fs.isdir(self.full_path(path)))

    def check_writable(self) -> None:
        """On a local disk, refuse before any work what could not be written; object stores say it at the first write.

        Raises StorageError.
        """
        if not self.is_local:
            return
        folder = Path(self.full_path(""))
        nearest = next(parent for parent in [folder, *folder.parents] if parent.exists())
        if not nearest.is_dir():
            raise StorageError(f"{self.uri}: {nearest} is a file, so nothing can be written below it")
        if not os.access(nearest, os.W_OK):
            raise StorageError(f"{self.uri}: {nearest} is not writable for this user. Change its permissions or the path.")

    def create(self, path: str, data: bytes) -> bool:
        """Commit an object in one atomic step unless it exists; True if this call made it.

        Readers see the whole object or none. Raises StorageError when the store cannot be written.
        """
        with explained(self, path, writes=True):
            if self.is_local:
                return _create_local(Path(self.full_path("")), Path(self.full_path(path)), data)
            fs, _ = self._connection
            try:
                fs.pipe_file(self.full_path(path), data, mode="create")
            except OSError as error:  # s3fs reports a refused If-None-Match as EINVAL
                refused = isinstance(error, FileExistsError) or "pre-conditions" in str(error)
                if refused and self.info(path) is not None:  # not refused for what stands above it
                    return False
                raise
            return True

    def replace(self, path: str, data: bytes) -> None:
        """Write a small object whether or not it exists: for hints, never for what readers rely on."""
        with explained(self, path, writes=True):
            if self.is_local:
                _replace_local(Path(self.full_path("")), Path(self.full_path(path)), data)
            else:
                self._connection[0].pipe_file(self.full_path(path), data)

    def delete(self, paths: list[str]) -> None:
        """Remove objects; one that is gone already is no error."""
        fs, _ = self._connection
        for path in paths:
            with contextlib.suppress(FileNotFoundError), explained(self, path):
                fs.rm_file(self.full_path(path))

    def clear_temporary(self, older_than_s: float = 3600.0) -> None:
        """Remove what writers that were killed left behind on a local disk."""
        folder = Path(self.full_path(TEMPORARY))
        if not self.is_local or not folder.is_dir():
            return
        for file in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > older_than_s:
                    file.unlink()


def _connect_anew(uri: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, str]:
    return cast(tuple[Any, str], fsspec.core.url_to_fs(uri, **dict(options)))


_connect_cached = lru_cache(maxsize=64)(_connect_anew)


def _is_hashable(options: tuple[tuple[str, Any], ...]) -> bool:
    """Nested options cannot be a cache key; fsspec then keeps the connection by itself."""
    try:
        hash(options)
    except TypeError:
        return False
    return True


def _connect(uri: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, str]:
    try:
        fs, root = _connect_cached(uri, options) if _is_hashable(options) else _connect_anew(uri, options)
    except ImportError as error:
        raise StorageError(f"{uri}: this kind of storage needs another package: {error}") from None
    except (ValueError, TypeError) as error:
        raise StorageError(f"{uri}: unknown kind of storage, or storage options that do not fit it: {error}") from None
    if not root and uri.startswith(("s3:", "s3a:")):
        raise StorageError(f"{uri}: names no bucket; expected s3://bucket/path")
    return fs, root


def _find(store: Store, prefix: str) -> Iterator[Entry]:
    """Files below a folder of a store that is not a local disk; none where there is no such folder."""
    fs, root = store._connection
    fs.invalidate_cache()
    is_async, kind, path = isinstance(fs, AsyncFileSystem), type(fs), store.full_path(prefix)
    walks = kind._find is AsyncFileSystem._find if is_async else kind.find is AbstractFileSystem.find
    try:
        # fsspec's own walk leaves out every folder that it cannot list; file systems with a `find` of theirs raise.
        found = dict(_walk(fs, path)) if walks else fs.find(path, detail=True)
    except FileNotFoundError:
        if fs.exists(path):
            raise StorageError(f"{store.uri}: changed while it was listed. Run the same command again.") from None
        return
    start = len(root.rstrip("/")) + 1
    yield from (_entry(name[start:], info) for name, info in found.items())


def _walk(fs: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for info in fs.ls(folder, detail=True):
        name = info["name"].rstrip("/")
        if info["type"] != "directory":
            yield name, info
        elif name != folder.rstrip("/"):  # some list the folder itself too
            yield from _walk(fs, name)


def _walk_local(store: Store, prefix: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Entry]:
    """Files below a local folder, links followed, but never round in a circle.

    Not fsspec's walk: that one leaves out folders it may not read, does not follow links to folders, and gives for a
    linked file the link's own time, which changes when nothing else does.
    """
    folder = store.full_path(prefix)
    try:
        state = os.stat(folder)
        names = os.listdir(folder) if (state.st_dev, state.st_ino) not in above else []
    except FileNotFoundError:
        return
    for name in names:
        path = f"{prefix}/{name}" if prefix else name
        try:
            file = os.stat(f"{folder}/{name}")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):  # deleted meanwhile, or a link to nothing
                continue
            raise
        if stat.S_ISDIR(file.st_mode):
            yield from _walk_local(store, path, above | {(state.st_dev, state.st_ino)})
        elif (entry := _local_entry(path, file)) is not None:
            yield entry


def _local_entry(path: str, state: os.stat_result) -> Entry | None:
    return Entry(path=path, size=state.st_size, etag=str(state.st_mtime_ns)) if stat.S_ISREG(state.st_mode) else None


def _entry(path: str, info: dict[str, Any]) -> Entry:
    etag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or info.get("created")
    if isinstance(etag, datetime):  # some give a number when they list, and a date when they are asked for one object
        etag = etag.timestamp()
    return Entry(path=path, size=int(info["size"] or 0), etag=str(etag).strip('"'))


def _create_local(root: Path, target: Path, data: bytes) -> bool:
    if target.is_dir():
        raise IsADirectoryError
    if target.exists():
        return False
    with _written_aside(root, target, data) as temporary:
        try:
            os.link(temporary, target)  # fails if the name exists: the commit, and whoever comes first wins
        except FileExistsError:
            return False
    _sync_folder(target.parent)
    return True


def _replace_local(root: Path, target: Path, data: bytes) -> None:
    with _written_aside(root, target, data) as temporary:
        os.replace(temporary, target)
    _sync_folder(target.parent)


@contextlib.contextmanager
def _written_aside(root: Path, target: Path, data: bytes) -> Iterator[Path]:
    """A file with these bytes, safely on the disk; gone afterwards, whether or not it was used."""
    target.parent.mkdir(parents=True, exist_ok=True)
    (root / TEMPORARY).mkdir(parents=True, exist_ok=True)
    temporary = root / TEMPORARY / uuid.uuid4().hex
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(store: Store, path: str, *, writes: bool = False) -> Iterator[None]:
    """Turn what a store refuses into one message that names the object.

    When reading, absent objects stay FileNotFoundError.
    """
    where = f"{store.uri.rstrip('/')}/{path}".rstrip("/")
    try:
        yield
    except PermissionError as error:
        raise StorageError(f"{where}: access denied ({error.strerror or error}). Check its permissions or keys.") from None
    except (NotADirectoryError, FileExistsError):
        raise StorageError(f"{where}: a file stands where a directory is expected") from None
    except IsADirectoryError:
        raise StorageError(f"{where}: a directory stands where a file is expected") from None
    except FileNotFoundError as error:
        if not writes:
            raise
        raise StorageError(f"{where}: cannot be written, what should hold it is not there ({error})") from None
    except OSError as error:
        raise StorageError(f"{where}: {error.strerror or error}") from None
    except _NETWORK as error:
        raise StorageError(f"{where}: cannot be reached: {error}. Check network, endpoint and keys.") from None
    except TypeError as error:  # file systems take their options late, and say only this of one they do not know
        if not store.options or "unexpected keyword" not in str(error):
            raise
        raise StorageError(f"{where}: a storage option is not known: {error}; given are {sorted(store.options)}") from None
