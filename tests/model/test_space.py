"""The space id: what of a model's configuration counts, whatever release of transformers reads it."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DINOv3ViTConfig, PretrainedConfig, PreTrainedModel

from jobs import ROOT
from lora_embed import load_encoder
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import EncoderError
from lora_embed.images.preprocess import Arithmetic
from lora_embed.model.base import load_headless
from lora_embed.model.build import build_encoder
from lora_embed.model.description import DESCRIPTION, REPORT, StateForm, read_description
from lora_embed.model.fold import Limit
from lora_embed.model.ingredients import gather
from lora_embed.model.space import SHAPING, shaping_fields, space_id_of
from models import FAMILIES, SIZE, save_adapter, save_base, save_bases
from old_pillow import install, path_with
from samples import PREPROCESSING

# By every release of transformers from 5.21.0 to 5.24.0; those of version 2 stay what they are.
IDS = {
    "vit": "52f3280f389f", "deit": "5fc86f2c35a0", "dinov2": "89b16006e413", "dinov2_with_registers": "96f2fd877600",
    "clip": "7c9447a26374", "siglip": "efa64280ba09", "swin": "9c5511d82427", "beit": "08000bbc9a66",
    "convnext": "ab7d56d487c7",
}  # fmt: skip
NEWER = '''
import dataclasses
from transformers import AutoConfig, AutoModel, ViTConfig, ViTModel

@dataclasses.dataclass
class NewerConfig(ViTConfig):
    """As a later release may have it: one more field, and one that follows from others."""
    model_type = "vit"
    layer_scale: float = 1.0
    head_size: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.head_size = self.head_size or self.hidden_size // self.num_attention_heads

ViTModel.config_class = NewerConfig
AutoConfig.register("vit", NewerConfig, exist_ok=True)
AutoModel.register(NewerConfig, ViTModel, exist_ok=True)
'''
LOADS = """
import sys
from lora_embed.errors import EncoderError
from lora_embed import load_encoder
for folder in sys.argv[1:]:
    encoder = load_encoder(folder)
    print(type(encoder.models[0].config).__name__, encoder.space_id)
"""
BUILDS = """
import sys
from pathlib import Path
from lora_embed.config.models import load_recipe
from lora_embed.model.build import build_encoder
from lora_embed.model.ingredients import gather
print(build_encoder(gather(load_recipe(sys.argv[1])), Path(sys.argv[2]), lambda line: None).space_id)
"""


def id_of(model: PreTrainedModel, config: PretrainedConfig | None = None) -> str:
    """Of the model's weights under a configuration."""
    right = model.config
    try:
        model.config = config or right
        return space_id_of([model], PREPROCESSING, "mean", False, StateForm())
    finally:
        model.config = right


