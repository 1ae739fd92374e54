"""Names are matched by what was loaded, never by what happened to be in memory."""

from typing import Any

import pytest
import torch
from transformers import LevitConfig, PretrainedConfig, RegNetConfig, ResNetConfig, ViTConfig, ViTMAEConfig

from lora_embed.model.locate import grouped_weights, locate, weight_shapes
from models import SMALL

LEVIT = {"image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
LEVIT |= {"key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
CONFIGS: dict[str, PretrainedConfig] = {
    "regnet": RegNetConfig(**STAGES, groups_width=4),
    "levit": LevitConfig(**LEVIT),
    "vit_mae": ViTMAEConfig(**SMALL, intermediate_size=64, decoder_num_hidden_layers=1, decoder_hidden_size=16),
    "resnet": ResNetConfig(**STAGES),
    "vit": ViTConfig(**SMALL),
}
FIRST, HUGE = 1024.0, 3e38  # FIRST is what a tensor that is looked for begins with


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), HUGE, FIRST], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_memory_that_was_not_loaded_is_not_looked_at(family: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are missing in what is loaded are memory as it was before, unless their model initialises them."""
    config = CONFIGS[family]
    shapes = weight_shapes(config)
    fill_memory(monkeypatch, value)
    names = sorted(shapes)
    asked = {name: shapes[name] for name in (names[0], names[len(names) // 2], names[-1])}
    assert locate(config, asked) == {name: name for name in asked}
    assert locate(config, {"nowhere.weight": shapes[names[0]]}) == {"nowhere.weight": None}
    assert locate(config, {name: torch.Size([1]) for name in asked}) == {
        name: name if shapes[name] == torch.Size([1]) else None for name in asked
    }


def fill_memory(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """No initialisation, and every new tensor holds one value."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def filled(*arguments: Any, real: Any = real, **named: Any) -> torch.Tensor:
            tensor: torch.Tensor = real(*arguments, **named)
            return tensor.fill_(value) if tensor.is_floating_point() and tensor.device.type == "cpu" else tensor

        monkeypatch.setattr(torch, name, filled)
    monkeypatch.setattr("transformers.PreTrainedModel.initialize_weights", lambda *arguments: None)


def test_statistics_are_weights_and_counters_are_not() -> None:
    shapes = weight_shapes(CONFIGS["resnet"])
    assert {name.rpartition(".")[2] for name in shapes} == {"weight", "bias", "running_mean", "running_var"}
    names = {f"resnet.{name}": shape for name, shape in shapes.items()}
    assert locate(CONFIGS["resnet"], names) == {name: name.removeprefix("resnet.") for name in names}


def test_convolutions_in_groups_are_known() -> None:
    assert all("layer.1.convolution" in name for name in grouped_weights(CONFIGS["regnet"]))
    assert len(grouped_weights(CONFIGS["regnet"])) == 2
    assert not grouped_weights(CONFIGS["resnet"])
