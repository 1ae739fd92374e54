"""Quality of a set of vectors on labelled images."""

import numpy as np
from numpy.typing import NDArray

QUERY_BLOCK = 1024


def knn_accuracy(
    bank: NDArray[np.float32],
    bank_labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    query_labels: NDArray[np.int64],
    k: int = 10,
) -> float:
    """Share of queries whose class is that of most of their k nearest vectors, each vote weighted by its cosine.

    `bank` is (n, d), `queries` (m, d); labels are classes 0, 1, …. The common protocol for frozen features, as in
    "Unsupervised feature learning via non-parametric instance discrimination" (arXiv 1805.01978), without its temperature.
    """
    bank, queries = _unit(bank), _unit(queries)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    right = 0
    for start in range(0, len(queries), QUERY_BLOCK):
        similarity = queries[start : start + QUERY_BLOCK] @ bank.T
        nearest = np.argpartition(-similarity, min(k, len(bank)) - 1, axis=1)[:, :k]
        votes = np.zeros((len(similarity), classes))
        rows = np.repeat(np.arange(len(similarity)), nearest.shape[1])
        np.add.at(votes, (rows, bank_labels[nearest].ravel()), np.take_along_axis(similarity, nearest, axis=1).ravel())
        right += int((votes.argmax(axis=1) == query_labels[start : start + QUERY_BLOCK]).sum())
    return right / len(queries)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
