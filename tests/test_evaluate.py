"""kNN accuracy against scikit-learn's own classifier on the same vectors."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from lora_embed.evaluate import knn_accuracy


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
