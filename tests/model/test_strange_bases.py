"""Bases that are read in another way than ViT: maps with channels last, other tokens, prefixes, classes that change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import EncoderError
from lora_embed.model.base import load_headless, open_headless
from lora_embed.model.base_config import read_model_config
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import Encoder, load_encoder
from lora_embed.model.find_state import find_state
from lora_embed.model.golden import relative_difference
from lora_embed.model.ingredients import gather
from models import SIZE, SMALL, save_adapter, save_base, v4_name

WIDE = SMALL | {"intermediate_size": 64}
SAM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
SAM |= {"output_channels": 24, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 64}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 48]}
PVT = STAGES | {"image_size": 64, "num_attention_heads": [1, 1, 2, 2]}
LEVIT = {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
BIT = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4}
PIXELS = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def saved(folder: Path, name: str, config: dict[str, Any], edge: int, part: str = "") -> Path:
    """A tiny model of a family with random weights, saved with a plain square processor."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{part}Model")(getattr(transformers, f"{name}{part}Config")(**config))
    shaken(model).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": edge, "width": edge}).save_pretrained(folder)
    return folder


@torch.no_grad()
def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """No weight is left at the zeros and ones of its initialisation, which hide mistakes."""
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.05)
    return model.eval()


def adapter_of(base: Path, folder: Path, targets: str, **settings: Any) -> Path:
    """A random LoRA of the headless model, as PEFT saves it."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, **settings)
    get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(folder)
    return folder


def build(base: Path, out: Path, *adapters: Path, **settings: Any) -> Encoder:
    specs = tuple(AdapterSpec(path=str(adapter)) for adapter in adapters)
    settings = settings if specs else {"merge_method": "none"} | settings
    build_encoder(gather(Recipe(base_model=str(base), adapters=specs, **settings)), out, lambda _line: None)
    return load_encoder(out)


def vectors(encoder: Encoder, pixels: torch.Tensor) -> NDArray[np.float32]:
    """The encoder's vectors of these values, which its preprocessing did not make."""
    with torch.inference_mode():
        return encoder._pool(encoder._hidden_states[0](pixels)).numpy()


@torch.inference_mode()
def states(base: Path, adapter: Path | None, pixels: torch.Tensor) -> Any:
    """What transformers gives for the base, the adapter beside its weights and not merged."""
    model = AutoModel.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    return model.eval()(pixel_values=pixels, output_hidden_states=True)


def test_a_map_with_channels_last_is_pooled_over_height_and_width(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "Sam", SAM, 64, "Vision")
    adapter = adapter_of(base, tmp_path / "adapter", r".*(qkv|lin1)")
    outputs = states(base, adapter, PIXELS)
    assert outputs.hidden_states[-1].shape == (3, 8, 8, 32)
    encoder = build(base, tmp_path / "mean", adapter)
    assert encoder.dimension == 32
    assert relative_difference(vectors(encoder, PIXELS), outputs.hidden_states[-1].mean(dim=(1, 2)).numpy()) <= 1e-5
    last = build(base, tmp_path / "last", adapter, pooling="last_mean")
    assert last.dimension == 24
    assert relative_difference(vectors(last, PIXELS), outputs.last_hidden_state.mean(dim=(2, 3)).numpy()) <= 1e-5


@pytest.mark.parametrize(("height", "width", "last"), [(32, 32, True), (32, 32, False), (64, 32, True), (64, 32, False)])
@pytest.mark.parametrize("channels", [2, 4, 5])
def test_the_axis_of_the_channels_is_found(height: int, width: int, last: bool, channels: int) -> None:
    """Also where a map has as many channels as rows or columns."""

    class Map(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, channels, 8, 8)

        def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> Any:
            state = self.conv(pixel_values)
            state = state.permute(0, 2, 3, 1) if last else state
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=state, hidden_states=(state,))

    found = find_state(Map(), torch.rand(2, 3, height, width), "mean")
    assert (found.form.channels_last, found.dimension) == (last, channels)


