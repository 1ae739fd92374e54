"""Adapters and merges that are refused: how each is made of a good one, and parts of what is said of it."""

from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from crooked import Tensors, both, config, drop, mapped, put, renamed, tensors, text, with_columns, without
from family_models import save_base as save_family
from family_specs import SPECS
from models import edit_tensors, save_adapter, save_base
from refused_bases import ALONE, Breaks, linked, locked, refused
from user_errors import Setup, nothing

NAME, WEIGHTS = "ten/adapter_config.json", "ten/adapter_model.safetensors"
FIRST = "base_model.model.vit.layers.0.attention.q_proj"
A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
NORM = "base_model.model.vit.layers.0.layernorm_before"
MAGNITUDES = tensors(with_columns("lora_magnitude_vector"))


def ten(*edits: Any) -> Breaks:
    """What is done to the first adapter's folder."""
    return lambda s: both(*edits)(s.folder / "ten")


def settings(**changes: Any) -> Breaks:
    return ten(config(**changes))


def changed(change: Any) -> Breaks:
    return ten(tensors(change))


def other_base(setup: Setup) -> None:
    save_adapter(setup.folder / "wide", save_base(setup.folder / "wider", hidden_size=48))
    setup.recipe(adapters=[{"path": "./wide"}])


def folder_of_adapters(setup: Setup) -> None:
    setup.move("ten", "all/ten")
    setup.recipe(adapters=[{"path": "./all"}])


def in_parts(setup: Setup) -> None:
    for number in (1, 2):
        data = (setup.folder / WEIGHTS).read_bytes()
        (setup.folder / f"ten/adapter_model-0000{number}-of-00002.safetensors").write_bytes(data)
    setup.remove(WEIGHTS)


def with_second(found: Tensors) -> Tensors:
    return found | {n.replace("lora_A", "lora_A.more"): t.clone() for n, t in found.items() if "lora_A" in n}


def of_two_models(found: Tensors) -> Tensors:
    return {n.replace("vit.", "teacher." if "layers.0" in n else "student."): t for n, t in found.items()}


def language_model(setup: Setup) -> None:
    setup.adapter_config(task_type="CAUSAL_LM", base_model_name_or_path="somebody/words-7b")
    setup.tensors(lambda found: {n.replace("vit.layers", "model.blocks"): t for n, t in found.items()})


def as_embedding(name: str) -> str:
    return {A: f"{FIRST}.lora_embedding_A", B: f"{FIRST}.lora_embedding_B"}.get(name, name)


def untrained_dora(setup: Setup) -> None:
    """As PEFT saves it before training: the product is zero, and the magnitudes are the lengths of the base's rows."""
    save_adapter(setup.folder / "dora", setup.folder / "base", use_dora=True, init_lora_weights=True, modules_to_save=None)
    setup.recipe(adapters=[{"path": "./dora"}])


def ranks_differ(setup: Setup) -> None:
    save_adapter(setup.folder / "rank8", setup.folder / "base", r=8)
    setup.recipe(adapters=[{"path": "./ten"}, {"path": "./rank8"}], merge_method="linear")


def linear_of_dora(setup: Setup) -> None:
    save_adapter(setup.folder / "dora", setup.folder / "base", use_dora=True)
    setup.recipe(adapters=[{"path": "./ten"}, {"path": "./dora"}], merge_method="linear")


def on(model_type: str, targets: Any, change: Any = None, copies: int = 1, **changes: Any) -> Breaks:
    """A tiny base of another type, and adapters of it as PEFT saves them."""

    def make(setup: Setup) -> None:
        spec, base = SPECS[model_type], setup.folder / model_type
        save_family(base, model_type, 0, spec.config)
        transformers.ViTImageProcessor(size={"height": spec.size, "width": spec.size}).save_pretrained(base)
        paths = []
        for number in range(copies):
            torch.manual_seed(number)
            rule = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": targets, "init_lora_weights": False} | changes)
            paths.append(setup.folder / f"adapter{number}")
            get_peft_model(AutoModel.from_pretrained(base), rule).save_pretrained(paths[-1])
            if change:
                edit_tensors(paths[-1], change)
        setup.recipe(base_model=f"./{model_type}", adapters=[{"path": f"./{path.name}"} for path in paths])

    return make


