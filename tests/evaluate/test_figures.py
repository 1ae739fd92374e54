"""Figures, intervals and changes: by hand, against scipy and against scikit-learn."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from lora_embed.chain.actors import VectorChunk
from lora_embed.errors import ConfigError
from lora_embed.evaluate.collect import samples_table
from lora_embed.evaluate.figures import (
    Labelled,
    Scored,
    check_sides,
    class_changes,
    classes_of,
    differences_of,
    figures_of,
    head_order,
    own_split,
    query_changes,
    retention_of,
    score,
    seeded_splits,
    verdict_of,
)
from lora_embed.evaluate.page.relations import KINDS
from lora_embed.evaluate.records import METRICS, RelationKind
from lora_embed.evaluate.show import TITLES
from lora_embed.evaluate.verdict import METRIC_NAMES
from lora_embed.model import relate
from lora_embed.schema import ChunkHead
from lora_embed.vectors.metrics import cluster_nmi, knn_accuracy, mean_interval, probe, score_interval
from lora_embed.vectors.rank import rank
from lora_embed.vectors.rows import unit

RNG = np.random.default_rng(7)
LABELS = np.concatenate([np.arange(5), RNG.integers(0, 5, 235)])
CENTRES = RNG.normal(size=(5, 12))
GOOD = (CENTRES[LABELS] + 0.9 * RNG.normal(size=(240, 12))).astype(np.float32)
POOR = (CENTRES[LABELS] + 3.0 * RNG.normal(size=(240, 12))).astype(np.float32)
IDS = tuple(f"a.tar/{number:03d}" for number in range(240))


def labelled(**changes: Any) -> Labelled:
    partly = np.where(np.arange(240) < 200, LABELS % 2, -1)
    fields: dict[str, Any] = {
        "ids": IDS, "classes": {"kind": tuple("abcde"), "odd": ("no", "yes")}, "labels": {"kind": LABELS, "odd": partly},
        "groups": np.arange(240) // 2, "banks": seeded_splits([str(number // 2) for number in range(240)], 4, seed=3),
    }  # fmt: skip
    return Labelled(**fields | changes)


def test_every_metric_and_every_relation_has_its_titles() -> None:
    assert list(TITLES) == list(METRIC_NAMES) == list(METRICS)
    assert get_args(RelationKind) == tuple(KINDS) == (*relate.KINDS, "cka")


def test_a_new_column_of_chunks_does_not_become_a_field_to_evaluate() -> None:
    columns = {name: ["x"] for name in ("key", "label", "new", "reason")}
    head, samples = ChunkHead(shard_id="1", shard_name="a", prefix="a"), pa.RecordBatch.from_pydict(columns)
    chunk = VectorChunk(head=head, samples=samples, vectors=GOOD, classes=LABELS)
    assert samples_table([chunk], (("label", "string"),)).to_pylist() == [{"id": "a/x", "label": "x", "reason": "x"}]


def test_seeds_draw_other_splits_of_whole_groups() -> None:
    names = [str(number // 2) for number in range(240)]
    drawn = [tuple(bank.tolist()) for seed in range(3) for bank in seeded_splits(names, 5, seed)]
    assert len(set(drawn)) == 15
    assert all(bank[::2] == bank[1::2] and sum(bank) == 160 for bank in drawn)


@pytest.fixture(scope="module")
def scored() -> dict[str, dict[str, Scored]]:
    return {"good": score(labelled(), GOOD), "poor": score(labelled(), POOR)}


def test_nmi_is_scikit_learns_of_k_means_on_unit_vectors() -> None:
    clusters = KMeans(5, n_init=4, random_state=0).fit_predict(unit(POOR))
    expected = normalized_mutual_info_score(LABELS, clusters)
    assert 0.05 < expected < 0.9
    assert cluster_nmi(POOR, LABELS) == pytest.approx(expected, abs=1e-9)
    lengths = np.linspace(0.1, 10, len(POOR), dtype=np.float32)[:, None]
    assert cluster_nmi(POOR * lengths, LABELS) == pytest.approx(expected, abs=1e-6)


def test_figures_are_the_metrics_of_each_split(scored: dict[str, dict[str, Scored]]) -> None:
    found = {
        (one.task, one.metric): one
        for task in ("kind", "odd")
        for one in figures_of(labelled(), task, "good", scored["good"][task])
    }
    assert {metric for _, metric in found} == set(METRICS)
    for split in range(4):
        bank, queries = labelled().sides("odd", split)
        assert (queries < 200).all()
        assert not set(bank // 2) & set(queries // 2)
        labels = labelled().labels["odd"]
        asked = (GOOD[bank], labels[bank], GOOD[queries], labels[queries])
        nearest = labels[bank][rank(*asked).nearest]
        expected = {
            "knn": knn_accuracy(*asked),
            "probe": (probe(*asked[:3]) == asked[3]).mean(),
            "recall@1": float((nearest[:, 0] == labels[queries]).mean()),
            "recall@5": float((nearest[:, :5] == labels[queries][:, None]).any(axis=1).mean()),
            "map": float(rank(*asked).precision.mean()),
            "nmi": cluster_nmi(GOOD[queries], labels[queries]),
        }
        for metric, value in expected.items():
            assert found["odd", metric].per_split[split] == pytest.approx(value, abs=1e-9), metric


def test_an_interval_without_queries_in_the_correction_is_students() -> None:
    figures = list(RNG.normal(0.7, 0.02, 5))
    low, high = stats.t.interval(0.95, 4, loc=np.mean(figures), scale=stats.sem(figures))
    assert mean_interval(figures, bank_share=1) == pytest.approx((np.mean(figures), low, high))
    wider = mean_interval(figures, bank_share=2 / 3)
    assert wider[2] - wider[0] == pytest.approx((high - np.mean(figures)) * ((1 / 5 + 1 / 2) / (1 / 5)) ** 0.5)


def test_an_interval_over_queries_counts_groups_not_images() -> None:
    scores = RNG.integers(0, 2, 150).astype(np.float64)
    mean, low, high = score_interval(scores, np.arange(150))
    assert high - mean == pytest.approx(1.96 * stats.sem(scores))
    doubled = score_interval(np.repeat(scores, 2), np.repeat(np.arange(150), 2))
    assert doubled == pytest.approx((mean, low, high))


def test_an_interval_over_queries_covers_the_truth_as_often_as_it_says() -> None:
    draws = [score_interval((RNG.random(300) < 0.3).astype(np.float64), np.arange(300)) for _ in range(600)]
    assert np.mean([low <= 0.3 <= high for _, low, high in draws]) == pytest.approx(0.95, abs=0.03)


def test_differences_are_paired_and_say_which_is_better(scored: dict[str, dict[str, Scored]]) -> None:
    found = differences_of(labelled(), "kind", ("poor", "good"), scored["poor"]["kind"], scored["good"]["kind"])
    figures = {name: {one.metric: one for one in figures_of(labelled(), "kind", name, scored[name]["kind"])} for name in scored}
    for one in found:
        per_split = np.subtract(figures["poor"][one.metric].per_split, figures["good"][one.metric].per_split)
        assert (one.mean, one.low, one.high) == pytest.approx(mean_interval(list(per_split), 2 / 3))
    assert {one.verdict for one in found if one.metric in ("knn", "probe", "map")} == {"worse"}
    same = differences_of(labelled(), "kind", ("good", "good"), scored["good"]["kind"], scored["good"]["kind"])
    assert {(one.mean, one.verdict) for one in same} == {(0.0, "within noise")}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 0.2, "better"),
        (-0.2, -0.1, "worse"),
        (-0.1, 0.2, "within noise"),
        (-0.2, 0.1, "within noise"),
        (0.0, 0.1, "within noise"),
        (-0.1, 0.0, "within noise"),
    ],
)
def test_an_interval_that_holds_zero_is_noise(low: float, high: float, verdict: str) -> None:
    assert verdict_of(low, high) == verdict


def test_ones_own_split_has_intervals_over_its_queries() -> None:
    sides = ["train" if number // 2 % 3 else "val" for number in range(240)]
    own = replace(labelled(), banks=own_split(sides, "side"), bank_share=None)
    scored = score(own, POOR)["kind"]
    figures = {one.metric: one for one in figures_of(own, "kind", "poor", scored)}
    right = scored.scores["knn"][0]
    assert len(right) == 80
    mean, low, high = score_interval(right, np.repeat(np.arange(40), 2))
    assert (figures["knn"].mean, figures["knn"].low, figures["knn"].high) == pytest.approx((mean, low, min(high, 1.0)))
    assert (figures["nmi"].low, figures["nmi"].high) == (0, 1)


def test_class_changes_count_all_queries_of_all_splits(scored: dict[str, dict[str, Scored]]) -> None:
    found = class_changes(labelled(), "kind", ("poor", "good"), scored["poor"]["kind"], scored["good"]["kind"])
    assert [one.label for one in found] == list("abcde")
    assert sum(one.images for one in found) == 240
    per_class = np.zeros(5)
    queries = [labelled().sides("kind", split)[1] for split in range(4)]
    for rows, predicted in zip(queries, scored["poor"]["kind"].predicted, strict=True):
        np.add.at(per_class, LABELS[rows[predicted == LABELS[rows]]], 1)
    counts = np.bincount(np.concatenate([LABELS[rows] for rows in queries]))
    assert [one.after for one in found] == pytest.approx(list(per_class / counts))


def test_most_changed_queries_come_first(scored: dict[str, dict[str, Scored]]) -> None:
    found = query_changes(labelled(), "kind", ("poor", "good"), scored["poor"]["kind"], scored["good"]["kind"])
    assert len(found) == 12
    overlaps = [len({one.id for one in query.before} & {one.id for one in query.after}) for query in found]
    assert overlaps == sorted(overlaps)
    bank, queries = labelled().sides("kind", 0)
    for query in found:
        row = IDS.index(query.id)
        assert row in queries
        cosines = (unit(POOR)[bank] @ unit(POOR)[row]).tolist()
        assert query.after[0].id == IDS[bank[int(np.argmax(cosines))]]
        assert query.after[0].cosine == pytest.approx(max(cosines), abs=1e-4)
        assert query.label == "abcde"[LABELS[row]]
    assert not query_changes(labelled(), "kind", ("good", "good"), scored["good"]["kind"], scored["good"]["kind"])


def test_retention_is_paired_by_image() -> None:
    own = np.where(np.arange(240) % 4, LABELS, (LABELS + 1) % 5).astype(np.int32)
    kept = np.where(np.arange(240) % 3, LABELS, (LABELS + 2) % 5).astype(np.int32)
    found = retention_of(labelled(), ("kind", "five", "half"), list("abcde"), own, kept)
    assert (found.own, found.kept, found.images) == pytest.approx((0.75, 2 / 3, 240))
    difference = (np.arange(240) % 3 > 0).astype(float) - (np.arange(240) % 4 > 0)
    assert (found.low, found.high) == pytest.approx(score_interval(difference, np.arange(240) // 2)[1:])
    turned = retention_of(labelled(), ("kind", "five", "half"), list("edcba"), (4 - own).astype(np.int32), own)
    assert (turned.own, turned.kept < 0.5) == (0.75, True)


def test_classes_sort_as_numbers_where_they_are() -> None:
    names, labels = classes_of(["10", "9", None, "9"])
    assert (names, labels.tolist()) == (("9", "10"), [1, 0, -1, 0])
    assert classes_of(["b", "10", "a"])[0] == ("10", "a", "b")


def test_the_order_of_a_heads_outputs() -> None:
    assert head_order(("0", "2", "3"), 4, None) == ["0", "1", "2", "3"]
    assert head_order(("0", "1"), 4, None) is None
    assert head_order(("cat", "dog"), 2, None) == ["cat", "dog"]
    assert head_order(("cat", "dog"), 3, ["dog", "owl", "cat"]) == ["dog", "owl", "cat"]
    assert head_order(("cat", "dog"), 3, ["dog", "owl", "bat"]) is None


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (np.zeros(240, int), ("a",), "all of class 'a'; expected two classes or more"),
        (np.full(240, -1), (), "none of them labelled"),
        (np.where(np.arange(240) < 2, np.arange(240), -1), ("a", "b"), "expected two classes or more and one query or more"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(labels: Any, classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--label kind: .*{message}"):
        check_sides(labelled(labels={"kind": labels}, classes={"kind": classes}))


def test_an_unknown_side_is_named() -> None:
    with pytest.raises(ConfigError, match="--split side: holds 'holdout', expected bank or train"):
        own_split(["train", "holdout"], "side")
