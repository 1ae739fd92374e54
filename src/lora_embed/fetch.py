"""Directories of models, adapters and encoders → on this machine's disk, copied once."""

import fcntl
import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from lora_embed.errors import StorageError
from lora_embed.storage import Entry, Store


def fetch_directory(uri: str, revision: str | None, patterns: tuple[str, ...], options: dict[str, Any] | None = None) -> Path:
    """A local directory with the files of a local directory, an fsspec URI or a hub repository.

    A local directory is returned as it is; others are copied once into the user's cache.
    Raises StorageError when there is nothing to read.
    """
    if "://" in uri:
        return _copy_to_cache(Store(uri, options or {}), patterns)
    try:
        if Path(uri).is_dir():
            return Path(uri)
    except PermissionError:  # of a folder above it
        raise StorageError(f"{uri}: this user may not look there. Give it read access, or name another directory.") from None
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
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{state}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a node's actors start together: one copies, the others wait for it
        if not target.is_dir():
            _copy(store, entries, target)
    return target


def _copy(store: Store, entries: list[Entry], target: Path) -> None:
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    try:
        for entry in entries:
            data = store.read(entry.path)
            if data is None or len(data) != entry.size:  # else the cache would hold half of it for good
                raise StorageError(f"{store.uri}/{entry.path}: changed while it was copied. Run the same command again.")
            file = partial / entry.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
