"""Local disks: listing that misses nothing, and writing in one atomic step."""

import contextlib
import ctypes
import errno
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_embed.schema import Entry

TEMPORARY = "_tmp"  # below a root: files being written, hidden from listings
# What a file system without hard links answers: exFAT and vfat the first, which otherwise means that access is denied.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_CURRENT_FOLDER, _RENAME_NOREPLACE = -100, 1  # of renameat2


def walk(root: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """Regular files below a folder, by path from the root, of what holds no links: OSError names one that is there."""
    try:
        with os.scandir(f"{root}/{prefix}" if prefix else root) as found:
            entries = list(found)
    except FileNotFoundError:
        return
    for entry in entries:
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_file(follow_symlinks=False):
            try:
                state = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # deleted meanwhile
                continue
            yield path, state
        elif entry.is_symlink():
            raise _link_at(path)
        elif entry.is_dir(follow_symlinks=False):
            yield from walk(root, path)


def refuse_links(root: str, parts: list[str]) -> None:
    """Raises OSError where a part of a path below the root is a link, or what it ends at is neither file nor folder.

    Reading a pipe might never end.
    """
    place, mode = root, 0
    for number, part in enumerate(parts):
        place = f"{place}/{part}"
        try:
            mode = os.lstat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        if stat.S_ISLNK(mode):
            raise _link_at("/".join(parts[: number + 1]))
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        says = f"{'/'.join(parts)} is neither a file nor a folder, so it is not opened. Remove it."
        raise OSError(errno.EINVAL, says)


def _link_at(path: str) -> OSError:
    says = f"{path} is a link, and no link in a table is followed. Remove it, or put what it names in its place."
    return OSError(errno.ELOOP, says)


def walk_input(root: str, *, follows: bool) -> Iterator[tuple[str, os.stat_result | str]]:
    """Regular files below an input's folder, by path from it, links to files among them; each folder is looked at once.

    A link to a folder that lies below the root too is no other folder. One to a folder elsewhere is walked where
    `follows`, by its own name, and else it is given with the place that it leads to, as text, in place of a state.
    """
    seen: set[tuple[int, int] | None] = {None}  # None: what is not there any more
    folders, links = [("", root)], list[tuple[str, str]]()
    while folders or links:
        if folders:
            found = _look_at(*folders.pop(), seen)
            folders += found.folders
            links = sorted([*links, *found.links], reverse=True)
            yield from found.files
            continue
        path, place = links.pop()  # only now: all that lies below the root in truth has been seen
        if _identity(place) not in seen:
            if follows:
                folders.append((path, place))
            else:
                yield path, os.path.realpath(place)


@dataclass
class _Folder:
    """What lies in a folder: files with their state, folders, and links to folders, by path from the root."""

    files: list[tuple[str, os.stat_result]] = field(default_factory=list)
    folders: list[tuple[str, str]] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)


def _look_at(path: str, place: str, seen: set[tuple[int, int] | None]) -> _Folder:
    found = _Folder()
    try:
        with os.scandir(place) as entries:
            identity = _identity(place)
            if identity in seen:
                return found
            seen.add(identity)
            for entry in entries:
                name = f"{path}/{entry.name}" if path else entry.name
                state = _state(entry)
                if state is not None and stat.S_ISREG(state.st_mode):
                    found.files.append((name, state))
                elif state is not None and stat.S_ISDIR(state.st_mode):
                    (found.links if entry.is_symlink() else found.folders).append((name, entry.path))
    except FileNotFoundError:  # it was deleted meanwhile, or never there
        return _Folder()
    return found


def _state(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of what a link leads to; None for what was deleted meanwhile, or a link to nothing."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def _identity(place: str) -> tuple[int, int] | None:
    try:
        state = os.stat(place)
    except FileNotFoundError:
        return None
    return state.st_dev, state.st_ino


def create(root: Path, target: Path, data: bytes) -> bool:
    """Commit a file in one atomic step unless it exists; True if this call made it."""
    if target.is_dir():
        raise IsADirectoryError
    if target.exists():
        return False
    with _written_aside(root, target, data) as temporary:
        try:
            _name(temporary, target)  # fails if the name exists: the commit, and whoever comes first wins
        except FileExistsError:
            return False
    _sync_folder(target.parent)
    return True


def _name(temporary: Path, target: Path) -> None:
    """Give a written file its name unless that is taken, in one step: by a link, else by a rename that replaces nothing.

    Not by `open("xb")`, which would show readers a part of the file. Raises FileExistsError, and OSError with what the file
    system lacks.
    """
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_to_free(temporary, target)


def _rename_to_free(temporary: Path, target: Path) -> None:
    rename: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # of Linux, which Python does not show
    code = errno.ENOSYS
    if rename is not None:
        if rename(_CURRENT_FOLDER, os.fsencode(temporary), _CURRENT_FOLDER, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(target))
    raise OSError(
        errno.ENOTSUP,
        "its file system has no hard links, and no rename that replaces nothing, so of two runs at once it could not tell "
        "which was first. Name a place on another disk, or in an object store.",
    )


def replace(root: Path, target: Path, data: bytes) -> None:
    """Write a file in one atomic step, whether or not it exists."""
    with _written_aside(root, target, data) as temporary:
        os.replace(temporary, target)
    _sync_folder(target.parent)


def now(root: Path) -> float:
    """Seconds since 1970 by the disk's own clock, which is another machine's where the disk is: that of a nameless file.

    This machine's time where nothing can be written below `root`.
    """
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def clear_temporary(root: Path, older_than_s: float) -> None:
    """Remove what writers that were killed left behind."""
    folder = root / TEMPORARY
    oldest = now(root) - older_than_s
    for file in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            state = file.lstat()
            if state.st_mtime < oldest and not stat.S_ISDIR(state.st_mode):
                file.unlink()


@contextlib.contextmanager
def _written_aside(root: Path, target: Path, data: bytes) -> Iterator[Path]:
    """A file with these bytes, safely on the disk; gone afterwards, whether or not it was used."""
    refuse_links(str(root), [TEMPORARY])
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


def entry(path: str, state: os.stat_result) -> Entry:
    """What a file's state says of it."""
    return Entry(path=path, size=state.st_size, etag=str(state.st_mtime_ns), modified=state.st_mtime)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # of a file system that syncs files alone
            raise
    finally:
        os.close(descriptor)
