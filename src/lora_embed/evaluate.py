"""Quality of a set of vectors on labelled images, and what a difference of two sets is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

QUERY_BLOCK = 1024
# Chosen on the demo's base alone, on images that no evaluation asks about: of 1e-4 … 1 the one within a standard error
# of the best on both tasks (category: 0.619, best 0.625 at 0.03; group: 0.571, best 0.578 at 1; errors 0.008 to 0.011).
PROBE_C = 0.1
PROBE_STEPS = 10_000


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


def probe_accuracy(
    bank: NDArray[np.float32],
    bank_labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    query_labels: NDArray[np.int64],
    c: float = PROBE_C,
) -> float:
    """Share of queries that a linear classifier fitted to the bank gives their class.

    `bank` is (n, d), `queries` (m, d). scikit-learn's multinomial logistic regression (L-BFGS from zero, so it has no
    seed) on features with the bank's mean 0 and deviation 1, in float64; `c` is its inverse strength of regularisation.
    A class that the bank lacks is never given. Needs the `evaluation` extra. Raises ValueError for a bank of one class,
    and when the fit does not converge.
    """
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    scale = StandardScaler().fit(bank.astype(np.float64))
    classifier = LogisticRegression(C=c, max_iter=PROBE_STEPS)
    classifier.fit(scale.transform(bank.astype(np.float64)), bank_labels)
    if classifier.n_iter_.max() >= PROBE_STEPS:
        raise ValueError(f"the probe has not converged in {PROBE_STEPS} steps at c = {c}; lower c")
    return float(classifier.score(scale.transform(queries.astype(np.float64)), query_labels))


def split_by_name(names: Sequence[str], bank_share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are in the bank, (n,): a share of the distinct names, drawn at random, with all rows of each."""
    distinct = np.array(sorted(set(names)))
    drawn = np.random.default_rng(seed).permutation(distinct)[: round(bank_share * len(distinct))]
    return np.isin(np.array(names), drawn)


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Two encoders on the same splits: mean and standard deviation over splits of the difference of their figures.

    Splits of one image set overlap, so `error`, the plain standard error, is too small; `corrected_error` is the one of
    Nadeau & Bengio, "Inference for the Generalization Error" (2003), which adds the ratio of queries to bank.
    """

    mean: float
    deviation: float
    error: float
    corrected_error: float
    verdict: Literal["better", "worse", "within noise"]  # noise: up to two plain standard errors
    holds: bool  # beyond the 95 % interval of Student's t with the corrected error as well


def paired_difference(figures: Sequence[float], reference: Sequence[float], bank_share: float) -> PairedDifference:
    """Compare figures of two encoders, one of each per split. Raises ValueError for fewer than two splits."""
    from scipy.stats import t as student  # type: ignore[import-untyped]

    differences = np.subtract(figures, reference)
    splits = len(differences)
    if splits < 2:
        raise ValueError(f"{splits} splits say nothing of noise; give two or more")
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    error = deviation / splits**0.5
    corrected = deviation * (1 / splits + (1 - bank_share) / bank_share) ** 0.5
    return PairedDifference(
        mean=mean,
        deviation=deviation,
        error=error,
        corrected_error=corrected,
        verdict="within noise" if abs(mean) <= 2 * error else "better" if mean > 0 else "worse",
        holds=abs(mean) > float(student.ppf(0.975, splits - 1)) * corrected,
    )


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