def statistics(change: Any, part: str) -> Any:
    return lambda found: {name: change(t) if name.endswith(part) else t for name, t in found.items()}


def twice_a_place(found: Tensors) -> Tensors:
    return found | {n.replace("vit.", ""): t * 2 for n, t in found.items() if "layers.0.attention.q_proj" in n}


def with_transposed(found: Tensors) -> Tensors:
    """Factors of a transposed convolution, for which PEFT has no layer."""
    module = f"{next(iter(found)).partition('backbone.')[0]}neck.fpn_layers.0.scale_layers.0"
    return {f"{module}.lora_A.weight": torch.ones(2, 16, 2, 2), f"{module}.lora_B.weight": torch.ones(32, 2, 1, 1)}


NORMS = {"modules_to_save": ["normalization"]}
STORED = ["build", "recipe.yaml", "--out", "encoder", "--store", "adapter"]

FOLDER_CASES = [
    refused("no such adapter", lambda s: s.remove("ten"), "/ten", "no such directory"),
    refused(
        "an adapter that is neither here nor said to be on the hub",
        lambda s: s.recipe(adapters=[{"path": "adapters/ten"}]),
        "adapters[0].path is adapters/ten",
        "no directory",
        "/adapters/ten. Correct the path",
        "write hf://adapters/ten if",
    ),
    refused("no adapter at all", lambda s: s.remove(NAME), "/ten", "no adapter_config.json", "Name the adapter's own"),
    refused("a folder of adapters", folder_of_adapters, "/all", "Its folder ten is an adapter. Name it"),
    refused(
        "an adapter saved as a pickle",
        lambda s: s.move(WEIGHTS, "ten/adapter_model.bin"),
        "/ten",
        "adapter_model.bin, a pickle",
        "safe_serialization=True",
    ),
    refused("an adapter in several files", in_parts, "adapter_model-00001-of-00002", "in several files", "in one file"),
    refused(
        "an adapter's weights of another name",
        lambda s: s.move(WEIGHTS, "ten/adapter.safetensors"),
        "found adapter.safetensors",
        "rename the file",
    ),
    refused("an adapter without weights", lambda s: s.remove(WEIGHTS), "found no weights"),
    refused(
        "a folder in place of the weights",
        lambda s: (s.remove(WEIGHTS), (s.folder / WEIGHTS).mkdir()),
        "found a directory of that name",
    ),
    refused("a truncated adapter", lambda s: s.cut(WEIGHTS), "/ten", "not a whole safetensors file", "Copy or save"),
    refused("a configuration of an adapter that is no JSON", ten(text("r: 8")), "/ten/adapter_config.json: is not valid JSON"),
    refused("a link in an adapter's folder", linked(WEIGHTS, "elsewhere/ten.safetensors"), "/adapter_model.safetensors: is a"),
    refused("an adapter's configuration that may not be read", locked(NAME), "Permission denied", as_ordinary_user=True),
    refused("an adapter's weights that may not be read", locked(WEIGHTS), "Permission denied", as_ordinary_user=True),
    refused(
        "an adapter named twice",
        lambda s: s.recipe(adapters=[{"path": "./ten"}, {"path": "./ten"}]),
        "/ten",
        "the same adapter",
        "Name it once",
    ),
]

