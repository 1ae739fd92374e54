"""Search a bank of vectors by cosine, in bounded memory: nearest rows, votes and average precision."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_embed.vectors.rows import unit

NEAREST = 10  # k of the kNN classifier, and the number of neighbours that a page shows
BLOCK = 2**23  # cosines in memory at a time: 32 MB, and as much again while they are sorted
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The results of m queries in a bank."""

    nearest: Rows  # (m, k) rows of the bank, nearest first
    cosines: Floats  # (m, k)
    precision: NDArray[np.float64]  # (m,) average precision


def cosine_blocks(bank: Floats, queries: Floats) -> Iterator[tuple[slice, Floats]]:
    """Yield a block of queries (m, d) at a time, with their cosines (rows, n) to all vectors of the bank (n, d)."""
    bank, queries = unit(bank), unit(queries)
    step = max(1, min(1024, BLOCK // max(len(bank), 1)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, queries[rows] @ bank.T


def nearest(cosines: Floats, k: int) -> Rows:
    """The k columns of greatest cosine for each row, greatest first; all columns where there are fewer than k."""
    k = min(k, cosines.shape[1])
    columns = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(cosines, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def vote(labels: Rows, cosines: Floats) -> Rows:
    """For each query, the class (m,) with the greatest sum of cosines among its neighbours of classes `labels` (m, k)."""
    votes = np.zeros((len(labels), int(labels.max()) + 1))
    rows = np.repeat(np.arange(len(labels)), labels.shape[1])
    np.add.at(votes, (rows, labels.ravel()), cosines.ravel())
    classes: Rows = votes.argmax(axis=1)
    return classes


def rank(bank: Floats, bank_labels: Rows, queries: Floats, query_labels: Rows, k: int = NEAREST) -> Ranked:
    """Rank the whole bank (n, d) for each query (m, d); classes are numbers 0, 1, ….

    Average precision is scikit-learn's: for each image of the query's class in the bank, the precision among all images that
    are at least as near, and the mean of that; equal cosines have one rank. It is 0 where the bank has no image of the class.
    """
    of_class = {int(label): np.flatnonzero(bank_labels == label) for label in np.unique(query_labels)}
    neighbours, cosines, precision = [], [], np.zeros(len(queries))
    for rows, similarity in cosine_blocks(bank, queries):
        neighbours.append(nearest(similarity, k))
        cosines.append(np.take_along_axis(similarity, neighbours[-1], axis=1))
        relevant = [similarity[row, of_class[int(label)]] for row, label in enumerate(query_labels[rows])]
        similarity.sort(axis=1)
        precision[rows] = [_average_precision(*pair) for pair in zip(similarity, relevant, strict=True)]
    return Ranked(nearest=np.concatenate(neighbours), cosines=np.concatenate(cosines), precision=precision)


def _average_precision(ascending: Floats, relevant: Floats) -> float:
    """The average precision of one query, from its sorted cosines to the bank and its cosines to the images of its class."""
    if not len(relevant):
        return 0.0
    relevant = np.sort(relevant)
    right = len(relevant) - np.searchsorted(relevant, relevant)  # images of its class that are at least as near
    return float((right / (len(ascending) - np.searchsorted(ascending, relevant))).mean())
