"""A store lent to other libraries: a read-only file system of fsspec whose reads are tried again as our own are."""

import os
from typing import Any

from fsspec.spec import AbstractFileSystem

from lora_embed.schema import Entry
from lora_embed.store.store import Store


def lend(store: Store) -> Any:
    """The store as a file system of fsspec to read from, for pyarrow, pandas, DuckDB, Ray and whatever else takes one.

    Of a local store fsspec's own, which libraries replace by theirs; paths are those of `Store.full_path`.
    """
    return store.filesystem if store.is_local else LentFileSystem(store.uri, store.options)


class LentFileSystem(AbstractFileSystem):
    """Files below a URI, by the full paths that its own file system has. Picklable: it connects where it is used.

    Its methods raise what those of `Store` raise; FileNotFoundError for what is not there.
    """

    protocol = "lora-embed"

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        super().__init__()
        self._store = Store(uri, options)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, type, size in bytes and time in seconds since 1970."""
        below = self._below(path)
        entry = self._store.info(below) if below else None
        if entry is not None:
            return self._describe(entry)
        if self._store.is_directory(below):
            return {"name": path, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def exists(self, path: str, **_: Any) -> bool:
        """Not fsspec's own, for which a store that does not answer is a file that is not there; likewise `isfile`."""
        try:
            return bool(self.info(path))
        except FileNotFoundError:
            return False

    def isfile(self, path: str) -> bool:
        return self._store.info(self._below(path)) is not None

    def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any) -> Any:
        """All files below a folder, by one listing; folders too where they are asked for."""
        found = {described["name"]: described for described in map(self._describe, self._store.list_files(self._below(path)))}
        if withdirs:
            above = {name for file in found for name in _folders(file, path)}
            found |= {name: {"name": name, "type": "directory", "size": 0} for name in above}
        base = path.rstrip("/").count("/")
        kept = {name: found[name] for name in sorted(found) if maxdepth is None or name.count("/") - base <= maxdepth}
        return kept if detail else list(kept)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What lies in a folder itself."""
        found = self.find(path, maxdepth=1, withdirs=True, detail=True)
        if not found and not self._store.is_directory(self._below(path)):
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode != "rb":
            raise OSError(f"{path}: is lent for reading alone, not for mode {mode!r}")
        return self._store.open(self._below(path))

    def _below(self, path: str) -> str:
        """A full path as one from the store's root."""
        root = self._store.full_path("").rstrip("/")
        below = path.rstrip("/").removeprefix(root)
        if not path.startswith(root) or (below and not below.startswith("/")):
            raise FileNotFoundError(f"{path}: lies outside of {root}")
        return below.removeprefix("/")

    def _describe(self, entry: Entry) -> dict[str, Any]:
        name = self._store.full_path(entry.path)
        return {"name": name, "type": "file", "size": entry.size, "mtime": entry.modified, "etag": entry.etag}


def _folders(file: str, below: str) -> list[str]:
    """Full paths of the folders between one and a file in it."""
    found, folder = [], os.path.dirname(file)
    while len(folder) > len(below.rstrip("/")):
        found.append(folder)
        folder = os.path.dirname(folder)
    return found
