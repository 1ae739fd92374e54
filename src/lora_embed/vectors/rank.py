"""Queries against a bank of vectors by cosine: nearest rows, votes and average precision, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_embed.vectors.rows import unit

NEAREST = 10  # k of the kNN classifier, and neighbours that are shown
BLOCK = 2**23  # cosines held at a time: 32 MB, and as much again while they are sorted
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """What m queries found in a bank."""

    nearest: Rows  # (m, k) rows of the bank, nearest first
    cosines: Floats  # (m, k)
    precision: NDArray[np.float64]  # (m,) average precision


def cosine_blocks(bank: Floats, queries: Floats) -> Iterator[tuple[slice, Floats]]:
    """Some queries at a time, and their cosines (rows, n) to all of the bank: (n, d) against (m, d)."""
    bank, queries = unit(bank), unit(queries)
    step = max(1, min(1024, BLOCK // max(len(bank), 1)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, queries[rows] @ bank.T


def nearest(cosines: Floats, k: int) -> Rows:
    """The k columns of greatest cosine for each row, greatest first; all of them where there are no more."""
    k = min(k, cosines.shape[1])
    found = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(cosines, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def vote(labels: Rows, cosines: Floats) -> Rows:
    """The class (m,) with the greatest sum of cosines among each query's neighbours, of classes `labels` (m, k)."""
    votes = np.zeros((len(labels), int(labels.max()) + 1))
    rows = np.repeat(np.arange(len(labels)), labels.shape[1])
    np.add.at(votes, (rows, labels.ravel()), cosines.ravel())
    found: Rows = votes.argmax(axis=1)
    return found


def rank(bank: Floats, bank_labels: Rows, queries: Floats, query_labels: Rows, k: int = NEAREST) -> Ranked:
    """Rank the whole bank (n, d) for each query (m, d); classes are 0, 1, ….

    Average precision is scikit-learn's: the mean over the bank's images of the query's class of the precision among all that
    are at least as near, so that equal cosines are one rank. It is 0 where the bank has none of the class.
    """
    of_class = {int(label): np.flatnonzero(bank_labels == label) for label in np.unique(query_labels)}
    found, cosines, precision = [], [], np.zeros(len(queries))
    for rows, similarity in cosine_blocks(bank, queries):
        found.append(nearest(similarity, k))
        cosines.append(np.take_along_axis(similarity, found[-1], axis=1))
        relevant = [similarity[row, of_class[int(label)]] for row, label in enumerate(query_labels[rows])]
        similarity.sort(axis=1)
        precision[rows] = [_average_precision(*pair) for pair in zip(similarity, relevant, strict=True)]
    return Ranked(nearest=np.concatenate(found), cosines=np.concatenate(cosines), precision=precision)


def _average_precision(ascending: Floats, relevant: Floats) -> float:
    """Of one query: all cosines to the bank, sorted, and those to the images of its class."""
    if not len(relevant):
        return 0.0
    relevant = np.sort(relevant)
    right = len(relevant) - np.searchsorted(relevant, relevant)  # of its class, and at least as near
    return float((right / (len(ascending) - np.searchsorted(ascending, relevant))).mean())
