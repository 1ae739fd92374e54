"""A saved adapter and the base's architecture → the change of each weight, by the base's names; or AdapterMismatch.

transformers' own checkpoint loader decides which weight of the base a tensor belongs to (`locate.locate`), and PEFT's
pattern rules decide its rank and alpha.
"""

import math
from dataclasses import dataclass, field

import torch

from lora_embed.errors import AdapterMismatch
from lora_embed.model.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME, SavedAdapter
from lora_embed.model.adapter_config import residual_kind
from lora_embed.model.base_config import needs_package, read_model_config
from lora_embed.model.base_files import Base
from lora_embed.model.change import Change, LowRank, Normed, Replaced, Residual, Shift
from lora_embed.model.locate import family_names, grouped_weights, head_names, locate, weight_shapes
from lora_embed.model.mismatch import explain_ranks
from lora_embed.model.names import COMPUTED, Names, read_names
from lora_embed.model.peft_private import expressions_of_names, named_by
from lora_embed.model.placing import Placing, place
from lora_embed.model.statistics import check_statistics, lost_statistics
from lora_embed.model.weights import shape_of
from lora_embed.model.whole import (
    Target,
    check_biases,
    check_effect,
    check_not_empty,
    check_patterns,
    check_saved_modules,
    check_types,
    check_whole,
    untargeted,
)
from lora_embed.text import number_of

