"""The digits of the third real task: all there, upright, split, and written as repeatable shards."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_embed.demo.digits import TRAIN_PER_DIGIT, Digit, fetch_digits, write_digit_shards
from lora_embed.model.adapter import read_adapter
from lora_embed.model.match import Target, match_adapter


@pytest.fixture(scope="module")
def digits(demo_cache: Path) -> list[Digit]:
    return fetch_digits(demo_cache, print)


def test_five_hundred_of_each_digit_in_two_splits(digits: list[Digit]) -> None:
    assert Counter(digit.digit for digit in digits) == dict.fromkeys(range(10), 500)
    assert Counter(digit.digit for digit in digits if digit.split == "train") == dict.fromkeys(range(10), TRAIN_PER_DIGIT)
    assert len({digit.key for digit in digits}) == 5000


def test_a_picture_is_its_digit(digits: list[Digit]) -> None:
    """A one has its ink in a narrow middle, a zero a hole there: labels and pictures belong together."""
    means = {
        number: np.mean([np.asarray(Image.open(d.path))[..., 0] for d in digits if d.digit == number][:100], axis=0)
        for number in (0, 1)
    }
    assert means[0].shape == (64, 64)
    assert means[1][28:36, 28:36].mean() > 3 * means[0][28:36, 28:36].mean()
    assert means[0][:4].max() == 0


def test_shards_hold_every_digit_and_repeat_byte_for_byte(digits: list[Digit], tmp_path: Path) -> None:
    some = digits[::500]
    paths = write_digit_shards(some, tmp_path / "one", per_shard=4)
    again = write_digit_shards(some, tmp_path / "two", per_shard=4)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    found = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                stream = tar.extractfile(name)
                assert stream is not None
                found[name] = stream.read()
    assert len(found) == 2 * len(some)
    for digit in some:
        assert json.loads(found[f"{digit.key}.json"]) == {"digit": digit.digit}
        assert found[f"{digit.key}.png"] == digit.path.read_bytes()


def test_the_committed_adapter_fits_the_base(target: Target, real_adapters: dict[str, Path]) -> None:
    adapter = match_adapter(read_adapter(str(real_adapters["category10"].with_name("digits10"))), target)
    assert len(adapter.changes) == 48
