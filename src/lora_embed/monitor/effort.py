"""Count what a run has done so far, over all its attempts, for its record, its state on storage and its metrics."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace

from lora_embed.monitor.record import EXAMPLES, RejectExample
from lora_embed.monitor.stages import Bound
from lora_embed.monitor.timeline import Timeline
from lora_embed.schema import ChunkHead, add_kinds


@dataclass
class Effort:
    """Counts that the driver updates for each finished chunk; the number of samples includes rejects.

    Other threads add retries with `add_retries`, and read with `now`, whose counts are all of the same moment.
    """

    shards: int = 0  # shards that this run embeds, finished ones included
    shards_done: int = 0
    shards_failed: int = 0  # in the current attempt
    chunks: int = 0
    rejects: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, list[RejectExample]] = field(default_factory=dict)  # a few rejects of each reason
    passed: dict[str, int] = field(default_factory=dict)  # images in tars that were passed over, by kind
    lacking: Counter[str] = field(default_factory=Counter)  # carried field → samples that do not have it in its type
    image_bytes: int = 0  # bytes of encoded images read
    taken: int = 0  # samples whose vectors were taken over from a version
    retries: int = 0  # requests to a store that were tried again
    bound: Bound | None = None
    timeline: Timeline = field(default_factory=Timeline)
    last_chunk: float | None = None  # when the last chunk was finished, seconds since 1970
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def samples(self) -> int:
        return self.timeline.now.samples

    @property
    def embedded(self) -> int:
        """Samples that were decoded, rejects included, without those whose vectors were taken over."""
        return self.samples - self.taken

    @property
    def vectors(self) -> int:
        return self.samples - self.rejects.total()

    @property
    def seconds(self) -> dict[str, float]:
        """The workers' seconds by stage."""
        return self.timeline.now.seconds

    @property
    def rounded_seconds(self) -> dict[str, float]:
        return {stage: round(spent, 3) for stage, spent in self.seconds.items()}

    @property
    def images_per_s(self) -> float:
        """The mean rate from the beginning to the last chunk."""
        last = self.timeline.now
        return round(last.samples / last.elapsed_s, 1) if last.samples else 0.0

    def begin(self, missing: int) -> None:
        """Start another attempt, which has that many shards to embed."""
        with self._lock:
            self.shards, self.shards_failed = self.shards_done + missing, 0

    def add(self, chunk: ChunkHead) -> None:
        """Count a finished chunk, or a shard that failed."""
        with self._lock:
            self.last_chunk = time.time()
            self.timeline.add(chunk.samples, chunk.seconds, chunk.ended)
            self.retries += chunk.retries
            if chunk.error:
                self.shards_failed += 1
                return
            self.chunks += 1
            self.rejects = self.rejects + Counter(chunk.reasons)  # a new object, since a copy from `now` shares the old one
            self.passed = add_kinds(self.passed, chunk.passed)
            self.lacking = self.lacking + Counter(chunk.lacking)
            self.examples = _joined(self.examples, chunk.examples)
            self.image_bytes += chunk.image_bytes
            self.taken += chunk.taken
            self.shards_done += chunk.last

    def add_retries(self, times: int) -> None:
        """Count requests that this process tried again itself."""
        with self._lock:
            self.retries += times

    def now(self) -> "Effort":
        """A copy of the counts as they are now; it does not change later."""
        with self._lock:
            return replace(self, timeline=self.timeline.copy())


def _joined(known: dict[str, list[RejectExample]], more: list[dict[str, str]]) -> dict[str, list[RejectExample]]:
    """Examples of rejects by reason with more of them, up to `EXAMPLES` of each reason."""
    joined = {reason: list(examples) for reason, examples in known.items()} if more else known
    for example in more:
        if len(of_reason := joined.setdefault(example["reason"], [])) < EXAMPLES:
            of_reason.append(RejectExample(**example))
    return joined
