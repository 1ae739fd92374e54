"""What an evaluation says in short: on the page, on a terminal and as Markdown the same, and nothing that is not known."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from evaluations import evaluation
from lora_embed.evaluate.figures import verdict_of
from lora_embed.evaluate.page.evaluation import evaluation_page
from lora_embed.evaluate.records import Candidate, Difference, Evaluation, Figure, Retention, Task
from lora_embed.evaluate.show import to_markdown
from lora_embed.evaluate.verdict import called, default_reference, in_short, own_adapters, pairs_of, singles_of, warnings_of
from pages import plain_text

MEANS = {"base": (0.50, 0.40), "half": (0.70, 0.41), "theme": (0.74, 0.42), "mood": (0.60, 0.39)}
TASKS = ("theme", "mood")  # as the adapters
HALF = 0.02  # of an interval


def candidate(name: str, weights: dict[str, float]) -> Candidate:
    return Candidate(
        name=name, method="weighted_sum" if weights else "none", weights=weights, options={}, recipe_id="0" * 12,
        space_id=f"{len(name):012x}", dimension=8, build_s=1.0, encoder_bytes=10, forward_s=1.0,
    )  # fmt: skip


CANDIDATES = (
    candidate("half", {"theme": 0.5, "mood": 0.5}),
    candidate("base", {}),
    candidate("theme", {"theme": 1.0}),
    candidate("mood", {"mood": 1.0}),
)


def judged(*candidates: Candidate, images: int = 300, half: float = HALF, reference: str = "base") -> Evaluation:
    """Two tasks that have the names of the two adapters; the merge is 20 points better than the base on one of them."""
    known = candidates or CANDIDATES
    figures, differences = [], []
    for place, task in enumerate(TASKS):
        for one in known:
            mean = MEANS[one.name][place]
            ends = {"low": mean - half, "high": mean + half}
            figures.append(Figure(task=task, metric="knn", candidate=one.name, per_split=(mean,) * 5, mean=mean, **ends))
        for name, other in pairs_of(known, reference):
            gap = MEANS[name][place] - MEANS[other][place]
            ends = {"low": gap - half, "high": gap + half}
            differences.append(
                Difference(
                    task=task, metric="knn", candidate=name, reference=other, mean=gap, verdict=verdict_of(**ends), **ends
                )
            )
    return replace(
        evaluation(), candidates=tuple(known), reference=reference, figures=tuple(figures), differences=tuple(differences),
        retention=(), classes=(), relations=(), queries=(), trials=(), thumbnails={},
        tasks=tuple(Task(name=task, label=task, classes=("a", "b"), images=images) for task in TASKS),
    )  # fmt: skip


def test_the_base_is_the_reference_if_it_is_a_candidate() -> None:
    assert default_reference(CANDIDATES) == "base"
    assert default_reference([CANDIDATES[0], CANDIDATES[2]]) == "half"
    assert pairs_of(CANDIDATES, "base") == [
        ("half", "base"), ("theme", "base"), ("mood", "base"), ("half", "theme"), ("half", "mood"),
    ]  # fmt: skip
    assert ("half", "base") in pairs_of(CANDIDATES, "half")
    again = candidate("best tried", {"theme": 1.0, "mood": 0.0})
    assert singles_of([*CANDIDATES, again]) == singles_of([again, *CANDIDATES]) == {"theme": "theme", "mood": "mood"}
    assert singles_of([again, candidate("half a mood", {"mood": 0.5})]) == {"theme": "best tried"}


def test_in_short_says_what_a_merge_gains_over_the_base_and_loses_to_each_adapter() -> None:
    (said,) = in_short(judged())
    assert str(said) == (
        "Merge half is better than the base on task theme by 20.0 points (18.0 to 22.0); it differs from the base on task "
        "mood only within noise (+1.0 points, −1.0 to +3.0). On task theme it loses 4.0 points (2.0 to 6.0) to adapter theme; "
        "on task mood it differs only within noise from adapter theme (−1.0 points, −3.0 to +1.0). Points are of kNN accuracy, "
        "with 95 % intervals."
    )


@pytest.mark.parametrize("show", [evaluation_page, to_markdown])
def test_page_terminal_and_markdown_say_the_same(show: Callable[[Evaluation], str]) -> None:
    text = plain_text(show(judged())).replace(" .", ".").replace(" ;", ";").replace(" ,", ",")
    for sentence in (*in_short(judged()), *warnings_of(judged(images=12))):
        assert str(sentence) in plain_text(show(judged(images=12))).replace(" .", ".").replace(" ;", ";").replace(" ,", ",")
    assert "Warning" not in text
    assert "In short" in text


def test_a_task_belongs_to_the_adapter_that_has_a_head_for_it() -> None:
    head = Retention(task="mood", adapter="mood", candidate="half", own=0.8, kept=0.7, low=-0.2, high=0.0, images=9)
    assert own_adapters(judged(), CANDIDATES[0]) == [("theme", "theme"), ("mood", "theme")]
    with_head = replace(judged(), retention=(head,))
    assert own_adapters(with_head, CANDIDATES[0]) == [("theme", "theme"), ("mood", "mood")]
    assert "on task mood it is better than adapter mood by 2.0" not in str(in_short(with_head)[0])
    assert "on task mood it differs only within noise from adapter mood (+2.0 points, +0.0 to +4.0)" in str(
        in_short(with_head)[0]
    )


def test_a_task_and_an_adapter_of_one_name_are_told_apart() -> None:
    text = plain_text(evaluation_page(judged()))
    assert "On task theme the best encoder is adapter theme , with 74.0 % kNN accuracy" in text
    assert [str(called(judged(), name)) for name in ("base", "half", "mood", "gone")] == [
        "the base", "merge half", "adapter mood", "gone",
    ]  # fmt: skip


def test_what_was_not_compared_is_not_claimed() -> None:
    (alone,) = in_short(judged(CANDIDATES[0], reference="half"))
    assert str(alone) == "Whether merge half beats the base is not known. Add the base and each adapter with --alone."
    (no_adapter,) = in_short(judged(*CANDIDATES[:2]))
    assert "What it loses to its adapters is not known" in str(no_adapter)
    (no_base,) = in_short(judged(CANDIDATES[0], *CANDIDATES[2:], reference="half"))
    assert str(no_base).startswith("Whether merge half beats the base is not known, since the base is no candidate. On task")
    assert in_short(judged(*CANDIDATES[1:])) == []


def test_an_interval_without_a_width_decides_nothing_and_has_a_warning() -> None:
    assert (verdict_of(0.1, 0.1), verdict_of(0.1, 0.2), verdict_of(-0.2, -0.1)) == ("within noise", "better", "worse")
    found = judged(images=10, half=0.0)
    (said,) = in_short(found)
    assert "differs from the base on task theme by a figure without an interval (+20.0 points)" in str(said)
    same = replace(found, differences=tuple(replace(gap, mean=0.0, low=0.0, high=0.0) for gap in found.differences))
    assert str(in_short(same)[0]).startswith("Merge half equals the base on task theme in each split; it equals the base on")
    assert "on task mood it equals adapter theme in each split" in str(in_short(same)[0])
    assert "= no difference" in evaluation_page(same)
    warned = [str(warning) for warning in warnings_of(found)]
    assert warned[0] == (
        "On task theme a split has about 3 queries, fewer than 30: one image changes a figure by 33 points. Label more images "
        "before you decide by these figures."
    )
    assert warned[1].startswith("On task theme, 4 of 4 figures have no interval, because all splits or queries gave the same")
    page, markdown = evaluation_page(found), to_markdown(found)
    assert "70.0 to 70.0" not in page
    assert "no interval" in page
    assert "▲ better" not in page
    assert "| half      | 70.0 [no interval] " in markdown
    assert "▲" not in markdown.partition("Percent")[0]
    assert warnings_of(judged(images=300)) == []


def test_names_with_braces_are_names() -> None:
    found = judged(replace(CANDIDATES[0], weights={"{}": 0.5, "{0}": 0.5}), CANDIDATES[1])
    braced = replace(found, tasks=tuple(replace(task, name="{x}") for task in found.tasks[:1]))
    braced = replace(
        braced,
        figures=tuple(replace(figure, task="{x}", metric="{m}") for figure in found.figures if figure.task == "theme"),
        differences=tuple(replace(gap, task="{x}", metric="{m}") for gap in found.differences if gap.task == "theme"),
    )
    (said,) = in_short(braced)
    assert str(said).startswith("Merge half is better than the base on task {x} by 20.0 points")
    assert "Points are of {m}, with" in str(said)


@pytest.mark.parametrize("is_first", [False, True])
def test_a_difference_to_another_than_the_reference_is_no_verdict_of_a_table(*, is_first: bool) -> None:
    found = judged()
    worse = [gap for gap in found.differences if gap.verdict == "worse" and gap.candidate == "half"]
    assert {gap.reference for gap in worse} == {"theme"}
    others = [gap for gap in found.differences if gap not in worse]
    found = replace(found, differences=tuple([*worse, *others] if is_first else [*others, *worse]))
    means = found.to_arrow().filter(found.to_arrow().column("split").is_null()).to_pylist()
    half = next(row for row in means if (row["task"], row["candidate"]) == ("theme", "half"))
    assert half["difference"] == pytest.approx(0.2)
    assert "70.0 [68.0, 72.0] ▲" in to_markdown(found)
    assert "70.0 68.0 to 72.0 +20.0 +18.0 to +22.0 ▲ better" in plain_text(evaluation_page(found))
