"""A store for other libraries: a read-only file system of fsspec that repeats failed reads like `Store` does."""

import os
from typing import Any

from fsspec.spec import AbstractFileSystem

from lora_embed.entries import Entry
from lora_embed.store.store import Store


def lend(store: Store) -> Any:
    """The store as a read-only file system of fsspec, for pyarrow, pandas, DuckDB, Ray and other libraries.

    For a local store it is fsspec's own, which libraries replace by theirs. Paths are those of `Store.full_path`.
    """
    return store.filesystem if store.is_local else LentFileSystem(store.uri, store.options)


class LentFileSystem(AbstractFileSystem):
    """Files below a URI, by the full paths of the URI's own file system. Picklable: it connects where it is used.

    Its methods raise what those of `Store` raise, and FileNotFoundError for a path that does not exist.
    """

    protocol = "lora-embed"

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        super().__init__()
        self._store = Store(uri, options)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, type, size in bytes and time in seconds since 1970 of a file or folder."""
        relative = self._below(path)
        entry = self._store.info(relative) if relative else None
        if entry is not None:
            return self._describe(entry)
        if self._store.is_directory(relative):
            return {"name": path, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def exists(self, path: str, **_: Any) -> bool:
        """Replaces fsspec's own, which takes a store that does not answer for a missing file; so does `isfile`."""
        try:
            return bool(self.info(path))
        except FileNotFoundError:
            return False

    def isfile(self, path: str) -> bool:
        return self._store.info(self._below(path)) is not None

    def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any) -> Any:
        """All files below a folder, by one listing; folders too if `withdirs`."""
        infos = {info["name"]: info for info in map(self._describe, self._store.list_files(self._below(path)))}
        if withdirs:
            folders = {name for file in infos for name in _folders(file, path)}
            infos |= {name: {"name": name, "type": "directory", "size": 0} for name in folders}
        base = path.rstrip("/").count("/")
        chosen_infos = {name: infos[name] for name in sorted(infos) if maxdepth is None or name.count("/") - base <= maxdepth}
        return chosen_infos if detail else list(chosen_infos)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """The files and folders directly in a folder."""
        infos = self.find(path, maxdepth=1, withdirs=True, detail=True)
        if not infos and not self._store.is_directory(self._below(path)):
            raise FileNotFoundError(path)
        return list(infos.values()) if detail else list(infos)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode != "rb":
            raise OSError(f"{path}: can only be read, not opened with mode {mode!r}")
        return self._store.open(self._below(path))

    def _below(self, path: str) -> str:
        """A full path as a path from the store's root."""
        root = self._store.full_path("").rstrip("/")
        relative = path.rstrip("/").removeprefix(root)
        if not path.startswith(root) or (relative and not relative.startswith("/")):
            raise FileNotFoundError(f"{path}: lies outside of {root}")
        return relative.removeprefix("/")

    def _describe(self, entry: Entry) -> dict[str, Any]:
        name = self._store.full_path(entry.path)
        return {"name": name, "type": "file", "size": entry.size, "mtime": entry.modified, "etag": entry.etag}


def _folders(file: str, below: str) -> list[str]:
    """Full paths of the folders between the folder `below` and a file in it."""
    folders, folder = [], os.path.dirname(file)
    while len(folder) > len(below.rstrip("/")):
        folders.append(folder)
        folder = os.path.dirname(folder)
    return folders
