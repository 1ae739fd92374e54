"""Adapters that were trained on another model than the base itself: around it, on a compiled one, or saved by other tools."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, CLIPModel, CLIPVisionModel, PreTrainedModel

from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import AdapterMismatch
from lora_embed.model.base_files import find_base
from lora_embed.model.build import build_encoder
from lora_embed.model.head import find_head
from lora_embed.model.ingredients import gather
from models import FAMILIES, edit_tensors, save_adapter, save_adapter_of, save_bases
from short import slow_but, slow_but_every
from trained import Own, difference, folded, states, train

Bases = dict[str, Path]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return save_bases(tmp_path_factory.mktemp("vit"), "vit")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return save_bases(tmp_path_factory.mktemp("clip"), "clip")


def headless(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(base / "headless")
    return model.eval()


def linear() -> nn.Module:
    return nn.Linear(32, 5)


def compiled_layers(model: PreTrainedModel) -> PreTrainedModel:
    for number, layer in enumerate(model.layers):
        model.layers[number] = torch.compile(layer, backend="eager")
    return model


@dataclass(frozen=True)
class Wrap:
    """A model around the base: what is trained, and what has to be left out of the names."""

    wrap: Callable[[PreTrainedModel], nn.Module]
    left_out: tuple[str, ...]
    config: dict[str, Any]


HEAD = {"modules_to_save": ["classifier"]}
WRAPS = {
    "the base alone": Wrap(lambda body: body, (), {}),
    "a backbone and a classifier": Wrap(lambda body: Own(backbone=body, classifier=linear()), ("backbone.",), HEAD),
    "a head of another usual name": Wrap(
        lambda body: Own(encoder=body, head=linear()), ("encoder.",), {"modules_to_save": ["head"]}
    ),
    "two classes deep": Wrap(
        lambda body: Own(model=Own(base=body), classifier=linear()), ("model.base.",), HEAD
    ),
    "a backbone trained with its biases": Wrap(
        lambda body: Own(backbone=body, classifier=linear()), ("backbone.",), HEAD | {"bias": "all"}
    ),
    "a norm and a pattern": Wrap(
        lambda body: Own(backbone=body, classifier=linear()),
        ("backbone.",),
        {"modules_to_save": ["classifier", "layernorm_after"], "target_modules": r"backbone\.layers\.\d\.attention\.q_proj"},
    ),
    "LoRA on the head too": Wrap(
        lambda body: Own(backbone=body, classifier=linear()), ("backbone.",), {"target_modules": ["q_proj", "classifier"]}
    ),
    "DoRA, with ranks and scales by name": Wrap(
        lambda body: Own(backbone=body),
        ("backbone.",),
        {"use_dora": True, "rank_pattern": {r"backbone\.layers\.0\..*q_proj": 2}, "alpha_pattern": {"backbone.*fc1": 3}},
    ),
    "a compiled model": Wrap(lambda body: torch.compile(body, backend="eager"), ("_orig_mod.",), {}),
    "compiled layers": Wrap(compiled_layers, ("_orig_mod.",), {}),
    "a compiled backbone": Wrap(
        lambda body: Own(backbone=torch.compile(body, backend="eager"), classifier=linear()), ("backbone.", "_orig_mod."), HEAD
    ),
    "a model on several GPUs": Wrap(lambda body: nn.DataParallel(body), ("module.",), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but_every(3, WRAPS))
def test_an_adapter_of_a_model_around_the_base_is_folded_and_said(name: str, vit: Bases, tmp_path: Path) -> None:
    case, body = WRAPS[name], headless(vit["headless"].parent)
    before = states(body)
    train(case.wrap(body), tmp_path / "adapter", **case.config)
    found, adapter = folded(tmp_path / "adapter", vit["headless"])
    assert difference(found, states(body)) <= 1e-5
    assert difference(found, before) > 1e-3
    assert adapter.left_out == case.left_out
    assert {name.partition(".")[0] for name in adapter.heads} <= {"classifier", "head", "pooler"}


@pytest.mark.parametrize("name", slow_but(["default", "flowers", "my.adapter", "Blumen-ä"], ["my.adapter"].__contains__))
@pytest.mark.parametrize("kind", ["plain", "dora", "biases", "embedding"])
def test_keys_of_a_state_dict_hold_the_adapters_name(name: str, kind: str, vit: Bases, clip: Bases, tmp_path: Path) -> None:
    """What `state_dict` of a PEFT model holds of the adapter, saved by hand. PEFT refuses a dot; other tools do not."""
    config: dict[str, dict[str, Any]] = {
        "plain": {"modules_to_save": ["layernorm_after"]}, "dora": {"use_dora": True},
        "biases": {"bias": "all", "lora_bias": True}, "embedding": {"target_modules": ["position_embedding", "q_proj"]},
    }  # fmt: skip
    base = (clip if kind == "embedding" else vit)["headless"]
    body = headless(base.parent)
    adapted = train(body, tmp_path / "saved", name="default", **config[kind])
    state = {
        key.replace(".default", f".{name}"): tensor.contiguous()
        for key, tensor in adapted.state_dict().items()
        if "lora_" in key or "modules_to_save" in key or "original_module" in key or (kind == "biases" and "bias" in key)
    }
    (tmp_path / "by hand").mkdir()
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "by hand" / "adapter_model.safetensors")
    (tmp_path / "by hand" / "adapter_config.json").write_text((tmp_path / "saved" / "adapter_config.json").read_text())
    found, adapter = folded(tmp_path / "by hand", base)
    assert difference(found, states(body)) <= 1e-5
    assert adapter.adapter_name == name


@pytest.mark.parametrize(
    ("front", "left_out"),
    [
        ("", ()),
        ("base_model.model.base_model.model.", ("base_model.model.",)),
        ("module.base_model.model.", ("module.",)),
        ("_orig_mod.base_model.model.", ("_orig_mod.",)),
        ("model.base_model.model.", ("model.",)),
        ("model._orig_mod.base_model.model.base_model.model.", ("model._orig_mod.base_model.model.",)),
        ("base_model.model.module.", ("module.",)),
        ("base_model.model.a.b.c.d.", ("a.b.c.d.",)),
    ],
)
def test_what_stands_before_all_names_is_left_out(front: str, left_out: tuple[str, ...], vit: Bases, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", vit["headless"], bias="all")
    expected, plain = folded(adapter, vit["headless"])
    edit_tensors(adapter, lambda tensors: {f"{front}{k.removeprefix('base_model.model.')}": v for k, v in tensors.items()})
    found, matched = folded(adapter, vit["headless"])
    assert torch.equal(found, expected)
    assert matched.left_out == left_out
    assert matched.heads.keys() == plain.heads.keys() == {"classifier.weight", "classifier.bias"}
    assert find_head(find_base(str(vit["headless"]), None), matched) == find_head(find_base(str(vit["headless"]), None), plain)


def test_the_vision_part_of_a_dual_model_in_somebodys_class(clip: Bases, tmp_path: Path) -> None:
    """The text part is left out as a head is; a class with the text part alone has nothing for an encoder."""
    model = CLIPModel.from_pretrained(clip["dual"])
    train(Own(clip=model, classifier=linear()), tmp_path / "adapter", modules_to_save=["classifier"])
    found, adapter = folded(tmp_path / "adapter", clip["dual"])
    body = CLIPVisionModel.from_pretrained(clip["dual"])
    assert difference(found, states(model.vision_model)) <= 1e-5
    assert difference(found, states(body)) > 1e-2
    assert adapter.left_out == ("clip.",)
    assert any("text_model" in name for name in adapter.heads)
    for part in ("vision_model", "text_model"):
        edited = train(Own(clip=CLIPModel.from_pretrained(clip["dual"])), tmp_path / part)
        assert edited is not None
        edit_tensors(tmp_path / part, lambda tensors, part=part: {k: v for k, v in tensors.items() if part in k})
    assert difference(folded(tmp_path / "vision_model", clip["dual"])[0], found) <= 1e-5
    with pytest.raises(AdapterMismatch, match=r"which an encoder does not have: it is a task's head, or the other part of a"):
        folded(tmp_path / "text_model", clip["dual"])


REFUSED = {  # what stands before the names → why it is not left out
    "beit.": "'beit' before them is another part of a model, or another family",
    "text_encoder.": "'text_encoder' before them is another part of a model, or another family",
    "language_model.": "'language_model' before them is another part of a model, or another family",
}


@pytest.mark.parametrize("front", REFUSED)
def test_names_of_another_model_are_not_taken_for_those_of_the_base(front: str, vit: Bases, tmp_path: Path) -> None:
    """Their shapes are the base's, so that they would be folded."""
    adapter = save_adapter(tmp_path / "adapter", vit["headless"], modules_to_save=None)
    edit_tensors(adapter, lambda tensors: {k.replace("vit.", front): v for k, v in tensors.items()})
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "somebody/other"}))
    with pytest.raises(AdapterMismatch, match=REFUSED[front]):
        folded(adapter, vit["headless"])


