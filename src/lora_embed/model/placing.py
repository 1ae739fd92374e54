"""Which weight of the base each tensor of an adapter belongs to, also if it was trained within another model.

PEFT writes the names of the model that it adapted. If the base was an attribute of that model (`backbone`), or was wrapped
for compilation or several GPUs, its name stands before those of the base's weights, and has to be left out.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora_embed.errors import AdapterMismatch
from lora_embed.model.adapter import SavedAdapter
from lora_embed.model.mismatch import Misfit, explain, is_of_another_model
from lora_embed.model.whole import Target

# Names that torch gives to modules within its wrappers, at any depth.
_OF_TORCH = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_USUAL_HEADS = {"classifier", "head", "score"}
_MOST = 8  # attributes that may stand before the base's names


@dataclass(frozen=True, kw_only=True)
class Placing:
    """The places of an adapter's tensors, by their names in the file without PEFT's additions."""

    wrapper: str  # stands before the base's names, such as `backbone.`; often empty
    places: dict[str, str]  # → weight of the base
    heads: dict[str, str]  # tensors of a task's head → name in a classification model
    strays: tuple[str, ...]  # tensors that belong to nothing
    inner: dict[str, str]  # → name without what stands before the base's names

    def left_out(self, front: str) -> tuple[str, ...]:
        """The parts of the names that are not the base's, after what stands before those of PEFT."""
        of_torch = {part for name in self.inner for part in _OF_TORCH.findall(name.removeprefix(self.wrapper))}
        return tuple(part for part in (front, self.wrapper, *sorted(of_torch)) if part)


def place(saved: SavedAdapter, target: Target, shapes: dict[str, torch.Size], whole: frozenset[str]) -> Placing:
    """Find the weight of each tensor; `whole` are those without LoRA.

    Raises AdapterMismatch with the reason if a tensor belongs to no weight and no head.
    """
    best = None
    for wrapper in _wrappers(saved, target, list(shapes)):
        placing = _place_within(wrapper, saved, target, shapes)
        if best is None or len(placing.strays) < len(best.strays):
            best = placing
        if not placing.strays:
            return placing
    assert best is not None
    _check_twice(saved, target, shapes, best)
    misfit = Misfit(
        shapes=shapes,
        strays=best.strays,
        whole=whole,
        weights=len(shapes) - len(best.heads),
        inner=best.inner,
        wrapper=best.wrapper,
    )
    raise explain(saved, target, misfit)


def _wrappers(saved: SavedAdapter, target: Target, names: list[str]) -> Iterator[str]:
    """What may stand before the base's names: nothing, or as many parts of a name as most names begin with."""
    yield ""
    wrapper = ""
    for _ in range(_MOST):
        rest = [name.removeprefix(wrapper) for name in names if name.startswith(wrapper)]
        counts = Counter(name.partition(".")[0] for name in rest if "." in name)
        part, count = next(iter(counts.most_common(1)), ("", 0))
        if count * 2 <= len(names) or is_of_another_model(part, saved, target):
            return
        wrapper += f"{part}."
        if not _OF_TORCH.fullmatch(wrapper):  # those are left out anyway
            yield wrapper


def _place_within(wrapper: str, saved: SavedAdapter, target: Target, shapes: dict[str, torch.Size]) -> Placing:
    inner = {name: _OF_TORCH.sub("", name.removeprefix(wrapper)) for name in shapes if name.startswith(wrapper)}
    if len(set(inner.values())) < len(inner):
        twice = Counter(inner.values()).most_common(1)[0][0]
        first, second = [name for name in inner if inner[name] == twice][:2]
        raise AdapterMismatch(f"{saved.uri}: {twice} is saved twice, as {first} and as {second}. Save the adapter again.")
    located = target.locate({inner[name]: shapes[name] for name in inner})
    places = {name: place for name in inner if (place := located[inner[name]]) is not None}
    heads = {name: inner[name] for name in inner if name not in places and _is_of_head(inner[name], target.head_names)}
    usual = target.head_names | _USUAL_HEADS
    heads |= {name: name for name in shapes if name not in inner and _is_of_head(_OF_TORCH.sub("", name), usual)}
    strays = tuple(name for name in shapes if name not in places and name not in heads)
    return Placing(wrapper=wrapper, places=places, heads=heads, strays=strays, inner=inner)


def _is_of_head(name: str, head_names: frozenset[str]) -> bool:
    """True for a weight of a head, which is beside the body (`classifier.…`) or at its end (`vit.pooler.…`)."""
    return bool(set(name.split(".")[:2]) & head_names)


def _check_twice(saved: SavedAdapter, target: Target, shapes: dict[str, torch.Size], placing: Placing) -> None:
    """Raises AdapterMismatch if a stray is a second name of a weight that another tensor belongs to."""
    within = {placing.inner[name]: name for name in placing.strays if name in placing.inner}
    alone = target.locate({inner: shapes[name] for inner, name in within.items()})
    for inner, place_alone in alone.items():
        first = next((name for name, weight in placing.places.items() if weight == place_alone), None)
        if first is not None:
            raise AdapterMismatch(
                f"{saved.uri}: {first} and {within[inner]} are both names of {place_alone}, so it is saved twice. Save the "
                "adapter again."
            )
