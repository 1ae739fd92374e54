"""Directories of models, adapters and encoders → on this machine's disk, copied once."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from lora_embed import hub
from lora_embed.errors import ChangedMeanwhile, StorageError
from lora_embed.storage import Entry, Store

KEPT_S = 7 * 86400.0  # a copy that was not asked for any longer is removed: each retrained adapter brings another encoder


def fetch_directory(uri: str, revision: str | None, patterns: tuple[str, ...], options: dict[str, Any] | None = None) -> Path:
    """A local directory with the files of a local directory, an fsspec URI or a repository of the hub (`hf://owner/name`).

    A local directory is returned as it is; others are copied once into the user's cache. A name without `://` is a path,
    never a repository. Raises StorageError when there is nothing to read.
    """
    if hub.is_repository(uri):
        return hub.download(hub.parse(uri, revision), patterns, f"{uri}: no repository of the hub that can be read")
    if "://" in uri:
        return _copy_to_cache(Store(uri, options or {}), patterns)
    try:
        if Path(uri).is_dir():
            return Path(uri)
    except PermissionError:  # of a folder above it
        raise StorageError(f"{uri}: this user may not look there. Give it read access, or name another directory.") from None
    if hub.may_be_repository(uri):
        raise StorageError(f"{uri}: {hub.no_directory(uri, Path.cwd())}")
    raise StorageError(f"{uri}: no such directory")


def cache_root() -> Path:
    """Where this machine keeps copies of remote files: `$LORA_EMBED_CACHE`, else `~/.cache/lora-embed`."""
    return Path(os.environ.get("LORA_EMBED_CACHE") or Path.home() / ".cache" / "lora-embed")


def _copy_to_cache(store: Store, patterns: tuple[str, ...]) -> Path:
    entries = _listed(store, patterns)
    if not entries:
        raise StorageError(f"{store.uri}: no files there that match {', '.join(patterns)}")
    if outside := [entry.path for entry in entries if ".." in entry.path.split("/") or entry.path.startswith("/")]:
        raise StorageError(f"{store.uri}: {outside[0]!r} would be copied out of its folder. Remove it there.")
    state = hashlib.sha256(repr([store.uri, entries]).encode()).hexdigest()[:24]
    target = cache_root() / "fetched" / state
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f"{state}.lock").open("w") as lock:  # which dates it: when the copy was asked for last
            fcntl.flock(lock, fcntl.LOCK_EX)  # a node's actors start together: one copies, the others wait for it
            if not target.is_dir():
                _copy(store, entries, target, patterns)
        _remove_unused(target.parent)
    except OSError as error:
        raise StorageError(
            f"{target.parent}: no copy of {store.uri} can be kept there: {error.strerror or error}. Make room, or set "
            "LORA_EMBED_CACHE to another disk."
        ) from None
    return target


def _remove_unused(folder: Path) -> None:
    """Remove copies that nobody asked for lately, and what a process that was killed had copied in part."""
    oldest = time.time() - KEPT_S
    for lock in folder.glob("*.lock"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.stat().st_mtime < oldest:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()
    for partial in folder.glob("*.*"):
        with contextlib.suppress(FileNotFoundError):
            if partial.is_dir() and partial.stat().st_mtime < oldest:
                shutil.rmtree(partial, ignore_errors=True)


def _listed(store: Store, patterns: tuple[str, ...]) -> list[Entry]:
    return [entry for entry in store.list_files() if any(Path(entry.path).match(pattern) for pattern in patterns)]


def _copy(store: Store, entries: list[Entry], target: Path, patterns: tuple[str, ...]) -> None:
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    try:
        for entry in entries:
            file = partial / entry.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(store.read(entry.path) or b"")
        if _listed(store, patterns) != entries:  # else the cache would hold some of it under the name of another for good
            raise ChangedMeanwhile(f"{store.uri}: changed while it was copied. Run the same command again.")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
