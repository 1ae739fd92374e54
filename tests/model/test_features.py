"""What PEFT's LoRA can hold, feature by feature: one adapter against PEFT's own forward pass, two against float64 by hand.

What PEFT's `add_weighted_adapter` makes of the same two is measured beside it; docs/adapters.md shows the figures.
"""

import copy
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedModel

from jobs import ROOT
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.model.adapter import read_adapter
from lora_embed.model.base_files import find_base
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import Encoder, load_encoder
from lora_embed.model.golden import relative_difference
from lora_embed.model.ingredients import gather
from lora_embed.model.match import match_adapter, target_of
from lora_embed.model.processor import read_processor
from models import FAMILIES, edit_tensors, save_bases
from short import slow_but_every

DOCS = ROOT / "docs" / "adapters.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
WEIGHTS = (0.6, 0.4)
PREFIX = "base_model.model."
Vectors = NDArray[np.float32]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What two adapters are made with, and what is known of PEFT's way with them."""

    handled: str  # for the docs
    config: dict[str, Any]
    second: dict[str, Any] = field(default_factory=dict)  # of the second adapter, where it differs
    family: str = "vit"
    peft: str = "right"  # merged by PEFT: right, wrong, or the beginning of its refusal
    issue: str = ""  # of huggingface/peft
    cast: torch.dtype = torch.float32


