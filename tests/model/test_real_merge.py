"""Properties of a merge on the real base: over the demo's adapters and perturbed copies of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_embed.model.adapter import read_adapter
from lora_embed.model.base import load_headless
from lora_embed.model.base_files import Base
from lora_embed.model.fold import Merge, fold
from lora_embed.model.match import Adapter, match_adapter
from lora_embed.model.whole import Target
from models import edit_tensors

Weights = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor, str], torch.Tensor]


@pytest.fixture(scope="module")
def perturbed(real_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, target: Target) -> list[Adapter]:
    """Five adapters: the two real ones, and three copies whose factors have noise of a tenth of their size."""
    folder = tmp_path_factory.mktemp("perturbed")
    adapters = [match_adapter(read_adapter(str(path)), target) for path in real_adapters.values()]
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        noisy = lambda tensor, name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=rng)  # noqa: B023, E731
        adapters.append(copy_of(real_adapters["category10"], folder / str(seed), noisy, target))
    return adapters


def copy_of(adapter: Path, folder: Path, change: Change, target: Target) -> Adapter:
    shutil.copytree(adapter, folder)
    edit_tensors(folder, lambda tensors: {name: change(tensor, name) for name, tensor in tensors.items()})
    return match_adapter(read_adapter(str(folder)), target)


def folded(base: Base, adapters: list[Adapter], weights: list[float]) -> Weights:
    model = load_headless(base.folder, base.uri)
    for _ in fold(model, Merge(adapters=tuple(adapters), weights=tuple(weights), options={})):
        pass
    return {name: weight.detach() for name, weight in model.named_parameters()}


def unequal(one: Weights, other: Weights) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def of_change(one: Weights, other: Weights, before: Weights) -> float:
    """Largest difference of a weight, relative to its change."""
    changed = [name for name in before if not torch.equal(one[name], before[name])]
    return max(float((one[name] - other[name]).norm() / (one[name] - before[name]).norm()) for name in changed)


@pytest.fixture(scope="module")
def before(base: Base) -> Weights:
    return folded(base, [], [])


def test_weights_one_and_zeros_give_one_adapter_bit_for_bit(base: Base, perturbed: list[Adapter], before: Weights) -> None:
    for number in (0, 2):
        weights = [float(place == number) for place in range(len(perturbed))]
        alone = folded(base, [perturbed[number]], [1.0])
        assert unequal(folded(base, perturbed, weights), alone) == []
        assert len(unequal(alone, before)) == 48


def test_order_changes_nothing_bit_for_bit(base: Base, perturbed: list[Adapter]) -> None:
    weights = [0.3, -0.2, 0.25, 0.5, 0.15]
    order = [3, 0, 4, 2, 1]
    shuffled = folded(base, [perturbed[place] for place in order], [weights[place] for place in order])
    assert unequal(folded(base, perturbed, weights), shuffled) == []
    assert unequal(folded(base, perturbed, weights[::-1]), shuffled) != []


def test_equal_deltas_at_one_kth_give_one_within_rounding(
    base: Base, real_adapters: dict[str, Path], tmp_path: Path, target: Target, before: Weights
) -> None:
    """Copies with A·2ⁿ and B/2ⁿ: the same change, other files."""
    rescaled = []
    for power in range(5):
        factor = 2.0**power
        change: Change = lambda tensor, name, f=factor: tensor * (f if "lora_A" in name else 1 / f)  # noqa: E731
        rescaled.append(copy_of(real_adapters["category10"], tmp_path / str(power), change, target))
    assert len({adapter.content_hash for adapter in rescaled}) == 5
    one = folded(base, rescaled[:1], [1.0])
    assert of_change(folded(base, rescaled, [0.2] * 5), one, before) < 1e-6


def test_scaling_weights_scales_the_change(base: Base, perturbed: list[Adapter], before: Weights) -> None:
    once = folded(base, perturbed[:3], [0.1, 0.2, 0.3])
    threefold = folded(base, perturbed[:3], [0.3, 0.6, 0.9])
    expected = {name: (before[name].double() + 3 * (once[name].double() - before[name].double())).float() for name in before}
    assert of_change(threefold, expected, before) < 1e-6


@pytest.mark.slow
def test_twenty_adapters_are_the_sum_of_twenty(base: Base, perturbed: list[Adapter], tmp_path: Path, target: Target) -> None:
    source = Path(perturbed[1].uri)
    twenty = []
    for seed in range(20):
        rng = torch.Generator().manual_seed(100 + seed)
        noisy: Change = lambda tensor, name, r=rng: tensor * (1 + 0.2 * torch.randn(tensor.shape, generator=r))  # noqa: E731
        twenty.append(copy_of(source, tmp_path / str(seed), noisy, target))
    weights = [(-1) ** number * (number + 1) / 100 for number in range(20)]
    found, before = folded(base, twenty, weights), folded(base, [], [])
    for name in twenty[0].changes:
        total = before[name].double()
        for adapter, weight in zip(twenty, weights, strict=True):
            total = total + weight * adapter.changes[name].delta(before[name])
        assert torch.allclose(found[name].double(), total, rtol=6e-8, atol=1e-12)