_DIFFERENT = "Configuration and weights belong to different adapters. Copy both files of one adapter."


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The changes that one adapter makes to a base, by weight name, and the tensors that are not folded."""

    saved: SavedAdapter
    changes: dict[str, Change]
    places: dict[str, str]  # the adapter's names of weights → the base's names
    heads: dict[str, str] = field(default_factory=dict)  # tensors of the task's head, which are not folded: name → key
    own_head: bool = False  # the head is that of somebody's own class around the base
    front: str = PREFIX  # before the names of the model that PEFT adapted
    left_out: tuple[str, ...] = ()  # parts of the names in the file that the base's names do not have, such as `backbone.`
    adapter_name: str = ""  # within PEFT, where the keys hold it
    lost_statistics: tuple[str, ...] = ()  # batch normalisations whose statistics the file does not hold
    untargeted: tuple[str, ...] = ()  # modules that the configuration does not name, though the file holds their tensors

    @property
    def uri(self) -> str:
        """The URI or path that the adapter was read from."""
        return self.saved.uri

    @property
    def content_hash(self) -> str:
        """A hash over all tensors, and the fields of the configuration that change the result."""
        return self.saved.content_hash

    @property
    def head_keys(self) -> tuple[str, ...]:
        """Names of the head's tensors in the file, without PEFT's prefix."""
        return tuple(sorted(key.removeprefix(PREFIX) for key in self.heads.values()))

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

    return Target(
        uri=base.uri,
        locate=locate_once,
        head_names=head_names(config),
        shapes=weights,
        grouped=grouped_weights(config),
        families=family_names(config),
    )


def match_adapter(saved: SavedAdapter, target: Target) -> Adapter:
    """Match every tensor of an adapter to a weight of the base.

    Raises AdapterMismatch if a tensor matches no weight, the file is incomplete, ranks disagree, or the adapter would
    change nothing.
    """
    names = read_names(saved)
    if not names.lora:
        raise AdapterMismatch(
            f"{saved.uri}: {WEIGHTS_NAME} holds no LoRA tensors, so it would change nothing. Leave the adapter out."
        )
    for field_name in ("rank_pattern", "alpha_pattern"):
        check_patterns(saved, [field_name], [expressions_of_names(saved.config.get(field_name) or {})], list(names.lora))
    modules = [_module(saved, target, name, keys) for name, keys in names.lora.items()]
    whole = {name: key for name, key in names.whole.items() if name.rpartition(".")[2] not in COMPUTED}
    placing = place(saved, target, _shapes(saved, modules, whole), frozenset(whole))
    places, heads = placing.places, placing.heads
    _check_numbers(saved, names, placing)
    adapted = {name: places[name] for name in (f"{module.name}.weight" for module in modules) if name in places}
    check_whole(saved, target, adapted)
    trained = {name: saved.tensors[key] for name, key in whole.items() if name in places}
    check_saved_modules(saved, target, {places[name] for name in trained})
    check_biases(saved, target, set(adapted.values()), {places[name] for name in trained})
    changes: dict[str, Change] = {places[name]: Replaced(trained=tensor) for name, tensor in trained.items()}
    for module in modules:
        if f"{module.name}.weight" in places:
            changes[places[f"{module.name}.weight"]] = _weight_change(saved, module)
        if module.bias is not None and f"{module.name}.bias" in places:
            trained_bias = trained.get(f"{module.name}.bias")
            changes[places[f"{module.name}.bias"]] = _bias_change(module.lora.scale, module.bias, trained_bias)
    check_statistics(saved, changes)
    check_effect(saved, changes, heads)
    return Adapter(
        saved=saved,
        changes=changes,
        places=places,
        heads=_head_tensors(names, placing),
        own_head=any(name not in placing.inner for name in heads),
        front=names.front,
        left_out=placing.left_out(names.front.removesuffix(PREFIX)),
        adapter_name=names.adapter_name,
        lost_statistics=lost_statistics(target, changes),
        untargeted=untargeted(saved, adapted),
    )


def _check_numbers(saved: SavedAdapter, names: Names, placing: Placing) -> None:
    """Raises AdapterMismatch if what is folded is no float numbers, or a counter stands alone. A head may hold anything."""
    modules = {name.rpartition(".")[0] for name in (*placing.places, *placing.heads)}
    for name, key in names.whole.items():
        module, _, kind = name.rpartition(".")
        if kind in COMPUTED and module not in modules:
            raise AdapterMismatch(
                f"{saved.uri}: has {key}, but no weights of {module}, so the file is incomplete. Save the adapter again."
            )
    folded = {name.rpartition(".")[0] for name in placing.places}
    factors = [key for module, by_kind in names.lora.items() if module in folded for key in by_kind.values()]
    check_types(saved, [*factors, *(key for name, key in names.whole.items() if name in placing.places)])


def _head_tensors(names: Names, placing: Placing) -> dict[str, str]:
    """The tensors of a head, by their names in a classification model, each with its key in the file."""
    heads = {placing.heads[name]: key for name, key in names.whole.items() if name in placing.heads}
    modules = {name.rpartition(".")[0]: inner.rpartition(".")[0] for name, inner in placing.heads.items()}
    for module, key_of_kind in names.lora.items():
        if f"{module}.weight" in placing.heads:
            heads |= {f"{modules[module]}.{kind}": key for kind, key in key_of_kind.items()}
    for name, key in names.whole.items():
        module, _, kind = name.rpartition(".")
        if kind in COMPUTED and module in modules:
            heads[f"{modules[module]}.{kind}"] = key
    return heads


def _shapes(saved: SavedAdapter, modules: list[_Module], whole: dict[str, str]) -> dict[str, torch.Size]:
    """The shapes of all weights that an adapter changes, by their names in its file."""
    shapes = {f"{module.name}.weight": module.lora.shape for module in modules}
    clash = sorted(set(shapes) & set(whole))
    if clash:
        raise AdapterMismatch(
            f"{saved.uri}: {clash[0]} is saved as a whole weight and also changed by LoRA. Save the adapter again with "
            "PEFT's save_pretrained (not the model's state_dict), without save_embedding_layers=True."
        )
    shapes |= {f"{module.name}.bias": module.bias.shape for module in modules if module.bias is not None}
    return shapes | {name: saved.tensors[key].shape for name, key in whole.items()}


def _module(saved: SavedAdapter, target: Target, name: str, keys: dict[str, str]) -> _Module:
    """Check that all tensors of a module exist and fit together."""
    tensors = {kind: saved.tensors[key] for kind, key in keys.items()}
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
            f"{saved.uri}: {name} has a {surplus[0]}, but {CONFIG_NAME} does not say {_setting_of(surplus[0])}. {_DIFFERENT}"
        )
    down, up = tensors[expected[0]], tensors[expected[1]]
    check_not_empty(saved, {key: saved.tensors[key] for key in keys.values()})
    embedding = kind == "lora_embedding"
    if not (down.ndim == up.ndim >= 2 and all(size == 1 for size in up.shape[2:])) or (embedding and down.ndim > 2):
        raise AdapterMismatch(
            f"{saved.uri}: {name} has {expected[0]} of shape {_shape(down)} and {expected[1]} of shape {_shape(up)}, which do "
            "not fit a linear layer, a convolution or an embedding. Save the adapter again."
        )
    if embedding:
        down, up = up.T, down.T
    if down.shape[0] != up.shape[1]:
        ranks = {expected[0]: down.shape[0], expected[1]: up.shape[1]}
        raise explain_ranks(saved, target, name, (down.shape, up.shape), ranks)
    shape = torch.Size((up.shape[0], *down.shape[1:]))
    lora = LowRank(down=down.flatten(1), up=up.flatten(1), scale=_scale(saved, name, down.shape[0]), shape=shape)
    bias, magnitude = tensors.get("lora_B.bias"), tensors.get("lora_magnitude_vector")
    return _Module(name=name, lora=lora, embedding=embedding, bias=bias, magnitude=magnitude)


def _setting_of(kind: str) -> str:
    """The setting of PEFT that makes a kind of tensor."""
    return {"lora_magnitude_vector": "use_dora: true", "lora_B.bias": "lora_bias: true"}.get(kind, f"that there is a {kind}")


def _weight_change(saved: SavedAdapter, module: _Module) -> Change:
    inner: LowRank | Residual = module.lora
    residual = residual_kind(saved.config)
    if residual is not None:
        if len(module.lora.shape) != 2 or module.embedding:
            raise AdapterMismatch(
                f"{saved.uri}: {module.name} is not a linear layer, but init_lora_weights={residual} works only for those. "
                f"{_DIFFERENT}"
            )
        inner = Residual(lora=module.lora, kind=residual)
    if module.magnitude is None:
        return inner
    if module.embedding:  # for an embedding, DoRA learns the lengths of columns
        raise AdapterMismatch(
            f"{saved.uri}: {module.name} is an embedding, but DoRA can be folded only for linear layers and convolutions. "
            "Merge the adapter into its base by PEFT's merge_and_unload, and name the result as the base."
        )
    if module.magnitude.numel() != module.lora.shape[0]:
        raise AdapterMismatch(
            f"{saved.uri}: {module.name} has {number_of(module.magnitude.numel(), 'DoRA magnitude')} for "
            f"{module.lora.shape[0]} outputs. Save the adapter again."
        )
    return Normed(inner=inner, magnitude=module.magnitude.reshape(-1))


def _bias_change(scale: float, bias: torch.Tensor, trained: torch.Tensor | None) -> Change:
    """The change of a bias by `lora_bias`: it is added to the layer's bias, or to the trained one that the adapter holds."""
    return Shift(bias=bias, scale=scale) if trained is None else Replaced(trained=trained.double() + scale * bias.double())


def _scale(saved: SavedAdapter, module: str, rank: int) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA (arXiv 2312.03732), patterns respected."""
    config = saved.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    expected = ranks.get(named_by(ranks, module), config["r"])
    alpha = float(alphas.get(named_by(alphas, module), config["lora_alpha"]))
    if expected != rank:
        raise AdapterMismatch(f"{saved.uri}: {module} has rank {rank}, but {CONFIG_NAME} says {expected}. {_DIFFERENT}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _shape(tensor: torch.Tensor) -> str:
    return shape_of(tensor.shape)
