"""What `evaluate` prints: tables that fit a terminal, whose figures are never cut, and Markdown elsewhere."""

import re
import sys
from pathlib import Path

import pytest

from lora_embed.evaluate.show import print_evaluation, to_markdown
from short import slow_but
from terminal import run_on_terminal
from whole_evaluation import whole_evaluation

SCRIPT = """
from whole_evaluation import whole_evaluation
from lora_embed.evaluate.show import print_evaluation
print_evaluation(whole_evaluation(lambda name: CALLED % name))
"""
TESTS = str(Path(__file__).parents[1])


def shown_at(width: int, called: str = "%s") -> list[str]:
    script = f"import sys; sys.path.insert(0, {TESTS!r})" + SCRIPT.replace("CALLED", repr(called))
    shown = run_on_terminal([sys.executable, "-c", script], width=width, folder=Path.cwd())
    assert shown.code == 0, shown.last
    return shown.last


def figures_of(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d", text))


@pytest.mark.parametrize("width", slow_but([60, 80, 100, 120, 200], lambda width: width == 80))
def test_no_figure_is_cut_at_any_width(width: int) -> None:
    lines = shown_at(width)
    text = "".join(lines) if width < 80 else "\n".join(lines)
    for figure in whole_evaluation().figures:
        for value in (figure.mean, figure.low, figure.high):
            assert f"{100 * value:.1f}" in text
    assert figures_of("\n".join(lines)) >= figures_of(to_markdown(whole_evaluation())) or width < 80
    assert not [line for line in lines if line.startswith("|") or "---" in line or "…" in line]
    if width >= 80:
        assert {"candidate", "kNN", "probe", "recall@1", "recall@5", "mAP", "NMI"} <= set(text.split())


@pytest.mark.parametrize(
    ("width", "is_one_line"), slow_but([(80, False), (120, False), (150, True)], lambda case: case[0] == 150)
)
def test_columns_are_aligned_and_intervals_stand_where_there_is_room(width: int, is_one_line: bool) -> None:
    lines = shown_at(width)
    head = next(number for number, line in enumerate(lines) if re.match(r"candidate {2,}", line))
    rows = [line for line in lines[head + 1 :] if line][: 3 if is_one_line else 6]
    assert [row.split()[0] for row in rows if not row.startswith(" ")] == ["base", "halves", "ties"]
    halves = next(row for row in rows if row.startswith("halves"))
    assert ("73.1 [71.7, 74.5] ▲" in halves) == is_one_line
    if not is_one_line:
        ends = [[found.end() for found in re.finditer(r"\S+", line) if found.end() > 10] for line in rows]
        below = [set(row) for row in ends[1::2]]
        assert all(one == below[0] and len(one) == 6 for one in below)
        assert all(below[0] <= set(row) for row in ends[::2])


def test_names_are_folded_before_figures_and_cannot_steer_the_terminal() -> None:
    lines = shown_at(80, called="%s of a rather long name\x1b[2J\r")
    text = "\n".join(lines)
    assert "73.1" in text
    assert "71.7–74.5" in text
    assert "\\x1b" in text.replace("\n", "")
    assert max(len(line) for line in lines) <= 80


def test_elsewhere_it_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = whole_evaluation()
    print_evaluation(evaluation)
    printed = capsys.readouterr().out
    assert printed == to_markdown(evaluation) + "\n"
    assert "| candidate | kNN " in printed
