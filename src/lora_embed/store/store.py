"""Local disks and object stores behind one interface; with `remote`, the only user of fsspec.

A `Store` is a root URI; every path given to it is relative to that root, with `/` between its parts.
"""

import contextlib
import functools
import io
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from fsspec.implementations.local import LocalFileSystem

from lora_embed.entries import Entries, Entry
from lora_embed.errors import StorageError, StoreUnavailable
from lora_embed.store import local, remote
from lora_embed.store.place import check_uri
from lora_embed.store.retry import LIBRARY_ERRORS, explained, first_contact, is_refused_create, retried

RETRY_S = 120.0  # how long a request is repeated after transient errors; the option `retry_s` changes it
FIRST_CONTACT_S = 5.0
READ_AHEAD = 16 * 2**20  # bytes of one request while a remote file is read from begin to end
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
R = TypeVar("R")


@dataclass(frozen=True)
class Store:
    """A root on a local disk or in an object store. Picklable: it connects where it is used.

    `options` go to fsspec, except `retry_s`, the seconds for which a request is repeated after transient errors. Every
    method raises StorageError when the store refuses a request, for a path that leads out of the root, and, on a local disk,
    for a link below the root unless links are followed. It raises StoreUnavailable when `retry_s` is over.
    """

    uri: str
    options: dict[str, Any] = field(default_factory=dict, hash=False, repr=False)  # they may hold keys
    exclusive: bool | None = None  # True if it obeys conditional PUT; None until `claim` has tried
    follows_links: bool = False  # True for inputs, which a user names; tables hold no links

    def __post_init__(self) -> None:
        check_uri(self.uri)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def filesystem(self) -> Any:
        """The fsspec file system itself, which does not repeat requests; `lend.lend` makes one that does."""
        return self._connection[0]

    @property
    def _connection(self) -> tuple[Any, str]:
        uri = self.uri if "://" in self.uri else os.path.abspath(self.uri)  # a process may change its current folder
        return remote.connect(uri, tuple(sorted((key, value) for key, value in self.options.items() if key != "retry_s")))

    @property
    def _root(self) -> Path:
        return Path(self.full_path(""))

    def full_path(self, path: str) -> str:
        """The path from the file system's root. Only here are root and path joined.

        Raises StorageError for a path that leads out of the root, or, on a local disk, through a link.
        """
        fs, root_as_given = self._connection
        root = root_as_given.rstrip("/")
        if not path:
            return root or root_as_given
        parts, is_local = path.split("/"), isinstance(fs, LocalFileSystem)
        if ".." in parts or "\0" in path or _SCHEME.match(path) or (is_local and ("" in parts or "." in parts)):
            raise StorageError(
                f"{self.uri}: the path {path!r} does not lie in it, so it is not opened. lora-embed did not write that path: "
                "find the file that names it, and remove that file."
            )
        if is_local and not self.follows_links:
            try:
                local.refuse_links(root, parts)
            except OSError:
                with self.explained(path):
                    raise
        return f"{root}/{path}"

    def name(self, path: str) -> str:
        """A path's whole URI, for messages."""
        return f"{self.uri.rstrip('/')}/{path}".rstrip("/")

    def explained(self, path: str, *, writes: bool = False) -> contextlib.AbstractContextManager[None]:
        """A context for work with an object: errors of the store become StorageError with a message that names the object."""
        return explained(self.name(path), self.options, writes=writes)

    def check_reachable(self) -> None:
        """Contact the store before any work, so that a wrong endpoint, key or bucket fails within seconds."""
        first_s = min(self.retry_s, FIRST_CONTACT_S)
        if self.is_local:
            return
        try:
            with first_contact(self.uri, self.options):
                self._list_one(first_s)
        except StoreUnavailable:
            self._list_one(self.retry_s)  # a server is there, and may answer later

    def list_files(self, prefix: str = "") -> list[Entry]:
        """All objects below a folder, sorted by path; none for a folder that does not exist. Never from a cache."""
        if self.is_local:
            self.full_path(prefix)
            with self.explained(prefix):
                entries = [local.entry(path, state) for path, state in local.walk(self.full_path(""), prefix)]
        else:
            entries = self._retried(prefix, lambda: list(self._find(prefix)))
        by_path = {entry.path: entry for entry in entries if not entry.path.startswith(f"{local.TEMPORARY}/")}
        return sorted(by_path.values(), key=lambda entry: entry.path)

    def list_input(self, *, follows: bool) -> tuple[Entries, dict[str, str]]:
        """All files of an input, folder by folder, and the ignored links to folders elsewhere → the paths that they lead to.

        On a local disk, a link to a file counts as a file, and a link to a folder elsewhere is followed only if `follows`.
        No folder is read twice. A name without a file behind it is listed as `broken`. An object store has no links.
        """
        ignored_links: dict[str, str] = {}
        if not self.is_local:
            return self._retried("", lambda: Entries(entry.state for entry in self._find(""))), ignored_links
        with self.explained(""):
            states = local.walk_input(self.full_path(""), follows=follows, ignored_links=ignored_links)
            return Entries(states), dict(sorted(ignored_links.items()))

    def page_behind(self, path: str, folder: str) -> list[Entry]:
        """The next thousand objects behind this path, of a folder and its folders, in the store's order."""
        fs, root = self.filesystem, self.full_path("")
        objects = self._retried(path, lambda: remote.page_behind(fs, self.full_path(path), self.full_path(folder)))
        return [remote.entry(name.removeprefix(f"{root}/"), described) for name, described in objects]

    def open(self, path: str, ahead: int = READ_AHEAD) -> BinaryIO:
        """Open an object for random reads, with at most `ahead` bytes read ahead. Raises FileNotFoundError if it is gone.

        On S3 every read carries If-Match, so all bytes come from the object as it was when it was opened.
        """
        fs, full = self.filesystem, self.full_path(path)
        is_local = isinstance(fs, LocalFileSystem)
        block_options = {} if is_local else {"block_size": max(1, min(ahead, READ_AHEAD))}
        file = self._retried(path, lambda: fs.open(full, "rb", **block_options))
        return cast(
            BinaryIO,
            file if is_local else io.BufferedReader(remote.RetriedFile(file, functools.partial(self._retried, path)), 65536),
        )

    def read(self, path: str) -> bytes | None:
        """The object's bytes, or None where it does not exist."""
        fs, full = self.filesystem, self.full_path(path)
        try:
            return self._retried(path, lambda: cast(bytes, fs.cat_file(full)))
        except FileNotFoundError:
            return None

    def info(self, path: str) -> Entry | None:
        """The object's present size and etag, or None where it does not exist. Where links are followed, see `list_input`."""
        fs, full = self.filesystem, self.full_path(path)
        try:
            if isinstance(fs, LocalFileSystem):
                with self.explained(path):
                    entry = local.input_entry(path, full)
                return entry if entry is None or not entry.broken or self.follows_links else None
            fs.invalidate_cache()
            answer = self._retried(path, lambda: fs.info(full))
        except FileNotFoundError:
            return None
        return remote.entry(path, answer) if answer["type"] == "file" else None

    def is_directory(self, path: str = "") -> bool:
        fs, full = self.filesystem, self.full_path(path)
        try:
            return self._retried(path, lambda: remote.has_folder(fs, full) if remote.is_s3(self.uri) else bool(fs.isdir(full)))
        except FileNotFoundError:
            return False

    def now(self) -> float:
        """Seconds since 1970 by the store's clock, which dates its objects and may differ from this machine's.

        It is known for local disks and S3. For other stores, this machine's clock is used.
        """
        if self.is_local:
            return local.now(self._root)
        return remote.date_of(self._list_one(self.retry_s)) if remote.is_s3(self.uri) else time.time()

    def check_writable(self) -> None:
        """On a local disk, raise StorageError before any work if nothing could be written."""
        if not self.is_local:
            return
        nearest = next(parent for parent in [self._root, *self._root.parents] if parent.exists())
        if not nearest.is_dir():
            raise StorageError(f"{self.uri}: {nearest} is a file, so nothing can be written below it. Use another path.")
        if not os.access(nearest, os.W_OK):
            raise StorageError(f"{self.uri}: {nearest} is not writable for this user. Change its permissions or the path.")

    def claim(self, marker: str, data: bytes) -> "Store":
        """Create the marker unless it exists, and return the store with `exclusive` set.

        This is the first write, so it shows whether the store can be written. A store that lets the marker be created twice
        ignores conditional PUT: two runs that publish at the same moment could both believe that they were first.
        """
        refuses_second = not self.create(marker, data) or not self.create(marker, data)
        return replace(self, exclusive=refuses_second)

    def create(self, path: str, data: bytes) -> bool:
        """Commit an object in one atomic step unless it exists; True if this call made it.

        Readers see the whole object or none. False may also mean that this call made it, but the answer was lost and the
        request was repeated: a caller that must know compares the content.
        """
        if self.is_local:
            with self.explained(path, writes=True):
                return local.create(self._root, Path(self.full_path(path)), data)
        ignores_condition = self.exclusive is False
        if ignores_condition and self.info(path) is not None:
            return False
        mode = "overwrite" if ignores_condition else "create"
        with self.explained(path, writes=True):
            try:
                retried(lambda: self._put(path, data, mode=mode), self.name(path), self.retry_s)
            except (OSError, *LIBRARY_ERRORS) as error:
                if is_refused_create(error):  # the object exists, or has been deleted since
                    return False
                if isinstance(error, FileExistsError) and self.info(path) is not None:  # the error may be of a folder above
                    return False
                raise
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Write an object in one atomic step, whether or not it exists."""
        with self.explained(path, writes=True):
            if self.is_local:
                local.replace(self._root, Path(self.full_path(path)), data)
            else:
                retried(lambda: self._put(path, data), self.name(path), self.retry_s)

    def delete(self, paths: list[str]) -> None:
        """Remove objects. An object that does not exist is no error."""
        fs = self.filesystem
        if remote.is_s3(self.uri):
            full_paths = [self.full_path(path) for path in paths]
            for start in range(0, len(paths), 1000):
                batch = full_paths[start : start + 1000]
                self._retried(paths[start], lambda batch=batch: remote.delete_at_once(fs, batch))  # type: ignore[misc]
            return
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self._retried(path, lambda path=path: fs.rm_file(self.full_path(path)))  # type: ignore[misc]

    def clear_temporary(self, older_than_s: float = 3600.0) -> None:
        """Remove temporary files that killed writers left behind on a local disk."""
        if self.is_local:
            self.full_path(local.TEMPORARY)
            with self.explained(local.TEMPORARY):
                local.clear_temporary(self._root, older_than_s)

    @property
    def retry_s(self) -> float:
        """Seconds for which a request is repeated after transient errors."""
        setting = self.options.get("retry_s", RETRY_S)
        with contextlib.suppress(TypeError, ValueError):
            if math.isfinite(seconds := float(setting)) and seconds >= 0:
                return seconds
        raise StorageError(f"{self.uri}: retry_s is {setting!r}, expected a number of seconds, 0 or more")

    def _put(self, path: str, data: bytes, **options: str) -> None:
        silence_s = self.options.get("config_kwargs", {}).get("read_timeout", remote.SILENCE_S)
        remote.put(self.filesystem, self.full_path(path), data, float(silence_s), **options)

    def _find(self, prefix: str) -> Iterator[Entry]:
        fs, root = self._connection
        start = len(root.rstrip("/")) + 1
        return (remote.entry(name[start:], info) for name, info in remote.find(fs, self.full_path(prefix), self.uri))

    def _list_one(self, limit_s: float) -> dict[str, Any]:
        """The answer to the cheapest request that fails where the bucket does not exist; s3fs would show it as empty."""
        fs = self.filesystem
        bucket, _, prefix = self.full_path("").partition("/")
        try:
            if remote.is_s3(self.uri):
                request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": 1}
                return cast(dict[str, Any], self._retried("", lambda: fs.call_s3("list_objects_v2", **request), limit_s))
            self._retried("", lambda: fs.exists(self.full_path("")), limit_s)
            return {}
        except FileNotFoundError:
            raise StorageError(f"{self.uri}: there is no bucket {bucket}. Correct its name, or create it.") from None

    def _retried(self, path: str, operation: Callable[[], R], limit_s: float | None = None) -> R:
        with self.explained(path):
            return retried(operation, self.name(path), self.retry_s if limit_s is None else limit_s)
