"""Decode images that somebody bent on purpose, in a child: what became of each, how long it took, how much memory it took."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from lora_embed.images.decode import BadImage, Decoded
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.schema import REASONS
from mutants import Mutant
from samples import PREPROCESSING, png

LIMIT_S = 5.0  # for one image
MAX_PIXELS = 1_000_000
BYTES_PER_PIXEL, MOST_BYTES = 40, 128 * 2**20  # that one image may take: by its area, and what its metadata unpack to


@dataclass
class Findings:
    """What became of mutants: outcomes by format, the slowest and the hungriest one, and what must not be."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    hungriest: tuple[int, str] = (0, "")
    failures: list[str] = field(default_factory=list)

    def describe(self) -> str:
        columns = ["pixels", *sorted({outcome for _, outcome in self.outcomes} - {"pixels"})]
        lines = [f"| format | {' | '.join(columns)} |"]
        for name in sorted({name for name, _ in self.outcomes}):
            lines.append(f"| {name} | {' | '.join(str(self.outcomes[name, column]) for column in columns)} |")
        lines.append(f"slowest: {self.slowest[0]:.2f} s, {self.slowest[1]}")
        lines.append(f"most memory: {self.hungriest[0] / 2**20:.0f} MiB, {self.hungriest[1]}")
        return "\n".join([*lines, *self.failures])


class Watched:
    """A decoder's child, and the most memory that an image took there, which the kernel counts."""

    def __init__(self, decode: IsolatedDecoder, max_pixels: int) -> None:
        self._decode, self._max_pixels = decode, max_pixels
        self.peak = 0
        self._find()

    def __call__(self, data: bytes) -> Decoded | BadImage:
        if not psutil.pid_exists(self._pid):
            self._find()
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # the peak is what it has now
        before = self._most()
        try:
            answer: Decoded | BadImage = self._decode(data, PREPROCESSING, self._max_pixels)
        except BadImage as bad:
            answer = bad
        self.peak = self._most() - before
        return answer

    def _find(self) -> None:
        self._decode(png(), PREPROCESSING)
        (self._pid,) = (one.pid for one in psutil.Process().children() if "lora_embed.images.isolate" in one.cmdline())

    def _most(self) -> int:
        """Bytes; 0 of a process that is gone."""
        try:
            status = Path(f"/proc/{self._pid}/status").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def outcome_of(answer: Decoded | BadImage, max_pixels: int = MAX_PIXELS) -> str:
    """`pixels`, or the reason. Raises AssertionError for an answer that is neither one proper image nor one proper reject."""
    if isinstance(answer, Decoded):
        assert answer.pixels.shape == PREPROCESSING.shape
        assert answer.pixels.dtype == np.uint8
        assert 0 < answer.width * answer.height <= max_pixels
        return "pixels"
    assert answer.reason in REASONS
    detail = str(answer)
    assert len(detail.encode()) < 400  # encoded: no halves of surrogate pairs, which Arrow refuses
    assert "0x" not in detail  # an address would make the part of each run another
    return answer.reason


def try_all(images: Iterable[Mutant], max_pixels: int = MAX_PIXELS) -> Findings:
    """Decode them in a child process, as it is done after a crash: what kills it, hangs, or takes too much is a failure."""
    found = Findings()
    most = MOST_BYTES + BYTES_PER_PIXEL * max_pixels
    with IsolatedDecoder(timeout_s=LIMIT_S) as decode:
        watched = Watched(decode, max_pixels)
        for number, image in enumerate(images):
            name = f"number {number}, {image.format} of {len(image.data)} bytes by {image.made}"
            started = time.monotonic()
            answer = watched(image.data)
            seconds = time.monotonic() - started
            outcome = outcome_of(answer, max_pixels)
            found.outcomes[image.format, outcome] += 1
            found.slowest = max(found.slowest, (seconds, name))
            found.hungriest = max(found.hungriest, (watched.peak, name))
            if outcome == "decoder_crashed" or watched.peak > most:
                found.failures.append(f"{name}: {answer!r}, {seconds:.1f} s, {watched.peak / 2**20:.0f} MiB")
    return found
