"""Files and folders on a disk that are there only once they are whole: made beside their place, then moved to it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """Where to write a file, which takes its place in one step when the block went well, whether or not one is there."""
    aside = path.with_name(f".{path.name}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """An empty folder that takes its place when the block went well, and is gone when not, with those made to hold it.

    An empty folder may be there already; for another one, OSError is raised at the end.
    """
    made = [above for above in path.parents if not above.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as aside:
            folder = Path(aside) / path.name
            folder.mkdir()
            yield folder
            folder.rename(path)
    except BaseException:
        for above in made:
            with contextlib.suppress(OSError):  # somebody else's files are in it by now
                above.rmdir()
        raise
