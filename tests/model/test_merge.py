"""Merged changes: exact sums, PEFT's methods, what does not depend on order; over random adapters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils

from lora_embed.config.values import MERGE_OPTIONS
from lora_embed.errors import AdapterMismatch, ConfigError
from lora_embed.model.adapter import SavedAdapter
from lora_embed.model.change import LowRank, Normed, Replaced, Residual, Shift
from lora_embed.model.match import Adapter
from lora_embed.model.merge import CONCAT, METHODS, Weighted, linear, merge, options_of, svd, truncate, weighted_sum

SHAPE = torch.Size((16, 24))
BEFORE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
WEIGHTS = st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3)
ADAPTERS = st.lists(st.tuples(st.integers(0, 2**31), st.integers(1, 12), st.floats(0.1, 4), WEIGHTS), min_size=1, max_size=5)


def low_rank(seed: int, rank: int = 4, scale: float = 2.0) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, SHAPE[1], generator=rng), torch.randn(SHAPE[0], rank, generator=rng)
    return LowRank(down=down, up=up, scale=scale, shape=SHAPE)


def adapter(seed: int, **changes: LowRank) -> Adapter:
    saved = SavedAdapter(uri=str(seed), folder=Path(), config={}, content_hash=f"{seed:012d}")
    changes = changes or {"a": low_rank(seed), "b": low_rank(seed + 1)}
    named = {f"{name}.weight": change for name, change in changes.items()}
    return Adapter(saved=saved, changes=dict(named), places={})


def merged(adapters: list[Adapter], weights: list[float], method: str, **options: Any) -> dict[str, torch.Tensor]:
    before = {name: BEFORE for adapter in adapters for name in adapter.changes}
    return dict(merge(adapters, weights, method, options_of(method, options), before))


def parts_of(drawn: list[tuple[int, int, float, float]]) -> list[Weighted]:
    return [Weighted(weight, low_rank(seed, rank, scale)) for seed, rank, scale, weight in drawn]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@given(ADAPTERS)
def test_weighted_sum_is_the_sum_of_deltas(drawn: list[tuple[int, int, float, float]]) -> None:
    expected = np.zeros(SHAPE)
    for part in parts_of(drawn):
        expected += part.weight * part.change.scale * (part.change.up.double().numpy() @ part.change.down.double().numpy())
    found = weighted_sum(parts_of(drawn), BEFORE).numpy()
    scale = sum(np.linalg.norm(part.weight * part.change.delta().numpy()) for part in parts_of(drawn))
    assert np.linalg.norm(found - expected) <= 1e-14 * scale


@given(ADAPTERS, st.integers(0, 2**31))
def test_weights_one_and_zero_give_adapter_one_bit_for_bit(drawn: list[tuple[int, int, float, float]], seed: int) -> None:
    others = [Weighted(0.0, part.change) for part in parts_of(drawn)]
    alone = weighted_sum([Weighted(1.0, low_rank(seed))], BEFORE)
    assert torch.equal(weighted_sum([*others, Weighted(1.0, low_rank(seed))], BEFORE), alone)
    assert torch.equal(alone, low_rank(seed).delta())


@given(st.permutations(range(4)), st.sampled_from(sorted(METHODS)))
def test_order_changes_nothing_bit_for_bit(order: list[int], method: str) -> None:
    adapters, weights = [adapter(seed) for seed in (1, 3, 5, 7)], [0.2, 0.3, 0.5, -0.1]
    forward = merged(adapters, weights, method)
    shuffled = merged([adapters[place] for place in order], [weights[place] for place in order], method)
    assert forward.keys() == shuffled.keys() == {"a.weight", "b.weight"}
    assert all(torch.equal(forward[name], shuffled[name]) for name in forward)


@given(ADAPTERS, st.floats(0.01, 100))
def test_scaling_weights_scales_deltas(drawn: list[tuple[int, int, float, float]], factor: float) -> None:
    scaled = [Weighted(part.weight * factor, part.change) for part in parts_of(drawn)]
    size = sum(float((part.weight * part.change.delta()).norm()) for part in parts_of(drawn))
    difference = weighted_sum(scaled, BEFORE) - factor * weighted_sum(parts_of(drawn), BEFORE)
    assert float(difference.norm()) <= 1e-14 * factor * size


@pytest.mark.parametrize("method", sorted(METHODS))
def test_under_every_method_twice_the_weights_are_twice_the_change(method: str) -> None:
    adapters = [adapter(seed) for seed in (1, 3, 5)]
    once, twice = merged(adapters, [0.4, -0.2, 0.3], method), merged(adapters, [0.8, -0.4, 0.6], method)
    assert all(relative(twice[name], 2 * once[name]) < 1e-6 for name in once)


@given(st.integers(1, 20), st.integers(0, 2**31))
def test_k_equal_deltas_at_one_kth_give_one(count: int, seed: int) -> None:
    parts = [Weighted(1 / count, low_rank(seed))] * count
    assert relative(weighted_sum(parts, BEFORE), low_rank(seed).delta()) <= 1e-14


def test_a_weight_that_one_adapter_changes_is_changed_by_it_alone() -> None:
    one, two = adapter(1), adapter(3, a=low_rank(4))
    assert torch.equal(merged([one, two], [0.5, 0.5], "weighted_sum")["b.weight"], 0.5 * low_rank(2).delta())


def test_biases_are_added_beside_factors() -> None:
    before, one, two = torch.zeros(16), torch.arange(16.0), torch.ones(16)
    parts = [Weighted(0.5, Shift(bias=one, scale=2.0)), Weighted(0.25, Shift(bias=two, scale=4.0))]
    assert torch.equal(weighted_sum(parts, before), one.double() + 1)
    assert torch.equal(svd(parts, before, rank=1), one.double() + 1)  # no singular values to cut


@given(st.lists(st.tuples(st.integers(0, 2**31), st.floats(0.1, 4), WEIGHTS), min_size=1, max_size=4), st.integers(1, 8))
def test_linear_adds_factors_before_it_multiplies(drawn: list[tuple[int, float, float]], rank: int) -> None:
    parts = [Weighted(weight, low_rank(seed, rank, scale)) for seed, scale, weight in drawn]
    roots = [abs(part.weight * part.change.scale) ** 0.5 for part in parts]
    up = sum(root * part.change.up.double() for root, part in zip(roots, parts, strict=True))
    down = sum(np.sign(part.weight) * root * part.change.down.double() for root, part in zip(roots, parts, strict=True))
    assert torch.allclose(linear(parts, BEFORE), up @ down, rtol=1e-11, atol=1e-11)


def test_linear_is_another_merge_than_the_sum() -> None:
    parts = [Weighted(0.5, low_rank(1)), Weighted(0.25, low_rank(2))]
    assert relative(linear(parts, BEFORE), weighted_sum(parts, BEFORE)) > 0.1


def test_linear_refuses_unequal_ranks_and_names_what_takes_them() -> None:
    with pytest.raises(AdapterMismatch, match=r"equal ranks, found \[4, 8\]\. Use 'weighted_sum'"):
        linear([Weighted(0.5, low_rank(1, rank=4)), Weighted(0.5, low_rank(2, rank=8))], BEFORE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Shift(bias=torch.ones(16), scale=1.0), "biases of lora_bias"),
        (Replaced(trained=BEFORE), "weights that were trained whole"),
        (Residual(lora=low_rank(1), kind="pissa"), "a change of the base by PiSSA or OLoRA"),
        (Normed(inner=low_rank(1), magnitude=torch.ones(16)), "DoRA's magnitudes"),
    ],
)
def test_linear_refuses_what_is_more_than_factors_and_names_the_adapter(change: Any, says: str) -> None:
    with pytest.raises(AdapterMismatch, match=rf"adds LoRA factors alone, but 7 also holds {says}\. Use 'weighted_sum'"):
        merged([adapter(1), adapter(7, c=change)], [0.5, 0.5], "linear")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"density": 0.2}),
        ("ties", {"density": 0.7, "majority_sign": "frequency"}),
        ("magnitude_prune", {"density": 0.3}),
    ],
)
def test_methods_on_full_deltas_are_pefts(method: str, options: dict[str, Any]) -> None:
    weights = [0.4, 0.6, 1.0]
    deltas = [low_rank(seed).delta().float() for seed in (1, 3, 5)]
    keywords = {"majority_sign_method" if key == "majority_sign" else key: value for key, value in options.items()}
    expected = getattr(merge_utils, method)(deltas, torch.tensor(weights), **keywords)
    found = merged([adapter(seed) for seed in (1, 3, 5)], weights, method, **options)
    assert torch.equal(found["a.weight"], expected.double())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_seeded_for_each_weight_and_leaves_other_randomness_alone(method: str) -> None:
    twins = [adapter(seed, a=low_rank(seed), b=low_rank(seed)) for seed in (1, 3)]
    torch.manual_seed(5)
    found = merged(twins, [0.5, 0.5], method, density=0.5, seed=1)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    again = merged(twins, [0.5, 0.5], method, density=0.5, seed=1)
    other = merged(twins, [0.5, 0.5], method, density=0.5, seed=2)
    assert torch.equal(found["a.weight"], again["a.weight"])
    assert not torch.equal(found["a.weight"], other["a.weight"])
    assert not torch.equal(found["a.weight"], found["b.weight"])  # equal deltas, other masks


def test_dare_keeps_the_share_that_density_says_and_rescales_it() -> None:
    found = merged([adapter(1)], [1.0], "dare_linear", density=0.25)["a.weight"]
    kept = found != 0
    assert 0.15 < float(kept.double().mean()) < 0.35
    assert torch.equal(found[kept], (low_rank(1).delta().float() / 0.25).double()[kept])


def test_svd_keeps_the_best_approximation_of_a_rank() -> None:
    parts = [Weighted(0.5, low_rank(1)), Weighted(0.5, low_rank(2))]
    whole = weighted_sum(parts, BEFORE)
    values = np.linalg.svd(whole.numpy(), compute_uv=False)
    for rank in (1, 3, 8):
        left = float((whole - svd(parts, BEFORE, rank=rank)).norm())
        assert left == pytest.approx(float(np.sqrt((values[rank:] ** 2).sum())), abs=1e-10)
    assert relative(svd(parts, BEFORE), whole) < 1e-14


def test_truncate_keeps_as_little_as_the_energy_asks_for() -> None:
    whole = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64))  # squares 16, 4, 1: shares .76, .95, 1
    assert [truncate(whole, None, energy)[0].shape[1] for energy in (0.7, 0.77, 0.95, 0.96, 1.0)] == [1, 2, 2, 3, 3]
    assert truncate(whole, 2, 1.0)[0].shape[1] == 2
    assert truncate(torch.zeros(4, 4, dtype=torch.float64), None, 1.0)[0].shape[1] == 1


def test_iso_c_evens_out_singular_values_and_keeps_their_mean_and_directions() -> None:
    parts = [Weighted(0.5, low_rank(1)), Weighted(2.0, low_rank(2))]
    u, s, vh = np.linalg.svd(weighted_sum(parts, BEFORE).numpy(), full_matrices=False)
    expected = s[:8].mean() * (u[:, :8] @ vh[:8])
    assert np.allclose(METHODS["iso_c"](parts, BEFORE).numpy(), expected, atol=1e-12)
    assert np.allclose(np.linalg.svd(expected, compute_uv=False)[:8], s[:8].mean())


def test_convolutions_keep_their_shape_under_every_method() -> None:
    kernel = torch.Size((16, 6, 2, 2))
    parts = [Weighted(0.5, LowRank(down=low_rank(s).down, up=low_rank(s).up, scale=1.0, shape=kernel)) for s in (1, 2)]
    for method in METHODS.values():
        assert method(parts, torch.zeros(kernel)).shape == kernel


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("cat", {}, "merge_method is 'cat', expected weighted_sum, linear, svd, .*concat or none"),
        ("linear", {"density": 0.5}, "merge_options sets density, but merge_method 'linear' takes no options"),
        ("ties", {"densty": 0.5}, "merge_options of ties: unknown key 'densty'. Did you mean 'density'?"),
        ("ties", {"density": 1.5}, "merge_options of ties: density is 1.5, expected at most 1"),
        ("ties", {"majority_sign": "loud"}, 'majority_sign is "loud", expected total or frequency'),
        ("svd", {"rank": 0}, "rank is 0, expected at least 1"),
        ("dare_ties", {"seed": "x"}, 'seed is "x", expected a whole number'),
    ],
)
def test_options_are_checked_by_name(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options_of(method, options)


def test_options_that_are_not_given_have_defaults() -> None:
    assert options_of("ties", {"density": 0.4}) == {"density": 0.4, "majority_sign": "total"}
    assert options_of("concat", {}) == {}


def test_the_options_that_recipes_may_name_are_those_of_the_methods() -> None:
    """They are listed once more where reading a recipe imports no torch."""
    assert list(MERGE_OPTIONS) == [*METHODS, CONCAT, "none"]
    assert {name: sorted(names) for name, names in MERGE_OPTIONS.items()} == {
        name: sorted(options_of(name, {})) for name in MERGE_OPTIONS
    }
