"""Bases by family: what transformers and PEFT compute themselves, from the forms and names that users have."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Dinov2Config,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    conversion_mapping,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import ConfigError, EncoderError
from lora_embed.images.processors import from_processor
from lora_embed.model.base import load_headless
from lora_embed.model.base_config import read_model_config
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import Encoder, load_encoder
from lora_embed.model.golden import relative_difference
from lora_embed.model.ingredients import gather
from lora_embed.model.locate import head_names, locate, weight_shapes
from lora_embed.model.processor import read_processor
from models import FAMILIES, SIZE, SMALL, Family, save_adapter_of, save_base, save_bases, v4_name, with_v4_names

PLAIN, TRAINED = "headless", "classification"


@dataclass(frozen=True, kw_only=True)
class Built:
    """One family's bases in their forms, an adapter trained on the classification model, and the encoder of both."""

    key: str
    family: Family
    bases: dict[str, Path]
    adapter: Path
    encoder: Encoder
    folder: Path


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    family = FAMILIES[request.param]
    bases = save_bases(folder, request.param)
    trained = family.classifier.from_pretrained(bases[TRAINED])
    adapter = save_adapter_of(trained, folder / "adapter", target_modules=list(family.targets))
    encoder = build(bases[PLAIN], adapter, folder / "encoder")
    return Built(key=request.param, family=family, bases=bases, adapter=adapter, encoder=encoder, folder=folder)


def build(base: Path, adapter: Path | None, out: Path, **settings: object) -> Encoder:
    specs = (AdapterSpec(path=str(adapter)),) if adapter else ()
    settings = settings if adapter else {"merge_method": "none"} | settings
    build_encoder(gather(Recipe(base_model=str(base), adapters=specs, **settings)), out, lambda _line: None)
    return load_encoder(out, batch_size=4)


def images() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    sizes = ((45, 64), (64, 45), (32, 32), (90, 37))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def pooled(states: torch.Tensor) -> NDArray[np.float32]:
    """The mean of the guide: over tokens, or over height and width."""
    return (states.mean(dim=(2, 3)) if states.ndim == 4 else states.mean(dim=1)).numpy()


@torch.inference_mode()
def by_peft(built: Built, adapter: Path | None) -> NDArray[np.float32]:
    """The classification model's own last hidden states, the adapter beside its weights and not merged."""
    model = built.family.classifier.from_pretrained(built.bases[TRAINED])
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    processor = read_processor(built.bases[PLAIN]).made
    pixels = torch.tensor(np.concatenate([processor(image)["pixel_values"] for image in images()]))
    return pooled(model.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states[-1])


def test_vectors_are_those_of_the_adapter_that_is_not_merged(built: Built) -> None:
    found, expected, base = built.encoder.embed(images()), by_peft(built, built.adapter), by_peft(built, None)
    assert relative_difference(found, expected) <= 1e-5
    assert relative_difference(found, base) > 1e-2


@torch.inference_mode()
def test_mean_is_that_of_the_literal_last_hidden_states(built: Built) -> None:
    """What is saved is opened by AutoModel alone, and given the very pixels that the encoder gives its own model."""
    preprocessing = built.encoder.description.preprocessing
    pixels = torch.tensor(np.stack([preprocessing.apply(image) for image in images()])).permute(0, 3, 1, 2).float()
    channels = [torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.add, preprocessing.multiply)]
    model = AutoModel.from_pretrained(built.folder / "encoder").eval()
    values = torch.addcmul(channels[0], pixels, channels[1]).contiguous()
    output = model(pixel_values=values, output_hidden_states=True)
    assert relative_difference(built.encoder.embed(images()), pooled(output.hidden_states[-1])) <= 1e-6
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1]) == (built.family.state == "final output")


def test_what_mean_pools(built: Built) -> None:
    description, family = built.encoder.description, built.family
    assert description.prefix_tokens == family.prefix_tokens
    assert bool(description.tap) == (family.state == "before the final norm")
    with torch.inference_mode():
        state = load_headless(built.bases[PLAIN], "base")(
            torch.zeros(1, 3, SIZE, SIZE), output_hidden_states=True
        ).hidden_states[-1]
    assert state.ndim == (4 if family.pools == "map" else 3)
    assert description.dimension == state.shape[1 if family.pools == "map" else 2]
    assert (description.suffix_tokens, description.channels_last) == (0, False)


