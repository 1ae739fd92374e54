"""The settings of a Hugging Face image processor → `Preprocessing`, by the rules of its class. Needs no transformers.

A class that is not named here is taken to resize, crop, rescale, normalise and pad by its settings alone. `build_encoder`
compares the result with the class itself where that can be made.
"""

import math
from collections.abc import Callable
from typing import Any

from lora_embed.errors import EncoderError
from lora_embed.images.preprocess import Decoding, Preprocessing, check_geometry

Settings = dict[str, Any]
Edges = dict[str, int]
Channels = tuple[float, float, float]
CORRECT = "Correct the image processor's file in the folder of the base."
_FILTERS = {"nearest": 0, "lanczos": 1, "antialias": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 2}
# Classes that exist for torchvision alone, which is not needed here: their defaults. Pillow resizes instead of torchvision.
TORCHVISION: dict[str, Settings] = {
    "DINOv3ViTImageProcessor": _STEPS | _IMAGENET | {"size": {"height": 224, "width": 224}},
    "PPLCNetImageProcessor": _STEPS | {
        "image_mean": [0.406, 0.456, 0.485], "image_std": [0.225, 0.224, 0.229], "size": {"height": 256, "width": 256},
        "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resize_short": 256, "size_divisor": 1,
    },
    "Sam2ImageProcessor": _STEPS | _IMAGENET | {"size": {"height": 1024, "width": 1024}},
    "Sam3ImageProcessor": _STEPS | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 1008, "width": 1008}},
    "Tipsv2ImageProcessor": _STEPS | {"do_normalize": False, "size": {"height": 448, "width": 448}},
}  # fmt: skip
_OWN_SIZES = "gives each image a size of its own, whatever its settings say"
_VIDEOS, _PAIRS = "prepares videos", "prepares pairs of images"
_PATCHES = "cuts an image into as many parts as its size allows"
REFUSED = {
    "DepthProImageProcessor": "normalises an image before it is resized, and does not smooth it",
    "EfficientLoFTRImageProcessor": _PAIRS,
    "GLPNImageProcessor": _OWN_SIZES,
    "ImageGPTImageProcessor": "gives the number of a colour for each pixel",
    "LightGlueImageProcessor": _PAIRS,
    "PerceiverImageProcessor": "crops an image before it is resized",
    "PixtralImageProcessor": _OWN_SIZES,
    "Siglip2ImageProcessor": _PATCHES,
    "Swin2SRImageProcessor": _OWN_SIZES,
    "TimmWrapperImageProcessor": "is made by the library timm",
    "UVDocImageProcessor": "resizes an image after it was normalised",
    "VideoMAEImageProcessor": _VIDEOS,
    "VivitImageProcessor": _VIDEOS,
}


def kind_of(name: str) -> str:
    """The name of a class without the ending that says which library it uses."""
    return name.removesuffix("Fast").removesuffix("Pil")


def from_processor(processor: Settings, image_size: int | None, decode: Decoding = "exact") -> tuple[Preprocessing, Settings]:
    """Read a Hugging Face processor's settings. Returns a `Preprocessing`, and the settings changed for `image_size`.

    `image_size` overrides the size of the model's input; a resize before a crop changes in proportion.
    Raises EncoderError for settings that give images of different sizes, or that are not supported.
    """
    settings = dict(processor)
    kind = kind_of(str(settings.get("image_processor_type")))
    if kind in REFUSED:
        raise EncoderError(f"the image processor {kind} {REFUSED[kind]}, which is not supported. Name another base.")
    try:
        if isinstance(settings.get("resample"), str | float):
            settings["resample"] = _filter(settings["resample"])
        if image_size is not None:
            settings |= _for_size(kind, settings, image_size)
        preprocessing = _read(kind, settings, decode)
    except ValueError as error:
        raise EncoderError(f"the image processor {kind} {error}. {CORRECT}") from None
    if preprocessing.fixed_size is None:
        raise EncoderError(
            f"the image processor {kind}, size {settings.get('size')}, gives images of different sizes. "
            "Set image_size in the recipe, or use a processor with a square size or a centre crop."
        )
    try:
        check_geometry(preprocessing)
    except ValueError as error:
        raise EncoderError(f"the image processor {kind}: {error}. {CORRECT}") from None
    height, width = preprocessing.fixed_size
    if image_size is not None and (height, width) != (image_size, image_size):
        raise EncoderError(
            f"image_size is {image_size}, but the image processor {kind} rounds it, to images of {height}×{width} pixels. Set "
            f"image_size: {height} in the recipe."
        )
    return preprocessing, settings


def _read(kind: str, settings: Settings, decode: Decoding) -> Preprocessing:
    """Raises ValueError, which completes a sentence about the image processor, for settings that are not understood."""
    multiply, add = _multiply_and_add(kind, settings)
    is_flipped = kind == "PPLCNetImageProcessor" or settings.get("do_flip_channel_order")  # after normalising
    return Preprocessing(
        **_geometry(kind, settings),
        resample=_filter(settings["resample"]) if settings.get("resample") is not None else 2,  # 0 is a filter: nearest
        multiply=multiply[::-1] if is_flipped else multiply,
        add=add[::-1] if is_flipped else add,
        decode=decode,
        channels="BGR" if is_flipped else "RGB",
    )


