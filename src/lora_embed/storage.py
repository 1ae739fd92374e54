"""Local disks and object stores: the only user of fsspec.

A `Store` is a root URI; every path given to it is relative to that root, with `/` between its parts.
"""

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lora_embed.errors import StorageError

TEMPORARY = "_tmp"  # below a local root: files being written, hidden from listings


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
        return f"{root}/{path}" if path else root

    def list_files(self, prefix: str = "") -> list[Entry]:
        """All objects below a folder, sorted by path; an absent folder is an empty one. Never from a cache.

        Raises StorageError when the store refuses the listing.
        """
        fs, root = self._connection
        fs.invalidate_cache()
        with _explained(self, prefix):
            try:
                found = fs.find(self.full_path(prefix), detail=True)
            except FileNotFoundError:
                return []
        start = len(root.rstrip("/")) + 1
        entries = [_entry(name[start:], info) for name, info in found.items()]
        return sorted((e for e in entries if not e.path.startswith(f"{TEMPORARY}/")), key=lambda entry: entry.path)

    def open(self, path: str) -> BinaryIO:
        """Open for reading at random. Raises StorageError when it cannot be opened."""
        fs, _ = self._connection
        with _explained(self, path):
            return cast(BinaryIO, fs.open(self.full_path(path), "rb"))

    def read(self, path: str) -> bytes | None:
        """The whole object, or None where there is none."""
        fs, _ = self._connection
        with _explained(self, path):
            try:
                return cast(bytes, fs.cat_file(self.full_path(path)))
            except FileNotFoundError:
                return None

    def info(self, path: str) -> Entry | None:
        """The object's size and etag as they are now, or None where there is none."""
        fs, _ = self._connection
        fs.invalidate_cache()
        with _explained(self, path):
            try:
                info = fs.info(self.full_path(path))
            except FileNotFoundError:
                return None
        return _entry(path, info) if info["type"] == "file" else None

    def is_directory(self, path: str = "") -> bool:
        fs, _ = self._connection
        with _explained(self, path):
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
        with _explained(self, path):
            if self.is_local:
                return _create_local(Path(self.full_path("")), Path(self.full_path(path)), data)
            fs, _ = self._connection
            try:
                fs.pipe_file(self.full_path(path), data, mode="create")
            except OSError as error:  # s3fs reports a refused If-None-Match as EINVAL
                if isinstance(error, FileExistsError) or "pre-conditions" in str(error):
                    return False
                raise
            return True

    def replace(self, path: str, data: bytes) -> None:
        """Write a small object whether or not it exists: for hints, never for what readers rely on."""
        with _explained(self, path):
            if self.is_local:
                _replace_local(Path(self.full_path("")), Path(self.full_path(path)), data)
            else:
                self._connection[0].pipe_file(self.full_path(path), data)

    def delete(self, paths: list[str]) -> None:
        """Remove objects; one that is gone already is no error."""
        fs, _ = self._connection
        for path in paths:
            with contextlib.suppress(FileNotFoundError), _explained(self, path):
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


def fetch_directory(uri: str, revision: str | None, patterns: tuple[str, ...], options: dict[str, Any] | None = None) -> Path:
    """A local directory with the files of a local directory, an fsspec URI or a hub repository.

    A local directory is returned as it is; others are copied once into the user's cache.
    Raises StorageError when there is nothing to read.
    """
    if "://" in uri:
        return _copy_to_cache(Store(uri, options or {}), patterns)
    if Path(uri).is_dir():
        return Path(uri)
    if Path(uri).is_absolute():
        raise StorageError(f"{uri}: no such directory")
    import huggingface_hub  # slow to import, and only a name of the hub needs it

    try:
        return Path(huggingface_hub.snapshot_download(uri, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StorageError(
            f"{uri}: neither a directory here nor a repository of the hub that can be read ({reason}). "
            "Check the name, log in, or give a directory or URI."
        ) from None


def cache_root() -> Path:
    """Where this machine keeps copies of remote files: `$LORA_EMBED_CACHE`, else `~/.cache/lora-embed`."""
    return Path(os.environ.get("LORA_EMBED_CACHE") or Path.home() / ".cache" / "lora-embed")


def _copy_to_cache(store: Store, patterns: tuple[str, ...]) -> Path:
    entries = [entry for entry in store.list_files() if any(Path(entry.path).match(pattern) for pattern in patterns)]
    if not entries:
        raise StorageError(f"{store.uri}: no files there that match {', '.join(patterns)}")
    state = hashlib.sha256(repr([store.uri, entries]).encode()).hexdigest()[:24]
    target = cache_root() / "fetched" / state
    if target.is_dir():
        return target
    partial = target.with_name(f"{state}.{uuid.uuid4().hex}")
    for entry in entries:
        file = partial / entry.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(store.read(entry.path) or b"")
    try:
        partial.rename(target)
    except OSError as error:  # another process finished the same copy first
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    return target


@lru_cache(maxsize=64)
def _connect_hashable(uri: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, str]:
    if "://" in uri and uri.split("://", 1)[0] not in fsspec.available_protocols():
        raise StorageError(f"{uri}: unknown kind of storage; known are {', '.join(fsspec.available_protocols()[:12])} …")
    return cast(tuple[Any, str], fsspec.core.url_to_fs(uri, **dict(options)))


def _connect(uri: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, str]:
    try:
        return _connect_hashable(uri, options)
    except TypeError:  # nested options cannot be a cache key; fsspec caches the connection itself
        return cast(tuple[Any, str], fsspec.core.url_to_fs(uri, **dict(options)))


def _entry(path: str, info: dict[str, Any]) -> Entry:
    etag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or info.get("created")
    return Entry(path=path, size=int(info["size"] or 0), etag=str(etag).strip('"'))


def _create_local(root: Path, target: Path, data: bytes) -> bool:
    if target.exists():
        return False
    temporary = _write_aside(root, target, data)
    try:
        os.link(temporary, target)  # fails if the name exists: the commit, and whoever comes first wins
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    _sync_folder(target.parent)
    return True


def _replace_local(root: Path, target: Path, data: bytes) -> None:
    os.replace(_write_aside(root, target, data), target)
    _sync_folder(target.parent)


def _write_aside(root: Path, target: Path, data: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    (root / TEMPORARY).mkdir(parents=True, exist_ok=True)
    temporary = root / TEMPORARY / uuid.uuid4().hex
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(store: Store, path: str) -> Iterator[None]:
    """Turn what a store refuses for good into one message; absent objects stay FileNotFoundError."""
    where = f"{store.uri.rstrip('/')}/{path}".rstrip("/")
    try:
        yield
    except PermissionError as error:
        raise StorageError(f"{where}: access denied ({error.strerror or error}). Check its permissions or keys.") from None
    except NotADirectoryError:
        raise StorageError(f"{where}: a file stands where a directory is expected") from None
    except IsADirectoryError:
        raise StorageError(f"{where}: a directory stands where a file is expected") from None
    except OSError as error:
        if error.errno == errno.EROFS:
            raise StorageError(f"{where}: the file system is read-only") from None
        raise