def test_two_models_in_one_class_are_not_one_base(vit: Bases, tmp_path: Path) -> None:
    root = vit["headless"].parent
    train(Own(teacher=headless(root), student=headless(root)), tmp_path / "adapter")
    with pytest.raises(
        AdapterMismatch, match=r"12 tensors|begin differently \('student', 'teacher'\), so they belong to several"
    ):
        folded(tmp_path / "adapter", vit["headless"])


def test_a_file_of_a_wrapped_model_must_be_whole_too(vit: Bases, tmp_path: Path) -> None:
    for number, targets in enumerate((["q_proj", "fc1"], r"backbone\.layers\.\d+\.(attention\.q_proj|mlp\.fc1)")):
        folder = tmp_path / str(number)
        train(Own(backbone=headless(vit["headless"].parent), classifier=linear()), folder, target_modules=targets, **HEAD)
        edit_tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if "layers.1.mlp" not in k})
        with pytest.raises(AdapterMismatch, match=r"has no tensors for layers\.1\.mlp\.fc1\.weight, so the file is incomplete"):
            folded(folder, vit["headless"])


def test_a_head_of_somebodys_own_class_is_not_used_as_that_of_transformers(vit: Bases, tmp_path: Path) -> None:
    own = Own(backbone=headless(vit["headless"].parent), classifier=linear())
    train(own, tmp_path / "adapter", **HEAD)
    _, adapter = folded(tmp_path / "adapter", vit["headless"])
    assert "belongs to a class of its own around the base" in str(find_head(find_base(str(vit["headless"]), None), adapter))