class Tokens(torch.nn.Module):
    """Four patches of an image, with a token in the middle that is the same for every image."""

    def __init__(self, *, middle: bool = False, masks: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.middle, self.masks = torch.nn.Conv2d(3, 8, 8, 8), torch.nn.LayerNorm(8), middle, masks

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> Any:
        state = self.conv(pixel_values).flatten(2).transpose(1, 2)
        if self.middle:
            state = torch.cat([state[:, :2], torch.zeros_like(state[:, :1]), state[:, 2:]], dim=1)
        state = self.norm(state) * (torch.rand(1) if self.masks else 1)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=state, hidden_states=(state,))


def test_states_that_differ_each_time_are_refused() -> None:
    with pytest.raises(EncoderError, match="Tokens gives the same images different states each time, like models that mask"):
        find_state(Tokens(masks=True), torch.rand(2, 3, 16, 16), "mean")


def test_patches_around_another_token_have_no_mean() -> None:
    assert find_state(Tokens(middle=True), torch.rand(2, 3, 16, 16), "mean").dimension == 8
    with pytest.raises(EncoderError, match="has other tokens among its patches, so pooling 'patch_mean' is not defined"):
        find_state(Tokens(middle=True), torch.rand(2, 3, 16, 16), "patch_mean")


def test_patches_of_padding_are_patches(tmp_path: Path) -> None:
    """They are the same in every image, as a class token is."""
    base = save_base(tmp_path / "base", image_size=64)
    settings = {"image_processor_type": "SamImageProcessor", "size": {"longest_edge": 64}, "pad_size": 64, "do_pad": True}
    (base / "preprocessor_config.json").write_text(json.dumps(settings))
    about = build(base, tmp_path / "encoder", pooling="patch_mean").description
    assert (about.preprocessing.pad, about.prefix_tokens, about.suffix_tokens) == ((64, 64), 1, 0)


@pytest.mark.parametrize(
    ("name", "config", "edge", "patches"),
    [("Pvt", PVT, 64, slice(1, None)), ("Yolos", WIDE | {"image_size": [32, 32], "num_detection_tokens": 5}, 32, slice(1, -5))],
)
def test_patches_are_what_changes_with_the_image(
    name: str, config: dict[str, Any], edge: int, patches: slice, tmp_path: Path
) -> None:
    """PVT's class token joins in the last stage; YOLOS's detection tokens stand behind the patches."""
    base, pixels = saved(tmp_path / "base", name, config, edge), PIXELS[:, :, :edge, :edge]
    state = states(base, None, pixels).hidden_states[-1]
    for pooling, expected in (
        ("mean", state.mean(dim=1)),
        ("patch_mean", state[:, patches].mean(dim=1)),
        ("cls", state[:, 0]),
    ):
        encoder = build(base, tmp_path / pooling, pooling=pooling)
        assert relative_difference(vectors(encoder, pixels), expected.numpy()) <= 1e-5, pooling


def test_only_a_form_that_was_read_wrong_before_has_another_space(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "Pvt", PVT, 64)
    encoder = build(base, tmp_path / "encoder", pooling="patch_mean")
    about = json.loads((tmp_path / "encoder" / "encoder.json").read_text())
    assert about["prefix_tokens"] == 1
    assert not {"suffix_tokens", "channels_last"} & set(about)
    (tmp_path / "encoder" / "encoder.json").write_text(json.dumps(about | {"prefix_tokens": 0}))
    with pytest.raises(EncoderError, match=f"but encoder.json says {encoder.space_id}"):
        load_encoder(tmp_path / "encoder")


