"""Batch normalisation: statistics that an adapter saved are folded, those that it did not save are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from jobs import ROOT
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import AdapterMismatch, ConfigError, EncoderError
from lora_embed.model import build as building
from lora_embed.model import member as members
from lora_embed.model.adapter import find_adapter, read_adapter
from lora_embed.model.base import load_headless
from lora_embed.model.base_files import find_base
from lora_embed.model.build import build_encoder, match_adapters
from lora_embed.model.fold import Limit
from lora_embed.model.head import SavedHead, find_head
from lora_embed.model.ingredients import gather
from lora_embed.model.match import match_adapter, target_of
from lora_embed.model.refold import Refolder
from lora_embed.model.relate import relate_adapters
from models import SIZE, edit_tensors, save_adapter, save_base
from trained import difference, folded, states, train

WITH_NORMS = {"target_modules": ["convolution"], "modules_to_save": ["normalization", "classifier"]}
LORA_ALONE = {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}
MEAN = "embedder.embedder.normalization.running_mean"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet whose statistics are those of some images."""
    folder = tmp_path_factory.mktemp("resnet") / "base"
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)
    look(model, 1.0)
    model.save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": SIZE}, crop_pct=0.875).save_pretrained(folder)
    return folder


@torch.no_grad()
def look(model: torch.nn.Module, scale: float) -> None:
    """Forward passes in training mode, which move the statistics."""
    model.train()
    for seed in range(5):
        torch.manual_seed(seed)
        model(pixel_values=scale * torch.randn(4, 3, SIZE, SIZE))
    model.eval()


def trained(base: Path, folder: Path, scale: float = 3.0, **config: Any) -> torch.nn.Module:
    """The body of a PEFT model whose statistics moved in training; the adapter in `folder`."""
    model = ResNetForImageClassification.from_pretrained(base)
    adapted = train(model, folder, **config)
    look(adapted, scale)
    adapted.save_pretrained(folder)
    return model.resnet  # type: ignore[no-any-return]


def recipe(base: Path, *adapters: tuple[Path, float], **settings: Any) -> Recipe:
    specs = tuple(AdapterSpec(path=str(path), weight=weight) for path, weight in adapters)
    return Recipe(base_model=str(base), adapters=specs, **settings)


