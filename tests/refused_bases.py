"""Bases, image processors, poolings and image sizes that are refused: how each is made, and parts of what is said of it."""

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import family_models
from family_specs import SPECS
from models import save_base
from user_errors import Case, Setup

Breaks = Callable[[Setup], Any]
BUILD = ["build", "recipe.yaml", "--out", "encoder"]
CONFIG, WEIGHTS, INDEX = "base/config.json", "base/model.safetensors", "base/model.safetensors.index.json"
PROCESSOR = "base/preprocessor_config.json"
ALONE = {"adapters": [], "merge_method": "none"}  # a recipe of the base without adapters


def refused(what: str, breaks: Breaks, *says: str, **more: Any) -> Case:
    """A case of `lora-embed build`."""
    return Case(what, breaks, list(says), **({"arguments": BUILD, "builds": True} | more))


def config(**changes: Any) -> Breaks:
    """Other values in the base's configuration."""
    return lambda s: s.text(CONFIG, json.dumps(json.loads((s.folder / CONFIG).read_text()) | changes))


def of_type(model_type: str) -> Breaks:
    """Another type of model, with the default values of its configuration."""
    return lambda s: s.text(CONFIG, transformers.CONFIG_MAPPING[model_type]().to_json_string())


def made(model_type: str, **recipe: Any) -> Breaks:
    """A tiny model of another type."""

    def make(setup: Setup) -> None:
        setup.remove(CONFIG, WEIGHTS)
        spec = SPECS[model_type]
        family_models.save_base(setup.folder / "base", model_type, 0, spec.config)
        setup.processor(image_processor_type="ViTImageProcessor", size={"height": spec.size, "width": spec.size})
        setup.recipe(**ALONE, **recipe)

    return make


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Breaks:
    def edit(setup: Setup) -> None:
        path = setup.folder / WEIGHTS
        changed = change(load_file(path))
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path, metadata={"format": "pt"})

    return edit


def twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{part}{name}": tensor.clone() for name, tensor in tensors.items() for part in ("student.", "teacher.")}


def vision_twice(setup: Setup) -> None:
    """A dual encoder whose files hold the images' part twice."""
    setup.remove("base")
    save_base(setup.folder / "base", "clip")
    setup.recipe(**ALONE)
    weights(lambda found: {f"{part}{n}": t.clone() for n, t in found.items() for part in ("image_model.", "ema.")})(setup)


def linked(name: str, target: str) -> Breaks:
    """A link in a file's place; the file itself lies outside the folder."""

    def link(setup: Setup) -> None:
        setup.move(name, target)
        (setup.folder / name).symlink_to(setup.folder / target)

    return link


def piped(name: str) -> Breaks:
    return lambda s: (s.remove(name), os.mkfifo(s.folder / name))


def index(content: Any) -> Breaks:
    """Weights in several files, with this index."""
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda s: (s.move(WEIGHTS, "base/model-00001-of-00002.safetensors"), s.text(INDEX, text))


def locked(name: str) -> Breaks:
    """A file that an ordinary user may not read."""
    return lambda s: (s.folder / name).chmod(0)


def replaced(family: str, **recipe: Any) -> Breaks:
    """A tiny base of another family, alone."""

    def replace(setup: Setup) -> None:
        setup.remove("base")
        save_base(setup.folder / "base", family)
        setup.recipe(**ALONE, **recipe)

    return replace


def small_sam(setup: Setup) -> None:
    """Its map has as many channels as rows and columns, and takes images of one size only."""
    setup.remove("base")
    settings: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
    settings |= {"patch_size": 8, "output_channels": 8, "window_size": 0, "global_attn_indexes": [0], "mlp_dim": 8}
    transformers.SamVisionModel(transformers.SamVisionConfig(**settings)).save_pretrained(setup.folder / "base")
    setup.processor(image_processor_type="ViTImageProcessor", size={"height": 64, "width": 64})
    setup.recipe(**ALONE)


def hgnet(setup: Setup) -> None:
    setup.remove("base")
    sizes = [16, 32, 32, 64]
    settings = transformers.HGNetV2Config(
        embedding_size=8, hidden_sizes=sizes, stem_channels=[3, 8, 8], stage_in_channels=[8, *sizes[:3]],
        stage_mid_channels=[8] * 4, stage_out_channels=sizes, stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4,
    )  # fmt: skip
    transformers.HGNetV2Backbone(settings).save_pretrained(setup.folder / "base")
    setup.processor(image_processor_type="ViTImageProcessor", size={"height": 64, "width": 64})
    setup.recipe(**ALONE, pooling="last_mean")


