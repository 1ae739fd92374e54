"""What a build costs: time and memory for a ViT-B, with 2 and with 20 adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import ROOT
from models import save_adapter, save_base

VIT_B = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "image_size": 224,
    "patch_size": 16,
}  # fmt: skip
COPIES = 5
MEASURE = """
import json, resource, sys, time
from pathlib import Path
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.model.build import build_encoder
from lora_embed.model.ingredients import gather

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base, out, method, *adapters = sys.argv[1:]
weight = 1.0 if method == "concat" else 1 / len(adapters)
specs = tuple(AdapterSpec(path=path, weight=weight) for path in adapters)
started, before = time.monotonic(), peak()
recipe = Recipe(base_model=base, adapters=specs, merge_method=method, image_size=224)
build_encoder(gather(recipe), Path(out), print)
print(json.dumps({"seconds": time.monotonic() - started, "bytes": peak() - before}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT-B with random weights, and 20 random adapters of rank 16 beside it."""
    folder = tmp_path_factory.mktemp("vit-b")
    base = save_base(folder / "base", **VIT_B)
    targets = ["q_proj", "v_proj", "fc1", "fc2"]
    first = save_adapter(folder / "0", base, target_modules=targets, r=16, lora_alpha=32)
    config, shapes = (first / "adapter_config.json").read_bytes(), load_file(first / "adapter_model.safetensors")
    for number in range(1, 20):
        (folder / str(number)).mkdir()
        (folder / str(number) / "adapter_config.json").write_bytes(config)
        rng = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(tensor.shape, generator=rng) * 0.02 for name, tensor in shapes.items()}
        save_file(tensors, folder / str(number) / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.long
@pytest.mark.parametrize("method", ["weighted_sum", "ties", "iso_c"])
@pytest.mark.parametrize("count", [2, 20])
def test_memory_of_a_build_does_not_grow_with_adapters(vit_b: Path, tmp_path: Path, count: int, method: str) -> None:
    adapters = [str(vit_b / str(number)) for number in range(count)]
    command = [sys.executable, "-c", MEASURE, str(vit_b / "base"), str(tmp_path / "encoder"), method, *adapters]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}
    )
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stderr.splitlines()[-1])
    copies = cost["bytes"] / (vit_b / "base" / "model.safetensors").stat().st_size
    memory = f"{cost['bytes'] / 1e6:,.0f} MB, {copies:.1f} copies of the base"
    print(f"\n{method} of {count} adapters: {cost['seconds']:.0f} s, {memory}")
    assert copies <= COPIES