@pytest.mark.parametrize("family", ["MobileNetV1", "MobileNetV2"])
def test_mobilenets_as_on_the_hub_take_trained_normalisation(family: str, tmp_path: Path) -> None:
    """PEFT cannot train their convolutions, whose padding reads the layer itself; LoRA is on the head alone."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(depth_multiplier=0.35, num_labels=10)
    assert config.tf_padding
    look(model := getattr(transformers, f"{family}ForImageClassification")(config), 1.0)
    model.save_pretrained(tmp_path / "base")
    ConvNextImageProcessor(size={"shortest_edge": SIZE}, crop_pct=0.875).save_pretrained(tmp_path / "base")
    adapted = train(model, tmp_path / "adapter", target_modules=["classifier"], modules_to_save=["normalization"])
    look(adapted, 3.0)
    adapted.save_pretrained(tmp_path / "adapter")
    found, adapter = folded(tmp_path / "adapter", tmp_path / "base")
    body = next(part for name, part in model.named_modules() if name.endswith(model.base_model_prefix))
    assert difference(found, states(body)) <= 1e-5
    assert difference(found, states(load_headless(tmp_path / "base", "base"))) > 0.1
    assert adapter.lost_statistics == ()


def test_saved_statistics_are_folded(base: Path, tmp_path: Path) -> None:
    body = trained(base, tmp_path / "adapter", **WITH_NORMS)
    found, adapter = folded(tmp_path / "adapter", base)
    assert difference(found, states(body)) <= 1e-5
    assert adapter.lost_statistics == ()
    assert sum(name.endswith(("running_mean", "running_var")) for name in adapter.changes) == 12
    edit_tensors(tmp_path / "adapter", lambda t: {k: v for k, v in t.items() if "running" not in k})
    assert difference(folded(tmp_path / "adapter", base)[0], states(body)) > 0.1


def test_statistics_that_were_not_saved_are_named(base: Path, tmp_path: Path) -> None:
    body = trained(base, tmp_path / "adapter", **LORA_ALONE)
    assert difference(folded(tmp_path / "adapter", base)[0], states(body)) > 0.1
    lines: list[str] = []
    build_encoder(gather(recipe(base, (tmp_path / "adapter", 1.0))), tmp_path / "encoder", lines.append)
    said = [line for line in lines if "does not hold the running statistics of 6 batch normalisations" in line]
    assert len(said) == 1
    assert "name them in modules_to_save" in said[0]
    report = json.loads((tmp_path / "encoder" / "merge_report.json").read_text())
    assert [f"note: {note}" for note in report["notes"]] == said


def test_statistics_of_two_adapters_are_the_weighted_sum_of_their_changes(base: Path, tmp_path: Path) -> None:
    adapters = [(tmp_path / "a", 0.3), (tmp_path / "b", 0.5)]
    for scale, (folder, _) in enumerate(adapters, 2):
        trained(base, folder, float(scale), **WITH_NORMS)
    lines: list[str] = []
    build_encoder(gather(recipe(base, *adapters)), tmp_path / "encoder", lines.append)
    assert not any("does not hold" in line for line in lines)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "encoder"))
    saved = [(load_file(folder / "adapter_model.safetensors"), weight) for folder, weight in adapters]
    for name in after:
        if name.endswith(("running_mean", "running_var")):
            old = before[f"resnet.{name}"].double()
            changes = [weight * (tensors[f"base_model.model.resnet.{name}"].double() - old) for tensors, weight in saved]
            assert torch.equal(after[name], (old + sum(changes)).float())
    report = json.loads((tmp_path / "encoder" / "merge_report.json").read_text())
    assert MEAN in report["members"][0]["weights"]


def test_a_variance_below_zero_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "a", 0.1, **WITH_NORMS)
    says = r"running_var is negative after the merge, but is a variance of batch normalisation: .* Make their weights smaller"
    with pytest.raises(EncoderError, match=says):
        build_encoder(gather(recipe(base, (tmp_path / "a", 4.0))), tmp_path / "encoder", lambda _: None)


def test_statistics_cannot_be_stored_as_an_adapter(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "a", **WITH_NORMS)
    with pytest.raises(ConfigError, match=r"so one LoRA adapter cannot hold it\. Store the whole"):
        build_encoder(gather(recipe(base, (tmp_path / "a", 1.0))), tmp_path / "encoder", lambda _: None, Limit())


def test_statistics_that_were_changed_after_saving_are_noticed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof compares buffers as it compares parameters, whether an adapter changes them or not."""
    right = members.write_member

    def write(member: members.Member, folder: Path, found: Any) -> None:
        right(member, folder, found)
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {MEAN: tensors[MEAN] * 1.01}, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(building, "write_member", write)
    for name, config, says in (
        ("norms", WITH_NORMS, "differs from the one recomputed"),
        ("alone", LORA_ALONE, "in weights that no adapter changes"),
    ):
        trained(base, tmp_path / name, **config)
        with pytest.raises(EncoderError, match=says):
            build_encoder(gather(recipe(base, (tmp_path / name, 1.0))), tmp_path / "encoder", lambda _: None)


def test_a_search_folds_statistics_anew_each_time(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "a", **WITH_NORMS)
    one, half = (recipe(base, (tmp_path / "a", weight)) for weight in (1.0, 0.5))
    refolder = Refolder(gather(one), "cpu")
    spaces = []
    for tried in (one, half, one):
        refolder.fold(tried)
        spaces.append(refolder.space_id())
    assert spaces[0] == spaces[2] != spaces[1]
    built = build_encoder(gather(half), tmp_path / "encoder", lambda _: None)
    assert built.space_id == spaces[1]


