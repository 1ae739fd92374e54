"""Crooked adapters: how each is made of a good one, and what is said of it. `test_crooked.py` makes them."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_embed.errors import AdapterMismatch, ConfigError, EncoderError, StorageError
from lora_embed.model.adapter import CONFIG_NAME, WEIGHTS_NAME
from models import v4_name

FIRST = "base_model.model.dinov2.encoder.layer.0.attention.q_proj"
A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
BODY = "base_model.model.dinov2."
FIRST_SETTINGS = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "bias")
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path], Any]
SAME = "folded as the adapter it was made of"


@dataclass(frozen=True)
class Case:
    """One crooked adapter: what was done to a good one, and what is said of it."""

    what: str
    edit: Edit
    says: str  # a part of the message, as a pattern; or SAME
    error: type[ConfigError] = AdapterMismatch


@dataclass(frozen=True)
class Marker:
    """What a pickle would do when it is opened."""

    path: Path

    def __reduce__(self) -> Any:
        return (self.path.touch, ())


def config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def without(field: str) -> Edit:
    return lambda folder: only(*(json.loads((folder / CONFIG_NAME).read_text()).keys() - {field}))(folder)


def only(*fields: str) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name in fields}))

    return edit


def text(content: str | bytes, name: str = CONFIG_NAME) -> Edit:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def tensors(change: Callable[[Tensors], Tensors]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / WEIGHTS_NAME
        changed = change(load_file(path))
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path, metadata={"format": "pt"})

    return edit


def put(name: str, *shape: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> Edit:
    return tensors(lambda found: found | {name: torch.full(shape, value, dtype=dtype)})


def mapped(change: Callable[[torch.Tensor], torch.Tensor], only: str = "") -> Edit:
    return tensors(lambda found: {name: change(tensor) if only in name else tensor.clone() for name, tensor in found.items()})


def drop(part: str) -> Edit:
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if part not in name})


def renamed(change: Callable[[str], str]) -> Edit:
    return tensors(lambda found: {change(name): tensor for name, tensor in found.items()})


def doubled(change: Callable[[str], str]) -> Edit:
    """Some tensors under a second name as well, with other numbers."""
    return tensors(lambda found: found | {change(name): found[name] * 2 for name in (A, B)})


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def move(name: str) -> Edit:
    return lambda folder: (folder / WEIGHTS_NAME).rename(folder / name)


def as_pickle(name: str) -> Edit:
    """Only a pickle, which leaves a file beside the adapter when it is opened."""

    def edit(folder: Path) -> None:
        (folder / WEIGHTS_NAME).unlink()
        (folder / name).write_bytes(pickle.dumps(Marker(folder / "opened")))

    return edit


def linked(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def as_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def a_directory(name: str) -> Edit:
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def with_columns(kind: str) -> Callable[[Tensors], Tensors]:
    """A further tensor of each module, of the shape that magnitudes and biases have."""

    def change(found: Tensors) -> Tensors:
        ups = {name.removesuffix("lora_B.weight"): tensor for name, tensor in found.items() if "lora_B" in name}
        return found | {f"{module}{kind}": up[:, 0] for module, up in ups.items()}

    return change


def as_embedding(name: str) -> str:
    return {A: f"{FIRST}.lora_embedding_A", B: f"{FIRST}.lora_embedding_B"}.get(name, name)


def refused(field: str, value: Any) -> Case:
    """A setting that PEFT has and nothing here folds."""
    return Case(field, config(**{field: value}), rf"sets {field}=.*(is not supported\. Merge the adapter into|Train |Leave )")


def initialised(value: Any) -> Case:
    return Case(
        f"initialised by {value}",
        config(init_lora_weights=value),
        rf"init_lora_weights={json.dumps(value)}, which (changes|is not known)",
    )


NO_JSON = r"adapter_config\.json: is not valid JSON"
NO_FILE = r"adapter_model\.safetensors: is not a whole safetensors file"
CASES = [
    # The configuration as a file
    Case("configuration that is no JSON", text("r: 8"), NO_JSON),
    Case("empty configuration", text(""), NO_JSON),
    Case("configuration with a byte order mark", text(b"\xef\xbb\xbf{}"), NO_JSON),
    Case("configuration in another encoding", text("{}".encode("utf-16")), NO_JSON),
    Case("configuration nested without end", text("[" * 200_000), NO_JSON),
    Case("number of ten thousand digits", text('{"r": 1' + "0" * 10_000 + "}"), NO_JSON),
    Case("configuration that is a list", text("[]"), r"expected a LoRA adapter \(peft_type LORA\), found list"),
    Case("configuration that is a directory", a_directory(CONFIG_NAME), r"is not a PEFT adapter: it has no adapter_config"),
    Case("no configuration", lambda folder: (folder / CONFIG_NAME).unlink(), "is not a PEFT adapter: it has no"),
    Case("another kind of adapter", config(peft_type="IA3"), r"expected a LoRA adapter \(peft_type LORA\), found IA3"),
    Case("no kind of adapter", without("peft_type"), r"expected a LoRA adapter \(peft_type LORA\), found None"),
    # Its numbers
    Case("rank missing", without("r"), "r of adapter_config.json is missing, expected a whole number of at least 1"),
    *(Case(f"rank {r}", config(r=json.loads(r)), f"r of .* is {r}, expected") for r in ("0", "-1", "true", '"8"', "8.5")),
    Case("rank of thirty digits", config(r=10**30), "has rank 8, but adapter_config.json says 1000"),
    Case("another rank than the tensors'", config(r=16), "has rank 8, but adapter_config.json says 16"),
    Case("alpha missing", without("lora_alpha"), "lora_alpha of adapter_config.json is missing, expected a finite number"),
    *(
        Case(f"alpha {alpha}", config(lora_alpha=json.loads(alpha)), "lora_alpha of .*, expected a finite number")
        for alpha in ("NaN", "Infinity", '"16"', "null")
    ),
    Case("alpha of four hundred digits", config(lora_alpha=10**400), "lora_alpha of .* is 1000.{96}, expected a finite"),
    Case("alpha zero", config(lora_alpha=0), "all of its LoRA products are zero"),
    Case("alpha as a fraction", config(lora_alpha=16.0), SAME),
    Case("rank_pattern that is no pattern", config(rank_pattern={"fc1[": 8}), "_pattern of .*the pattern .* cannot be read"),
    Case("rank_pattern with another rank", config(rank_pattern={"fc1": 4}), "has rank 8, but adapter_config.json says 4"),
    Case("rank_pattern with the same rank", config(rank_pattern={"fc1": 8}), SAME),
    Case("rank_pattern as a list", config(rank_pattern=[8]), r"rank_pattern of .* is \[8\], expected an object such as"),
    Case("alpha_pattern with a string", config(alpha_pattern={"fc1": "8"}), "alpha_pattern of .*expected an object such as"),
    Case("alpha_pattern of no module", config(alpha_pattern={"nowhere": 8}), SAME),
    Case("use_rslora as a string", config(use_rslora="yes"), 'use_rslora of .* is "yes", expected true or false'),
    Case("bias of another kind", config(bias="some"), 'bias of .* is "some", expected none, all or lora_only'),
    Case("target_modules as a number", config(target_modules=5), "target_modules of .* is 5, expected a list of names"),
    Case("target_modules that is no pattern", config(target_modules="q_proj("), "of .*the pattern .* cannot be read"),
    Case("modules_to_save as a string", config(modules_to_save="classifier"), "modules_to_save of .*expected a list of names"),
    Case("settings of the first versions alone", only(*FIRST_SETTINGS), SAME),
    Case("setting of no known version", config(use_next=True), "sets use_next=true, which is not known to this version"),
    Case("setting of no known version, off", config(use_next=False), SAME),
    # What no fixed change of weights can hold
    refused("alora_invocation_tokens", [1, 2]),
    refused("layer_replication", [[0, 4], [2, 5]]),
    refused("target_parameters", ["experts.gate"]),
    refused("trainable_token_indices", [0]),
    refused("use_qalora", True),
    refused("kasa_config", {"beta": 0.1}),
    refused("velora_config", {"num_groups": 1}),
    refused("monteclora_config", {"num_samples": 8}),
    refused("arrow_config", {"top_k": 3}),
    refused("use_bdlora", {"nblocks": 2}),
    refused("megatron_config", {"tp": 2}),
    *(initialised(kind) for kind in ("corda", "loftq", "lora_ga", "pissa_niter_4", "nonsense")),
    Case("initialised as nothing", config(init_lora_weights=None), SAME),
    Case("initialised with capitals", config(init_lora_weights="Gaussian"), SAME),
    # Configuration and tensors that contradict each other
    Case("DoRA without magnitudes", config(use_dora=True), "has no lora_magnitude_vector, so the file is incomplete"),
    Case("magnitudes without DoRA", tensors(with_columns("lora_magnitude_vector")), "but .* not say use_dora"),
    Case(
        "DoRA on an embedding",
        both(config(use_dora=True), tensors(with_columns("lora_magnitude_vector")), renamed(as_embedding)),
        "is an embedding, but DoRA can be folded only for linear layers and convolutions",
    ),
    Case("lora_bias without biases", config(lora_bias=True), r"has no lora_B\.bias, so the file is incomplete"),
    Case("biases without lora_bias", put(f"{FIRST}.lora_B.bias", 384), r"has a lora_B\.bias, but .* not say lora_bias"),
    Case("bias all, none saved", config(bias="all"), "was trained with bias='all', but .* does not hold embeddings"),
    Case(
        "bias lora_only, one of them saved",
        both(config(bias="lora_only"), put(f"{FIRST}.base_layer.bias", 384)),
        r"bias='lora_only', but .* does not hold encoder\.layer\.0\.attention\.v_proj\.bias",
    ),
    Case(
        "bias lora_only, other biases saved",
        both(config(bias="lora_only", lora_bias=True), tensors(with_columns("lora_B.bias"))),
        "bias='lora_only', but .* does not hold encoder",
    ),
    Case("PiSSA on what is no linear layer", both(
        config(init_lora_weights="pissa", target_modules=None),
        tensors(lambda _: {f"{BODY}embeddings.patch_embeddings.projection.lora_A.weight": torch.ones(8, 3, 14, 14),
                           f"{BODY}embeddings.patch_embeddings.projection.lora_B.weight": torch.ones(384, 8, 1, 1)}),
    ), "is not a linear layer, but init_lora_weights=pissa works only for those"),
    # Tensors that are not there
    Case("half of a pair missing", drop("layer.3.mlp.fc1.lora_B"), r"mlp\.fc1 has no lora_B, so the file is incomplete"),
    Case("the other half missing", drop("layer.3.mlp.fc1.lora_A"), r"mlp\.fc1 has no lora_A, so the file is incomplete"),
    Case("a module missing", drop("layer.3.mlp.fc1."), r"targets fc1, fc2, q_proj, v_proj, but .*layer\.3\.mlp"),
    Case("a layer missing", drop("layer.11."), r"has no tensors for encoder\.layer\.11\.attention\.q_proj"),
    Case("a kind of module missing", drop(".v_proj."), r"has no tensors for encoder\.layer\.0\.attention\.v_proj\.weight"),
    Case(
        "a module missing of the layers named",
        both(config(layers_to_transform=[0, 3]), tensors(lambda found: {n: t for n, t in found.items() if "layer.0." in n})),
        r"has no tensors for encoder\.layer\.3\.",
    ),
    Case("layers named", both(config(layers_to_transform=list(range(12)), layers_pattern="layer")), SAME),
    Case(
        "a module missing of a pattern",
        both(config(target_modules=r".*\.(q_proj|v_proj|fc1|fc2)"), drop("layer.3.mlp.fc1.")),
        r"has no tensors for encoder\.layer\.3\.mlp\.fc1",
    ),
    Case("head missing", drop("classifier"), SAME),
    Case("nothing but a head", drop("lora_"), "holds no LoRA tensors, so it would change nothing"),
    Case("LoRA of a head alone", both(config(target_modules=["classifier"]), tensors(
        lambda _: {"classifier.lora_A.weight": torch.ones(8, 768), "classifier.lora_B.weight": torch.ones(10, 8)}
    )), r"changes only classifier\.weight, which an encoder does not have: it is a task's head"),
    # Tensors that do not fit
    Case("a factor transposed", mapped(torch.t, A), "has rank 384 in lora_A but 8 in lora_B"),
    Case("factors exchanged", tensors(lambda found: found | {A: found[B], B: found[A]}), "has rank 384, but .* says 8"),
    Case("ranks that disagree", mapped(lambda tensor: tensor[:4], A), "rank 4 in lora_A but 8 in lora_B. The file is damaged"),
    Case("a scalar", put(A), r"lora_A of shape scalar and lora_B of shape 384×8"),
    Case("scalars of an embedding", tensors(lambda found: found | {
        f"{BODY}x.lora_embedding_A": torch.tensor(1.0), f"{BODY}x.lora_embedding_B": torch.tensor(1.0)
    }), "lora_embedding_A of shape scalar and lora_embedding_B of shape scalar"),
    Case("empty tensors", tensors(lambda found: found | {A: torch.empty(0, 384), B: torch.empty(384, 0)}), r"\(shape 0×384\)"),
    Case("one tensor cut short", mapped(lambda tensor: tensor[:100], B), "1 of the 48 weights that it changes matches no"),
    Case("larger than memory", tensors(lambda found: found | {
        f"{BODY}head.lora_A.weight": torch.ones(8, 2**20), f"{BODY}head.lora_B.weight": torch.ones(2**20, 8)
    }), "1 of the 49 weights that it changes matches no weight of .* 1048576×1048576"),
    # Their numbers
    Case("float64", mapped(torch.Tensor.double), SAME),
    *(
        Case(f"{dtype}", mapped(lambda tensor, dtype=dtype: tensor.to(dtype)), f"numbers of type {str(dtype)[6:]}, expected")
        for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    ),
    Case("NaN", mapped(lambda tensor: tensor * float("nan"), B), "lora_B.weight holds NaN or infinity. The training diverged"),
    Case("infinity", mapped(lambda tensor: tensor / 0, "classifier.bias"), r"classifier\.bias holds NaN or infinity"),
    Case("all zero", mapped(torch.zeros_like, "lora_B"), "all of its LoRA products are zero, so it would change nothing"),
    # Their names
    Case("a tensor of no weight", put(f"{BODY}encoder.extra.weight", 384), "1 of the 49 weights that it changes matches no"),
    Case("a kind of LoRA tensor that is not known", put(f"{FIRST}.lora_E", 8, 1), "lora_E is no tensor of LoRA"),
    Case("a head of another name", put("base_model.model.my_head.weight", 10, 384), r"no weight .*my_head\.weight 10×384"),
    Case("modules of another model", renamed(lambda name: name.replace("dinov2.encoder", "swin.blocks")), "48 of the 48"),
    Case("some modules of another model", renamed(lambda name: name.replace("fc1", "up")), "12 of the 48 weights"),
    Case("names of transformers 4", renamed(lambda name: v4_name(name, "dinov2")), SAME),
    Case("names without prefix", renamed(lambda name: name.removeprefix("base_model.model.")), SAME),
    Case("names of both versions", doubled(lambda name: v4_name(name, "dinov2")), "are both names of encoder"),
    Case("names with and without prefix", doubled(lambda name: name.removeprefix("base_model.model.")), "is saved twice"),
    Case("names with and without model", doubled(lambda name: name.replace("dinov2.", "")), "are both names of encoder"),
    Case("names with and without base_layer", doubled(lambda name: name.replace(".lora", ".base_layer.lora")), "saved twice"),
    Case("a weight saved whole beside its LoRA", put(f"{FIRST}.base_layer.weight", 384, 384), "also changed by LoRA"),
    Case("names of an adapter within PEFT", renamed(lambda n: n.replace("A.weight", "A.x.weight")), "several adapter names"),
    # The weights as a file
    Case("weights cut short", lambda folder: os.truncate(folder / WEIGHTS_NAME, 1_000_000), NO_FILE),
    Case("empty weights", text("", WEIGHTS_NAME), NO_FILE),
    Case("a web page in place of weights", text("<!doctype html><title>Sign in</title>", WEIGHTS_NAME), NO_FILE),
    Case("a pointer in place of weights", text("version https://git-lfs.github.com/spec/v1\n", WEIGHTS_NAME), NO_FILE),
    Case("a pickle by another name", as_pickle(WEIGHTS_NAME), NO_FILE),
    Case("a pickle", as_pickle("adapter_model.bin"), "found adapter_model.bin, a pickle, which is never opened"),
    Case("weights renamed", move("adapter.safetensors"), "found adapter.safetensors. If these are its weights, rename"),
    Case("weights in parts", move("adapter_model-00001-of-00002.safetensors"), "found adapter_model-00001-of-00002"),
    Case("no weights", lambda folder: (folder / WEIGHTS_NAME).unlink(), "found no weights. Copy or save the adapter again"),
    Case("weights that are a directory", a_directory(WEIGHTS_NAME), "found a directory of that name"),
    Case("a link to the folder", linked, SAME),
    Case("no folder", shutil.rmtree, "no such directory", StorageError),
    Case("a file in place of the folder", as_a_file, "no such directory", StorageError),
]  # fmt: skip
# What shows in the fold alone.
LATE = [
    Case("values too large for float32", mapped(lambda one: one * 1e30, "lora_"), "is not finite after", EncoderError),
    Case("values too large for float64", mapped(lambda one: one.double() * 1e200, "lora_"), "is not finite", EncoderError),
    Case(
        "DoRA that was not trained",
        both(mapped(torch.zeros_like, "lora_B"), config(use_dora=True)),
        "changes the base by less than float32 rounding",
    ),
]  # fmt: skip