ATTENTION = ["q_proj", "v_proj", "fc1"]
SUPPORTS_ONE = "LoraModel supports only 1 adapter with bias"
SAME_SAVED = "Cannot add weighted adapters if they target the same module with modules_to_save"
FACTORS = "`s·B·A`"
FEATURES = {
    "plain LoRA": Feature(handled=FACTORS, config={}),
    "other ranks": Feature(handled=FACTORS, config={"r": 1, "lora_alpha": 4}, second={"r": 8, "lora_alpha": 3}),
    "`rank_pattern`, `alpha_pattern`": Feature(
        handled=FACTORS + ", each module by its own rank and alpha",
        config={"rank_pattern": {"fc1": 2, r"layers\.0\.attention\.q_proj": 6}, "alpha_pattern": {"fc1": 7, "^vit.*v_proj": 3}},
    ),
    "`use_rslora`": Feature(
        handled="alpha over the root of the rank",
        config={"use_rslora": True},
        second={"r": 2, "lora_alpha": 6},
        peft="wrong",
        issue="#3761",
    ),
    "`layers_to_transform`": Feature(
        handled="each adapter in its own layers",
        config={"layers_to_transform": [0], "layers_pattern": "layers"},
        second={"layers_to_transform": [1]},
        peft="wrong",
    ),
    "`exclude_modules`": Feature(
        handled="shown by the tensors",
        config={"exclude_modules": ["fc1"]},
        second={"exclude_modules": ["vit.layers.0.mlp.fc1"]},
        peft="wrong",
    ),
    "`target_modules` as a pattern": Feature(
        handled="shown by the tensors",
        config={"target_modules": r".*layers\.1\..*(k_proj|fc2)"},
        second={"target_modules": r".*layers\.\d\..*(k_proj|q_proj)"},
    ),
    "`target_modules: all-linear`": Feature(handled="shown by the tensors", config={"target_modules": "all-linear"}),
    "`fan_in_fan_out` on linear layers": Feature(handled="ignored, as PEFT does", config={"fan_in_fan_out": True}),
    "convolution": Feature(handled="`s·B·A` as a kernel", config={"target_modules": ["projection", "q_proj"]}),
    "embedding": Feature(
        handled="`s·(B·A)ᵀ`", config={"target_modules": ["position_embedding", "q_proj"]}, family="clip"
    ),
    "DoRA": Feature(
        handled="each output scaled to its learned length", config={"use_dora": True}, peft="wrong", issue="#3761"
    ),
    "DoRA on a convolution": Feature(
        handled="the same",
        config={"use_dora": True, "target_modules": ["projection"]},
        peft="wrong",
        issue="#3761",
    ),
    "DoRA with `use_rslora`": Feature(
        handled="both", config={"use_dora": True, "use_rslora": True}, peft="wrong", issue="#3761"
    ),
    "`lora_bias`": Feature(handled="`s·bias` added to the bias", config={"lora_bias": True}, peft="wrong", issue="#3761"),
    '`bias: "all"`': Feature(handled="saved − base", config={"bias": "all"}, peft=SUPPORTS_ONE, issue="#792"),
    '`bias: "lora_only"`': Feature(handled="saved − base", config={"bias": "lora_only"}, peft=SUPPORTS_ONE, issue="#792"),
    "`lora_bias` and `bias`": Feature(
        handled="saved − base, `s·bias` added", config={"lora_bias": True, "bias": "all"}, peft=SUPPORTS_ONE, issue="#792"
    ),
    "`modules_to_save`: the head": Feature(
        handled="dropped", config={"modules_to_save": ["classifier"]}, peft=SAME_SAVED, issue="#1595"
    ),
    "`modules_to_save`: a norm": Feature(
        handled="saved − base",
        config={"modules_to_save": ["classifier", "layernorm_after"]},
        peft=SAME_SAVED,
        issue="#1615",
    ),
    '`modules_to_save` and `bias: "all"`': Feature(
        handled="saved − base",
        config={"modules_to_save": ["classifier", "layernorm_after"], "bias": "all"},
        peft=SUPPORTS_ONE,
        issue="#792",
    ),
    "LoRA on the head": Feature(handled="dropped", config={"target_modules": [*ATTENTION, "classifier"]}),
    "PiSSA": Feature(
        handled="the part that went into the factors is taken out of the base",
        config={"init_lora_weights": "pissa"},
        peft="wrong",
        issue="#2184",
    ),
    "PiSSA with DoRA": Feature(
        handled="both", config={"init_lora_weights": "pissa", "use_dora": True}, peft="wrong", issue="#2184, #3761"
    ),
    "OLoRA": Feature(
        handled="as PiSSA, by QR", config={"init_lora_weights": "olora"}, peft="wrong", issue="#2184"
    ),
    "`init_lora_weights: gaussian`": Feature(handled=FACTORS, config={"init_lora_weights": "gaussian"}),
    "`init_lora_weights: orthogonal`": Feature(handled=FACTORS, config={"init_lora_weights": "orthogonal"}),
    "`init_lora_weights: eva`": Feature(handled=FACTORS, config={"init_lora_weights": "eva"}),
    "`init_lora_weights: mica`": Feature(handled=FACTORS, config={"init_lora_weights": "mica"}),
    "saved in float16": Feature(handled="read as float64", config={}, cast=torch.float16),
    "saved in bfloat16": Feature(handled="read as float64", config={}, cast=torch.bfloat16),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Made:
    """One feature's base, its two adapters, and the vectors of the base and of each adapter's own model by PEFT."""

    name: str
    feature: Feature
    bases: dict[str, Path]
    adapters: tuple[Path, Path]
    folder: Path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return {family: save_bases(tmp_path_factory.mktemp(family), family) for family in ("vit", "clip")}


@pytest.fixture(scope="module", params=slow_but_every(2, FEATURES))
def made(request: pytest.FixtureRequest, bases: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Made:
    feature, folder = FEATURES[request.param], tmp_path_factory.mktemp("feature")
    own = bases[feature.family]
    settings = (feature.config, feature.config | feature.second)
    adapters = tuple(train(folder / f"{n}", classifier(feature, own), n, feature.cast, **one) for n, one in enumerate(settings))
    return Made(name=request.param, feature=feature, bases=own, adapters=(adapters[0], adapters[1]), folder=folder)


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, str]]]:
    """Measured by the tests of each feature; written to the docs at the end when that is asked for and all passed."""
    measured: dict[str, dict[str, str]] = {}
    yield measured
    if os.environ.get("LORA_EMBED_WRITE_DOCS") == "1" and not request.session.testsfailed:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        table = "".join(f"{row(name, measured[name])}\n" for name in FEATURES)
        DOCS.write_text(f"{before}{BEGIN}\n{HEADER}{table}{END}{rest.partition(END)[2]}", encoding="utf-8")


HEADER = """| feature | how it is folded | PEFT, loaded alone | two merged by PEFT's `cat` | two merged here | issue |
| --- | --- | --- | --- | --- | --- |
"""


