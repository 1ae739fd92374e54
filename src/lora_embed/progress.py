"""What a running job shows: one live line on a terminal, a log line every ten seconds elsewhere; always on stderr."""

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lora_embed.schema import ChunkStats, Shard
from lora_embed.stages import Bound, Timeline, Workers, add_seconds, find_bound

LOG_EVERY_S = 10.0


def say(message: str) -> None:
    """One line for a person, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


class Progress:
    """Counts what the chain reports; a context manager that shows the counts while it is open."""

    def __init__(
        self, shards: list[Shard], workers: Workers, console: Console | None = None, timeline: Timeline | None = None
    ) -> None:
        self._workers = workers
        self._timeline = timeline or Timeline()
        self.seconds: dict[str, float] = {}  # by stage, summed over the workers
        self._sizes = {shard.id: shard.size for shard in shards}
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._first: float | None = None
        self._ended = threading.Event()
        self.samples = self.vectors = self.rejects = self.shards_done = self.shards_failed = 0
        self._bytes_done = 0
        self._live = Live(get_renderable=self._text, console=self._console, refresh_per_second=4, transient=True)
        self._logger = threading.Thread(target=self._log, daemon=True)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        else:
            self._logger.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._logger.join()
        self._console.print(self.line())
        if self.seconds:
            self._console.print(self.bound().says)

    def add(self, stats: ChunkStats) -> None:
        """Count one row of the chain's end."""
        self._first = self._first or time.monotonic() - sum(stats.seconds.values())  # when the first worker began
        add_seconds(self.seconds, stats.seconds)
        self._timeline.add(stats.samples, stats.seconds)
        if stats.error:
            self.shards_failed += 1
            return
        self.samples += stats.samples
        self.vectors += stats.vectors
        self.rejects += stats.rejects
        if stats.last:
            self.shards_done += 1
            self._bytes_done += self._sizes.get(stats.shard_id, 0)

    def bound(self) -> Bound:
        """What bounds the run, from when its first worker began."""
        began = self._first or time.monotonic()
        return find_bound(self.seconds, time.monotonic() - began, self._workers)

    def line(self) -> str:
        """Samples, images/s, shards, rejects and the time left, as one line."""
        elapsed = time.monotonic() - self._started
        failed = f", {self.shards_failed} failed" if self.shards_failed else ""
        return (
            f"{self.samples:,} samples · {self.samples / max(elapsed, 1e-9):,.1f} images/s · "
            f"{self.shards_done}/{len(self._sizes)} shards{failed} · {self.rejects:,} rejects · "
            f"{_span(elapsed)} elapsed{self._time_left(elapsed)}{f' · bound by {self.bound().by}' if self.seconds else ''}"
        )

    def _time_left(self, elapsed: float) -> str:
        total = sum(self._sizes.values())
        if not self._bytes_done or self._bytes_done >= total:
            return ""
        return f" · about {_span(elapsed * (total - self._bytes_done) / self._bytes_done)} left"

    def _text(self) -> Text:
        return Text(self.line() if self._first else f"starting … {_span(time.monotonic() - self._started)}")

    def _log(self) -> None:
        while not self._ended.wait(LOG_EVERY_S):
            self._console.print(f"{time.strftime('%H:%M:%S')} {self.line()}")


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