def test_what_was_left_out_is_said_by_the_build_and_in_its_report(vit: Bases, tmp_path: Path) -> None:
    train(Own(backbone=headless(vit["headless"].parent)), tmp_path / "adapter")
    lines: list[str] = []
    recipe = Recipe(base_model=str(vit["headless"]), adapters=(AdapterSpec(path=str(tmp_path / "adapter")),))
    build_encoder(gather(recipe), tmp_path / "encoder", lines.append)
    said = f"{tmp_path / 'adapter'}: 'backbone.' was left out of the names of its tensors."
    assert sum(said in line for line in lines) == 1
    report = json.loads((tmp_path / "encoder" / "merge_report.json").read_text())
    assert sum(note.startswith(said) for note in report["notes"]) == 1


@pytest.mark.slow
def test_every_family_is_found_within_another_class(tmp_path: Path) -> None:
    """Names of transformers 5, as a class around the headless model has them."""
    for family in FAMILIES:
        bases = save_bases(tmp_path / family, family)
        trained = FAMILIES[family].classifier.from_pretrained(bases["classification"])
        adapter = save_adapter_of(trained, tmp_path / family / "adapter", target_modules=list(FAMILIES[family].targets))
        expected, _ = folded(adapter, bases["headless"])
        edit_tensors(
            adapter, lambda t: {k.replace("base_model.model.", "base_model.model.net.inner."): v for k, v in t.items()}
        )
        found, matched = folded(adapter, bases["headless"])
        assert torch.equal(found, expected), family
        assert matched.left_out == ("net.inner.",)