def row(name: str, measured: dict[str, str]) -> str:
    feature = FEATURES[name]
    issue = feature.issue or ("" if feature.peft == "right" else "none known")
    return f"| {name} | {feature.handled} | {measured['alone']} | {measured['peft']} | {measured['here']} | {issue} |"


def classifier(feature: Feature, own: dict[str, Path]) -> PreTrainedModel:
    return copy.deepcopy(loaded(feature.family, own["classification"]))


@functools.cache
def loaded(family: str, folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = FAMILIES[family].classifier.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def train(folder: Path, model: PreTrainedModel, seed: int, cast: torch.dtype, **config: Any) -> Path:
    """An adapter as after training: all that PEFT would have trained is moved at random."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | config
    adapted = get_peft_model(model, LoraConfig(**settings))
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    adapted.save_pretrained(folder)
    return edit_tensors(folder, lambda tensors: {name: tensor.to(cast) for name, tensor in tensors.items()})


def images() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((45, 64), (32, 32), (90, 37))]


@torch.inference_mode()
def vectors(model: Any, made: Made, dtype: torch.dtype = torch.float32) -> Vectors:
    """The guide's vectors, of any classification model."""
    processor = read_processor(made.bases["headless"]).made
    pixels = torch.tensor(np.concatenate([processor(image)["pixel_values"] for image in images()])).to(dtype)
    states = model.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    return states.mean(dim=1).double().numpy()  # type: ignore[no-any-return]


def build(made: Made, adapters: tuple[Path, ...], weights: tuple[float, ...], out: Path) -> Encoder:
    specs = tuple(AdapterSpec(path=str(path), weight=weight) for path, weight in zip(adapters, weights, strict=True))
    recipe = Recipe(base_model=str(made.bases["headless"]), adapters=specs)
    build_encoder(gather(recipe), out, lambda _line: None)
    return load_encoder(out, batch_size=4)


@torch.no_grad()
def by_hand(made: Made, adapters: tuple[Path, ...], weights: tuple[float, ...]) -> Vectors:
    """The classification model in float64, each adapter's change of its weights added: formulas of the papers, and no more."""
    model = classifier(made.feature, made.bases).double()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    parameters = dict(model.named_parameters())
    for folder, weight in zip(adapters, weights, strict=True):
        for name, change in changes_by_hand(folder, before).items():
            parameters[name] += weight * change
    return vectors(model, made, torch.float64)


def changes_by_hand(folder: Path, before: Tensors) -> Tensors:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        name.removeprefix(PREFIX).replace(".base_layer", ""): tensor.double()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    changes = {name: tensor - before[name] for name, tensor in tensors.items() if name in before}
    modules = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    for module in modules:
        old, name = before[f"{module}.weight"], f"{module}.weight"
        if f"{module}.lora_embedding_A" in tensors:
            b, a = tensors[f"{module}.lora_embedding_A"].T, tensors[f"{module}.lora_embedding_B"].T
        else:
            b, a = (tensors[f"{module}.lora_{half}.weight"] for half in "BA")
        scale = scale_by_hand(config, module, len(a))
        change = scale * (b.flatten(1) @ a.flatten(1)).reshape(old.shape)
        if config["init_lora_weights"] == "pissa":
            u, s, vh = torch.linalg.svd(old, full_matrices=False)
            change -= u[:, : len(a)] @ s[: len(a)].diag() @ vh[: len(a)]
        if config["init_lora_weights"] == "olora":
            q, r = torch.linalg.qr(old)
            change -= scale * q[:, : len(a)] @ r[: len(a)]
        if config["use_dora"]:
            new = (old + change).flatten(1)
            lengths = tensors[f"{module}.lora_magnitude_vector"].flatten()
            change = (torch.nn.functional.normalize(new, dim=1) * lengths[:, None]).reshape(old.shape) - old
        changes[name] = change
        if config["lora_bias"]:
            bias = f"{module}.bias"
            changes[bias] = changes.get(bias, 0) + scale * tensors[f"{module}.lora_B.bias"]
    return changes


def scale_by_hand(config: dict[str, Any], module: str, rank: int) -> float:
    alphas = [alpha for key, alpha in config["alpha_pattern"].items() if re.search(rf"(^|\.)({key})$", module)]
    alpha = alphas[0] if alphas else config["lora_alpha"]
    return float(alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank)


def test_one_adapter_is_what_peft_computes_with_it(made: Made, figures: dict[str, dict[str, str]]) -> None:
    one = made.adapters[0]
    alone = vectors(PeftModel.from_pretrained(classifier(made.feature, made.bases), one), made)
    found = build(made, (one,), (1.0,), made.folder / "one").embed(images())
    assert relative_difference(found, alone) <= 1e-5
    assert relative_difference(found, vectors(classifier(made.feature, made.bases), made)) > 1e-2
    difference = relative_difference(alone, by_hand(made, (one,), (1.0,)))
    assert difference <= 1e-5  # so that what is written by hand is what the adapter was trained to do
    figures.setdefault(made.name, {})["alone"] = f"{difference:.0e}"


def test_two_adapters_are_the_sum_of_both(made: Made, figures: dict[str, dict[str, str]]) -> None:
    expected = by_hand(made, made.adapters, WEIGHTS)
    found = build(made, made.adapters, WEIGHTS, made.folder / "two").embed(images())
    difference = relative_difference(found, expected)
    assert difference <= 1e-5
    assert relative_difference(expected, by_hand(made, made.adapters[:1], WEIGHTS[:1])) > 1e-3  # the second one counts
    figures.setdefault(made.name, {})["here"] = f"{difference:.0e}"


def test_what_peft_makes_of_the_two(made: Made, figures: dict[str, dict[str, str]]) -> None:
    """No promise of ours, but of the docs: it shows when another version of PEFT changes its ways."""
    measured = figures.setdefault(made.name, {})
    if made.feature.peft not in ("right", "wrong"):
        with pytest.raises(ValueError, match=made.feature.peft):
            merged_by_peft(made)
        measured["peft"] = "refused"
        return
    difference = relative_difference(merged_by_peft(made), by_hand(made, made.adapters, WEIGHTS))
    assert difference <= 1e-5 if made.feature.peft == "right" else difference > 1e-3
    measured["peft"] = f"{difference:.0e}" if made.feature.peft == "right" else f"**{difference:.0e}**"


def merged_by_peft(made: Made) -> Vectors:
    model = PeftModel.from_pretrained(classifier(made.feature, made.bases), made.adapters[0], adapter_name="a")
    model.load_adapter(made.adapters[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "both", combination_type="cat")
    model.set_adapter("both")
    return vectors(model, made)


@pytest.mark.parametrize(
    ("config", "dropped"),
    [
        ({"modules_to_save": ["classifier"]}, ["classifier.bias", "classifier.weight"]),
        ({"target_modules": [*ATTENTION, "classifier"]}, ["classifier.lora_A.weight", "classifier.lora_B.weight"]),
    ],
)
def test_what_is_dropped_is_named(
    bases: dict[str, dict[str, Path]], tmp_path: Path, config: dict[str, Any], dropped: list[str]
) -> None:
    base = bases["vit"]
    folder = train(tmp_path / "adapter", classifier(FEATURES["plain LoRA"], base), 1, torch.float32, **config)
    adapter = match_adapter(read_adapter(str(folder)), target_of(find_base(str(base["headless"]), None)))
    assert list(adapter.head_keys) == dropped
    assert len(adapter.changes) == 6


@pytest.mark.parametrize("cut", [PREFIX, PREFIX + "vit."])
def test_names_without_prefixes_are_the_same_adapter(bases: dict[str, dict[str, Path]], tmp_path: Path, cut: str) -> None:
    """As other tools than PEFT write them, which PEFT itself passes over without a word."""
    base, plain = bases["vit"], FEATURES["plain LoRA"]
    first, second = (train(tmp_path / name, classifier(plain, base), 1, torch.float32) for name in ("first", "second"))
    edit_tensors(second, lambda tensors: {name.removeprefix(cut): tensor for name, tensor in tensors.items()})
    target = target_of(find_base(str(base["headless"]), None))
    whole, bare = (match_adapter(read_adapter(str(folder)), target).changes for folder in (first, second))
    assert whole.keys() == bare.keys()
    before = dict.fromkeys(whole, torch.zeros(1))
    assert all(torch.equal(whole[name].delta(before[name]), bare[name].delta(before[name])) for name in whole)