CONFIG_CASES = [
    refused("an adapter of another method", settings(peft_type="LOHA"), "found LOHA", "merge_and_unload"),
    refused("a rank that is missing", ten(without("r")), "r of adapter_config.json is missing, expected a whole number"),
    refused("an alpha that is no number", settings(lora_alpha=float("nan")), "lora_alpha of adapter_config.json is NaN"),
    refused(
        "ranks of modules as a list",
        settings(rank_pattern=[8]),
        "rank_pattern of .* is [8]".replace(".*", "adapter_config.json"),
    ),
    refused("a bias of no known kind", settings(bias="some"), 'bias of adapter_config.json is "some", expected none, all or'),
    refused("target_modules that are no names", settings(target_modules=5), "target_modules of adapter_config.json is 5"),
    refused(
        "a pattern that cannot be read",
        settings(target_modules="q_proj("),
        "target_modules of adapter_config.json: the pattern 'q_proj('",
    ),
    refused(
        "a pattern whose matching never ends",
        settings(target_modules=r"(([a-z0-9._])+)+!"),
        "target_modules of adapter_config.json: matching its pattern",
        "processor time",
    ),
    refused(
        "alora_invocation_tokens",
        settings(alora_invocation_tokens=[1, 2]),
        "alora_invocation_tokens=[1, 2]",
        "Train a plain LoRA",
    ),
    refused(
        "layer_replication",
        settings(layer_replication=[[0, 4], [2, 5]]),
        "layer_replication=[[0, 4], [2, 5]]",
        "Do not merge it with PEFT",
    ),
    refused(
        "target_parameters",
        settings(target_parameters=["experts.gate"]),
        'target_parameters=["experts.gate"]',
        "Merge the adapter into",
    ),
    refused(
        "trainable_token_indices",
        settings(trainable_token_indices=[0]),
        "trainable_token_indices=[0]",
        "Merge the adapter into",
    ),
    refused("use_qalora", settings(use_qalora=True), "use_qalora=true", "neither lora-embed nor PEFT can merge"),
    refused(
        "kasa_config", settings(kasa_config={"beta": 0.1}), "kasa_config=", "not supported", "Merge the adapter into its base"
    ),
    refused(
        "a setting of no known version",
        settings(use_next=True),
        "use_next=true, which is not known to this version",
        "the version of PEFT that wrote",
    ),
    refused("initialised by corda", settings(init_lora_weights="corda"), '"corda"', "path_initial_model_for_weight_conversion"),
    refused("initialised by lora_ga", settings(init_lora_weights="lora_ga"), '"lora_ga"', "path_initial_model_for_weight"),
    refused("initialised by pissa_niter_4", settings(init_lora_weights="pissa_niter_4"), '"pissa_niter_4"', "path_initial_"),
    refused(
        "initialised by loftq", settings(init_lora_weights="loftq"), '"loftq"', "into the quantised base that was saved with it"
    ),
    refused("initialised in an unknown way", settings(init_lora_weights="next"), '"next"', "not known", "merge_and_unload"),
]

