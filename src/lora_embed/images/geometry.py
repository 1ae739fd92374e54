"""The settings of an image processor → where an image's pixels go: resize, crop and padding, by the rules of its class.

All functions raise ValueError, which completes a sentence about the image processor, for settings that are not understood.
"""

import math
from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]
Edges = dict[str, int]


def number(settings: Settings, key: str) -> float:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"has {key} {str(value)[:100]!r}, expected a number")
    return float(value)


def _positive(settings: Settings, key: str) -> float:
    value = number(settings, key)
    if value <= 0:
        raise ValueError(f"has {key} {value:g}, expected a number above 0")
    return value


def _multiple(settings: Settings, key: str) -> int:
    """What edges are multiples of; 1 if that is left out."""
    return int(_positive(settings, key)) if settings.get(key) else 1


def _edges(settings: Settings, key: str) -> Edges:
    """A size by the names of its edges. One number is that of a square, and two are height and width."""
    size = settings.get(key) or {}
    if isinstance(size, int | float):
        size = {"height": size, "width": size}
    elif isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, dict):
        raise ValueError(f"has {key} {str(size)[:100]!r}, expected the lengths of edges")
    return {str(edge): int(number(size, edge)) for edge, length in size.items() if length}


def geometry(kind: str, settings: Settings) -> dict[str, Any]:
    """The fields of `Preprocessing` that say where pixels come from."""
    fields: dict[str, Any] = {"resize": None, "crop": None}
    if settings.get("do_center_crop"):
        crop = _edges(settings, "crop_size")
        if not crop.get("height") or not crop.get("width"):
            raise ValueError(f"has crop_size {crop}, expected height and width")
        fields["crop"] = (crop["height"], crop["width"])
    if settings.get("do_resize", True):
        fields |= _RULES.get(kind, _by_edges)(settings, _edges(settings, "size"))
    if settings.get("do_pad") and kind != "DonutImageProcessor":
        pad = _edges(settings, "pad_size")
        if pad.get("height") and pad.get("width"):  # without them, an image is padded to the largest of its batch: not at all
            fields["pad"] = (pad["height"], pad["width"])
    return fields


def _by_edges(settings: Settings, size: Edges) -> dict[str, Any]:
    if size.get("height") and size.get("width"):
        return {"resize": (size["height"], size["width"])}
    if size.get("shortest_edge") and size.get("longest_edge"):
        return {"resize": (size["shortest_edge"], size["longest_edge"]), "fit": "within"}
    if size.get("shortest_edge"):
        return {"resize": size["shortest_edge"]}
    raise ValueError(f"has size {size}, expected height and width, or shortest_edge; image_size in the recipe would set them")


def _divided(settings: Settings, size: Edges) -> dict[str, Any]:
    """As by edges, with the edges rounded up to multiples of size_divisor."""
    fields, multiple = _by_edges(settings, size), _multiple(settings, "size_divisor")
    if isinstance(fields["resize"], tuple) and "fit" not in fields:
        return {"resize": tuple(-(-edge // multiple) * multiple for edge in fields["resize"])}
    return fields | {"multiple": multiple}


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
    if settings.get("crop_pct") is None:
        return _by_edges(settings, size)
    factor = _positive(settings, "crop_pct")
    short = size.get("shortest_edge")
    if not short and size.get("height") == size.get("width"):
        short = _needed(size, "height")
    if short:
        return {"resize": int(short / factor)}
    return {"resize": (int(_needed(size, "height") / factor), int(_needed(size, "width") / factor))}


def _dpt(settings: Settings, size: Edges) -> dict[str, Any]:
    height, width = _needed(size, "height"), _needed(size, "width")
    if settings.get("keep_aspect_ratio"):
        return {"resize": (height, width), "fit": "within"}  # images of different sizes, which are refused
    multiple = _multiple(settings, "ensure_multiple_of")
    return {"resize": (round(height / multiple) * multiple, round(width / multiple) * multiple)}


def _pp_lcnet(settings: Settings, size: Edges) -> dict[str, Any]:
    if settings.get("resize_short") is None:
        return _by_edges(settings, size)
    edge = int(_positive(settings, "resize_short"))
    return {"resize": edge, "fit": "rounded", "multiple": _multiple(settings, "size_divisor")}


def _sam(settings: Settings, size: Edges) -> dict[str, Any]:
    return {"resize": _needed(size, "longest_edge"), "fit": "longest"}


def _donut(settings: Settings, size: Edges) -> dict[str, Any]:
    for key, expected in (("do_thumbnail", "true"), ("do_pad", "true"), ("do_center_crop", "false")):
        if (value := str(bool(settings.get(key))).lower()) != expected:
            raise ValueError(f"has {key} {value}, expected {expected}")
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


def for_size(kind: str, settings: Settings, image_size: int) -> Settings:
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
            changes["resize_short"] = round(number(settings, "resize_short") * factor)
    else:
        changes = {"do_resize": True, "size": {"longest_edge": image_size} if kind == "SamImageProcessor" else square}
        changes |= {key: None for key in ("resize_short", "keep_aspect_ratio") if settings.get(key)}
    return changes | ({"pad_size": square} if settings.get("pad_size") else {})
