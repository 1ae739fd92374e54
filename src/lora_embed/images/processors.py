"""The settings of a Hugging Face image processor → `Preprocessing`, by the rules of its class. Needs no transformers.

A class that is not named here is taken to resize, crop, rescale, normalise and pad by its settings alone. `build_encoder`
compares the result with the class itself where that can be made.
"""

from typing import Any

from lora_embed.errors import ProcessorRefused
from lora_embed.images.geometry import Settings, for_size, geometry, number
from lora_embed.images.preprocess import Decoding, Preprocessing, check_geometry

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
_LATE = "resizes an image after it was normalised"
REFUSED = {
    "DepthProImageProcessor": _LATE,
    "EfficientLoFTRImageProcessor": _PAIRS,
    "GLPNImageProcessor": _OWN_SIZES,
    "ImageGPTImageProcessor": "gives the number of a colour for each pixel",
    "LightGlueImageProcessor": _PAIRS,
    "PerceiverImageProcessor": "crops an image before it is resized",
    "PixtralImageProcessor": _OWN_SIZES,
    "Siglip2ImageProcessor": "cuts an image into as many parts as its size allows",
    "SuperGlueImageProcessor": _PAIRS,
    "Swin2SRImageProcessor": _OWN_SIZES,
    "TimmWrapperImageProcessor": "is made by the library timm",
    "UVDocImageProcessor": _LATE,
    "VideoMAEImageProcessor": _VIDEOS,
    "VivitImageProcessor": _VIDEOS,
}


def kind_of(name: str) -> str:
    """The name of a class without the ending that says which library it uses."""
    return name.removesuffix("Fast").removesuffix("Pil")


def from_processor(processor: Settings, image_size: int | None, decode: Decoding = "exact") -> tuple[Preprocessing, Settings]:
    """Read a Hugging Face processor's settings. Returns a `Preprocessing`, and the settings changed for `image_size`.

    `image_size` overrides the size of the model's input; a resize before a crop changes in proportion.
    Raises ProcessorRefused for settings that give images of different sizes, or that are not supported.
    """
    settings = dict(processor)
    kind = kind_of(str(settings.get("image_processor_type")))
    if kind in REFUSED:
        raise _refused(f"{kind} {REFUSED[kind]}, which is not supported.", "Name another base.")
    try:
        if isinstance(settings.get("resample"), str | float):
            settings["resample"] = _filter(settings["resample"])
        if image_size is not None:
            settings |= for_size(kind, settings, image_size)
        preprocessing = _read(kind, settings, decode)
    except ValueError as error:
        raise _refused(f"{kind} {error}.", CORRECT) from None
    if preprocessing.fixed_size is None:
        raise _refused(
            f"{kind}, size {settings.get('size')}, gives images of different sizes.",
            "Set image_size in the recipe, or use a processor with a square size or a centre crop.",
        )
    try:
        check_geometry(preprocessing)
    except ValueError as error:
        raise _refused(f"{kind}: {error}.", CORRECT) from None
    height, width = preprocessing.fixed_size
    if image_size is not None and (height, width) != (image_size, image_size):
        raise _refused(
            f"{kind} rounds image_size, which is {image_size}, to images of {height}×{width} pixels.",
            f"Set image_size: {height} in the recipe.",
        )
    return preprocessing, settings


def _refused(reason: str, advice: str) -> ProcessorRefused:
    return ProcessorRefused(f"the image processor {reason} {advice}", f"the image processor {reason}")


def _read(kind: str, settings: Settings, decode: Decoding) -> Preprocessing:
    """Raises ValueError, which completes a sentence about the image processor, for settings that are not understood."""
    multiply, add = _multiply_and_add(kind, settings)
    is_flipped = kind == "PPLCNetImageProcessor" or settings.get("do_flip_channel_order")  # after normalising
    return Preprocessing(
        **geometry(kind, settings),
        resample=_filter(settings["resample"]) if settings.get("resample") is not None else 2,  # 0 is a filter: nearest
        multiply=multiply[::-1] if is_flipped else multiply,
        add=add[::-1] if is_flipped else add,
        decode=decode,
        channels="BGR" if is_flipped else "RGB",
    )


def _filter(value: Any) -> int:
    """Pillow's number of a filter, from that number, its name, or the name of a constant: `PILImageResampling.BICUBIC`."""
    known = _FILTERS.get(value.rpartition(".")[2].lower()) if isinstance(value, str) else value
    if not isinstance(known, int | float) or known not in _FILTERS.values():
        names = ", ".join(_FILTERS)
        raise ValueError(f"has resample {str(value)[:100]!r}, expected a filter of Pillow ({names}) or its number, 0 to 5")
    return int(known)


def _multiply_and_add(kind: str, settings: Settings) -> tuple[Channels, Channels]:
    """Rescaling and normalising as one product and one sum for each channel, in the order of the settings."""
    rescale = settings.get("do_rescale", True)
    normalise = settings.get("do_normalize", True) and kind != "MobileViTImageProcessor"
    scale = number(settings, "rescale_factor") if rescale else 1.0
    mean = _each_channel(settings, "image_mean") if normalise else [0.0] * 3
    std = _each_channel(settings, "image_std") if normalise else [1.0] * 3
    shift, again = 0, [1.0] * 3
    if kind == "EfficientNetImageProcessor":
        shift = 1 if rescale and settings.get("rescale_offset") else 0
        again = _each_channel(settings, "image_std") if settings.get("include_top", True) else again
    if 0 in std or 0 in again:
        raise ValueError(f"has a 0 in image_std {settings['image_std']}, by which pixels are divided")
    multiply = [scale / by / once_more for by, once_more in zip(std, again, strict=True)]
    add = [(-value - shift) / by / once_more for value, by, once_more in zip(mean, std, again, strict=True)]
    return (multiply[0], multiply[1], multiply[2]), (add[0], add[1], add[2])


def _each_channel(settings: Settings, key: str) -> list[float]:
    """Three numbers, or one number for all three channels."""
    values = settings.get(key)
    if not isinstance(values, list | tuple):
        values = [values] * 3
    if len(values) != 3:
        raise ValueError(f"has {key} {str(values)[:100]}, expected one number or three")
    return [number({key: value}, key) for value in values]