TENSOR_CASES = [
    # What is missing
    refused("half of a LoRA pair", ten(drop("layers.0.attention.q_proj.lora_B")), "q_proj has no lora_B", "Save the adapter"),
    refused(
        "a module missing", ten(drop("layers.1.mlp.fc1.")), "targets fc1, q_proj, v_proj", "layers.1.mlp.fc1", "incomplete"
    ),
    refused(
        "an adapter without its trained norm",
        settings(modules_to_save=["layernorm_after"]),
        "names layernorm_after",
        "no weights of layers.0.layernorm_after",
    ),
    refused("trained biases missing", settings(bias="lora_only"), "bias='lora_only'", "trained biases are lost", 'bias="none"'),
    refused("DoRA without magnitudes", settings(use_dora=True), "has no lora_magnitude_vector", "incomplete"),
    refused("lora_bias without biases", settings(lora_bias=True), "has no lora_B.bias", "incomplete"),
    refused("empty tensors", changed(lambda f: {n: torch.empty(0) if "lora_" in n else t for n, t in f.items()}), "DeepSpeed"),
    refused(
        "one statistic of two",
        on("resnet", r".*convolution", lambda f: {n: t for n, t in f.items() if not n.endswith("running_var")}, **NORMS),
        "running_mean, but no",
        "incomplete",
    ),
    refused(
        "a counter without its layer",
        ten(put("base_model.model.vit.norm.num_batches_tracked", dtype=torch.int64)),
        "but no weights of vit.norm",
        "incomplete",
    ),
    # What contradicts the configuration
    refused("magnitudes without DoRA", ten(MAGNITUDES), "does not say use_dora: true", "Copy both files"),
    refused("another rank than the tensors'", settings(r=16), "has rank 4, but adapter_config.json says 16", "Copy both files"),
    refused(
        "DoRA on an embedding",
        ten(config(use_dora=True), MAGNITUDES, renamed(as_embedding)),
        "is an embedding, but DoRA",
        "Merge the adapter into its base",
    ),
    refused(
        "PiSSA on a convolution",
        lambda s: (
            on("resnet", r".*convolution")(s),
            config(init_lora_weights="pissa", target_modules=None)(s.folder / "adapter0"),
        ),
        "is not a linear layer, but init_lora_weights=pissa",
        "Copy both files",
    ),
    refused(
        "DoRA with one magnitude for all outputs",
        ten(config(use_dora=True), MAGNITUDES, mapped(lambda t: t[0], "magnitude")),
        "has 1 DoRA magnitude for",
    ),
    # What its numbers are
    refused("NaN in an adapter", ten(mapped(lambda t: t * torch.nan, "lora_B")), "holds NaN or infinity", "another checkpoint"),
    refused("a quantised adapter", ten(mapped(lambda t: t.to(torch.int8))), "type int8, expected float64", "quantisation"),
    refused(
        "numbers of a rare type", ten(mapped(lambda t: t.to(torch.uint16), A)), "of type U16, expected F64, F32", "Save it as"
    ),
    refused(
        "a variance below zero",
        on("resnet", r".*convolution", statistics(torch.neg, "running_var"), **NORMS),
        "holds negative numbers, but is a variance",
        "copy it again, or use another checkpoint",
    ),
    refused("an untrained adapter", ten(mapped(torch.zeros_like, "lora_B")), "LoRA products are zero", "leave it out"),
    refused("DoRA that was not trained", untrained_dora, "by less than float32 rounding", "leave it out"),
    refused("nothing but a head", ten(drop("lora_")), "holds no LoRA tensors", "Leave the adapter out"),
    refused(
        "LoRA of a head alone",
        ten(
            config(target_modules=["classifier"]),
            tensors(lambda _: {"classifier.lora_A.weight": torch.ones(4, 32), "classifier.lora_B.weight": torch.ones(10, 4)}),
        ),
        "changes only classifier.weight",
        "Leave it out",
    ),
    # What names are there
    refused("tensors of two adapters", changed(with_second), "several adapter names", "Save each adapter alone"),
    refused(
        "names with and without prefix",
        changed(lambda f: f | {n.removeprefix("base_model.model."): f[n] * 2 for n in (A, B)}),
        f"is saved twice, as {A} and as {A.removeprefix('base_model.model.')}",
    ),
    refused("names with and without the model", changed(twice_a_place), "are both names of layers.0.attention.q_proj.weight"),
    refused(
        "a norm with two values",
        ten(put(f"{NORM}.modules_to_save.weight", 32), put(f"{NORM}.weight", 32, value=2.0)),
        "twice with different numbers",
    ),
    refused(
        "a weight saved whole beside its LoRA",
        ten(put(f"{FIRST}.base_layer.weight", 32, 32)),
        "and also changed by LoRA",
        "without save_embedding_layers=True",
    ),
    refused(
        "two beginnings of names",
        ten(renamed(lambda n: f"module.{n}" if "fc1" in n else n)),
        "others with 'module.base_model.model.'",
        "two models",
    ),
    refused(
        "a compiled layer under two names",
        changed(lambda f: f | {n.replace("layers.0.", "layers.0._orig_mod."): f[n] * 2 for n in (A, B)}),
        "q_proj.weight is saved twice, as",
        "layers.0._orig_mod.attention",
    ),
    refused(
        "a kind of LoRA tensor that is not known",
        ten(put(f"{FIRST}.lora_E", 4, 1)),
        "lora_E is no tensor of LoRA",
        "Copy both files",
    ),
    refused("a name that cannot be printed", ten(put("base_model.model.vit.norm\n\x1b[31m.weight", 32)), "cannot be printed"),
    refused(
        "a name without end", ten(put(f"base_model.model.vit.{'a' * 2000}.weight", 32)), "has 2,028 characters, at most 1,000"
    ),
    # What shapes they have
    refused("ranks that disagree", ten(mapped(lambda t: t[:2], A)), "rank 2 in lora_A but 4 in lora_B", "damaged"),
    refused("factors of one dimension", ten(mapped(torch.flatten, FIRST)), "which do not fit a linear layer, a convolution"),
    refused(
        "LoRA of a convolution in groups",
        on("regnet", r".*stages\.1\.layers\.0\.layer\.1\.convolution", r=4),
        "in groups",
        "without this layer",
    ),
    # What weights they belong to
    refused("an adapter of another base", other_base, "/wide", "no weight of", "the shape 32×32", "name that base"),
    refused(
        "tensors that match nothing",
        ten(renamed(lambda n: n.replace("q_proj", "wrong_name"))),
        "2 of the 6 weights",
        "names this base",
        "Save it again from",
    ),
    refused(
        "an adapter of an unnamed base",
        ten(config(base_model_name_or_path=None), renamed(lambda n: n.replace("fc1", "up"))),
        "does not name the base",
    ),
    refused("a head of an unusual name", ten(put("base_model.model.fc.weight", 10, 32)), "fc.weight", "remove it"),
    refused(
        "an adapter of a text model around the base",
        ten(renamed(lambda n: n.replace("vit.", "text_encoder."))),
        "'text_encoder' before them is another part of a model",
    ),
    refused(
        "an adapter of another family",
        ten(config(base_model_name_or_path="somebody/other"), renamed(lambda n: n.replace("vit.", "beit."))),
        "'beit' before them is another part of a model, or another family",
    ),
    refused("an adapter of two models", changed(of_two_models), "begin differently", "several models"),
    refused(
        "a wrapper around half of the layers",
        ten(renamed(lambda n: n.replace("vit.", "student.vit.") if "layers.1." in n else n)),
        "the other names begin in another way",
    ),
    refused(
        "a wrapper with a part of its own",
        ten(renamed(lambda n: n.replace("vit.", "backbone.")), put("base_model.model.neck.weight", 32)),
        "neck.weight",
        "match without 'backbone.'",
    ),
    refused("an adapter of a language model", language_model, "CAUSAL_LM", "language model", "Leave it out"),
]

