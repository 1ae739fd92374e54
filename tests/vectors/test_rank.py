"""Ranking against independent references on the same vectors: FAISS for neighbours, scikit-learn for average precision."""

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from lora_embed.vectors import rank as ranking
from lora_embed.vectors.rank import Ranked, cosine_blocks, nearest, rank, vote
from lora_embed.vectors.rows import unit

CLASSES = 6


def labelled(rows: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Vectors (rows, 16) of lengths that differ, about six centres that overlap."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    centres = np.random.default_rng(0).normal(size=(CLASSES, 16))
    vectors = (centres[labels] + 1.4 * rng.normal(size=(rows, 16))) * rng.uniform(0.1, 9, (rows, 1))
    return vectors.astype(np.float32), labels


BANK, QUERIES = labelled(400, 1), labelled(300, 2)


@pytest.fixture(params=[2**23, 4000], ids=["one block", "many blocks"])
def ranked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranked:
    monkeypatch.setattr(ranking, "BLOCK", request.param)
    return rank(*BANK, *QUERIES)


def test_neighbours_and_cosines_are_faisss(ranked: Ranked) -> None:
    index = faiss.IndexFlatIP(16)
    index.add(unit(BANK[0]))
    cosines, rows = index.search(unit(QUERIES[0]), 10)
    np.testing.assert_allclose(ranked.cosines, cosines, atol=1e-6)
    exact = (
        unit(QUERIES[0]).astype(np.float64) @ unit(BANK[0]).astype(np.float64).T
    )  # two that are all but equal may be swapped
    np.testing.assert_allclose(np.take_along_axis(exact, ranked.nearest, 1), np.take_along_axis(exact, rows, 1), atol=1e-6)


def test_average_precision_is_scikit_learns(ranked: Ranked) -> None:
    """Of the same cosines: those of another size of block may differ in their last bits, and change the order of two images."""
    similarity = np.concatenate([block for _, block in cosine_blocks(BANK[0], QUERIES[0])])
    expected = [average_precision_score(BANK[1] == label, row) for label, row in zip(QUERIES[1], similarity, strict=True)]
    assert 0.2 < np.mean(expected) < 0.9
    np.testing.assert_allclose(ranked.precision, expected, atol=1e-9)


def test_equal_cosines_are_one_rank_as_in_scikit_learn() -> None:
    bank = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    labels = np.arange(20) % 3
    queries, query_labels = np.eye(4, dtype=np.float32)[[0, 1, 3]] * 2, np.array([0, 1, 2])
    expected = [
        average_precision_score(labels == label, row) for label, row in zip(query_labels, queries @ bank.T, strict=True)
    ]
    np.testing.assert_allclose(rank(bank, labels, queries, query_labels).precision, expected)


def test_votes_are_scikit_learns(ranked: Ranked) -> None:
    def cosine(distances: np.ndarray) -> np.ndarray:
        return 1 - distances

    reference = KNeighborsClassifier(10, metric="cosine", algorithm="brute", weights=cosine).fit(*BANK)
    np.testing.assert_array_equal(vote(BANK[1][ranked.nearest], ranked.cosines), reference.predict(QUERIES[0]))


def test_many_neighbours_are_in_order() -> None:
    """Of few, numpy's partition leaves them sorted on some processors."""
    cosines = np.random.default_rng(4).normal(size=(3, 5000)).astype(np.float32)
    np.testing.assert_array_equal(nearest(cosines, 900), np.argsort(-cosines, axis=1)[:, :900])


def test_a_class_that_the_bank_lacks_has_no_precision() -> None:
    known = BANK[1] != 2
    found = rank(BANK[0][known], BANK[1][known], *QUERIES).precision
    assert (found[QUERIES[1] == 2] == 0).all()
    assert (found[QUERIES[1] != 2] > 0).all()


def test_a_vector_of_zeros_is_no_ones_neighbour_first() -> None:
    bank = np.array([[0, 0], [1, 0.1], [-1, 0]], np.float32)
    found = rank(bank, np.array([0, 1, 1]), np.array([[2, 0]], np.float32), np.array([1]))
    assert found.nearest.tolist() == [[1, 0, 2]]
    assert found.cosines[0, 1] == 0
