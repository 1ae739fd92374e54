"""Images bent on purpose, many thousands: each is pixels or one reject with its reason, soon and in bounded memory.

python tests/images/test_hostile.py --seed 7 --count 50000     # prints what became of them, by format
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from bent_images import LIMIT_S, MAX_PIXELS, Findings, Watched, outcome_of, try_all
from image_files import FORMATS
from lora_embed.chain.chunks import decode_shard
from lora_embed.chain.items import WorkItem
from lora_embed.errors import ShardError
from lora_embed.images.decode import Decoded
from lora_embed.images.isolate import IsolatedDecoder
from mutants import mutants
from samples import PREPROCESSING, layout, parquet_of, png, samples_of, shard_at, tar_shard

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damage


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