def test_statistics_count_where_adapters_are_compared(base: Path, tmp_path: Path) -> None:
    for scale, name in ((2.0, "a"), (3.0, "b")):
        trained(base, tmp_path / name, scale, **WITH_NORMS)
    both = recipe(base, (tmp_path / "a", 1.0), (tmp_path / "b", 1.0))
    compared = list(relate_adapters(find_base(str(base), None), match_adapters(gather(both))))
    assert any(weight == MEAN for _, _, _, weight, _ in compared)


def test_a_head_with_normalisation_is_dropped_and_its_counter_with_it(tmp_path: Path) -> None:
    """LeViT's classifiers have batch normalisation; a segmentation head likewise."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    expected, _ = folded(adapter, base)
    statistics = {"weight": torch.ones(4), "running_mean": torch.zeros(4), "num_batches_tracked": torch.tensor(7)}
    for head in ("classifier.bn", "decode_head.batch_norm", "pooler.norm"):
        edit_tensors(adapter, lambda t, head=head: t | {f"base_model.model.{head}.{k}": v for k, v in statistics.items()})
    found, matched = folded(adapter, base)
    assert torch.equal(found, expected)
    assert "decode_head.batch_norm.num_batches_tracked" in matched.head_keys


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_head_of_any_type_is_dropped(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    expected, _ = folded(adapter, base)
    edit_tensors(adapter, lambda t: {k: v.to(dtype) if "classifier.weight" in k else v for k, v in t.items()})
    found, matched = folded(adapter, base)
    assert torch.equal(found, expected)
    head = find_head(find_base(str(base), None), matched)
    assert not isinstance(head, SavedHead)
    assert f"the head is saved as {dtype}" in head


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if "running_var" not in k}, "has .*running_mean, but no .*running_var"),
        (lambda t: {k: v for k, v in t.items() if "running_mean" not in k}, "has .*running_var, but no .*running_mean"),
        (lambda t: {k: -v if "running_var" in k else v for k, v in t.items()}, "running_var holds negative numbers"),
        (lambda t: {k: v[:4].clone() if "running_mean" in k else v for k, v in t.items()}, "6 of the .* match no weight"),
        (lambda t: {k: v[None].clone() if "running_var" in k else v for k, v in t.items()}, "has the shape 8"),
        (lambda t: {k: v.to(torch.int32) if "running_var" in k else v for k, v in t.items()}, "numbers of type int32"),
        (
            lambda t: t | {"base_model.model.resnet.other.num_batches_tracked": torch.tensor(1)},
            "but no weights of resnet.other",
        ),
    ],
)
def test_crooked_statistics_are_refused(change: Any, says: str, base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", **WITH_NORMS)
    edit_tensors(tmp_path / "adapter", change)
    with pytest.raises(AdapterMismatch, match=says):
        folded(tmp_path / "adapter", base)


def test_counters_of_any_type_are_ignored(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", **WITH_NORMS)
    expected, _ = folded(tmp_path / "adapter", base)
    edit_tensors(tmp_path / "adapter", lambda t: {k: v.half() if "tracked" in k else v for k, v in t.items()})
    assert torch.equal(folded(tmp_path / "adapter", base)[0], expected)


def test_hashes_of_adapters_are_those_of_earlier_releases() -> None:
    """A recipe's id is made of them: with others, every table would be embedded again."""
    adapters = ROOT / "src" / "lora_embed" / "demo" / "adapters"
    hashes = {name: find_adapter(str(adapters / name)).content_hash[:16] for name in ("category10", "group27")}
    assert hashes == {"category10": "b46937caff2d2347", "group27": "e7eeacced77afd4b"}


def test_a_base_that_is_opened_by_automodel_has_the_statistics(base: Path, tmp_path: Path) -> None:
    body = trained(base, tmp_path / "adapter", **WITH_NORMS)
    build_encoder(gather(recipe(base, (tmp_path / "adapter", 1.0))), tmp_path / "encoder", lambda _: None)
    assert difference(states(AutoModel.from_pretrained(tmp_path / "encoder")), states(body)) <= 1e-5
    assert match_adapter(read_adapter(str(tmp_path / "adapter")), target_of(find_base(str(base), None))).lost_statistics == ()
