"""Files of PEFT 0.2 to the newest: what each version writes into a configuration and into the names of tensors.

For each version an adapter that PEFT trains today is written as that version wrote it. The names and fields were read from
files that these versions saved.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AutoModel

from lora_embed.errors import AdapterMismatch
from models import edit_tensors, save_bases
from short import slow_but
from trained import difference, folded, states, train

# The fields of the first version, and those that each version added, at their defaults.
FIRST = (
    "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout", "modules_to_save",
    "peft_type", "r", "target_modules", "task_type",
)  # fmt: skip
ADDED: dict[str, dict[str, Any]] = {
    "0.2": {},
    "0.3": {"init_lora_weights": True},
    "0.4": {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.16": {"qalora_group_size": 16, "use_qalora": False},
    "0.17": {"target_parameters": None},
    "0.18": {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.0"},
    "0.19": {"lora_ga_config": None, "use_bdlora": None},
    "0.20": {"monteclora_config": None, "velora_config": None},
}
ONLY_IN: dict[str, dict[str, Any]] = {"0.2": {"enable_lora": None, "merge_weights": True}}  # fields that were dropped later
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # the first version that has it, and its settings
    "plain": ("0.2", {}),
    "a norm": ("0.2", {"modules_to_save": ["layernorm_after"]}),
    "biases": ("0.2", {"bias": "all"}),
    "biases of its layers": ("0.2", {"bias": "lora_only"}),
    "biases and a norm": ("0.2", {"bias": "all", "modules_to_save": ["layernorm_after"]}),
    "a pattern of modules": ("0.2", {"target_modules": r".*layers\.\d\.attention\.q_proj"}),
    "a convolution": ("0.4", {"target_modules": ["projection", "q_proj"]}),
    "some layers": ("0.4", {"layers_to_transform": [0], "layers_pattern": "layers"}),
    "ranks": ("0.6", {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc1": 3}}),
    "rank-stabilised": ("0.8", {"use_rslora": True}),
    "DoRA": ("0.9", {"use_dora": True}),
    "DoRA of a convolution": ("0.10", {"use_dora": True, "target_modules": ["projection"]}),
    "PiSSA": ("0.10", {"init_lora_weights": "pissa"}),
    "biases of LoRA": ("0.14", {"lora_bias": True}),
}


def versions() -> Iterator[tuple[str, str]]:
    order = list(ADDED)
    for kind, (first, _) in KINDS.items():
        for version in order[order.index(first) :]:
            yield version, kind


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bases(tmp_path_factory.mktemp("vit"), "vit")["headless"]


def name_of(version: str, name: str) -> str:
    """Until 0.6, an adapted layer was a subclass of the layer, so its bias had the layer's own name."""
    return name.replace(".base_layer.", ".") if version in ("0.2", "0.3", "0.4", "0.6") else name


def write_as(version: str, folder: Path) -> None:
    order = list(ADDED)
    fields = {name: value for older in order[: order.index(version) + 1] for name, value in ADDED[older].items()}
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    written = {name: config[name] for name in FIRST} | {name: config.get(name, value) for name, value in fields.items()}
    path.write_text(json.dumps(written | ONLY_IN.get(version, {})))
    edit_tensors(folder, lambda tensors: {name_of(version, name): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(("version", "kind"), slow_but(versions(), lambda case: case[0] in ("0.2", "0.20")))
def test_files_of_each_version_are_folded_as_peft_computes_them(version: str, kind: str, base: Path, tmp_path: Path) -> None:
    settings = KINDS[kind][1]
    body = AutoModel.from_pretrained(base)
    before = states(body)
    adapted = train(body, tmp_path / "adapter", **settings)
    if kind == "biases of its layers":
        with_biases(tmp_path / "adapter", adapted)
    write_as(version, tmp_path / "adapter")
    found, _ = folded(tmp_path / "adapter", base)
    assert difference(found, states(reloaded(tmp_path / "adapter", base) if "PiSSA" in kind else body)) <= 1e-5
    assert difference(found, before) > 1e-3


def reloaded(folder: Path, base: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).base_model.model


def with_biases(folder: Path, adapted: Any) -> None:
    """Since 0.7, PEFT loses these biases when it saves; they are taken from the model."""
    biases = {k: v for k, v in adapted.state_dict().items() if re.search(r"(q_proj|fc1)\.base_layer\.bias", k)}
    edit_tensors(folder, lambda tensors: tensors | {k: v.detach().clone() for k, v in biases.items()})


def test_the_table_has_every_field_of_the_installed_version() -> None:
    """A new field of PEFT is decided here: folded, ignored with a reason, or refused by name."""
    known = {*FIRST, *(name for fields in ADDED.values() for name in fields)}
    added_since = {"runtime_config", "kasa_config"}  # the first is not written
    assert set(LoraConfig().to_dict()) - known <= added_since


@pytest.mark.parametrize("field", [{"enable_lora": [True, False, True]}, {"layer_replication": [[0, 2]]}])
def test_settings_of_old_versions_that_change_the_result_are_refused(field: dict[str, Any], base: Path, tmp_path: Path) -> None:
    train(AutoModel.from_pretrained(base), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(AdapterMismatch, match=rf"sets {next(iter(field))}="):
        folded(tmp_path / "adapter", base)
