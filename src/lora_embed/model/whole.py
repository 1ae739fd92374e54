"""Checks of an adapter: its file is complete, every tensor belongs to a weight of the base, and it changes something."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from lora_embed.errors import AdapterMismatch
from lora_embed.model.adapter import CONFIG_NAME, WEIGHTS_NAME, SavedAdapter, first_names
from lora_embed.model.change import Change, LowRank
from lora_embed.model.endless import Expression, problem_with
from lora_embed.model.peft_private import expressions_of_targets, targeting
from lora_embed.model.weights import shape_of

# Shapes of tensors by name → for each name, the weight of the base that it belongs to, or None: see `locate.locate`.
Locate = Callable[[dict[str, torch.Size]], dict[str, str | None]]
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of tensors that are folded
_OF_TARGETS = ("target_modules", "exclude_modules", "layers_pattern")  # fields with patterns
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer


@dataclass(frozen=True, kw_only=True)
class Target:
    """The architecture that adapters are matched to."""

    uri: str  # of the base, for messages
    locate: Locate
    head_names: frozenset[str]  # modules of a task's head, which an encoder does not have
    shapes: dict[str, torch.Size]  # of all weights of the headless model
    grouped: frozenset[str]  # weights of convolutions in groups
    families: frozenset[str]  # names of the model's type, and of the dual encoder that it may be a part of


def check_patterns(saved: SavedAdapter, fields: Sequence[str], patterns: list[list[Expression]], names: list[str]) -> None:
    """Raises AdapterMismatch for a stranger's regular expression that cannot be read, or whose matching may never end.

    `fields` of the configuration may hold it.
    """
    if (problem := problem_with(patterns, names)) is not None:
        held = " or ".join(field for field in fields if saved.config.get(field))
        raise AdapterMismatch(f"{saved.uri}: {held} of {CONFIG_NAME}: {problem}. Correct it there.")


def check_whole(saved: SavedAdapter, target: Target, adapted: dict[str, str]) -> None:
    """Raises AdapterMismatch if a module that the configuration targets, by PEFT's own rule, has no tensors in the file."""
    targets = saved.config.get("target_modules")
    if not targets:
        return
    names = _adapter_names(target, adapted)
    absent = {place: adapter_name for place, adapter_name in names.items() if place not in adapted.values()}
    check_patterns(saved, _OF_TARGETS, expressions_of_targets(saved.config), list(absent.values()))
    is_targeted = targeting(saved.config)
    missing = sorted(place for place, adapter_name in absent.items() if is_targeted(adapter_name))
    if missing:
        raise AdapterMismatch(
            f"{saved.uri}: {CONFIG_NAME} targets {first_names(sorted([targets] if isinstance(targets, str) else targets), 6)}, "
            f"but {WEIGHTS_NAME} has no tensors for {first_names(missing)}, so the file is incomplete. Save the adapter again."
        )


def untargeted(saved: SavedAdapter, adapted: dict[str, str]) -> tuple[str, ...]:
    """Modules with tensors in the file that the configuration does not target, by the adapter's names; PEFT passes over them.

    Names of transformers 4 and 5 are tried. The configuration's patterns must have been tried on both.
    """
    targets = saved.config.get("target_modules")
    if not targets or targets == "all-linear":  # PEFT writes a list of names in place of that word
        return ()
    names = {name.removesuffix(".weight"): place.removesuffix(".weight") for name, place in adapted.items()}
    check_patterns(saved, _OF_TARGETS, expressions_of_targets(saved.config), [*names, *names.values()])
    is_targeted = targeting(saved.config)
    return tuple(name for name, place in names.items() if not is_targeted(name) and not is_targeted(place))