def test_a_backbone_without_last_hidden_state_is_pooled_all_the_same(tmp_path: Path) -> None:
    sizes = [16, 32, 32, 64]
    config = transformers.HGNetV2Config(
        embedding_size=8, hidden_sizes=sizes, stem_channels=[3, 8, 8], stage_in_channels=[8, *sizes[:3]],
        stage_mid_channels=[8] * 4, stage_out_channels=sizes, stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4,
    )  # fmt: skip
    torch.manual_seed(0)
    shaken(transformers.HGNetV2Backbone(config)).save_pretrained(tmp_path / "base")
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "base")
    encoder = build(tmp_path / "base", tmp_path / "encoder")
    expected = states(tmp_path / "base", None, PIXELS).hidden_states[-1].mean(dim=(2, 3)).numpy()
    assert relative_difference(vectors(encoder, PIXELS), expected) <= 1e-5
    with pytest.raises(EncoderError, match=r"gives no last_hidden_state, which pooling 'last_mean' needs. Use pooling: mean"):
        build(tmp_path / "base", tmp_path / "last", pooling="last_mean")


def test_a_fold_that_is_right_by_weights_and_wrong_by_function_is_refused(tmp_path: Path) -> None:
    """BiT's convolutions standardise their weight whenever they run."""
    base = saved(tmp_path / "base", "Bit", BIT, 64)
    adapter = adapter_of(base, tmp_path / "adapter", r".*conv2")
    for method in ("weighted_sum", "ties"):
        with pytest.raises(
            EncoderError, match=r"adapter: cannot be folded into BitModel.*WeightStandardizedConv2d.*other layers"
        ):
            build(base, tmp_path / method, adapter, merge_method=method)
        assert not (tmp_path / method).exists()
    assert build(base, tmp_path / "alone").dimension == 32


def test_a_wrong_fold_of_one_weight_is_seen_in_the_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the proof of the weights makes the same mistake."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr("lora_embed.model.match._scale", lambda *_: 3.0)
    monkeypatch.setattr("lora_embed.model.member.prove", lambda *_: {})
    with pytest.raises(EncoderError, match="cannot be folded into ViTModel: the vectors of the golden images then differ by"):
        build(base, tmp_path / "encoder", adapter)


def test_a_class_that_changes_its_configuration_has_one_space(tmp_path: Path) -> None:
    """LeViT's class adds an entry to `down_ops` whenever a model is made."""
    base = saved(tmp_path / "base", "Levit", LEVIT | {"key_dim": [8, 8, 8]}, 64)
    before = read_model_config(base, "base").to_dict()
    assert load_headless(base, "base").config.down_ops == before["down_ops"]
    assert build(base, tmp_path / "encoder").dimension == 64


@torch.inference_mode()
def test_vit_mae_is_read_as_a_vit(tmp_path: Path) -> None:
    """Its own class masks and shuffles patches at random; without masks, both are the same to a mean."""
    base = saved(tmp_path / "base", "ViTMAE", WIDE | {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2}, SIZE)
    pixels = PIXELS[:, :, :SIZE, :SIZE]
    unmasked = AutoModel.from_pretrained(base, mask_ratio=0.0).eval()(pixel_values=pixels, output_hidden_states=True)
    encoder = build(base, tmp_path / "encoder")
    assert relative_difference(vectors(encoder, pixels), unmasked.hidden_states[-1].mean(dim=1).numpy()) <= 1e-5
    assert type(encoder.models[0]).__name__ == "ViTModel"


