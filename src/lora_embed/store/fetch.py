"""Copy remote directories of models, adapters and encoders to this machine's disk, once each."""

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

from lora_embed.entries import Entry
from lora_embed.errors import ChangedMeanwhile, StorageError
from lora_embed.store import hub
from lora_embed.store.local import correct_the_path
from lora_embed.store.place import check_uri
from lora_embed.store.store import Store

KEPT_S = 7 * 86400.0  # a copy is removed when it was not used for so long: each retrained adapter makes another encoder


def fetch_directory(uri: str, revision: str | None, patterns: tuple[str, ...], options: dict[str, Any] | None = None) -> Path:
    """A local directory with the files of a local directory, an fsspec URI or a repository of the hub (`hf://owner/name`).

    A local directory is returned as it is. Others are copied once into the user's cache. A name without `://` is a path,
    never a repository. Raises StorageError where there is nothing to read.
    """
    if hub.is_repository(uri):
        return hub.download(hub.parse(uri, revision), patterns, f"{uri}: this repository of the hub cannot be read")
    if "://" in uri:
        return _copy_to_cache(Store(uri, options or {}), patterns)
    check_uri(uri)
    try:
        if Path(uri).is_dir():
            return Path(uri)
    except PermissionError:  # for a folder above it
        raise StorageError(f"{uri}: this user may not read it. Give read access, or name another directory.") from None
    if hub.may_be_repository(uri):
        raise StorageError(f"{uri}: {hub.no_directory(uri, Path.cwd())}")
    raise StorageError(f"{uri}: no such directory. {correct_the_path(uri)}")


def cache_root() -> Path:
    """Where this machine keeps copies of remote files: `$LORA_EMBED_CACHE`, else `~/.cache/lora-embed`."""
    return Path(os.environ.get("LORA_EMBED_CACHE") or Path.home() / ".cache" / "lora-embed")


def private_folder(name: str) -> Path:
    """A folder of the cache that only this user can write to. It is created where it does not exist.

    File names in it can be predicted, so another user who could write there could replace copies by other models. Raises
    StorageError for a folder that belongs to another user, is a link, or can be written by others.
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
            f"{folder}: cannot be created or used: {error.strerror or error}. Free space there, or set LORA_EMBED_CACHE to a "
            "folder on another disk."
        ) from None
    return folder


def check_private(folder: Path) -> None:
    """Raises StorageError unless the folder is a directory that belongs to this user and that others cannot write to."""
    state = folder.lstat()
    problem = ""
    if not stat.S_ISDIR(state.st_mode):
        problem = "is a link or a file, expected a directory"
    elif state.st_uid != os.getuid():
        problem = f"belongs to user {state.st_uid}, expected user {os.getuid()}"
    elif state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"can be written by other users (mode {stat.S_IMODE(state.st_mode):o}, expected 700)"
    if problem:
        raise StorageError(
            f"{folder}: {problem}. Another user may have put files there, so it is not used. Remove it, or set "
            "LORA_EMBED_CACHE to your own directory."
        )


def _copy_to_cache(store: Store, patterns: tuple[str, ...]) -> Path:
    entries = _listed(store, patterns)
    if not entries:
        raise StorageError(f"{store.uri}: holds no file that matches {', '.join(patterns)}. Correct the URI.")
    state = hashlib.sha256(repr([store.uri, entries]).encode()).hexdigest()[:24]
    target = private_folder("fetched") / state
    try:
        with _locked(target.with_name(f"{state}.lock")) as lock:  # a node's actors start together: one copies, others wait
            os.utime(lock)  # the lock's time is the copy's last use
            if not os.path.lexists(target):
                _copy(store, entries, target, patterns)
            check_private(target)
        _remove_unused(target.parent)
    except OSError as error:
        raise StorageError(
            f"{target.parent}: {store.uri} cannot be copied there: {error.strerror or error}. Free space there, or set "
            "LORA_EMBED_CACHE to a folder on another disk."
        ) from None
    return target


@contextlib.contextmanager
def _locked(path: Path, *, waits: bool = True) -> Iterator[int]:
    """Hold a file's lock. Nothing is written to the file, and a link is not followed: it could lead to any file."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise FileExistsError(f"{path} is not an ordinary file")
        fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    finally:
        os.close(lock)


def _remove_unused(folder: Path) -> None:
    """Remove copies that were not used lately, and partial copies of killed processes."""
    oldest = time.time() - KEPT_S
    for lock in folder.glob("*.lock"):
        with contextlib.suppress(OSError), _locked(lock, waits=False):  # suppressed: in use, gone already, or not a lock
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
        raise StorageError(f"{store.uri}: the file {outside[0]!r} would be copied to another folder. Remove it there.")
    return [entry for entry in listed if any(_matches(entry.path, pattern) for pattern in patterns)]


def _matches(path: str, pattern: str) -> bool:
    """True if a path below the store matches the pattern, folder by folder."""
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)


def _copy(store: Store, entries: list[Entry], target: Path, patterns: tuple[str, ...]) -> None:
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    try:
        for entry in entries:
            file = partial / entry.path
            for folder in reversed(file.relative_to(target.parent).parents[:-1]):
                (target.parent / folder).mkdir(mode=0o700, exist_ok=True)
            file.write_bytes(store.read(entry.path) or b"")
        if _listed(store, patterns) != entries:  # otherwise the cache would keep a mixture of two states for good
            raise ChangedMeanwhile(f"{store.uri}: changed while it was copied. Run the same command again.")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
