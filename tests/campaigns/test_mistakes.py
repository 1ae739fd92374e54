"""The short form of two campaigns: wrong jobs and recipes by seed, and the page of forty mistakes; `make mistakes` has all."""

import re
from pathlib import Path

import pytest

from mistakes import BEGIN, END, FORTY, MOST_CPU_S, PAGE, READ_WEIGHTS
from refused import PAGE as REFUSALS
from test_errors import PAGE as ERRORS
from user_errors import masked
from wrong_files import Place, judge, make_place, run_all

ROW = re.compile(r"^\| ([^|]+) \| `([^|]+)` \| (`[^|]+`) \| (\d) \| ([\d.]+) \|$", re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.chdir(tmp_path)
    return make_place(tmp_path)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(80)),
        pytest.param(range(80, 500), marks=pytest.mark.slow),
        pytest.param(range(500, 2000), marks=pytest.mark.long),
    ],
    ids=["first", "more", "all"],
)
def test_a_wrong_job_or_recipe_ends_in_one_message(place: Place, numbers: range) -> None:
    found = run_all(place, 1, numbers)
    assert not found.failures, "\n".join(found.failures)
    assert found.outcomes["refused"] > len(numbers) // 2
    assert found.outcomes["planned"] > 0, "some changes are harmless"


@pytest.mark.parametrize(
    ("code", "said", "problem"),
    [
        (0, "", ""),
        (2, "error: job.yaml: chunk_size is 0, expected at least 1\n", ""),
        (2, "error: job.yaml: unknown key 'a'. Known keys: b.\n  job.yaml: c is 1, expected text\n", ""),
        (2, "", "0 messages, expected one"),
        (2, "error: job.yaml: one thing is wrong\nerror: job.yaml: another thing\n", "2 messages, expected one"),
        (1, "error: job.yaml: something is wrong with it\n", "exit code 1"),
        (0, "error: job.yaml: something is wrong with it\n", "an error, but exit code 0"),
        (
            2,
            "warning of a library\nerror: job.yaml: something is wrong with it\n",
            "said before the message: warning of a library",
        ),
        (2, "Traceback (most recent call last):\n  File\nerror: x\n", "a traceback"),
        (2, "error: job.yaml: wrong\n", "a message that says nothing"),
    ],
)
def test_what_breaks_the_promise_is_seen(code: int, said: str, problem: str) -> None:
    assert judge(code, said) == problem


def test_the_page_has_forty_mistakes_with_todays_messages_within_the_time() -> None:
    """Else run `make mistakes`."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0])
    assert [what for what, *_ in rows] == list(FORTY)
    assert len(FORTY) == len(set(FORTY)) == 40
    codes = {case.what: case.code for page in (ERRORS, REFUSALS) for case in page.cases}
    listed = ERRORS.rows() | REFUSALS.rows()
    for what, command, message, code, cpu_s in rows:
        assert command.startswith("lora-embed ")
        assert masked(message) == masked(listed[what][0]), f"{what}: docs/errors.md or docs/refusals.md has another message"
        assert int(code) == codes[what]
        assert float(cpu_s) <= MOST_CPU_S or what in READ_WEIGHTS
