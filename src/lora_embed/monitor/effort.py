"""What a run has done so far, over all its tries: what its record, its state on storage and its metrics tell."""

import copy
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace

from lora_embed.monitor.stages import Bound, Timeline
from lora_embed.schema import ChunkHead


@dataclass
class Effort:
    """Counted by the driver as chunks come in; samples, which the timeline counts, include rejects.

    Other threads add what they count by `add_retries`, and read by `now`: its counts are all of one moment.
    """

    shards: int = 0  # to embed, those of this run that are done included
    shards_done: int = 0
    shards_failed: int = 0  # in the present try
    chunks: int = 0
    rejects: Counter[str] = field(default_factory=Counter)  # by reason
    image_bytes: int = 0  # of the images' files, as they were read
    retries: int = 0  # of requests to a store, by those who read and write chunks
    bound: Bound | None = None
    timeline: Timeline = field(default_factory=Timeline)
    last_chunk: float | None = None  # when it came in, seconds since 1970
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def samples(self) -> int:
        return self.timeline.now.samples

    @property
    def vectors(self) -> int:
        return self.samples - self.rejects.total()

    @property
    def seconds(self) -> dict[str, float]:
        """Of the workers, by stage."""
        return self.timeline.now.seconds

    @property
    def rounded_seconds(self) -> dict[str, float]:
        return {stage: round(spent, 3) for stage, spent in self.seconds.items()}

    @property
    def images_per_s(self) -> float:
        """From the beginning to the last chunk."""
        last = self.timeline.now
        return round(last.samples / last.elapsed_s, 1) if last.samples else 0.0

    def begin(self, missing: int) -> None:
        """Another try, at that many shards."""
        with self._lock:
            self.shards, self.shards_failed = self.shards_done + missing, 0

    def add(self, chunk: ChunkHead) -> None:
        """A chunk, or a shard that cannot go on."""
        with self._lock:
            self.last_chunk = time.time()
            self.timeline.add(chunk.samples, chunk.seconds)
            self.retries += chunk.retries
            if chunk.error:
                self.shards_failed += 1
                return
            self.chunks += 1
            self.rejects = self.rejects + Counter(chunk.reasons)  # anew: what `now` returned shares the old one
            self.image_bytes += chunk.image_bytes
            self.shards_done += chunk.last

    def add_retries(self, times: int) -> None:
        """Requests that this process tried again itself."""
        with self._lock:
            self.retries += times

    def now(self) -> "Effort":
        """A copy that does not change any more."""
        with self._lock:
            return replace(self, timeline=copy.copy(self.timeline))
