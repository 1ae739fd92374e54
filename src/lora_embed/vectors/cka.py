"""Centred kernel alignment: how similar two encoders' vectors of the same images are, without labels."""

import numpy as np
from numpy.typing import NDArray


def linear_cka(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Linear CKA of vectors (n, d) and (n, e) of the same n images: 1 for spaces alike up to rotation and one scale.

    Kornblith et al., "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414), with the unbiased
    estimate of HSIC (Song et al. 2012) as in arXiv 2010.15327: the plain estimate approaches 1 for any two spaces unless
    there are many more images than dimensions. The unbiased one is 0 on average for unrelated vectors, and can be a little
    below 0. Memory grows with d × e, not with n. Raises ValueError for fewer than 4 images, or vectors that are all alike.
    """
    if len(first) != len(second) or len(first) < 4:
        raise ValueError(f"{len(first)} and {len(second)} vectors, expected two vectors each of the same 4 images or more")
    x, y = _centred(first), _centred(second)
    x_alone, y_alone = _hsic(x, x), _hsic(y, y)
    if min(x_alone, y_alone) <= 0:
        raise ValueError("the vectors of one encoder do not differ more than by chance, so the two cannot be compared")
    return float(_hsic(x, y) / np.sqrt(x_alone * y_alone))


def _centred(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = vectors.astype(np.float64)
    return np.asarray(exact - exact.mean(axis=0))


def _hsic(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The unbiased HSIC of linear kernels, times n(n − 3), of centred vectors.

    With Gram matrices of zero diagonal K and L it is tr KL + ΣK ΣL / (n−1)(n−2) − 2/(n−2) · 1ᵀKL1. Rows of a centred Gram
    matrix sum to 0, so the rows of K sum to minus the removed diagonal: only the vectors' squared lengths remain.
    """
    n = len(x)
    lengths, others = (x**2).sum(axis=1), (y**2).sum(axis=1)
    shared = float(((x.T @ y) ** 2).sum())
    return shared - n / (n - 2) * float(lengths @ others) + float(lengths.sum() * others.sum()) / ((n - 1) * (n - 2))
