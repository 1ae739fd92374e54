"""The log of trials: what it holds is found again, whatever moment its writer was killed at."""

from pathlib import Path

import pytest

from lora_embed.errors import ConfigError
from lora_embed.tune.trials import Exam, TrialLog, Tried, alone_in

EXAM = Exam(data="abc", seed=0, splits=20)


def tried(recipe_id: str, exam: Exam = EXAM) -> Tried:
    return Tried(recipe_id=recipe_id, exam=exam, per_split={"kind": [0.1 + 0.2, 0.5]}, seconds=1.5)


def test_a_trial_is_found_by_recipe_and_exam_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    TrialLog(path).add(tried("one"))
    other = Exam(data="abc", seed=1, splits=20)
    log = TrialLog(path)
    assert log.find("one", EXAM) == tried("one")
    assert log.find("two", EXAM) is None
    assert log.find("one", other) is None
    log.add(tried("one", other))
    assert TrialLog(path).find("one", other) == tried("one", other)


def test_half_a_last_line_at_any_byte_costs_that_trial_alone(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    log = TrialLog(path)
    log.add(tried("one"))
    first = path.stat().st_size
    log.add(tried("two"))
    whole = path.read_bytes()
    for cut in (first, first + 1, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        again = TrialLog(path)
        assert again.find("one", EXAM) == tried("one")
        assert again.find("two", EXAM) is None
        again.add(tried("two"))
        assert path.read_bytes() == whole


def test_a_line_that_is_no_trial_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    TrialLog(path).add(tried("one"))
    path.write_bytes(path.read_bytes() + b'{"recipe_id": "two"}\n')
    with pytest.raises(ConfigError, match=r"line 2 is not a trial"):
        TrialLog(path)


def test_one_search_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "work"),
        pytest.raises(ConfigError, match="another search is using this folder"),
        alone_in(tmp_path / "work"),
    ):
        pass
    with alone_in(tmp_path / "work"):
        pass
