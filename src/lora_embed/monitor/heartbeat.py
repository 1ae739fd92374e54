"""Does something every few seconds for as long as a run lives, whatever the run itself waits for."""

import threading
from collections.abc import Callable
from types import TracebackType

EVERY_S = 10.0
LAST_BEAT_S = 15.0  # for a beat that is under way at the end
DEAD_AFTER_S = 90.0  # without a beat a run seems dead: several have failed, or nobody is left to beat


class Heartbeat:
    """A context manager; the first beat comes at once, and none after the block."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(LAST_BEAT_S)  # else a late beat could be written after the end; one that hangs holds no run

    def _run(self) -> None:
        self._beat()
        while not self._ended.wait(EVERY_S):
            self._beat()
