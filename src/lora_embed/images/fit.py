"""The size that an image is resized to: the rules by which the image processors of transformers derive it."""

from collections.abc import Callable
from typing import Literal

Resize = tuple[int, int] | int
Size = tuple[int, int]  # (width, height)
Fit = Literal["plain", "longest", "within", "rounded", "thumbnail", "aligned_thumbnail"]
THUMBNAILS = ("thumbnail", "aligned_thumbnail")
PAIRS = ("within", *THUMBNAILS)  # their `resize` has two numbers; "plain" takes one or two, the others one


def sizes(fit: Fit, resize: Resize, multiple: int, width: int, height: int) -> list[Size]:
    """The sizes after each resize of an image; the edges are rounded up to a multiple, and never down to 0."""
    if is_turned(fit, resize, width, height):
        width, height = height, width
    return [
        (_rounded_up(max(1, wide), multiple), _rounded_up(max(1, high), multiple))
        for wide, high in _RULES[fit](resize, width, height)
    ]


def is_turned(fit: Fit, resize: Resize, width: int, height: int) -> bool:
    """True if the image is first turned clockwise by 90°, so that its long side lies along the long side of `resize`."""
    if fit != "aligned_thumbnail" or not isinstance(resize, tuple):
        return False
    return (resize[1] < resize[0] and width > height) or (resize[1] > resize[0] and width < height)


def largest(fit: Fit, resize: Resize) -> tuple[int, int] | None:
    """(height, width) that no resized image exceeds; None if there is no such limit."""
    if fit == "longest" and isinstance(resize, int):
        return resize, resize
    if fit == "within" and isinstance(resize, tuple):
        return max(resize), max(resize)
    return resize if isinstance(resize, tuple) else None


def _rounded_up(edge: int, multiple: int) -> int:
    return -(-edge // multiple) * multiple


def _plain(resize: Resize, width: int, height: int) -> list[Size]:
    """(height, width) whatever the image is, or one number for its shorter edge."""
    if isinstance(resize, tuple):
        return [(resize[1], resize[0])]
    short, long = min(width, height), max(width, height)
    longer = int(resize * long / short)
    return [(resize, longer) if width <= height else (longer, resize)]


def _longest(resize: Resize, width: int, height: int) -> list[Size]:
    """One number for the longer edge, as of SAM."""
    assert isinstance(resize, int)
    scale = resize / max(width, height)
    return [(int(width * scale + 0.5), int(height * scale + 0.5))]


def _within(resize: Resize, width: int, height: int) -> list[Size]:
    """(shorter edge, most of the longer edge): where the longer edge would be more, both become smaller."""
    assert isinstance(resize, tuple)
    short, long = float(min(width, height)), float(max(width, height))
    exact: float = resize[0]
    if long / short * resize[0] > resize[1]:
        exact = resize[1] * short / long
    edge = round(exact)
    if min(width, height) == edge:
        return [(width, height)]
    return [(edge, int(exact * height / width)) if width < height else (int(exact * width / height), edge)]


def _rounded(resize: Resize, width: int, height: int) -> list[Size]:
    """One number for the shorter edge, the longer one rounded and not cut, as of PP-LCNet."""
    assert isinstance(resize, int)
    scale = resize / min(width, height)
    return [(round(width * scale), round(height * scale))]


def _thumbnail(resize: Resize, width: int, height: int) -> list[Size]:
    """(height, width): first the shorter edge becomes the shorter of both, then what is larger shrinks into it: Donut."""
    assert isinstance(resize, tuple)
    first = _plain(min(resize), width, height)[0]
    wide, high = min(first[0], resize[1]), min(first[1], resize[0])
    if (wide, high) == first:
        return [first]
    if first[1] > first[0]:
        wide = int(first[0] * high / first[1])
    elif first[0] > first[1]:
        high = int(first[1] * wide / first[0])
    return [first, (wide, high)]


_RULES: dict[Fit, Callable[[Resize, int, int], list[Size]]] = {
    "plain": _plain,
    "longest": _longest,
    "within": _within,
    "rounded": _rounded,
    "thumbnail": _thumbnail,
    "aligned_thumbnail": _thumbnail,
}
