"""Adapters are matched to the base weight by weight, or refused with the reason."""

import json
from pathlib import Path

import pytest
import torch
from transformers import RegNetConfig, RegNetModel, ViTImageProcessor

from lora_embed.errors import AdapterMismatch, StorageError
from lora_embed.model.adapter import read_adapter
from lora_embed.model.base_files import find_base
from lora_embed.model.change import LowRank
from lora_embed.model.match import Adapter, match_adapter, target_of
from lora_embed.model.remarks import remarks
from lora_embed.model.whole import Target
from models import edit_tensors, save_adapter, save_adapter_of, save_base, with_v4_names


def matched(adapter: Path, base: Path) -> Adapter:
    return match_adapter(read_adapter(str(adapter)), target_of(find_base(str(base), None)))


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_names_of_transformers_4_and_5_give_the_same_factors(tmp_path: Path, family: str) -> None:
    base = save_base(tmp_path / "base", family)
    new = matched(save_adapter(tmp_path / "new", base), base)
    old = matched(with_v4_names(save_adapter(tmp_path / "old", base), family), base)
    assert sorted(new.changes) == sorted(old.changes)
    assert len(new.changes) == 6
    assert all(torch.equal(low_rank(new, name).delta(), low_rank(old, name).delta()) for name in new.changes)


def test_head_is_dropped_and_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = matched(save_adapter(tmp_path / "adapter", base, labels=27), base)
    assert adapter.head_keys == ("classifier.bias", "classifier.weight")
    assert not any("classifier" in name for name in adapter.changes)


def test_delta_is_scale_times_b_times_a(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base, r=4, lora_alpha=8, rank_pattern={"fc1": 2}, alpha_pattern={"fc1": 6})
    saved, adapter = read_adapter(str(folder)), matched(folder, base)
    for name, scale in (("layers.1.attention.q_proj", 2.0), ("layers.0.mlp.fc1", 3.0)):
        a, b = (saved.tensors[f"base_model.model.vit.{name}.lora_{half}.weight"].double() for half in "AB")
        assert torch.equal(low_rank(adapter, f"{name}.weight").delta(), scale * (b @ a))


def test_rank_stabilised_scale(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = matched(save_adapter(tmp_path / "adapter", base, r=4, lora_alpha=8, use_rslora=True), base)
    assert {low_rank(adapter, name).scale for name in adapter.changes} == {4.0}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"use_qalora": True}, "use_qalora"),
    ],
)
def test_what_cannot_be_folded_exactly_is_refused_by_name(tmp_path: Path, config: dict[str, object], field: str) -> None:
    base = save_base(tmp_path / "base")
    with pytest.raises(AdapterMismatch, match=field):
        read_adapter(str(save_adapter(tmp_path / "adapter", base, **config)))


def test_unknown_config_field_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_next_years_trick": True}))
    with pytest.raises(AdapterMismatch, match="use_next_years_trick=true, which is not known"):
        read_adapter(str(folder))


def test_adapter_of_a_deeper_base_is_refused(tmp_path: Path) -> None:
    base, deeper = save_base(tmp_path / "base"), save_base(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(AdapterMismatch, match=r"3 of the 9 weights that it changes match no weight of .*layers\.2"):
        matched(save_adapter(tmp_path / "adapter", deeper), base)


def test_adapter_of_a_wider_base_is_refused(tmp_path: Path) -> None:
    base, wider = save_base(tmp_path / "base"), save_base(tmp_path / "wider", hidden_size=48)
    with pytest.raises(AdapterMismatch, match="6 of the 6 weights that it changes match no weight of"):
        matched(save_adapter(tmp_path / "adapter", wider), base)


def test_renamed_modules_are_refused_not_ignored(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base)
    edit_tensors(folder, lambda tensors: {name.replace("q_proj", "qq_proj"): value for name, value in tensors.items()})
    with pytest.raises(AdapterMismatch, match="2 of the 6 weights that it changes match no weight"):
        matched(folder, base)


def test_missing_half_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base)
    edit_tensors(folder, lambda tensors: {n: v for n, v in tensors.items() if "layers.1.mlp.fc1.lora_B" not in n})
    with pytest.raises(AdapterMismatch, match=r"layers\.1\.mlp\.fc1 has no lora_B"):
        matched(folder, base)