MERGE_CASES = [
    refused("an unknown merge method", lambda s: s.recipe(merge_method="cat"), "merge_method is 'cat'", "concat or none"),
    refused(
        "an option that the method does not have",
        lambda s: s.recipe(merge_method="ties", merge_options={"densty": 0.5}),
        "unknown key 'densty'",
        "Did you mean",
    ),
    refused(
        "an option of a method without options",
        lambda s: s.recipe(merge_options={"density": 0.5}),
        "takes no options",
        "Remove",
    ),
    refused("a linear merge of unequal ranks", ranks_differ, "'linear'", "[4, 8]", "Use 'weighted_sum'"),
    refused(
        "a linear merge of DoRA",
        linear_of_dora,
        "'linear' adds LoRA factors",
        "/dora also holds DoRA's magnitudes",
        "Use 'weighted_sum'",
    ),
    refused("values too large for float32", ten(mapped(lambda t: t * 1e30, "lora_")), "is not finite after the merge"),
    refused(
        "variances that become negative",
        on("resnet", r".*convolution", statistics(lambda t: t * 0.1, "running_var"), 2, **NORMS),
        "is negative after the merge",
        "Make their weights smaller",
    ),
    refused("a layer that changes its weight", on("bit", r".*conv2"), "cannot be folded into BitModel", "Train the adapter on"),
    refused(
        "a layer that PEFT does not change",
        lambda s: (
            on("sam3_vision_model", r".*q_proj", with_transposed)(s),
            config(target_modules=None)(s.folder / "adapter0"),
        ),
        "PEFT cannot put it beside the weights of",
        "Train it on other layers",
    ),
    refused("`--rank` for a whole model", nothing, "--rank", "Add --store adapter", arguments=[*STORED[:4], "--rank", "4"]),
    refused(
        "an adapter to store without one in the recipe", lambda s: s.recipe(**ALONE), "no adapter to store", arguments=STORED
    ),
    refused(
        "a norm to store in an adapter",
        lambda s: (
            save_adapter(s.folder / "norm", s.folder / "base", modules_to_save=["layernorm_after"]),
            s.recipe(adapters=[{"path": "./norm"}]),
        ),
        "one LoRA adapter cannot hold it",
        "leave out --store adapter",
        arguments=STORED,
    ),
]
