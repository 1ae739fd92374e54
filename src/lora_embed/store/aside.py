"""Write a local file or folder under a temporary name, and rename it when it is complete: readers never see a part of it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """A temporary path for a file. When the block succeeds, the file replaces `path` in one step."""
    aside = path.with_name(f".{path.name}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """An empty temporary folder. When the block succeeds, it becomes `path`; when it fails, all folders made are removed.

    `path` may be an empty folder already. Where it is another one, OSError is raised at the end.
    """
    new_folders = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as aside:
            folder = Path(aside) / path.name
            folder.mkdir()
            yield folder
            folder.rename(path)
    except BaseException:
        for parent in new_folders:
            with contextlib.suppress(OSError):  # another process has put files there since
                parent.rmdir()
        raise
