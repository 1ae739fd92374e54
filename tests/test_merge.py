"""Merged changes: exact sums, PEFT's linear, and what does not depend on order."""

import pytest
import torch

from lora_embed.errors import AdapterMismatch
from lora_embed.model.adapter import Adapter, Factors
from lora_embed.model.merge import Weighted, linear, merge, weighted_sum


def factors(seed: int, rank: int = 4, scale: float = 2.0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(down=torch.randn(rank, 24, generator=rng), up=torch.randn(16, rank, generator=rng), scale=scale)


def adapter(seed: int) -> Adapter:
    parts = {"a.weight": factors(seed), "b.weight": factors(seed + 100)}
    return Adapter(uri=str(seed), content_hash=f"{seed:02d}", factors=parts, head_keys=(), trained_on=None)


def test_weighted_sum_is_the_sum_of_deltas() -> None:
    one, two = factors(1, rank=4, scale=2.0), factors(2, rank=8, scale=0.5)
    expected = 0.7 * 2.0 * (one.up.double() @ one.down.double()) + 0.3 * 0.5 * (two.up.double() @ two.down.double())
    assert torch.allclose(weighted_sum([Weighted(0.7, one), Weighted(0.3, two)]), expected, rtol=1e-14, atol=0)


def test_weights_one_and_zero_give_adapter_one_bit_for_bit() -> None:
    assert torch.equal(weighted_sum([Weighted(1.0, factors(1)), Weighted(0.0, factors(2))]), factors(1).delta())


def test_linear_adds_factors_before_it_multiplies() -> None:
    one, two = factors(1, scale=2.0), factors(2, scale=3.0)
    roots = [(0.5 * 2.0) ** 0.5, (0.25 * 3.0) ** 0.5]
    up = roots[0] * one.up.double() + roots[1] * two.up.double()
    down = roots[0] * one.down.double() + roots[1] * two.down.double()
    merged = linear([Weighted(0.5, one), Weighted(0.25, two)])
    assert torch.allclose(merged, up @ down, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(merged, weighted_sum([Weighted(0.5, one), Weighted(0.25, two)]), rtol=0.1)


def test_linear_of_one_adapter_with_negative_weight_is_its_negative() -> None:
    assert torch.allclose(linear([Weighted(-0.5, factors(1))]), -0.5 * factors(1).delta(), rtol=1e-13)


def test_linear_refuses_unequal_ranks_and_names_what_takes_them() -> None:
    with pytest.raises(AdapterMismatch, match=r"equal ranks, found \[4, 8\]; use 'weighted_sum'"):
        linear([Weighted(0.5, factors(1, rank=4)), Weighted(0.5, factors(2, rank=8))])


@pytest.mark.parametrize("method", ["weighted_sum", "linear"])
def test_order_changes_nothing_bit_for_bit(method: str) -> None:
    adapters, weights = [adapter(seed) for seed in (1, 2, 3)], [0.2, 0.3, 0.5]
    forward = dict(merge(adapters, weights, method))
    backward = dict(merge(adapters[::-1], weights[::-1], method))
    assert forward.keys() == backward.keys() == {"a.weight", "b.weight"}
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


def test_a_weight_that_one_adapter_changes_is_changed_by_it_alone() -> None:
    one, two = adapter(1), adapter(2)
    del two.factors["b.weight"]
    assert torch.equal(dict(merge([one, two], [0.5, 0.5], "weighted_sum"))["b.weight"], 0.5 * one.factors["b.weight"].delta())
