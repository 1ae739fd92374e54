"""Do something every few seconds while a run is live, even when the run itself waits."""

import threading
from collections.abc import Callable
from types import TracebackType

EVERY_S = 10.0
LAST_BEAT_S = 15.0  # how long the end waits for a beat that is under way
DEAD_AFTER_S = 90.0  # a run seems dead after this time without a beat: several beats failed, or its process is gone


class Heartbeat:
    """A context manager that calls `beat` at once and then every few seconds, but never after its block has ended."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(LAST_BEAT_S)  # so that no late beat is written after the end; a beat that hangs is given up

    def _run(self) -> None:
        self._beat()
        while not self._ended.wait(EVERY_S):
            self._beat()