def test_names_of_both_versions_fold_into_the_same_bits(built: Built) -> None:
    """Each form of the base, each under another seed: nothing random is left in an encoder, and no name is lost."""
    old = save_adapter_of(
        built.family.classifier.from_pretrained(built.bases[TRAINED]), built.folder / "v4",
        target_modules=list(built.family.targets),
    )  # fmt: skip
    if built.family.v4:
        with_v4_names(old, built.key)
    plain = [form for form in built.bases if form != PLAIN]
    for seed, (form, adapter) in enumerate([(PLAIN, old), *((form, built.adapter) for form in plain)]):
        torch.manual_seed(seed)
        again = build(built.bases[form], adapter, built.folder / f"again-{seed}")
        assert again.space_id == built.encoder.space_id, form


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("around", ["plain", "trained"])
def test_every_weight_is_found_by_every_name_it_has(built: Built, version: int, around: str) -> None:
    config = read_model_config(built.bases[PLAIN], "base")
    prefix = "vision_model." if built.family.dual else f"{built.family.classifier.base_model_prefix}."
    saved = {}
    for weight in weight_shapes(config):
        name = f"{prefix}{weight}" if around == "trained" or (built.family.dual and version == 4) else weight
        saved[weight] = v4_name(name, built.key) if version == 4 else name
    found = locate(config, {saved[weight]: shape for weight, shape in weight_shapes(config).items()})
    assert found == {saved[weight]: weight for weight in saved}


def test_heads_are_known_by_name(built: Built) -> None:
    """All that the classification model has beside the headless one is a head's, and nothing of the headless one is."""
    config = read_model_config(built.bases[PLAIN], "base")
    heads = head_names(config)
    shapes = weight_shapes(config)
    saved = {name: weight.shape for name, weight in load_file(built.bases[TRAINED] / "model.safetensors").items()}
    others = {name for name, place in locate(config, saved).items() if place is None}
    assert others, "a classification model has a classifier"
    assert all(set(name.split(".")[:2]) & heads for name in others)
    assert not {name.split(".")[0] for name in shapes} & heads


def test_saved_again_it_is_the_same(built: Built, tmp_path: Path) -> None:
    for form, folder in built.bases.items():
        model = load_headless(folder, form)
        model.save_pretrained(tmp_path / form)
        torch.manual_seed(99)
        weights = load_headless(tmp_path / form, form).state_dict()
        plain = AutoModel.from_pretrained(tmp_path / form).state_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name]), name
            assert torch.equal(weight, plain[name]), name


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].dual])
def test_adapter_of_a_dual_encoder_counts_for_its_images(family: str, tmp_path: Path) -> None:
    """Trained on text and image together: the text's part is dropped as a head is, the vision part folds."""
    bases = save_bases(tmp_path, family)
    dual = AutoModel.from_pretrained(bases["dual"])
    adapter = save_adapter_of(dual, tmp_path / "adapter", target_modules=["q_proj", "fc1"], modules_to_save=None)
    encoder = build(bases["dual"], adapter, tmp_path / "encoder")
    tensors = load_file(adapter / "adapter_model.safetensors")
    vision = {name: tensor for name, tensor in tensors.items() if ".vision_model." in name}
    assert 0 < len(vision) < len(tensors)
    with torch.inference_mode():
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(bases["dual"]), adapter).base_model.model.eval()
        processor = read_processor(bases["dual"]).made
        pixels = torch.tensor(np.concatenate([processor(image)["pixel_values"] for image in images()]))
        expected = pooled(model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1])
    assert relative_difference(encoder.embed(images()), expected) <= 1e-5


def test_two_names_for_one_weight_are_not_both_found(tmp_path: Path) -> None:
    config = read_model_config(save_base(tmp_path / "base"), "base")
    shape = weight_shapes(config)["layers.0.attention.q_proj.weight"]
    names = ["vit.layers.0.attention.q_proj.weight", "vit.encoder.layer.0.attention.attention.query.weight"]
    found = locate(config, dict.fromkeys(names, shape))
    assert sorted(map(str, found.values())) in (["None", "None"], ["None", "layers.0.attention.q_proj.weight"])


def test_a_head_that_calls_itself_a_body_module_is_not_taken_for_it(tmp_path: Path) -> None:
    config = read_model_config(save_base(tmp_path / "base"), "base")
    shapes = weight_shapes(config)
    name = "layers.0.attention.q_proj.weight"
    turned = {name: torch.Size((shapes[name][0] * 2, shapes[name][1]))}
    assert locate(config, turned) == {name: None}
    for stranger in (f"head.{name}", f"classifier.vit.{name}", "layernorm", "layers.weight"):
        assert locate(config, {stranger: shapes[name]}) == {stranger: None}


def test_a_weight_that_is_two_today_is_not_taken_for_one(tmp_path: Path) -> None:
    """DINOv2's giant: the gate and the up projection were one weight in transformers 4."""
    config = Dinov2Config(**SMALL, use_swiglu_ffn=True)
    gate = weight_shapes(config)["encoder.layer.0.mlp.gate_proj.weight"]
    name = "dinov2.encoder.layer.0.mlp.weights_in.weight"
    assert locate(config, {name: torch.Size((2 * gate[0], gate[1]))}) == {name: None}