def processor(kind: str | None = "ViTImageProcessor", image_size: int | None = None, **settings: Any) -> Breaks:
    """The base's image processor, and the recipe's image_size and decode."""
    named = {"image_processor_type": kind} if kind else {}
    decode = settings.pop("decode", "exact")

    def write(setup: Setup) -> None:
        setup.processor(**named, **settings)
        setup.recipe(**({"image_size": image_size} if image_size else {}), decode=decode)

    return write


FILE_CASES = [
    refused("no such base", lambda s: s.recipe(base_model="./bsae"), "/bsae", "no such directory"),
    refused(
        "no such base on the hub",
        lambda s: s.recipe(base_model="nobody/no-such-model"),
        "nobody/no-such-model",
        "neither a local directory nor a repository",
        "Check the name",
    ),
    refused(
        "a repository that cannot be read",
        lambda s: s.recipe(base_model="hf://nobody/no-such-model"),
        "hf://nobody/no-such-model: this repository of the hub cannot be read",
        "Check the name",
    ),
    refused(
        "a base that is neither here nor said to be on the hub",
        lambda s: s.recipe(base_model="ten/base"),
        "base_model is ten/base",
        "no directory",
        "/ten/base. Correct the path",
        "write hf://ten/base if",
    ),
    refused(
        "a URI of the hub that names nothing", lambda s: s.recipe(base_model="hf://owner/../name"), "expected hf://owner/name"
    ),
    refused(
        "two revisions",
        lambda s: s.recipe(base_model="hf://owner/name@main", revision="v2"),
        "names revision main, but the key revision is v2",
        "Remove one",
    ),
    refused("an adapter as the base", lambda s: s.recipe(base_model="./ten"), "/ten", "is an adapter, not a model"),
    refused("a base without config.json", lambda s: s.remove(CONFIG), "/base", "no config.json", "Name the model's directory"),
    refused(
        "a base without image preparation",
        lambda s: s.remove(PROCESSOR),
        "/base",
        "neither preprocessor_config.json nor",
        "Save the",
    ),
    refused(
        "a base in the form of timm",
        lambda s: (s.remove(PROCESSOR), s.text(CONFIG, '{"pretrained_cfg": {}}')),
        "/base",
        "model of the library timm",
        "form of transformers",
    ),
    refused(
        "a model of timm that transformers has saved",
        lambda s: s.text(CONFIG, transformers.CONFIG_MAPPING["timm_wrapper"]().to_json_string()),
        "/base",
        "model of the library timm",
        "form of transformers",
    ),
    refused(
        "a base with pickled weights only",
        lambda s: s.move(WEIGHTS, "base/pytorch_model.bin"),
        "/base",
        "pickled weights are never opened",
        "Save the model again",
    ),
    refused(
        "weights of another name",
        lambda s: s.move(WEIGHTS, "base/weights.safetensors"),
        "/base",
        "found weights.safetensors",
        "rename the file to model.safetensors",
        "model.safetensors.index.json",
    ),
    refused("an index that is no JSON", index("{"), "/base", "index.json is damaged", "Copy"),
    refused("an index of no files", index({"weight_map": {}}), "/base", "names no files"),
    refused(
        "a file of weights missing",
        index({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}),
        "/base",
        "'model-00002-of-00002.safetensors', but that file is not there",
    ),
    refused(
        "an index that leads out of the folder",
        index({"weight_map": {"a": "../ten/adapter_model.safetensors"}}),
        "/base",
        "'../ten/adapter_model.safetensors'",
    ),
    refused("a link in the base's folder", linked(WEIGHTS, "elsewhere/model.safetensors"), "/model.safetensors: is a link"),
    refused("a pipe in the base's folder", piped(CONFIG), "/base/config.json: is not an ordinary file"),
    refused(
        "weights that may not be read", locked(WEIGHTS), "/base/model.safetensors", "Permission denied", as_ordinary_user=True
    ),
    refused(
        "a configuration that may not be read", locked(CONFIG), "/base/config.json", "Permission denied", as_ordinary_user=True
    ),
]