def check_saved_modules(saved: SavedAdapter, target: Target, trained: set[str]) -> None:
    """Raises AdapterMismatch if a module of the body that `modules_to_save` names has no weights in the file."""
    modules_of_end: dict[str, list[str]] = {}  # `norm1`, `0.norm1` … → modules whose names end so
    for module in sorted({name.rpartition(".")[0] for name in target.shapes}):
        parts = module.split(".")
        for first in range(len(parts)):
            modules_of_end.setdefault(".".join(parts[first:]), []).append(module)
    saved_modules = {name.rpartition(".")[0] for name in trained}
    for named in saved.config.get("modules_to_save") or ():
        for module in modules_of_end.get(named, ()):
            if module not in saved_modules:
                raise AdapterMismatch(
                    f"{saved.uri}: modules_to_save of {CONFIG_NAME} names {named}, but {WEIGHTS_NAME} has no weights of "
                    f"{module}, so the file is incomplete. Save the adapter again."
                )


def _adapter_names(target: Target, adapted: dict[str, str]) -> dict[str, str]:
    """Weights of the base → the adapter's names of their modules, as far as the names in its file show them."""
    weights = [name for name, shape in target.shapes.items() if name.endswith(".weight") and len(shape) > 1]
    fronts = {name.removesuffix(place) if name.endswith(place) else None for name, place in adapted.items()}
    if len(fronts) == 1 and None not in fronts:
        return {place: f"{fronts.copy().pop()}{place}".removesuffix(".weight") for place in weights}
    templates = {}  # names in other layers differ only in their numbers
    for name, place in adapted.items():
        template = _NUMBER.sub("{}", name)
        if template.format(*_NUMBER.findall(place), *[""] * template.count("{}")) == name:
            templates[_NUMBER.sub("#", place)] = template.removesuffix(".weight")
    kinds = {place: templates.get(_NUMBER.sub("#", place)) for place in weights}
    return {place: template.format(*_NUMBER.findall(place)) for place, template in kinds.items() if template}


def check_biases(saved: SavedAdapter, target: Target, adapted: set[str], trained: set[str]) -> None:
    """Raises AdapterMismatch if a bias that `bias` in the configuration trained is missing: old versions of PEFT lost them."""
    kind = saved.config.get("bias")
    biases = {name for name in target.shapes if name.endswith(".bias")}
    owners = {"all": biases, "lora_only": {f"{name.removesuffix('.weight')}.bias" for name in adapted} & biases}
    missing = sorted(owners.get(str(kind), set()) - trained)
    if missing:
        raise AdapterMismatch(
            f"{saved.uri}: was trained with bias={kind!r}, but {WEIGHTS_NAME} does not hold {first_names(missing)}, so these "
            'trained biases are lost. Train it again with a newer version of PEFT, or with bias="none".'
        )


def check_effect(saved: SavedAdapter, changes: dict[str, Change], heads: Iterable[str]) -> None:
    if not changes:
        raise AdapterMismatch(
            f"{saved.uri}: changes only {first_names(sorted(heads))}, which an encoder does not have: it is a task's head, or "
            "the other part of a model of images and text. Leave it out of the recipe."
        )
    if all(isinstance(change, LowRank) and not change.norm() for change in changes.values()):
        raise AdapterMismatch(
            f"{saved.uri}: all of its LoRA products are zero, so it would change nothing. "
            "Was it saved before training? Train it, or leave it out of the recipe."
        )


def check_not_empty(saved: SavedAdapter, tensors: dict[str, torch.Tensor]) -> None:
    """Raises AdapterMismatch for a tensor without numbers."""
    empty = next((key for key, tensor in sorted(tensors.items()) if not tensor.numel()), None)
    if empty is not None:
        raise AdapterMismatch(
            f"{saved.uri}: {empty} is empty (shape {shape_of(tensors[empty].shape)}). DeepSpeed (ZeRO 3) and FSDP leave such "
            "tensors, if the weights are not gathered before they are saved. Gather them, and save the adapter again."
        )


def check_types(saved: SavedAdapter, keys: Iterable[str]) -> None:
    """Raises AdapterMismatch for tensors that are no float numbers, such as quantised ones."""
    for key in sorted(keys):
        if saved.tensors[key].dtype not in TYPES:
            found, *expected = (str(dtype).removeprefix("torch.") for dtype in (saved.tensors[key].dtype, *TYPES))
            raise AdapterMismatch(
                f"{saved.uri}: {key} holds numbers of type {found}, expected {', '.join(expected)}. Save the adapter without "
                "quantisation."
            )
