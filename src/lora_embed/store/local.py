"""Local disks: list all files, and write a file in one atomic step."""

import contextlib
import ctypes
import difflib
import errno
import heapq
import itertools
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_embed.entries import Entry, State
from lora_embed.text import printable

_MOST_LOOKED_AT = 10_000  # names of a folder
TEMPORARY = "_tmp"  # folder below a root for files that are being written; listings leave it out
# Errors of file systems without hard links. exFAT and vfat give EPERM, which otherwise means that access is denied.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Errors of a path that has no file: missing, a circle of links, a file in place of a folder, or too long.
_LEADS_NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
_CURRENT_FOLDER, _RENAME_NOREPLACE = -100, 1  # arguments of renameat2


def correct_the_path(path: str | os.PathLike[str]) -> str:
    """What to do about a path that does not exist; with a name of its folder if one is almost the same."""
    folder, name = os.path.split(os.path.abspath(path))
    with contextlib.suppress(OSError), os.scandir(folder) as scan:
        names = [entry.name for entry in itertools.islice(scan, _MOST_LOOKED_AT)]
        if close := difflib.get_close_matches(name, names, 1):
            return f"Did you mean {os.path.join(os.path.dirname(path), close[0])}?"
    return "Correct the path."


def walk(root: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """Regular files below a folder, by path from the root. Raises OSError for a link, since no link there is followed."""
    try:
        with os.scandir(f"{root}/{prefix}" if prefix else root) as scan:
            entries = list(scan)
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
    """Raises OSError where a part of a path below the root is a link, or the path is neither a file nor a folder.

    A pipe, for example: reading it might never end.
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
        message = f"{'/'.join(parts)} is neither a file nor a folder, so it is not opened. Remove it."
        raise OSError(errno.EINVAL, message)


def _link_at(path: str) -> OSError:
    message = f"{path} is a link, and links in a table are not followed. Remove it, or replace it by the file that it leads to."
    return OSError(errno.ELOOP, message)


def walk_input(root: str, *, follows: bool, ignored_links: dict[str, str]) -> Iterator[State]:
    """All files below an input's folder, by path from it. A link to a file is a file; each folder is read once.

    A name without a file behind it, such as a link whose target is gone, is an entry that is `broken`. A link to a folder
    below the root is ignored, since that folder is read anyway. A link to a folder elsewhere is followed if `follows`;
    otherwise it is put into `ignored_links`, with the path that it leads to.
    """
    folders_seen: set[tuple[int, int] | None] = {None}  # None stands for a folder that does not exist any more
    folders, links = [("", root)], list[tuple[str, str]]()
    while folders or links:
        if folders:
            yield from _look_at(*folders.pop(), folders_seen, folders, links)
            continue
        path, target = heapq.heappop(links)  # only now, when every real folder below the root has been seen
        if _identity(target) not in folders_seen:
            if follows:
                folders.append((path, target))
            else:
                ignored_links[path] = os.path.realpath(target)


def _look_at(
    path: str,
    place: str,
    seen: set[tuple[int, int] | None],
    folders: list[tuple[str, str]],
    links: list[tuple[str, str]],
) -> Iterator[State]:
    """The files of a folder, unless it was seen; its folders and the links to folders are put into the lists, with places."""
    with contextlib.suppress(FileNotFoundError), os.scandir(place) as entries:  # it was deleted meanwhile, or never existed
        identity = _identity(place)
        if identity in seen:
            return
        seen.add(identity)
        for entry in entries:
            name = f"{path}/{entry.name}" if path else entry.name
            if not _is_folder(entry):
                state, why = _state_of_input(entry.path)
                if state is not None:
                    yield name, state.st_size, str(state.st_mtime_ns), ""
                elif why:
                    yield name, 0, why, why
            elif entry.is_symlink():
                heapq.heappush(links, (name, entry.path))
            else:
                folders.append((name, entry.path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """True for a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return False
        raise


def input_entry(path: str, place: str) -> Entry | None:
    """The entry of a file of an input, or of a link to one; None for a folder, or if nothing has this name (any more)."""
    state, why = _state_of_input(place)
    if state is None:
        return Entry(path, 0, why, broken=why) if why else None
    return entry(path, state)


def _state_of_input(place: str) -> tuple[os.stat_result | None, str]:
    """The state of a file, or why there is no file behind its name; neither for a folder, and for what is gone."""
    try:
        state = os.stat(place)
    except OSError as error:
        if error.errno not in _LEADS_NOWHERE:
            raise
        return None, _broken_link(place)
    if stat.S_ISREG(state.st_mode):
        return state, ""
    return None, "" if stat.S_ISDIR(state.st_mode) else "neither a file nor a folder, but a pipe, socket or device"


def _broken_link(place: str) -> str:
    try:
        return f"a link to {printable(os.readlink(place))}, which does not exist"
    except OSError:  # it is no link, so the file was deleted meanwhile
        return ""


def find(place: str, path: str) -> Entry | None:
    """The `Entry` of a file, or None where no path can lead to one, since a part of it is missing, a file, or too long."""
    try:
        state = os.stat(place)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise
    return entry(path, state) if stat.S_ISREG(state.st_mode) else None


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
            _name(temporary, target)  # the commit: it fails if the name exists, so the first writer wins
        except FileExistsError:
            return False
    _sync_folder(target.parent)
    return True


def _name(temporary: Path, target: Path) -> None:
    """Give a written file its name in one step, unless the name exists: by a hard link, or a rename that replaces nothing.

    Not by `open("xb")`, which would show readers a part of the file. Raises FileExistsError, and OSError for a file system
    that has neither.
    """
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_to_free(temporary, target)


def _rename_to_free(temporary: Path, target: Path) -> None:
    rename: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # on Linux; Python has no function for it
    code = errno.ENOSYS
    if rename is not None:
        if rename(_CURRENT_FOLDER, os.fsencode(temporary), _CURRENT_FOLDER, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(target))
    raise OSError(
        errno.ENOTSUP,
        "its file system has neither hard links nor a rename that replaces no file, so two runs at once could overwrite each "
        "other's files. Use another disk or an object store.",
    )


def replace(root: Path, target: Path, data: bytes) -> None:
    """Write a file in one atomic step, whether or not it exists."""
    with _written_aside(root, target, data) as temporary:
        os.replace(temporary, target)
    _sync_folder(target.parent)


def now(root: Path) -> float:
    """Seconds since 1970 by the disk's clock, which for a network disk is another machine's: the time of a temporary file.

    This machine's time where nothing can be written below `root`.
    """
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def clear_temporary(root: Path, older_than_s: float) -> None:
    """Remove temporary files that killed writers left behind."""
    folder = root / TEMPORARY
    oldest = now(root) - older_than_s
    for file in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            state = file.lstat()
            if state.st_mtime < oldest and not stat.S_ISDIR(state.st_mode):
                file.unlink()


@contextlib.contextmanager
def _written_aside(root: Path, target: Path, data: bytes) -> Iterator[Path]:
    """A temporary file with these bytes, synced to the disk. It is removed afterwards, whether or not it was used."""
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
    """A file's `Entry`, from its state."""
    return Entry(path, state.st_size, str(state.st_mtime_ns), state.st_mtime)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # file systems that can sync files only
            raise
    finally:
        os.close(descriptor)