def test_a_weight_that_the_loader_turns_is_not_taken_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square weight has the same shape when it lies the other way, and a change would be added crosswise."""
    config = read_model_config(save_base(tmp_path / "base"), "base")
    name = "layers.0.attention.q_proj.weight"
    get_checkpoint_conversion_mapping("ViTModel")
    turned = WeightConverter(name.replace("q_proj", "turned"), name, operations=[Transpose(0, 1)])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "ViTModel", [turned])
    shape = weight_shapes(config)[name]
    assert locate(config, {name: shape}) == {name: name}
    assert locate(config, {turned.source_patterns[0]: shape}) == {turned.source_patterns[0]: None}


def test_siglip_s_attention_pooling_is_not_needed_and_not_made(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "siglip")
    drop_weights(base, "head.")
    assert not any(name.startswith("head.") for name, _ in load_headless(base, "base").named_parameters())


def test_pretraining_s_mask_token_may_be_missing_and_is_then_left_out(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "dinov2")
    drop_weights(base, "mask_token")
    model = load_headless(base, "base")
    assert model.embeddings.mask_token is None
    model.save_pretrained(tmp_path / "again")
    assert load_headless(tmp_path / "again", "again").embeddings.mask_token is None


def test_a_weight_that_is_missing_is_refused_not_made_up(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "siglip")
    drop_weights(base, "post_layernorm")
    with pytest.raises(EncoderError, match=r"2 weights of SiglipVisionModel are not in its files: post_layernorm.bias"):
        load_headless(base, "base")


def drop_weights(base: Path, part: str) -> None:
    path = base / "model.safetensors"
    kept = {name: weight for name, weight in load_file(path).items() if part not in name}
    save_file(kept, path, metadata={"format": "pt"})


def test_a_base_that_keeps_all_states_is_told_not_to(tmp_path: Path) -> None:
    """As saved, such a configuration would make each forward pass keep every layer, or give a tuple."""
    base = save_base(tmp_path / "base", output_hidden_states=True, return_dict=False)
    output = load_headless(base, "base")(pixel_values=torch.zeros(1, 3, SIZE, SIZE))
    assert output.hidden_states is None


def test_models_of_other_things_are_refused(tmp_path: Path) -> None:
    text = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    )
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(EncoderError, match="BertModel takes no pixel_values, but a base must take images alone"):
        read_model_config(tmp_path / "text", "text")


def test_siglip_2_of_flexible_resolution_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "siglip")
    config = Siglip2VisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_patches=16
    )
    Siglip2VisionModel(config).save_pretrained(base)
    with pytest.raises(EncoderError, match="Siglip2VisionModel needs pixel_attention_mask, spatial_shapes as well"):
        build(base, None, tmp_path / "encoder")


def test_a_processor_may_be_saved_inside_a_dual_encoders(tmp_path: Path) -> None:
    """As `CLIPProcessor.save_pretrained` does: one file for the tokenizer's and the images' settings."""
    base = save_base(tmp_path / "base", "clip")
    expected = build(base, None, tmp_path / "one").space_id
    images_alone = json.loads((base / "preprocessor_config.json").read_text())
    (base / "preprocessor_config.json").unlink()
    whole = {"processor_class": "CLIPProcessor", "image_processor": images_alone}
    (base / "processor_config.json").write_text(json.dumps(whole))
    assert build(base, None, tmp_path / "two").space_id == expected


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_a_size_that_the_model_does_not_take_is_refused(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    with pytest.raises(ConfigError, match="does not take images of 48×48 pixels"):
        build(base, None, tmp_path / "encoder", image_size=48)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "swin", "beit", "convnext"])
def test_another_size_is_taken_where_the_model_takes_it(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    encoder = build(base, None, tmp_path / "encoder", image_size=48)
    assert encoder.description.preprocessing.size == (48, 48)
    assert encoder.description.prefix_tokens == FAMILIES[family].prefix_tokens
    assert relative_difference(encoder.embed(images()), build(base, None, tmp_path / "own").embed(images())) > 1e-3


@pytest.mark.parametrize(("edge", "size"), [(32, 32), (224, 224), (384, 384), (400, 400)])
@pytest.mark.parametrize("override", [False, True])
def test_convnext_crops_what_is_small_and_squares_what_is_large(edge: int, size: int, override: bool, tmp_path: Path) -> None:
    processor = read_processor(save_base(tmp_path / "base", "convnext")).made
    settings = processor.to_dict() | ({} if override else {"size": {"shortest_edge": edge}})
    preprocessing, changed = from_processor(settings, edge if override else None)
    assert preprocessing.size == (size, size)
    again = type(processor)(**changed)
    for image in images():
        expected = np.asarray(again(image)["pixel_values"][0])
        ours = preprocessing.apply(image).transpose(2, 0, 1) * np.array(preprocessing.multiply).reshape(3, 1, 1)
        assert np.abs(expected - ours - np.array(preprocessing.add).reshape(3, 1, 1)).max() < 1e-5