MODEL_CASES = [
    # The configuration
    refused("a configuration that is no JSON", lambda s: s.text(CONFIG, "{"), "/base", "config.json is not", "Copy"),
    refused("a type of model that is not known", config(model_type="vit-9"), "/base", "model_type 'vit-9'", "Install a newer"),
    refused("no type of model", lambda s: s.text(CONFIG, "{}"), "/base", "config.json has no model_type"),
    refused(
        "a model that comes with its own code",
        config(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}),
        "/base",
        "model_type 'own'",
        "is never run",
    ),
    refused("a type that AutoModel does not open", of_type("blip"), "/base", "AutoBackbone", "'blip_vision_model'"),
    refused("a model that needs the library natten", of_type("dinat"), "/base", "needs a package", "Install natten 0.17.5"),
    refused(
        "a quantised base",
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "/base",
        "quantization_config",
        "quantised",
    ),
    refused(
        "a configuration that names other files",
        config(transformers_weights="other.safetensors"),
        "/base",
        "config.json sets transformers_weights",
        "Remove that key",
    ),
    refused(
        "an implementation from a repository",
        config(attn_implementation="somebody/flash-attention"),
        "/base",
        "config.json sets attn_implementation to 'somebody/flash-attention'",
        "Remove that key",
    ),
    refused("a million layers", config(num_hidden_layers=10**6), "/base", "num_hidden_layers is 1000000, more than any model"),
    refused("more layers than the files hold", config(num_hidden_layers=2000), "/base", "num_hidden_layers 2000", "tensors"),
    refused(
        "a larger model than the files hold",
        config(hidden_size=1024),
        "/base",
        "config.json describes a model of",
        "but the weight files hold",
    ),
    # The kind of model
    refused("a model of texts", of_type("bert"), "BertModel takes no pixel_values", "ViT, DINOv2"),
    refused("a model of texts and images at once", of_type("vilt"), "ViltModel reads texts too", "ViT, DINOv2"),
    refused(
        "a model of images in any proportion",
        of_type("siglip2"),
        "Siglip2VisionModel needs pixel_attention_mask, spatial_shapes as well",
    ),
    refused("a model of videos", of_type("videomae"), "VideoMAEModel takes videos", "single images"),
    # The weights
    refused("a configuration that its class cannot take", config(hidden_act="geluu"), "/base", "cannot be loaded"),
    refused("truncated weights of the base", lambda s: s.cut(WEIGHTS), "/base/model.safetensors", "not a whole safetensors"),
    refused(
        "weights missing",
        weights(lambda found: {name: t for name, t in found.items() if "layer.1." not in name}),
        "/base",
        "weights of ViTModel are not in its files",
    ),
    refused(
        "weights of another size",
        lambda s: (config(intermediate_size=128)(s), s.recipe(**ALONE)),
        "/base",
        "have other shapes in the files than in config.json",
    ),
    refused("a model that is held twice", weights(twice), "hold ViTModel 2 times, below 'student.', 'teacher.'"),
    refused("a dual encoder's vision model twice", vision_twice, "hold CLIPVisionModel 2 times", "image_model."),
    refused(
        "quantised weights",
        weights(lambda found: {n: t.to(torch.int8) if "intermediate" in n else t for n, t in found.items()}),
        "/base",
        "int8",
        "quantised",
    ),
    refused(
        "NaN in the base",
        lambda s: (weights(lambda found: {n: t * torch.nan for n, t in found.items()})(s), s.recipe(**ALONE)),
        "/base",
        "hold NaN or infinity",
    ),
    refused(
        "zeros in the base",
        lambda s: (weights(lambda found: {n: torch.zeros_like(t) for n, t in found.items()})(s), s.recipe(**ALONE)),
        "/base",
        "vectors that are zero",
        "name another base",
    ),
    # What the model gives
    refused("a model without hidden states", made("detr"), "/base", "DetrModel gives no hidden_states", "last_mean"),
    refused("a hidden state of no block", made("mgp-str"), "/base", "not the output of the last of its blocks"),
    refused("a model that packs its images", made("pixtral"), "/base", "shape (1, 32, 32) for 2 images"),
    refused("a map whose channels cannot be told", small_sam, "/base", "do not show which axis is the channels"),
]

