"""Images bent on purpose, many thousands: each is pixels or one reject with its reason, soon and in bounded memory.

python tests/images/test_hostile.py --seed 7 --count 50000     # prints what became of them, by format
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest

from image_files import FORMATS
from lora_embed.chain.chunks import decode_shard
from lora_embed.chain.items import WorkItem
from lora_embed.errors import ShardError
from lora_embed.images.decode import BadImage, Decoded
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.schema import REASONS
from mutants import Mutant, mutants
from samples import PREPROCESSING, layout, parquet_of, png, samples_of, shard_at, tar_shard

LIMIT_S = 5.0  # for one image
MAX_PIXELS = 1_000_000
BYTES_PER_PIXEL, MOST_BYTES = 40, 128 * 2**20  # that one image may take: by its area, and what its metadata unpack to

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damage


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


def assert_sound(found: Findings, count: int) -> None:
    print(f"\n{found.describe()}")
    assert not found.failures
    assert sum(found.outcomes.values()) == count
    for name in FORMATS:  # mutants that are all refused at the door would test nothing behind it
        assert found.outcomes[name, "pixels"] > count / len(FORMATS) / 20
        assert found.outcomes[name, "corrupt_image"] > count / len(FORMATS) / 20


def test_mutants_are_pixels_or_one_reject() -> None:
    assert_sound(try_all(mutants(0, 1500)), 1500)


@pytest.mark.long
def test_many_mutants_are_pixels_or_one_reject() -> None:
    assert_sound(try_all(mutants(1, 12_000)), 12_000)


def test_mutants_in_a_shard_are_one_row_each(tmp_path: Path) -> None:
    """Through the chain, in this process; the same outcomes as in a child, row by row, and the same bytes twice."""
    images = list(mutants(2, 120))
    shard = tar_shard(tmp_path, [(f"{number:04d}.jpg", image.data) for number, image in enumerate(images)])
    (one,), (two,) = (list(decode_shard(WorkItem(shard=shard), layout(chunk_size=120), PREPROCESSING, {})) for _ in range(2))
    assert one.samples.equals(two.samples)
    np.testing.assert_array_equal(one.pixels, two.pixels)
    rows = one.samples.to_pylist()
    assert [row["key"] for row in rows] == [f"{number:04d}" for number in range(120)]
    with IsolatedDecoder(timeout_s=LIMIT_S) as decode:
        watched = Watched(decode, MAX_PIXELS)
        apart = [watched(image.data) for image in images]
    assert [row["reason"] or "pixels" for row in rows] == [outcome_of(answer) for answer in apart]
    np.testing.assert_array_equal(one.pixels, [answer.pixels for answer in apart if isinstance(answer, Decoded)])


def test_mutants_of_parquet_are_rows_or_an_error_that_says_so(tmp_path: Path) -> None:
    """Its footer above all, which says where everything is."""
    rng = random.Random(5)
    whole = parquet_of({"image": [png(seed) for seed in range(6)], "key": list("abcdef"), "label": list(range(6))})
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    read = refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data[-rng.randrange(8, footer) if rng.random() < 0.7 else rng.randrange(len(data))] = rng.randrange(256)
        try:
            samples_of(shard_at(tmp_path / "a.parquet", bytes(data)), carry=(("label", "int64"),))
            read += 1
        except ShardError:
            refused += 1
    assert read > 50
    assert refused > 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS)
    options = parser.parse_args()
    found = try_all(mutants(options.seed, options.count), options.max_pixels)
    print(found.describe())
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
