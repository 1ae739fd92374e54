"""Accuracies against scikit-learn's own classifiers on the same vectors; splits and paired differences by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import ttest_rel
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from lora_embed.vectors.metrics import PROBE_C, knn_accuracy, paired_difference, probe, split_by_name

Floats, Classes = NDArray[np.float32], NDArray[np.int64]
Clusters = tuple[Floats, Classes]


def clusters(seed: int, rows: int, spread: float) -> Clusters:
    """Vectors (rows, 16) about six centres, one per class, on axes of very different scales."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(6), rng.integers(0, 6, rows - 6)])
    centres = np.random.default_rng(0).normal(size=(6, 16))
    vectors = (centres[labels] + spread * rng.normal(size=(rows, 16))) * np.geomspace(0.01, 100, 16) + 3
    return vectors.astype(np.float32), labels


def test_knn_accuracy_is_scikit_learns() -> None:
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(6, 16))
    labels, query_labels = rng.integers(0, 6, 400), rng.integers(0, 6, 1500)
    bank = (centres[labels] + 1.4 * rng.normal(size=(400, 16))).astype(np.float32)
    queries = (centres[query_labels] + 1.4 * rng.normal(size=(1500, 16))).astype(np.float32)

    def cosine(distances: np.ndarray) -> np.ndarray:
        return 1 - distances

    reference = KNeighborsClassifier(10, metric="cosine", algorithm="brute", weights=cosine).fit(bank, labels)
    expected = float((reference.predict(queries) == query_labels).mean())
    assert 0.4 < expected < 0.95
    assert knn_accuracy(bank, labels, queries, query_labels, k=10) == pytest.approx(expected, abs=1e-9)


def probe_accuracy(bank: Floats, labels: Classes, queries: Floats, query_labels: Classes) -> float:
    return float((probe(bank, labels, queries) == query_labels).mean())


def test_probe_separates_what_is_separable() -> None:
    assert probe_accuracy(*clusters(1, 200, 0.1), *clusters(2, 100, 0.1)) == 1.0


def test_probe_is_at_chance_on_shuffled_labels() -> None:
    (bank, labels), (queries, query_labels) = clusters(1, 600, 1.4), clusters(2, 2000, 1.4)
    rng = np.random.default_rng(3)
    found = [probe_accuracy(bank, rng.permutation(labels), queries, query_labels) for _ in range(10)]
    assert np.mean(found) == pytest.approx(1 / 6, abs=0.05)
    assert probe_accuracy(bank, labels, queries, query_labels) > 0.4


def test_probe_is_scikit_learns_on_features_standardised_by_the_bank() -> None:
    (bank, labels), (queries, query_labels) = clusters(1, 300, 1.4), clusters(2, 1000, 1.4)
    mean, deviation = bank.astype(np.float64).mean(axis=0), bank.astype(np.float64).std(axis=0)
    reference = LogisticRegression(C=PROBE_C, max_iter=1000).fit((bank - mean) / deviation, labels)
    expected = float((reference.predict((queries - mean) / deviation) == query_labels).mean())
    assert 0.4 < expected < 0.95
    assert probe_accuracy(bank, labels, queries, query_labels) == pytest.approx(expected, abs=1e-9)


def test_probe_gives_the_same_twice_and_does_not_mind_the_scale_of_features() -> None:
    (bank, labels), (queries, query_labels) = clusters(1, 300, 1.4), clusters(2, 1000, 1.4)
    found = probe_accuracy(bank, labels, queries, query_labels)
    assert probe_accuracy(bank, labels, queries, query_labels) == found
    assert probe_accuracy(bank * 1024, labels, queries * 1024, query_labels) == found


def test_probe_counts_a_class_that_the_bank_lacks_as_wrong() -> None:
    (bank, labels), (queries, query_labels) = clusters(1, 200, 0.1), clusters(2, 100, 0.1)
    known = labels != 5
    found = probe_accuracy(bank[known], labels[known], queries, query_labels)
    assert found == pytest.approx((query_labels != 5).mean())


def test_split_keeps_all_rows_of_a_name_together() -> None:
    names = [f"{number}" for number in range(90)] * 2
    bank = split_by_name(names, 2 / 3, seed=4)
    assert bank[:90].sum() == 60
    assert np.array_equal(bank[:90], bank[90:])


def test_split_depends_on_the_seed_and_on_nothing_else() -> None:
    names = [f"{number}" for number in range(90)]
    first = split_by_name(names, 2 / 3, seed=4)
    assert np.array_equal(first, split_by_name(names, 2 / 3, seed=4))
    assert np.array_equal(first[::-1], split_by_name(names[::-1], 2 / 3, seed=4))
    assert not np.array_equal(first, split_by_name(names, 2 / 3, seed=5))


def test_paired_difference_by_hand() -> None:
    found = paired_difference([0.72, 0.74, 0.73, 0.75], [0.70, 0.70, 0.70, 0.70], bank_share=2 / 3)
    assert found.mean == pytest.approx(0.035)
    assert found.deviation == pytest.approx((5e-4 / 3) ** 0.5)
    assert found.error == pytest.approx(found.deviation / 2)
    assert found.corrected_error == pytest.approx(found.deviation * (1 / 4 + 1 / 2) ** 0.5)
    assert found.verdict == "better"


def test_paired_difference_without_queries_in_the_correction_holds_as_the_t_test_does() -> None:
    rng = np.random.default_rng(6)
    for _ in range(40):
        figures, reference = rng.normal(0.02, 0.02, 5), rng.normal(0, 0.02, 5)
        expected = ttest_rel(figures, reference).pvalue < 0.05
        assert paired_difference(figures, reference, bank_share=1).holds == expected


@pytest.mark.parametrize(
    ("figures", "verdict", "holds"),
    [
        ([0.60, 0.61, 0.60, 0.61, 0.60], "worse", True),
        ([0.67, 0.68, 0.70, 0.66, 0.69], "worse", False),
        ([0.70, 0.72, 0.69, 0.71, 0.70], "within noise", False),
        ([0.70, 0.70, 0.70, 0.70, 0.70], "within noise", False),
    ],
)
def test_verdict(figures: list[float], verdict: str, holds: bool) -> None:
    found = paired_difference(figures, [0.7] * 5, bank_share=2 / 3)
    assert (found.verdict, found.holds) == (verdict, holds)


def test_one_split_is_refused() -> None:
    with pytest.raises(ValueError, match="1 splits do not show how much the figures vary"):
        paired_difference([0.7], [0.6], bank_share=2 / 3)