def others(value: Any) -> list[Any]:
    """Other values that a field may have in place of this one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 10 + 0.1]
    if isinstance(value, str):
        return ["relu", "gelu_new"]
    if isinstance(value, list | tuple) and value and all(isinstance(one, int) for one in value):
        return [[one + 1 for one in value], [one * 2 for one in value], [max(1, one // 2) for one in value]]
    return []


@torch.no_grad()
def vectors(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(0)
    output: torch.Tensor = model(pixel_values=torch.randn(2, 3, SIZE, SIZE)).last_hidden_state
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_moves_a_vector_is_in_the_id_and_one_of_training_is_not(family: str, tmp_path: Path) -> None:
    """The same weights under a configuration with one other value, wherever the class takes them."""
    model = load_headless(save_base(tmp_path, family), family)
    right, known, moved = vectors(model), id_of(model), set()
    for name, value in sorted(model.config.to_dict().items()):
        for other in others(value):
            changed = copy.deepcopy(model.config)
            try:
                setattr(changed, name, other)
                again = type(model)(changed)
                missing, unknown = again.load_state_dict(model.state_dict(), strict=False)
                if unknown or any(not weight.startswith("pooler.") for weight in missing):
                    continue
                found = vectors(again.eval())
            except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, ZeroDivisionError):
                continue  # other weights, or none: that is another id without the configuration
            if found.shape != right.shape or not torch.equal(found, right):
                moved.add(name)
                assert id_of(model, changed) != known, f"{name} = {other} moves vectors"
            elif "dropout" in name or "drop_path" in name or name.startswith("initializer"):
                assert id_of(model, changed) == known, name
    usual: set[str] = {"swin": {"layer_norm_eps"}, "beit": {"layer_norm_eps"}, "convnext": set()}.get(
        family, {"layer_norm_eps", "num_attention_heads"}
    )
    assert {"hidden_act"} | usual <= moved


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_what_they_were(family: str, tmp_path: Path) -> None:
    for form in save_bases(tmp_path, family).values():
        config = load_headless(form, family).config
        assert shaping_fields(config).keys() - {"image_size"} <= set(SHAPING[config.model_type]), "more is said than shapes it"
    model = load_headless(form, family)  # with weights that no release of torch changes:
    for number, weight in enumerate(model.state_dict().values()):
        weight.copy_(torch.arange(weight.numel()).reshape(weight.shape) % 7 + number)
    assert id_of(model) == IDS[family]


def test_a_field_of_nobody_s_list_counts_once_it_is_set() -> None:
    """Also in a family that no list knows; what follows from others does not count."""
    usual = shaping_fields(DINOv3ViTConfig())
    assert usual == {}
    assert shaping_fields(DINOv3ViTConfig(rope_theta=50.0)) == {"rope_theta": 50}
    assert shaping_fields(DINOv3ViTConfig(num_hidden_layers=3)) == {"num_hidden_layers": 3}  # and not the names of its stages
    assert shaping_fields(DINOv3ViTConfig(attention_dropout=0.3, num_labels=7, dtype="float16")) == usual
    assert shaping_fields(DINOv3ViTConfig(unheard_of={"a": [1.0, 2.5]})) == {"unheard_of": {"a": [1, 2.5]}}


def test_arithmetic_and_decoding_are_in_the_id(tmp_path: Path) -> None:
    model = load_headless(save_base(tmp_path), "vit")
    ways = [
        PREPROCESSING,
        replace(PREPROCESSING, decode="fast"),
        replace(PREPROCESSING, arithmetic=Arithmetic(name="pixels-0123456789ab")),
        replace(PREPROCESSING, resample=2),
    ]
    assert len({space_id_of([model], way, "mean", False, StateForm()) for way in ways}) == len(ways)
    seen = replace(PREPROCESSING, arithmetic=Arithmetic(pixels=(("decode a.png", "00"),), libraries=(("Pillow", "14.0"),)))
    assert space_id_of([model], seen, "mean", False, StateForm()) == id_of(model)


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Path]:
    """Encoders kept as adapters: one as it is built today, and one as they were before ids had a version."""
    base = save_base(tmp_path / "base")
    recipe = Recipe(base_model=str(base), adapters=(AdapterSpec(path=str(save_adapter(tmp_path / "ten", base))),))
    for name in ("today", "before"):
        build_encoder(gather(recipe), tmp_path / name, lambda line: None, Limit())
    about, report = (json.loads((tmp_path / "before" / name).read_text()) for name in (DESCRIPTION, REPORT))
    del about["arithmetic"], about["space_version"], report["files"]["adapter/adapter_config.json"]
    (tmp_path / "before" / DESCRIPTION).write_text(json.dumps(about | {"space_id": "0123456789ab"}))
    (tmp_path / "before" / REPORT).write_text(json.dumps(report))
    return {name: tmp_path / name for name in ("today", "before")}


def python(code: str, *arguments: str, path: str = "") -> list[str]:
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_later_transformers_loads_what_is_kept_as_an_adapter_and_builds_the_same_id(
    stored: dict[str, Path], tmp_path: Path
) -> None:
    found = python(NEWER + LOADS, *map(str, stored.values()))
    assert found == [f"NewerConfig {read_description(stored['today']).space_id}", "NewerConfig 0123456789ab"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{base_model: ./base, merge_method: none}\n")
    [newer], [today] = (python(code + BUILDS, str(recipe), str(tmp_path / name)) for code, name in ((NEWER, "a"), ("", "b")))
    assert newer == today


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
def test_a_file_that_was_changed_since_is_refused(stored: dict[str, Path], file: str) -> None:
    path = stored["today"] / file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(EncoderError, match=rf"today: {file} has the SHA-256 .* The file was changed. Restore it"):
        load_encoder(stored["today"])
    path.unlink()
    with pytest.raises(EncoderError, match=rf"today: {file} does not exist, but the encoder was built with"):
        load_encoder(stored["today"])


@pytest.mark.parametrize(("report", "says"), [(None, "has no merge_report.json"), ("{", "is damaged"), ("[]", "is damaged")])
def test_a_report_that_says_nothing_is_refused(stored: dict[str, Path], report: str | None, says: str) -> None:
    (stored["before"] / REPORT).unlink()
    if report is not None:
        (stored["before"] / REPORT).write_text(report)
    with pytest.raises(EncoderError, match=says):
        load_encoder(stored["before"])


@pytest.mark.long
@pytest.mark.parametrize("version", ["5.21.0", "5.23.0"])
def test_real_releases_of_transformers_build_one_id(version: str, tmp_path: Path, stored: dict[str, Path]) -> None:
    path = path_with(install("transformers", version))
    assert [line.split()[1] for line in python(LOADS, *map(str, stored.values()), path=path)] == [
        read_description(folder).space_id for folder in stored.values()
    ]
    for family in ("siglip", "dinov2"):
        save_base(tmp_path / family / "base", family)
        recipe = tmp_path / family / "recipe.yaml"
        recipe.write_text("{base_model: ./base, merge_method: none}\n")
        there = python(BUILDS, str(recipe), str(tmp_path / family / "there"), path=path)
        assert there == python(BUILDS, str(recipe), str(tmp_path / family / "here"))
