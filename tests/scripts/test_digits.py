"""The digits of the third real task: all there, upright and split."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from digits import TRAIN_PER_DIGIT, Digit, fetch_digits
from lora_embed.model.adapter import read_adapter
from lora_embed.model.match import match_adapter
from lora_embed.model.whole import Target


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


def test_the_committed_adapter_fits_the_base(target: Target, real_adapters: dict[str, Path]) -> None:
    adapter = match_adapter(read_adapter(str(real_adapters["category10"].with_name("digits10"))), target)
    assert len(adapter.changes) == 48
