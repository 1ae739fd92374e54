"""A saved adapter and the base's architecture → the change of each weight, by the base's names; or AdapterMismatch.

transformers' own checkpoint loader decides which weight of the base a tensor belongs to (`locate.locate`), and PEFT's
pattern rules decide its rank and alpha.
"""

import math
from dataclasses import dataclass

import torch

from lora_embed.errors import AdapterMismatch
from lora_embed.model.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME, SavedAdapter, residual_kind
from lora_embed.model.base import needs_package, read_model_config
from lora_embed.model.base_files import Base
from lora_embed.model.change import Change, LowRank, Normed, Replaced, Residual, Shift
from lora_embed.model.locate import head_names, locate, weight_shapes
from lora_embed.model.peft_private import expressions_of_names, named_by
from lora_embed.model.whole import Target, check_biases, check_effect, check_patterns, check_places, check_whole, shape_of

_HALVES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
# With bias="all", PEFT saves the bias of a module in modules_to_save three times: the trained one, and two of its wrapper.
_COPIES = (".modules_to_save.", ".original_module.")
_KINDS = (*_HALVES, "lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The changes that one adapter makes to a base, by weight name, and the tensors that are not folded."""

    saved: SavedAdapter
    changes: dict[str, Change]
    places: dict[str, str]  # the adapter's names of weights → the base's names
    head_keys: tuple[str, ...]  # tensors of the task's head, which are not folded

    @property
    def uri(self) -> str:
        """The URI or path that the adapter was read from."""
        return self.saved.uri

    @property
    def content_hash(self) -> str:
        """A hash over all tensors, and the fields of the configuration that change the result."""
        return self.saved.content_hash

    @property
    def trained_on(self) -> str | None:
        """The base that the adapter's configuration names."""
        return self.saved.config.get("base_model_name_or_path")


@dataclass(frozen=True, kw_only=True)
class _Module:
    """The tensors of one LoRA module, by kind."""

    name: str
    lora: LowRank
    embedding: bool
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None


def target_of(base: Base) -> Target:
    """The architecture of a base. Adapters with the same weight names share one answer of the checkpoint loader."""
    config = read_model_config(base.folder, base.uri)
    try:
        weights = weight_shapes(config)
    except ImportError as error:
        raise needs_package(config.model_type, error, base.uri) from None
    sizes = set(weights.values())
    places_of_shapes: dict[frozenset[tuple[str, torch.Size]], dict[str, str | None]] = {}

    def locate_once(shapes: dict[str, torch.Size]) -> dict[str, str | None]:
        key = frozenset(shapes.items())
        if key not in places_of_shapes:
            # A shape that no weight has is not tried, since a language model's adapter would take as much memory as it has.
            fitting = {name: shape for name, shape in shapes.items() if shape in sizes}
            places = locate(config, fitting) if fitting else {}
            places_of_shapes[key] = {name: places.get(name) for name in shapes}
        return places_of_shapes[key]

    return Target(uri=base.uri, locate=locate_once, head_names=head_names(config), shapes=weights)


def match_adapter(saved: SavedAdapter, target: Target) -> Adapter:
    """Match every tensor of an adapter to a weight of the base.

    Raises AdapterMismatch if a tensor matches no weight, the file is incomplete, ranks disagree, or the adapter would
    change nothing.
    """
    modules, plain = _split(saved)
    shapes = {f"{module.name}.weight": module.lora.shape for module in modules}
    clash = sorted(set(shapes) & set(plain))
    if clash:
        raise AdapterMismatch(
            f"{saved.uri}: {clash[0]} is saved as a whole weight and also changed by LoRA. Save the adapter again with "
            "save_embedding_layers=False."
        )
    shapes |= {f"{module.name}.bias": module.bias.shape for module in modules if module.bias is not None}
    shapes |= {name: tensor.shape for name, tensor in plain.items()}
    located = target.locate(shapes)
    heads = {name for name, place in located.items() if place is None and _is_of_head(name, target)}
    check_places(saved, target, shapes, {name: place for name, place in located.items() if name not in heads})
    places = {name: place for name, place in located.items() if place is not None}
    adapted = {name: places[name] for name in (f"{module.name}.weight" for module in modules) if name in places}
    check_whole(saved, target, adapted)
    check_biases(saved, target, set(adapted.values()), {places[name] for name in plain if name in places})
    changes: dict[str, Change] = {places[name]: Replaced(trained=plain[name]) for name in plain if name in places}
    for module in modules:
        if f"{module.name}.weight" in places:
            changes[places[f"{module.name}.weight"]] = _weight_change(saved, module)
        if module.bias is not None and f"{module.name}.bias" in places:
            trained_bias = plain.get(f"{module.name}.bias")
            changes[places[f"{module.name}.bias"]] = _bias_change(module.lora.scale, module.bias, trained_bias)
    check_effect(saved, changes, heads)
    keys = sorted(key.removeprefix(PREFIX) for key in saved.tensors)
    dropped = tuple(key for key in keys if _is_below(key, heads))
    return Adapter(saved=saved, changes=changes, places=places, head_keys=dropped)


def _split(saved: SavedAdapter) -> tuple[list[_Module], dict[str, torch.Tensor]]:
    """The LoRA modules of an adapter, and all its other tensors by their names."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    plain: dict[str, torch.Tensor] = {}
    for key, tensor in saved.tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if any(part in key and key.replace(part, ".") in saved.tensors for part in _COPIES):
            continue
        kind = next((kind for kind in _KINDS if name.endswith(f".{kind}")), None)
        if kind is None and "lora_" in name:
            raise AdapterMismatch(
                f"{saved.uri}: {key} is a kind of LoRA tensor that cannot be folded exactly. "
                "Merge this adapter into its base with PEFT first, or train it without such tensors."
            )
        module, short = (name.removesuffix(f".{kind}"), kind.removesuffix(".weight")) if kind else (name, "")
        tensors = by_module.setdefault(module, {}) if kind else plain
        if (short or name) in tensors:
            raise AdapterMismatch(f"{saved.uri}: {name} is saved twice, under two names. Save the adapter again.")
        tensors[short or name] = tensor
    if not by_module:
        raise AdapterMismatch(
            f"{saved.uri}: {WEIGHTS_NAME} holds no LoRA tensors, so it would change nothing. Leave the adapter out."
        )
    patterns = [expressions_of_names(saved.config.get(field) or {}) for field in ("rank_pattern", "alpha_pattern")]
    check_patterns(saved, patterns, list(by_module))
    return [_module(saved, name, tensors) for name, tensors in by_module.items()], plain


def _module(saved: SavedAdapter, name: str, tensors: dict[str, torch.Tensor]) -> _Module:
    """Check that all tensors of a module exist and fit together."""
    kind = "lora_embedding" if any(key.startswith("lora_embedding") for key in tensors) else "lora"
    expected = [f"{kind}_A", f"{kind}_B"]
    if saved.config.get("use_dora"):
        expected.append("lora_magnitude_vector")
    if saved.config.get("lora_bias") and kind == "lora":
        expected.append("lora_B.bias")
    for key in expected:
        if key not in tensors:
            raise AdapterMismatch(f"{saved.uri}: {name} has no {key}, so the file is incomplete. Save the adapter again.")
    surplus = sorted(set(tensors) - set(expected))
    if surplus:
        raise AdapterMismatch(
            f"{saved.uri}: {name} has a {surplus[0]}, which does not fit {CONFIG_NAME}. Configuration and weights belong to "
            "different adapters. Copy both files of one adapter."
        )
    down, up = tensors[expected[0]], tensors[expected[1]]
    embedding = kind == "lora_embedding"
    if not (down.ndim == up.ndim >= 2 and all(size == 1 for size in up.shape[2:])) or (embedding and down.ndim > 2):
        raise AdapterMismatch(
            f"{saved.uri}: {name} has {expected[0]} of shape {_shape(down)} and {expected[1]} of shape {_shape(up)}, which do "
            "not fit a linear layer, a convolution or an embedding. Save the adapter again."
        )
    if embedding:
        down, up = up.T, down.T
    if down.shape[0] != up.shape[1] or not down.shape[0]:
        raise AdapterMismatch(
            f"{saved.uri}: {name} has rank {down.shape[0]} in {expected[0]} but {up.shape[1]} in {expected[1]}. Either the "
            "file is damaged: save it again. Or the layer is a grouped convolution, for which LoRA cannot be folded."
        )
    shape = torch.Size((up.shape[0], *down.shape[1:]))
    lora = LowRank(down=down.flatten(1), up=up.flatten(1), scale=_scale(saved, name, down.shape[0]), shape=shape)
    bias, magnitude = tensors.get("lora_B.bias"), tensors.get("lora_magnitude_vector")
    return _Module(name=name, lora=lora, embedding=embedding, bias=bias, magnitude=magnitude)


def _weight_change(saved: SavedAdapter, module: _Module) -> Change:
    inner: LowRank | Residual = module.lora
    residual = residual_kind(saved.config)
    if residual is not None:
        if len(module.lora.shape) != 2 or module.embedding:
            raise AdapterMismatch(
                f"{saved.uri}: {module.name} is not a linear layer, but init_lora_weights={residual} works only for those. "
                "Save the adapter again."
            )
        inner = Residual(lora=module.lora, kind=residual)
    if module.magnitude is None:
        return inner
    if module.embedding:  # for an embedding, DoRA learns the lengths of columns
        raise AdapterMismatch(
            f"{saved.uri}: {module.name} is an embedding, but DoRA can be folded only for linear layers and convolutions. "
            "Merge this adapter into its base with PEFT first."
        )
    if module.magnitude.numel() != module.lora.shape[0]:
        raise AdapterMismatch(
            f"{saved.uri}: {module.name} has {module.magnitude.numel()} DoRA magnitudes for {module.lora.shape[0]} outputs. "
            "Save the adapter again."
        )
    return Normed(inner=inner, magnitude=module.magnitude.reshape(-1))


def _bias_change(scale: float, bias: torch.Tensor, trained: torch.Tensor | None) -> Change:
    """The change of a bias by `lora_bias`: it is added to the layer's bias, or to the trained one that the adapter holds."""
    return Shift(bias=bias, scale=scale) if trained is None else Replaced(trained=trained.double() + scale * bias.double())


def _is_of_head(name: str, target: Target) -> bool:
    """True for a weight of a head, which is beside the body (`classifier.…`) or at its end (`vit.pooler.…`)."""
    return bool(set(name.split(".")[:2]) & target.head_names)


def _is_below(key: str, heads: set[str]) -> bool:
    modules = {name.removesuffix(".weight").removesuffix(".bias") for name in heads}
    return any(key.replace(".base_layer.", ".").startswith(f"{module}.") for module in modules) or key in heads


def _scale(saved: SavedAdapter, module: str, rank: int) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA (arXiv 2312.03732), patterns respected."""
    config = saved.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    expected = ranks.get(named_by(ranks, module), config["r"])
    alpha = float(alphas.get(named_by(alphas, module), config["lora_alpha"]))
    if expected != rank:
        raise AdapterMismatch(
            f"{saved.uri}: {module} has rank {rank}, but {CONFIG_NAME} says {expected}. Configuration and weights belong to "
            "different adapters. Copy both files of one adapter."
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _shape(tensor: torch.Tensor) -> str:
    return shape_of(tensor.shape)