@torch.inference_mode()
def test_the_images_of_metaclip_2_are_read_as_those_of_clip(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "MetaClip2", WIDE, SIZE, "Vision")
    own = transformers.MetaClip2VisionModel.from_pretrained(base).eval()
    pixels = PIXELS[:, :, :SIZE, :SIZE]
    expected = own(pixel_values=pixels, output_hidden_states=True).hidden_states[-1].mean(dim=1).numpy()
    assert relative_difference(vectors(build(base, tmp_path / "encoder"), pixels), expected) <= 1e-5


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "backbone.", "model.base.vit."])
def test_a_prefix_before_every_weight_is_left_out_and_said(prefix: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    space_id = build(base, tmp_path / "plain").space_id
    file = base / "model.safetensors"
    weights = {f"{prefix}{name}": weight for name, weight in load_file(file).items()}
    save_file(weights | {"head.weight": torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    assert open_headless(base, "base")[1] == prefix
    lines: list[str] = []
    recipe = Recipe(base_model=str(base), adapters=(), merge_method="none")
    assert build_encoder(gather(recipe), tmp_path / "encoder", lines.append).space_id == space_id
    assert any(f"in its files below {prefix!r}" in line for line in lines)


@pytest.mark.parametrize("prefix", ["module.", "model.base."])
def test_older_names_of_weights_are_known_below_a_prefix(prefix: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    space_id = build(base, tmp_path / "plain").space_id
    file = base / "model.safetensors"
    weights = {f"{prefix}vit.{v4_name(name, 'vit')}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert build(base, tmp_path / "encoder").space_id == space_id


def test_the_images_part_of_a_language_model_is_taken(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    vision = transformers.CLIPVisionConfig(**WIDE)
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**text))
    torch.manual_seed(0)
    model = shaken(transformers.LlavaForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "base")
    transformers.CLIPImageProcessor(size={"height": SIZE, "width": SIZE}, do_center_crop=False).save_pretrained(
        tmp_path / "base"
    )
    pixels = PIXELS[:, :, :SIZE, :SIZE]
    with torch.inference_mode():
        tower = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True)
    encoder = build(tmp_path / "base", tmp_path / "encoder")
    assert relative_difference(vectors(encoder, pixels), tower.hidden_states[-1].mean(dim=1).numpy()) <= 1e-5


def test_a_model_that_is_held_twice_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    file = base / "model.safetensors"
    weights = {f"{part}{name}": weight + 0 for name, weight in load_file(file).items() for part in ("student.", "teacher.")}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"its files hold ViTModel 2 times, below 'student.', 'teacher.'. Save the one"):
        load_headless(base, "base")


def test_numbers_of_channels_are_no_numbers_of_layers(tmp_path: Path) -> None:
    """HGNet-v2's and SAM 2's channels of each stage sum to more than any number of layers."""
    (tmp_path / "config.json").write_text(transformers.Sam2HieraDetConfig().to_json_string())
    config = read_model_config(tmp_path, "base")
    assert sum(config.embed_dim_per_stage) > 1000
    config.blocks_per_stage = [1, 1, 1, 1]
    transformers.Sam2HieraDetModel(config).save_pretrained(tmp_path)
    assert load_headless(tmp_path, "base").config.embed_dim_per_stage == config.embed_dim_per_stage


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("videomae", "VideoMAEModel takes videos, but a base must take single images"),
        ("timesformer", "TimesformerModel takes videos"),
        ("vivit", "VivitModel takes videos"),
        ("vjepa2", "VJEPA2Model needs pixel_values_videos as well"),
        ("vilt", "ViltModel reads texts too, but a base must take images alone. Name its vision model"),
        ("blip", "neither AutoModel nor AutoBackbone of .* opens a model of type 'blip_vision_model'"),
        ("dinat", "is a model of type 'dinat', which needs a package that is not installed: .*natten"),
        ("timm_wrapper", "is a model of type 'timm_wrapper', which needs a package that is not installed: .*timm"),
    ],
)
def test_what_is_no_model_of_single_images_is_refused_for_that_reason(model_type: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(transformers.CONFIG_MAPPING[model_type]().to_json_string())
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=reason):
        load_headless(tmp_path, "base")


def test_a_model_that_packs_its_images_is_refused(tmp_path: Path) -> None:
    """Pixtral gives the tokens of all images in one row."""
    base = saved(tmp_path / "base", "Pixtral", WIDE, SIZE, "Vision")
    with pytest.raises(EncoderError, match=r"gives a hidden state of shape \(1, 32, 32\) for 2 images"):
        build(base, tmp_path / "encoder")
