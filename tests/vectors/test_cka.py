"""CKA: against its definition by Gram matrices, and on spaces whose likeness is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_embed.evaluate.figures import cka_relations
from lora_embed.vectors.cka import linear_cka


def vectors(n: int, d: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def hsic_by_grams(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Song et al. 2012, equation 5, as it stands there, of vectors that nobody centred."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    n, ones = len(x), np.ones(len(x))
    total = np.trace(k @ l) + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones @ k @ l @ ones)
    return float(total / (n * (n - 3)))


@pytest.mark.parametrize(("n", "d", "e"), [(4, 3, 2), (30, 8, 50), (200, 16, 5)])
def test_it_is_its_definition_by_gram_matrices(n: int, d: int, e: int) -> None:
    x = vectors(n, d, 0) + 3
    y = np.tanh(x @ vectors(d, e, 1)) + 0.3 * vectors(n, e, 2)
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    expected = hsic_by_grams(wide_x, wide_y) / np.sqrt(hsic_by_grams(wide_x, wide_x) * hsic_by_grams(wide_y, wide_y))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-8)


def test_a_turned_scaled_and_moved_space_is_the_same_one() -> None:
    x = vectors(100, 6, 0)
    turn = np.linalg.qr(vectors(6, 6, 1))[0]
    assert linear_cka(x, 2.5 * x @ turn + 7) == pytest.approx(1, abs=1e-6)


def test_unrelated_spaces_are_near_zero_also_where_dimensions_outnumber_images() -> None:
    values = [linear_cka(vectors(60, 300, seed), vectors(60, 300, 100 + seed)) for seed in range(20)]
    assert abs(np.mean(values)) < 0.03  # the plain estimate gives 0.83 here


def test_half_shared_spaces_lie_between() -> None:
    shared, noise = vectors(500, 5, 0), [vectors(500, 5, seed) for seed in (1, 2)]
    one, other = (np.hstack([shared, own]) for own in noise)
    assert linear_cka(one, other) == pytest.approx(0.5, abs=0.06)


def test_relations_name_each_pair_once() -> None:
    spaces = {"base": vectors(50, 8, 0), "ten": vectors(50, 8, 1), "more": vectors(50, 8, 0)}
    found = {(relation.one, relation.other): relation.value for relation in cka_relations(spaces)}
    assert list(found) == [("base", "ten"), ("base", "more"), ("ten", "more")]
    assert found["base", "more"] == pytest.approx(1)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="4 images or more"):
        linear_cka(vectors(3, 2, 0), vectors(3, 2, 1))
    with pytest.raises(ValueError, match="do not differ"):
        linear_cka(np.ones((5, 2), np.float32), vectors(5, 2, 1))
