"""Directories of models, adapters and encoders → on this machine's disk, copied once."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_embed.errors import ChangedMeanwhile, StorageError
from lora_embed.schema import Entry
from lora_embed.store import hub
from lora_embed.store.store import Store

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


def private_folder(name: str) -> Path:
    """A folder of the cache that this user alone can write to, made where there is none.

    Names in it can be computed, so whoever could write there could put models in the place of copies. Raises StorageError for a
    folder that is another user's, or a link, or that others may write to.
    """
    folder = cache_root() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        check_private(folder)
        folder.chmod(0o700)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be made or used: {error.strerror or error}. Make room, or set LORA_EMBED_CACHE to another disk."
        ) from None
    return folder


def check_private(folder: Path) -> None:
    """Raises StorageError for what is no directory of this user's, or is one that others may write to."""
    state = folder.lstat()
    problem = ""
    if not stat.S_ISDIR(state.st_mode):
        problem = "is a link or a file, expected a directory"
    elif state.st_uid != os.getuid():
        problem = f"belongs to user {state.st_uid}, expected {os.getuid()}"
    elif state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"may be written to by others (mode {stat.S_IMODE(state.st_mode):o}, expected 700)"
    if problem:
        raise StorageError(
            f"{folder}: {problem}. So what lies there may be somebody else's, and is not used. Remove it, or set "
            "LORA_EMBED_CACHE to a directory of your own."
        )


def _copy_to_cache(store: Store, patterns: tuple[str, ...]) -> Path:
    entries = _listed(store, patterns)
    if not entries:
        raise StorageError(f"{store.uri}: no files there that match {', '.join(patterns)}")
    state = hashlib.sha256(repr([store.uri, entries]).encode()).hexdigest()[:24]
    target = private_folder("fetched") / state
    try:
        with _locked(target.with_name(f"{state}.lock")) as lock:  # a node's actors start together: one copies, others wait
            os.utime(lock)  # when the copy was asked for last
            if not os.path.lexists(target):
                _copy(store, entries, target, patterns)
            check_private(target)
        _remove_unused(target.parent)
    except OSError as error:
        raise StorageError(
            f"{target.parent}: no copy of {store.uri} can be kept there: {error.strerror or error}. Make room, or set "
            "LORA_EMBED_CACHE to another disk."
        ) from None
    return target


@contextlib.contextmanager
def _locked(path: Path, *, waits: bool = True) -> Iterator[int]:
    """Hold a file's lock. Nothing is written to it, and a link is not followed: it could be to any file of the user's."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise FileExistsError(f"{path} is no ordinary file")
        fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    finally:
        os.close(lock)


def _remove_unused(folder: Path) -> None:
    """Remove copies that nobody asked for lately, and what a process that was killed had copied in part."""
    oldest = time.time() - KEPT_S
    for lock in folder.glob("*.lock"):
        with contextlib.suppress(OSError), _locked(lock, waits=False):  # in use, gone already, or no lock
            if lock.lstat().st_mtime < oldest:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()
    for partial in folder.glob("*.*"):
        with contextlib.suppress(FileNotFoundError):
            if partial.is_dir() and partial.lstat().st_mtime < oldest:
                shutil.rmtree(partial, ignore_errors=True)


def _listed(store: Store, patterns: tuple[str, ...]) -> list[Entry]:
    listed = store.list_files()
    if outside := [entry.path for entry in listed if ".." in entry.path.split("/") or entry.path.startswith("/")]:
        raise StorageError(f"{store.uri}: {outside[0]!r} would be copied out of its folder. Remove it there.")
    return [entry for entry in listed if any(_matches(entry.path, pattern) for pattern in patterns)]


def _matches(path: str, pattern: str) -> bool:
    """Does a path below the store match, folder by folder?"""
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)


def _copy(store: Store, entries: list[Entry], target: Path, patterns: tuple[str, ...]) -> None:
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    try:
        for entry in entries:
            file = partial / entry.path
            for folder in reversed(file.relative_to(target.parent).parents[:-1]):
                (target.parent / folder).mkdir(mode=0o700, exist_ok=True)
            file.write_bytes(store.read(entry.path) or b"")
        if _listed(store, patterns) != entries:  # else the cache would hold some of it under the name of another for good
            raise ChangedMeanwhile(f"{store.uri}: changed while it was copied. Run the same command again.")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
