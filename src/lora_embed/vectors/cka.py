"""How alike two encoders see the same images: centred kernel alignment of their vectors, no labels needed."""

import numpy as np
from numpy.typing import NDArray


def linear_cka(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Linear CKA of vectors (n, d) and (n, e) of the same n images: 1 for spaces alike up to rotation and one scale.

    Kornblith et al., "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414), with the unbiased
    estimate of HSIC (Song et al. 2012) as in arXiv 2010.15327: the plain one approaches 1 for any two spaces when images
    are not many more than dimensions. So it is 0 on average for unrelated vectors, and can be a little below. Computed by
    features, in memory of d × e whatever n is. Raises ValueError for fewer than 4 images, or vectors that are all alike.
    """
    if len(one) != len(other) or len(one) < 4:
        raise ValueError(f"{len(one)} and {len(other)} vectors, expected those of the same 4 images or more")
    x, y = _centred(one), _centred(other)
    own = _hsic(x, x), _hsic(y, y)
    if min(own) <= 0:
        raise ValueError("the vectors of one encoder do not differ beyond chance, so there is nothing to compare")
    return float(_hsic(x, y) / np.sqrt(own[0] * own[1]))


def _centred(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = vectors.astype(np.float64)
    return np.asarray(exact - exact.mean(axis=0))


def _hsic(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The unbiased HSIC of linear kernels, times n(n − 3), of centred vectors.

    With Gram matrices of zero diagonal K and L it is tr KL + ΣK ΣL / (n−1)(n−2) − 2/(n−2) · 1ᵀKL1. Rows of a centred Gram
    matrix sum to 0, so those of K sum to minus the diagonal that was taken out: only squared lengths of vectors remain.
    """
    n = len(x)
    lengths, others = (x**2).sum(axis=1), (y**2).sum(axis=1)
    shared = float(((x.T @ y) ** 2).sum())
    return shared - n / (n - 2) * float(lengths @ others) + float(lengths.sum() * others.sum()) / ((n - 1) * (n - 2))