def test_modules_that_the_configuration_does_not_name_are_folded_and_said(
    tmp_path: Path, real_adapters: dict[str, Path], target: Target
) -> None:
    """PEFT passes over such tensors when it loads the file, such as layers that only one of two merged adapters has."""
    base = save_base(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base)
    path = folder / "adapter_config.json"
    for change in ({"layers_to_transform": [0]}, {"exclude_modules": r".*layers\.1\..*"}):
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | change))
        adapter = matched(folder, base)
        assert [module for module in adapter.untargeted if "layers.0" in module] == []
        assert len(adapter.untargeted) == 3
        assert any(
            "holds tensors for 3 modules that adapter_config.json does not target" in note for note in notes(base, adapter)
        )
        path.write_text(json.dumps(config))
    assert list(notes(base, matched(folder, base))) == []
    assert list(notes(base, matched(with_v4_names(folder, "vit"), base))) == []
    assert all(match_adapter(read_adapter(str(real)), target).untargeted == () for real in real_adapters.values())


def notes(base: Path, adapter: Adapter) -> list[str]:
    return list(remarks(find_base(str(base), None), [adapter]))


@pytest.mark.parametrize("rank", [4, 16])
def test_a_convolution_in_groups_is_named_where_it_is_one(tmp_path: Path, rank: int) -> None:
    """PEFT trains it with two factors of different ranks, and does not merge it either; older files have equal ranks."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    config = RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)
    RegNetModel(config).save_pretrained(base)
    ViTImageProcessor().save_pretrained(base)
    grouped = "encoder.stages.1.layers.0.layer.1.convolution"
    folder = save_adapter_of(
        RegNetModel(config), tmp_path / "adapter", r=rank, target_modules=r".*stages.1.layers.0.layer.1.convolution",
        modules_to_save=None,
    )  # fmt: skip
    says = rf"{grouped}\.weight is the weight of a convolution in groups, for which LoRA cannot be folded: it mixes channels"
    with pytest.raises(AdapterMismatch, match=says):
        matched(folder, base)
    whole = {"lora_A.weight": torch.ones(rank, 16, 3, 3), "lora_B.weight": torch.ones(16, rank, 1, 1)}
    edit_tensors(folder, lambda _: {f"base_model.model.{grouped}.{kind}": tensor for kind, tensor in whole.items()})
    with pytest.raises(AdapterMismatch, match=says):
        matched(folder, base)
    edit_tensors(
        folder, lambda tensors: {n.replace("layer.1.conv", "layer.0.conv"): t[:, :8].clone() for n, t in tensors.items()}
    )
    with pytest.raises(AdapterMismatch) as caught:
        matched(folder, base)
    assert "convolution in groups" not in str(caught.value)


def test_nan_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base)
    edit_tensors(folder, lambda tensors: tensors | {max(tensors): torch.full_like(tensors[max(tensors)], float("nan"))})
    with pytest.raises(AdapterMismatch, match="NaN"):
        read_adapter(str(folder))


def test_untrained_adapter_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    with pytest.raises(AdapterMismatch, match="would change nothing"):
        matched(save_adapter(tmp_path / "adapter", base, init_lora_weights=True), base)


def test_rank_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(AdapterMismatch, match=r"has rank 4, but adapter_config\.json says 8"):
        matched(folder, base)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterMismatch, match="a pickle, which is never opened"):
        read_adapter(str(folder))


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    path = save_adapter(tmp_path / "adapter", base) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterMismatch, match="not a whole safetensors file"):
        read_adapter(str(path.parent))


def test_absent_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such directory"):
        read_adapter(str(tmp_path / "nowhere"))


def test_content_hash_follows_content_not_place(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    one, same = save_adapter(tmp_path / "one", base), save_adapter(tmp_path / "same", base)
    other = save_adapter(tmp_path / "other", base, seed=2)
    assert read_adapter(str(one)).content_hash == read_adapter(str(same)).content_hash
    assert read_adapter(str(one)).content_hash != read_adapter(str(other)).content_hash


def low_rank(adapter: Adapter, name: str) -> LowRank:
    change = adapter.changes[name]
    assert isinstance(change, LowRank)
    return change
