"""Read what other code than Python writes to stderr, such as Ray's core, so that it does not break the live line.

Such code writes to file descriptor 2, which is a pipe meanwhile. If this process dies, a small shell that waits for that
writes the rest of the pipe to the real stderr, so that the cause of the death is seen.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TextIO

PIPE_BYTES = 2**20  # so that a burst does not wait for the thread that reads
LAST_LINES_S = 5.0  # how long the end waits for the last lines
KEEPER = "read -r line || exec cat <&{rest} >&{out}"  # a line comes when all is well; no line, if this process has died
# Messages that Ray's core writes in every run, although nothing is wrong.
HARMLESS = (
    # Ray Data starts its actors with arguments in the object store, and keeps them there until its Dataset has ended.
    "has constructor arguments in the object store and max_restarts > 0",
)


class Relay:
    """A context manager that reads file descriptor 2 while its block runs, and gives each line to `tell`.

    Python's own `sys.stderr` writes to the real stderr meanwhile. If it already writes elsewhere, nothing is changed.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._ours: TextIO | None = None

    def __enter__(self) -> "Relay":
        if not _is_descriptor_2(sys.stderr):
            return self
        self._before, self._ours = sys.stderr, _real_stderr()
        theirs, end = os.pipe()
        with contextlib.suppress(OSError, AttributeError):  # more than this user may have, or not on Linux
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._keeper = _start_keeper(theirs, self._ours.fileno())
        self._before.flush()
        os.dup2(end, 2)
        os.close(end)
        sys.stderr = self._ours
        self._thread = threading.Thread(target=self._read, args=(theirs,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours is None:
            return
        os.dup2(self._ours.fileno(), 2)  # the pipe's last end closes, unless a child process has it too
        self._thread.join(LAST_LINES_S)
        sys.stderr = self._before
        if self._keeper is not None:
            self._keeper.communicate(b"\n")
        self._ours.close()
        self._ours = None

    def _read(self, theirs: int) -> None:
        with os.fdopen(theirs, encoding="utf-8", errors="backslashreplace") as lines:
            for line in filter(None, map(str.rstrip, lines)):
                if not any(message in line for message in HARMLESS):
                    self._tell(line)


def _real_stderr() -> TextIO:
    return os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")


def _is_descriptor_2(file: TextIO | None) -> bool:
    try:
        return file is not None and file.fileno() == 2
    except (OSError, ValueError, AttributeError):
        return False


def _start_keeper(rest: int, out: int) -> "subprocess.Popen[bytes] | None":
    """Start the shell; in a session of its own, so that Ctrl-C on the terminal does not end it."""
    command = ["/bin/sh", "-c", KEEPER.format(rest=rest, out=out)]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(rest, out),
            start_new_session=True,
        )
    except OSError:
        return None
