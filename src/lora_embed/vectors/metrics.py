"""Quality of a set of vectors on labelled images, and whether two sets differ by more than chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lora_embed.vectors.rank import NEAREST, cosine_blocks, nearest, vote
from lora_embed.vectors.rows import unit

# Chosen with the demo's base alone, on images that no evaluation uses: of the values 1e-4 … 1, it is the one within a standard
# error of the best on both tasks (category: 0.619, best 0.625 at 0.03; group: 0.571, best 0.578 at 1; errors 0.008 to 0.011).
PROBE_C = 0.1
PROBE_STEPS = 10_000
MOST_CLUSTERED, STARTS = 20_000, 4


def knn_accuracy(
    bank: NDArray[np.float32],
    bank_labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    query_labels: NDArray[np.int64],
    k: int = NEAREST,
) -> float:
    """The share of queries that their k nearest vectors in the bank put into the right class, each vote weighted by its cosine.

    `bank` is (n, d), `queries` (m, d); labels are classes 0, 1, …. The common protocol for frozen features, as in
    "Unsupervised feature learning via non-parametric instance discrimination" (arXiv 1805.01978), without its temperature.
    """
    right = 0
    for rows, similarity in cosine_blocks(bank, queries):
        neighbours = nearest(similarity, k)
        predicted = vote(bank_labels[neighbours], np.take_along_axis(similarity, neighbours, axis=1))
        right += int((predicted == query_labels[rows]).sum())
    return right / len(queries)


def probe(
    bank: NDArray[np.float32], bank_labels: NDArray[np.int64], queries: NDArray[np.float32], c: float = PROBE_C
) -> NDArray[np.int64]:
    """The classes (m,) that a linear classifier, fitted to the bank, predicts for the queries.

    `bank` is (n, d), `queries` (m, d). scikit-learn's multinomial logistic regression (L-BFGS from zero, so it has no
    seed) on features with the bank's mean 0 and deviation 1, in float64; `c` is its inverse strength of regularisation.
    A class that is not in the bank is never predicted. Needs the `evaluation` extra. Raises ValueError for a bank of one
    class, and when the fit does not converge.
    """
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    scale = StandardScaler().fit(bank.astype(np.float64))
    classifier = LogisticRegression(C=c, max_iter=PROBE_STEPS)
    classifier.fit(scale.transform(bank.astype(np.float64)), bank_labels)
    if classifier.n_iter_.max() >= PROBE_STEPS:
        raise ValueError(f"the linear probe did not converge in {PROBE_STEPS} steps at c = {c}; lower c")
    predicted: NDArray[np.int64] = classifier.predict(scale.transform(queries.astype(np.float64)))
    return predicted


def cluster_nmi(vectors: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Normalised mutual information of k-means clusters of the vectors (n, d), scaled to length 1, and their classes (n,).

    It is normalised by the arithmetic mean of both entropies. There are as many clusters as classes; the best of `STARTS`
    starts from a fixed seed counts. Of more than `MOST_CLUSTERED` vectors, that many are drawn by a fixed seed. Needs the
    `evaluation` extra.
    """
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    from sklearn.metrics import normalized_mutual_info_score  # type: ignore[import-untyped]

    if len(vectors) > MOST_CLUSTERED:
        sampled_rows = np.random.default_rng(0).choice(len(vectors), MOST_CLUSTERED, replace=False)
        vectors, labels = vectors[sampled_rows], labels[sampled_rows]
    clusters = KMeans(n_clusters=len(np.unique(labels)), n_init=STARTS, random_state=0).fit_predict(unit(vectors))
    return float(normalized_mutual_info_score(labels, clusters))


def split_by_name(names: Sequence[str], bank_share: float, seed: int) -> NDArray[np.bool_]:
    """True (n,) for rows in the bank, which gets a share of the distinct names, drawn at random, with all rows of each name."""
    distinct = sorted(set(names))  # a list: in an array each name would take as much memory as the longest
    order = np.random.default_rng(seed).permutation(len(distinct))
    bank_names = {distinct[place] for place in order[: round(bank_share * len(distinct))]}
    return np.array([name in bank_names for name in names], bool)


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Two encoders on the same splits: mean and standard deviation, over splits, of the difference of their figures.

    Splits of one image set overlap, so the plain standard error, `error`, is too small. `corrected_error` follows Nadeau &
    Bengio, "Inference for the Generalization Error" (2003), who add the ratio of queries to bank.
    """

    mean: float
    deviation: float
    error: float
    corrected_error: float
    verdict: Literal["better", "worse", "within noise"]  # noise: up to two plain standard errors
    holds: bool  # 0 lies outside of the 95 % interval of Student's t with the corrected error
    low: float  # the lower end of that interval
    high: float


def paired_difference(figures: Sequence[float], reference: Sequence[float], bank_share: float) -> PairedDifference:
    """Compare two encoders by one figure of each per split. Raises ValueError for fewer than two splits."""
    differences = np.subtract(figures, reference)
    mean, low, high = mean_interval(list(differences), bank_share)
    deviation = float(differences.std(ddof=1))
    error = deviation / len(differences) ** 0.5
    corrected = deviation * _correction(len(differences), bank_share)
    return PairedDifference(
        mean=mean,
        deviation=deviation,
        error=error,
        corrected_error=corrected,
        verdict="within noise" if abs(mean) <= 2 * error else "better" if mean > 0 else "worse",
        holds=not low <= 0 <= high,
        low=low,
        high=high,
    )


def mean_interval(figures: Sequence[float], bank_share: float) -> tuple[float, float, float]:
    """The mean of one figure per split, and both ends of its 95 % interval by Student's t.

    The error is the corrected one of `PairedDifference`. Raises ValueError for fewer than two splits.
    """
    from scipy.stats import t as student  # type: ignore[import-untyped]

    splits = len(figures)
    if splits < 2:
        raise ValueError(f"{splits} splits do not show how much the figures vary; give two or more")
    mean, deviation = float(np.mean(figures)), float(np.std(figures, ddof=1))
    reach = float(student.ppf(0.975, splits - 1)) * deviation * _correction(splits, bank_share)
    return mean, mean - reach, mean + reach


def _correction(splits: int, bank_share: float) -> float:
    """The factor from the deviation over splits to the error of their mean."""
    return float((1 / splits + (1 - bank_share) / bank_share) ** 0.5)


def score_interval(scores: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[float, float, float]:
    """The mean of one score per query (m,), and both ends of its 95 % interval over queries; bank and fit stay the same.

    Queries of one group vary together, so the error is cluster-robust: it uses the sum of deviations of each group.
    """
    mean = float(scores.mean())
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=scores - mean)
    count = len(sums)
    reach = 1.96 * float(np.sqrt(count / max(count - 1, 1) * np.square(sums).sum())) / len(scores)
    return mean, mean - reach, mean + reach
