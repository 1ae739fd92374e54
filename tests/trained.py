"""Adapters as they are after training, with PEFT's own model of each, and what a fold makes of their files."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_embed.model.adapter import read_adapter
from lora_embed.model.base import load_headless
from lora_embed.model.base_files import find_base
from lora_embed.model.fold import Merge, fold
from lora_embed.model.match import Adapter, match_adapter, target_of
from lora_embed.model.proof import prove
from models import SIZE


class Own(nn.Module):
    """Somebody's own class around a base, as users of models without a classification class write it."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


@torch.no_grad()
def train(model: nn.Module, folder: Path, *, name: str = "default", **config: Any) -> Any:
    """The PEFT model as after training, and its folder as PEFT saves it."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"]} | config
    adapted = get_peft_model(model, LoraConfig(**settings), adapter_name=name)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    adapted.save_pretrained(folder)
    return adapted


@torch.inference_mode()
def states(body: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    output = body.eval()(pixel_values=torch.randn(2, 3, SIZE, SIZE), output_hidden_states=True)
    return output.hidden_states[-1]  # type: ignore[no-any-return]


def folded(folder: Path, base: Path) -> tuple[torch.Tensor, Adapter]:
    """The states of the base with an adapter folded into it, and proven as in a build."""
    found = find_base(str(base), None)
    adapter = match_adapter(read_adapter(str(folder)), target_of(found))
    model, merged = load_headless(found.folder, found.uri), Merge(adapters=(adapter,), weights=(1.0,), options={})
    for _ in fold(model, merged):
        pass
    assert prove(merged, load_headless(found.folder, found.uri), model).keys() == adapter.changes.keys()
    return states(model), adapter


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