PROCESSOR_CASES = [
    refused("a processor that is no JSON", lambda s: s.text(PROCESSOR, "{"), "/base/preprocessor_config.json", "Copy"),
    refused("a processor that is a list", lambda s: s.text(PROCESSOR, "[]"), "holds a list, expected a JSON object"),
    refused(
        "a processor of texts alone",
        lambda s: (s.remove(PROCESSOR), s.text("base/processor_config.json", '{"processor_class": "CLIPProcessor"}')),
        "/base",
        "has no image processor",
        "Save the image processor",
    ),
    refused(
        "a processor without its name",
        lambda s: (replaced("dinov2_with_registers")(s), s.text(PROCESSOR, '{"size": 32}')),
        "/base/preprocessor_config.json",
        "no image_processor_type",
    ),
    refused(
        "an image processor that transformers does not know",
        processor("MyImageProcessor"),
        "/base/preprocessor_config.json",
        "'MyImageProcessor', which this version of transformers",
        "name another base",
    ),
    refused("an image processor for torchvision alone", processor("RfDetrImageProcessor"), "torchvision alone", "Name another"),
    refused("an image processor of videos", processor("VideoMAEImageProcessor"), "prepares videos", "Name another base"),
    refused("an image processor of pairs", processor("LightGlueImageProcessor"), "prepares pairs of images"),
    refused("an image processor with sizes of its own", processor("GLPNImageProcessor"), "a size of its own"),
    refused("an image processor that cuts images into parts", processor("Siglip2ImageProcessor"), "cuts an image into"),
    refused("an image processor of colours", processor("ImageGPTImageProcessor"), "the number of a colour"),
    refused("an image processor that crops first", processor("PerceiverImageProcessor"), "crops an image before"),
    refused("an image processor that resizes last", processor("DepthProImageProcessor"), "after it was normalised"),
    refused("an image processor of timm", processor("TimmWrapperImageProcessor"), "made by the library timm"),
    refused("an image processor that does more", processor("NougatImageProcessor"), "does more to a"),
    # Its settings
    refused("a setting that its class cannot take", processor(size="large"), "/base/preprocessor_config.json"),
    refused("an image that its class cannot prepare", processor(return_tensors="xx"), "cannot prepare an"),
    refused("image_mean of two numbers", processor(image_mean=[0.5, 0.5]), "image_mean (0.5, 0.5)", "one number or three"),
    refused("image_std of zero", processor(image_std=[0.5, 0.0, 0.5]), "a 0 in image_std"),
    refused("a filter that Pillow does not have", processor(resample=9), "resample '9'", "0 to 5"),
    refused("rescale_factor that is no number", processor(rescale_factor="1/255"), "rescale_factor '1/255', expected a number"),
    refused("a size that is no number", processor(size={"height": "32", "width": 32}), "height '32', expected a number"),
    refused("a size that is text", processor("DINOv3ViTImageProcessor", size="9"), "size '9', expected the lengths of edges"),
    refused("a size without edges", processor(size={"longest_edge": 32}), "expected height and width, or shortest_edge"),
    refused(
        "a size without the edge that its class needs",
        processor("SamImageProcessor", size={"height": 32, "width": 32}),
        "expected a longest_edge",
    ),
    refused("a crop without edges", processor(do_center_crop=True, crop_size={"shortest_edge": 32}), "crop_size"),
    refused("crop_pct of zero", processor("ConvNextImageProcessor", crop_pct=0, size={"shortest_edge": 32}), "above 0"),
    refused("Donut without padding", processor("DonutImageProcessor", do_pad=False), "do_pad false, expected true"),
    refused("images of a billion pixels", processor(size={"height": 10**9, "width": 10**9}), "an edge of 1000000000 pixels"),
    refused(
        "padding that is smaller than the image",
        processor("RTDetrImageProcessor", do_pad=True, size={"height": 32, "width": 32}, pad_size={"height": 16, "width": 16}),
        "pads images to 16×16 pixels",
    ),
]

SIZE_CASES = [
    refused("a pooling of a class token that the model lacks", replaced("siglip", pooling="cls"), "needs a class token"),
    refused("a pooling of a state that the model lacks", hgnet, "/base", "gives no last_hidden_state", "pooling: mean"),
    refused("an image size that the base does not take", lambda s: s.recipe(image_size=48), "48×48", "Correct image_size"),
    refused(
        "an image processor that gives images of different sizes",
        processor(size={"shortest_edge": 32}),
        "/base",
        "images of different sizes",
        "Set image_size in the recipe",
    ),
    refused(
        "an image processor that rounds image_size",
        processor("DPTImageProcessor", ensure_multiple_of=14, image_size=32),
        "/base",
        "rounds image_size, which is 32, to images of 28×28 pixels",
        "Set image_size: 28",
    ),
    refused(
        "decode: fast without a resize",
        processor(do_resize=False, do_center_crop=True, crop_size={"height": 32, "width": 32}, decode="fast"),
        "decode: fast has no effect",
        "decode: exact",
    ),
    refused(
        "decode: fast for large images",
        processor(size={"height": 2400, "width": 2400}, decode="fast"),
        "so large that decode: fast",
        "decode: exact",
        slow=True,
    ),
    refused("decode: fast with a coarse filter", processor(resample=0, decode="fast"), "differ from exact ones"),
]
