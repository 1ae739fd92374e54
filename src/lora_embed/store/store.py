"""Local disks and object stores behind one interface; with `remote`, the only user of fsspec.

A `Store` is a root URI; every path given to it is relative to that root, with `/` between its parts.
"""

import contextlib
import functools
import io
import math
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from fsspec.implementations.local import LocalFileSystem

from lora_embed.errors import StorageError, StoreUnavailable
from lora_embed.schema import Entry
from lora_embed.store import local, remote
from lora_embed.store.retry import LIBRARY_ERRORS, describe, explained, is_no_connection, is_refused_create, retried

RETRY_S = 120.0  # how long transient errors are tried again; `retry_s` beside fsspec's own options changes it
FIRST_CONTACT_S = 5.0
READ_AHEAD = 16 * 2**20  # bytes of one request when a remote file is read on
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
R = TypeVar("R")


@dataclass(frozen=True)
class Store:
    """A root on a local disk or in an object store. Picklable: the connection is made where it is used.

    `options` go to fsspec, but for `retry_s`, the seconds for which transient errors are tried again. Every method
    raises StorageError for what the store refuses, for a path that leads out of the root, and on a disk for a link below
    the root unless links are followed; and StoreUnavailable once that time is over.
    """

    uri: str
    options: dict[str, Any] = field(default_factory=dict, hash=False, repr=False)  # they may hold keys
    exclusive: bool | None = None  # does it honour conditional PUT? None until `claim` has found out
    follows_links: bool = False  # of inputs, which a user names; what is written to holds none

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def filesystem(self) -> Any:
        """The fsspec file system itself, which tries nothing again; `lend.lend` makes one for other libraries."""
        return self._connection[0]

    @property
    def _connection(self) -> tuple[Any, str]:
        uri = self.uri if "://" in self.uri else os.path.abspath(self.uri)  # of the folder now, which a process may change
        return remote.connect(uri, tuple(sorted((key, value) for key, value in self.options.items() if key != "retry_s")))

    @property
    def _root(self) -> Path:
        return Path(self.full_path(""))

    def full_path(self, path: str) -> str:
        """Where a path is in the file system: the one place where root and path are joined.

        Raises StorageError for a path that leads, or on a disk through a link may lead, out of the root.
        """
        fs, whole = self._connection
        root = whole.rstrip("/")
        if not path:
            return root or whole
        parts, is_local = path.split("/"), isinstance(fs, LocalFileSystem)
        if ".." in parts or "\0" in path or _SCHEME.match(path) or (is_local and ("" in parts or "." in parts)):
            raise StorageError(
                f"{self.uri}: the path {path!r} leads out of it or names nothing in it, so it is not followed. Something that "
                "was not written by lora-embed names it: find out what, and remove that."
            )
        if is_local and not self.follows_links:
            try:
                local.refuse_links(root, parts)
            except OSError:
                with self.explained(path):
                    raise
        return f"{root}/{path}"

    def name(self, path: str) -> str:
        """A path's whole URI, as messages give it."""
        return f"{self.uri.rstrip('/')}/{path}".rstrip("/")

    def explained(self, path: str, *, writes: bool = False) -> contextlib.AbstractContextManager[None]:
        """For a block that works with an object: what the store refuses there becomes one message that names it."""
        return explained(self.name(path), self.options, writes=writes)

    def check_reachable(self) -> None:
        """First contact, before any work: a wrong endpoint or key, or a bucket that is not there, is said at once."""
        first_s = min(self.retry_s, FIRST_CONTACT_S)
        if self.is_local:
            return
        try:
            self._list_one(first_s)
        except StoreUnavailable as error:
            if error.__cause__ is None or not is_no_connection(error.__cause__):
                self._list_one(self.retry_s)  # somebody is there, who may answer later
                return
            raise StorageError(
                f"{self.uri}: cannot be reached: {describe(error.__cause__)}. Check network, endpoint and keys."
            ) from None

    def list_files(self, prefix: str = "") -> list[Entry]:
        """All objects below a folder, sorted by path; an absent folder is an empty one. Never from a cache."""
        if self.is_local:
            self.full_path(prefix)
            with self.explained(prefix):
                entries = [local.entry(path, state) for path, state in local.walk(self.full_path(""), prefix)]
        else:
            entries = self._retried(prefix, lambda: self._find(prefix))
        return sorted((e for e in entries if not e.path.startswith(f"{local.TEMPORARY}/")), key=lambda entry: entry.path)

    def list_input(self, *, follows: bool) -> tuple[list[Entry], dict[str, str]]:
        """All files of an input, sorted by path, and the links to folders elsewhere that were passed over → where they lead.

        On a local disk links to files are files, and those to folders elsewhere are followed only where `follows`; no
        folder is looked at twice. An object store has no links.
        """
        if not self.is_local:
            return self.list_files(), {}
        with self.explained(""):
            states = dict(local.walk_input(self.full_path(""), follows=follows))
        passed_over = {path: state for path, state in sorted(states.items()) if isinstance(state, str)}
        files = [local.entry(path, state) for path, state in sorted(states.items()) if not isinstance(state, str)]
        return [entry for entry in files if not entry.path.startswith(f"{local.TEMPORARY}/")], passed_over

    def open(self, path: str, ahead: int = READ_AHEAD) -> BinaryIO:
        """Open for reading at random, at most `ahead` bytes beyond what is asked for; FileNotFoundError when it is gone.

        On S3 every read carries If-Match, so that all bytes are of the object as it was when it was opened.
        """
        fs, full = self.filesystem, self.full_path(path)
        is_local = isinstance(fs, LocalFileSystem)
        given = {} if is_local else {"block_size": max(1, min(ahead, READ_AHEAD))}
        file = self._retried(path, lambda: fs.open(full, "rb", **given))
        return cast(
            BinaryIO,
            file if is_local else io.BufferedReader(remote.RetriedFile(file, functools.partial(self._retried, path)), 65536),
        )

    def read(self, path: str) -> bytes | None:
        """The whole object, or None where there is none."""
        fs, full = self.filesystem, self.full_path(path)
        try:
            return self._retried(path, lambda: cast(bytes, fs.cat_file(full)))
        except FileNotFoundError:
            return None

    def info(self, path: str) -> Entry | None:
        """The object's size and etag as they are now, or None where there is none."""
        fs, full = self.filesystem, self.full_path(path)
        try:
            if isinstance(fs, LocalFileSystem):
                with self.explained(path):
                    state = os.stat(full)
                return local.entry(path, state) if stat.S_ISREG(state.st_mode) else None
            fs.invalidate_cache()
            answer = self._retried(path, lambda: fs.info(full))
        except FileNotFoundError:
            return None
        return remote.entry(path, answer) if answer["type"] == "file" else None

    def is_directory(self, path: str = "") -> bool:
        fs = self.filesystem
        full = self.full_path(path)
        return self._retried(path, lambda: bool(fs.isdir(full)))

    def now(self) -> float:
        """Seconds since 1970 by the clock that dates what is stored, which need not be this machine's.

        Known of local disks and of S3; of other stores this machine's time is all there is.
        """
        if self.is_local:
            return local.now(self._root)
        return remote.date_of(self._list_one(self.retry_s)) if remote.is_s3(self.uri) else time.time()

    def check_writable(self) -> None:
        """On a local disk, refuse before any work what could not be written."""
        if not self.is_local:
            return
        nearest = next(parent for parent in [self._root, *self._root.parents] if parent.exists())
        if not nearest.is_dir():
            raise StorageError(f"{self.uri}: {nearest} is a file, so nothing can be written below it")
        if not os.access(nearest, os.W_OK):
            raise StorageError(f"{self.uri}: {nearest} is not writable for this user. Change its permissions or the path.")

    def claim(self, marker: str, data: bytes) -> "Store":
        """Create the marker unless it is there; the store as it is to be used from then on.

        The first write, which shows whether there may be others. A store that lets the marker be created twice ignores
        conditional PUT: two runs that publish at the same moment could both believe that they were first.
        """
        refuses_second = not self.create(marker, data) or not self.create(marker, data)
        return replace(self, exclusive=refuses_second)

    def create(self, path: str, data: bytes) -> bool:
        """Commit an object in one atomic step unless it exists; True if this call made it.

        Readers see the whole object or none. False may also mean that this call made it and the answer got lost, so
        that it was sent again: whoever needs to know compares the content.
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
                if is_refused_create(error):  # by now the object may be gone again
                    return False
                if isinstance(error, FileExistsError) and self.info(path) is not None:  # not for what stands above it
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
        """Remove objects; one that is gone already is no error."""
        fs = self.filesystem
        if remote.is_s3(self.uri):
            whole = [self.full_path(path) for path in paths]
            for start in range(0, len(paths), 1000):
                self._retried(paths[start], lambda some=whole[start : start + 1000]: remote.delete_at_once(fs, some))  # type: ignore[misc]
            return
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self._retried(path, lambda path=path: fs.rm_file(self.full_path(path)))  # type: ignore[misc]

    def clear_temporary(self, older_than_s: float = 3600.0) -> None:
        """Remove what writers that were killed left behind on a local disk."""
        if self.is_local:
            self.full_path(local.TEMPORARY)
            with self.explained(local.TEMPORARY):
                local.clear_temporary(self._root, older_than_s)

    @property
    def retry_s(self) -> float:
        """Seconds for which transient errors are tried again."""
        given = self.options.get("retry_s", RETRY_S)
        with contextlib.suppress(TypeError, ValueError):
            if math.isfinite(seconds := float(given)) and seconds >= 0:
                return seconds
        raise StorageError(f"{self.uri}: retry_s is {given!r}, expected a number of seconds, 0 or more")

    def _put(self, path: str, data: bytes, **options: str) -> None:
        silence_s = self.options.get("config_kwargs", {}).get("read_timeout", remote.SILENCE_S)
        remote.put(self.filesystem, self.full_path(path), data, float(silence_s), **options)

    def _find(self, prefix: str) -> list[Entry]:
        fs, root = self._connection
        start = len(root.rstrip("/")) + 1
        return [remote.entry(name[start:], info) for name, info in remote.find(fs, self.full_path(prefix), self.uri)]

    def _list_one(self, limit_s: float) -> dict[str, Any]:
        """The answer to the cheapest request that fails where the bucket is not there; s3fs takes such a one for empty."""
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