def _filter(value: Any) -> int:
    """Pillow's number of a filter, from that number, its name, or the name of a constant: `PILImageResampling.BICUBIC`."""
    number = _FILTERS.get(value.rpartition(".")[2].lower()) if isinstance(value, str) else value
    if not isinstance(number, int | float) or number not in _FILTERS.values():
        names = ", ".join(_FILTERS)
        raise ValueError(f"has resample {str(value)[:100]!r}, expected a filter of Pillow ({names}) or its number, 0 to 5")
    return int(number)


def _multiply_and_add(kind: str, settings: Settings) -> tuple[Channels, Channels]:
    """Rescaling and normalising as one product and one sum for each channel, in the order of the settings."""
    rescale = settings.get("do_rescale", True)
    normalise = settings.get("do_normalize", True) and kind != "MobileViTImageProcessor"
    scale = _number(settings, "rescale_factor") if rescale else 1.0
    mean = _each_channel(settings, "image_mean") if normalise else [0.0] * 3
    std = _each_channel(settings, "image_std") if normalise else [1.0] * 3
    shift, again = 0, [1.0] * 3
    if kind == "EfficientNetImageProcessor":
        shift = 1 if rescale and settings.get("rescale_offset") else 0
        again = _each_channel(settings, "image_std") if settings.get("include_top", True) else again
    if 0 in std or 0 in again:
        raise ValueError(f"has image_std {std}, by which pixels are divided, with a 0")
    multiply = [scale / by / once_more for by, once_more in zip(std, again, strict=True)]
    add = [(-value - shift) / by / once_more for value, by, once_more in zip(mean, std, again, strict=True)]
    return (multiply[0], multiply[1], multiply[2]), (add[0], add[1], add[2])


def _number(settings: Settings, key: str) -> float:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"has {key} {str(value)[:100]!r}, expected a number")
    return float(value)


def _positive(settings: Settings, key: str) -> float:
    value = _number(settings, key)
    if value <= 0:
        raise ValueError(f"has {key} {value:g}, expected a number above 0")
    return value


def _multiple(settings: Settings, key: str) -> int:
    """What edges are multiples of; 1 if that is left out."""
    return int(_positive(settings, key)) if settings.get(key) else 1


def _each_channel(settings: Settings, key: str) -> list[float]:
    """Three numbers, or one number for all three channels."""
    values = settings.get(key)
    if not isinstance(values, list | tuple):
        values = [values] * 3
    if len(values) != 3:
        raise ValueError(f"has {key} {str(values)[:100]}, expected one number or three")
    return [_number({key: value}, key) for value in values]


def _edges(settings: Settings, key: str) -> Edges:
    """A size by the names of its edges. One number is that of a square, and two are height and width."""
    size = settings.get(key) or {}
    if isinstance(size, int | float):
        size = {"height": size, "width": size}
    elif isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, dict):
        raise ValueError(f"has {key} {str(size)[:100]!r}, expected the lengths of edges")
    return {str(edge): int(_number(size, edge)) for edge, length in size.items() if length}


def _geometry(kind: str, settings: Settings) -> dict[str, Any]:
    """The fields of `Preprocessing` that say where pixels come from."""
    geometry: dict[str, Any] = {"resize": None, "crop": None}
    if settings.get("do_center_crop"):
        crop = _edges(settings, "crop_size")
        if not crop.get("height") or not crop.get("width"):
            raise ValueError(f"has crop_size {crop}, expected height and width")
        geometry["crop"] = (crop["height"], crop["width"])
    if settings.get("do_resize", True):
        geometry |= _RULES.get(kind, _by_edges)(settings, _edges(settings, "size"))
    if settings.get("do_pad") and kind != "DonutImageProcessor":
        pad = _edges(settings, "pad_size")
        if pad.get("height") and pad.get("width"):  # without them, an image is padded to the largest of its batch: not at all
            geometry["pad"] = (pad["height"], pad["width"])
    return geometry


def _by_edges(settings: Settings, size: Edges) -> dict[str, Any]:
    if size.get("height") and size.get("width"):
        return {"resize": (size["height"], size["width"])}
    if size.get("shortest_edge") and size.get("longest_edge"):
        return {"resize": (size["shortest_edge"], size["longest_edge"]), "fit": "within"}
    if size.get("shortest_edge"):
        return {"resize": size["shortest_edge"]}
    raise ValueError(f"has size {size}, expected height and width, or shortest_edge, as image_size in the recipe would set")


def _divided(settings: Settings, size: Edges) -> dict[str, Any]:
    """As by edges, with the edges rounded up to multiples of size_divisor."""
    geometry, multiple = _by_edges(settings, size), _multiple(settings, "size_divisor")
    if isinstance(geometry["resize"], tuple) and "fit" not in geometry:
        return {"resize": tuple(-(-edge // multiple) * multiple for edge in geometry["resize"])}
    return geometry | {"multiple": multiple}


def _convnext(settings: Settings, size: Edges) -> dict[str, Any]:
    """`size` is the size of a centre crop below 384 pixels, and of a square resize without crop from 384 on."""
    edge = _needed(size, "shortest_edge")
    if edge >= 384:
        return {"resize": (edge, edge), "crop": None}
    return {"resize": int(edge / _positive(settings, "crop_pct")), "crop": (edge, edge)}


def _levit(settings: Settings, size: Edges) -> dict[str, Any]:
    if size.get("shortest_edge"):
        return {"resize": int(256 / 224 * size["shortest_edge"])}
    return _by_edges(settings, size)


def _poolformer(settings: Settings, size: Edges) -> dict[str, Any]:
    """With crop_pct, the image is resized to a size that is larger by that factor; a square one is its shorter edge."""
    resize = _by_edges(settings, size)["resize"]
    if settings.get("crop_pct") is None:
        return {"resize": resize}
    factor = _positive(settings, "crop_pct")
    if isinstance(resize, tuple) and resize[0] != resize[1]:
        return {"resize": tuple(int(edge / factor) for edge in resize)}
    return {"resize": int((resize[0] if isinstance(resize, tuple) else resize) / factor)}


def _dpt(settings: Settings, size: Edges) -> dict[str, Any]:
    """Height and width are rounded to multiples; `keep_aspect_ratio` gives images of different sizes."""
    geometry, multiple = _by_edges(settings, size), _multiple(settings, "ensure_multiple_of")
    if settings.get("keep_aspect_ratio"):
        return geometry | {"fit": "within"}
    return geometry | {"resize": tuple(round(edge / multiple) * multiple for edge in geometry["resize"])}


def _pp_lcnet(settings: Settings, size: Edges) -> dict[str, Any]:
    if settings.get("resize_short") is None:
        return _by_edges(settings, size)
    edge = int(_positive(settings, "resize_short"))
    return {"resize": edge, "fit": "rounded", "multiple": _multiple(settings, "size_divisor")}


def _sam(settings: Settings, size: Edges) -> dict[str, Any]:
    return {"resize": _needed(size, "longest_edge"), "fit": "longest"}


def _donut(settings: Settings, size: Edges) -> dict[str, Any]:
    if not settings.get("do_thumbnail") or not settings.get("do_pad") or settings.get("do_center_crop"):
        raise ValueError("has do_thumbnail or do_pad false, or do_center_crop true, which is not supported")
    resize = (_needed(size, "height"), _needed(size, "width"))
    return {"resize": resize, "fit": "aligned_thumbnail" if settings.get("do_align_long_axis") else "thumbnail"}


def _needed(size: Edges, edge: str) -> int:
    if not size.get(edge):
        raise ValueError(f"has size {size}, expected a {edge}")
    return size[edge]


_RULES: dict[str, Callable[[Settings, Edges], dict[str, Any]]] = {
    "ConvNextImageProcessor": _convnext,
    "DPTImageProcessor": _dpt,
    "DonutImageProcessor": _donut,
    "LevitImageProcessor": _levit,
    "Mask2FormerImageProcessor": _divided,
    "MaskFormerImageProcessor": _divided,
    "PPLCNetImageProcessor": _pp_lcnet,
    "PoolFormerImageProcessor": _poolformer,
    "SamImageProcessor": _sam,
    "TextNetImageProcessor": _divided,
}


def _for_size(kind: str, settings: Settings, image_size: int) -> Settings:
    """The settings that change so that the model's input has this size; a resize before a crop changes in proportion."""
    square = {"height": image_size, "width": image_size}
    crop = _edges(settings, "crop_size") if settings.get("do_center_crop") else None
    if kind == "ConvNextImageProcessor":
        return {"do_resize": True, "size": {"shortest_edge": image_size}}
    if kind == "TextNetImageProcessor" and crop is None:  # its resize always keeps the proportion
        return {"do_resize": True, "size": {"shortest_edge": image_size}, "do_center_crop": True, "crop_size": square}
    if crop is not None:
        factor = image_size / min(crop.get("height", image_size), crop.get("width", image_size))
        size = {edge: round(length * factor) for edge, length in _edges(settings, "size").items()}
        changes: Settings = {"size": size, "crop_size": square}
        if settings.get("resize_short"):
            changes["resize_short"] = round(_number(settings, "resize_short") * factor)
    else:
        changes = {"do_resize": True, "size": {"longest_edge": image_size} if kind == "SamImageProcessor" else square}
        changes |= {key: None for key in ("resize_short", "keep_aspect_ratio") if settings.get(key)}
    return changes | ({"pad_size": square} if settings.get("pad_size") else {})
