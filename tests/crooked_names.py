"""More crooked adapters: names with wrappers and adapters, heads of odd types, and tensors of odd shapes."""

from typing import Any

import torch

from crooked import (
    BODY,
    FIRST,
    SAME,
    A,
    B,
    Case,
    Edit,
    Tensors,
    both,
    config,
    doubled,
    mapped,
    put,
    renamed,
    tensors,
    with_columns,
)

PREFIX = "base_model.model."
ELSEWHERE = config(base_model_name_or_path="somebody/other")
OTHER_PART = "before them is another part of a model, or another family"
FIRST_NAME = r"layer\.0\.attention\.q_proj"
NORM = f"{BODY}encoder.layer.0.norm1"


def around(front: str) -> Edit:
    """Another model around the whole trained model."""
    return renamed(lambda name: name.replace(PREFIX, PREFIX + front, 1))


def as_body(front: str) -> Edit:
    """Another name for the base in the trained model; its head keeps its own."""
    return renamed(lambda name: name.replace("dinov2.", front, 1))


def within(name: str) -> Edit:
    """Names as a state dict of a PEFT model has them, with the adapter's name."""
    return renamed(lambda key: key.replace(".weight", f".{name}.weight") if ".lora_" in key else key)


def by_layer(even: str, odd: str) -> Edit:
    def rename(name: str) -> str:
        layer = name.partition("layer.")[2].partition(".")[0]
        return name if not layer else name.replace(PREFIX, PREFIX + (odd if int(layer) % 2 else even), 1)

    return renamed(rename)


def only_head(change: Any) -> Edit:
    return mapped(change, "classifier")


def padded(found: Tensors) -> Tensors:
    """Twice the rank, half of it zeros."""
    return found | {
        A: torch.cat([found[A], torch.zeros_like(found[A])]),
        B: torch.cat([found[B], torch.zeros_like(found[B])], dim=1),
    }


def with_norm(*, same: bool) -> Edit:
    """A norm under both names that PEFT gives it, with equal numbers or others."""
    trained = {f"{NORM}.modules_to_save.weight": torch.ones(384), f"{NORM}.weight": torch.full((384,), 1.0 if same else 2.0)}
    return tensors(lambda found: found | trained)


NAMES = [
    # What stands before the names
    *(
        Case(f"all names after {front}", around(front), SAME)
        for front in ("backbone.", "model.base.", "module.", "_orig_mod.", PREFIX, "модель.", "head.", "a.b.c.d.e.", "encoder.")
    ),
    *(
        Case(f"the base called {front}", as_body(front), SAME)
        for front in ("backbone.", "encoder.", "_orig_mod.dinov2.", "tower.vision.", "backbone._orig_mod.", "dinov2.dinov2.")
    ),
    Case("compiled layers", renamed(lambda name: name.replace(".attention.", "._orig_mod.attention.")), SAME),
    Case("checkpointed layers", renamed(lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")), SAME),
    Case("names without prefix after module", renamed(lambda name: name.replace(PREFIX, "module.")), SAME),
    Case("half of the names without prefix", renamed(lambda n: n.removeprefix(PREFIX) if "fc1" in n else n), SAME),
    Case("another family of the same shapes", both(ELSEWHERE, as_body("beit.")), f"'beit' {OTHER_PART}"),
    Case("another family, and this base named", as_body("beit."), SAME),
    Case("a text model of the same shapes", as_body("text_model."), f"'text_model' {OTHER_PART}"),
    Case("a decoder of the same shapes", around("decoder."), f"'decoder' {OTHER_PART}"),
    Case("one module of a short name", tensors(
        lambda found: {"a.lora_A.weight": found[A], "a.lora_B.weight": found[B]}
    ), "1 of the 1 weights that it changes matches no weight"),
    Case("more names before it than any model has", around("a." * 12), "50 of the 50 weights that it changes match no weight"),
    Case("a wrapper around half of the layers", by_layer("", "student."), "the other names begin in another way"),
    Case("two models in one file", by_layer("teacher.", "student."), r"\('student\.dinov2', 'teacher\.dinov2'\), so they"),
    Case("another prefix before half of the names", renamed(
        lambda name: f"module.{name}" if "fc1" in name else name
    ), "some names of its tensors begin with 'base_model.model.', others with 'module.base_"),
    Case("a second name after a wrapper", doubled(lambda n: n.replace("dinov2.", "backbone.dinov2.")), "1 of the 49 weights"),
    Case("a second name of a compiled layer", doubled(lambda n: n.replace("layer.0.", "layer.0._orig_mod.")), "saved twice"),
    Case("a body called like a head", around("classifier."), "which an encoder does not have: it is a task's head"),
    Case("a wrapper with a neck", both(as_body("backbone."), put(f"{PREFIX}neck.weight", 384)), r"1 of the 49 .*neck\.weight"),
    Case("a name that cannot be printed", put(f"{BODY}norm\n\x1b[31m.weight", 384), r"norm\\n\\x1b\[31m.weight' of a"),
    Case("a name without end", put(f"{BODY}{'a' * 2000}.weight", 384), "the name of a tensor has 2,031 characters"),
    # The adapter's name within PEFT
    *(
        Case(f"the adapter called {name}", within(name), SAME)
        for name in ("default", "my.own.adapter", "weight", "lora_B", "花", "0", "modules_to_save")
    ),
    Case("two adapters in one file", doubled(lambda n: n.replace(".weight", ".other.weight")), "adapter names: none in"),
    Case("a head as PEFT wraps it", both(within("ten"), tensors(lambda found: {
        name.replace("classifier.", "classifier.modules_to_save.ten."): tensor for name, tensor in found.items()
    } | {f"{PREFIX}classifier.original_module.weight": torch.ones(10, 768)})), SAME),
    Case("the untrained half of a wrapped norm", put(f"{NORM}.original_module.weight", 384), "1 of the 49 weights"),
    Case("a wrapped norm with two values", with_norm(same=False), r"norm1\.weight is saved twice with different numbers"),
    # Heads, which are dropped
    *(
        Case(f"a head of {dtype}", only_head(lambda tensor, dtype=dtype: tensor.to(dtype)), SAME)
        for dtype in (torch.int8, torch.uint8, torch.bool, torch.float8_e5m2, torch.complex64, torch.int64)
    ),
    Case("an empty head", only_head(lambda tensor: tensor[:0]), SAME),
    Case("a head of single numbers", only_head(lambda tensor: tensor.flatten()[0]), SAME),
    Case("a head with a counter", put(f"{PREFIX}classifier.num_batches_tracked", dtype=torch.int64), SAME),
    Case("NaN in a head", only_head(lambda tensor: tensor * float("nan")), r"classifier\.bias holds NaN or infinity"),
    Case("a counter of nothing", put(f"{BODY}norm.num_batches_tracked", dtype=torch.int64), r"but no weights of dinov2\.norm"),
    Case("positions that are counted", put(f"{BODY}x.position_ids", 1, 5, dtype=torch.int64), r"but no weights of dinov2\.x"),
    # Shapes
    Case("all tensors empty", mapped(lambda tensor: torch.empty(0), "lora_"), r"is empty \(shape 0\)\. DeepSpeed"),
    Case("one tensor empty", mapped(lambda tensor: torch.empty(0), B), r"q_proj\.lora_B\.weight is empty \(shape 0\)"),
    Case("a weight saved whole and empty", put(f"{NORM}.weight", 0), r"norm1\.weight has the shape 384"),
    Case("both factors transposed", mapped(torch.t, FIRST), "has rank 384, but adapter_config.json says 8"),
    Case("factors of one dimension", mapped(torch.flatten, FIRST), "lora_A of shape 3072 and lora_B of shape 3072"),
    Case("factors of a convolution", mapped(lambda t: t[..., None, None], FIRST), r"1 of the 48 .*q_proj\.weight 384×384×1×1"),
    Case("factors of five dimensions", mapped(lambda t: t[..., None, None, None], FIRST), "has the shape 384×384"),
    Case("one factor of a convolution", mapped(lambda t: t[..., None], A), "which do not fit a linear layer"),
    Case("a layer of half the rank", both(mapped(lambda t: t[:4], A), mapped(lambda t: t[:, :4], B)), "has rank 4, but .* 8"),
    Case("a layer of twice the rank, and named", both(
        tensors(padded), config(rank_pattern={FIRST_NAME: 16}, alpha_pattern={FIRST_NAME: 32})
    ), SAME),
    Case("one output less", mapped(lambda t: t[:-1], B), r"The base's weight of the name dinov2\..* has the shape 384×384"),
    Case("statistics without normalisation", put(f"{NORM}.running_mean", 384), r"1 of the 49 .*norm1\.running_mean 384"),
    Case("one magnitude for all", both(config(use_dora=True), tensors(with_columns("lora_magnitude_vector")), mapped(
        lambda tensor: tensor[0], "magnitude")), "has 1 DoRA magnitude for 384 outputs"),
    Case("magnitudes of whole numbers", both(config(use_dora=True), tensors(with_columns("lora_magnitude_vector")), mapped(
        torch.Tensor.int, "magnitude")), "holds numbers of type int32, expected float64"),
    Case("magnitudes under two names", both(config(use_dora=True), tensors(with_columns("lora_magnitude_vector")), tensors(
        lambda found: found | {f"{FIRST}.lora_magnitude_vector.weight": torch.ones(384)})), "is saved twice, as "),
    Case("biases of another length", both(config(lora_bias=True), tensors(with_columns("lora_B.bias")), mapped(
        lambda tensor: tensor[:8], "q_proj.lora_B.bias")), r"12 of the 96 .*q_proj\.bias 8.*has the shape 384"),
    # Configuration and tensors
    Case("modules that nothing targets", config(target_modules=["q_proj", "v_proj", "fc1"]), SAME),
    Case("layers that nothing targets", config(layers_to_transform=[0]), SAME),
    Case("modules that are excluded", config(exclude_modules=["fc1"]), SAME),
    Case("no targets", config(target_modules=[]), SAME),
    Case("a norm that was not saved", config(modules_to_save=["classifier", "norm1"]), "names norm1, but .* no weights of"),
    Case("fields without values", config(rank_pattern=None, alpha_pattern=None, use_dora=None, bias=None), SAME),
    Case("another name of the method", config(peft_type="lora"), r"expected a LoRA adapter \(peft_type LORA\), found lora"),
    Case("an adapter of a language model", both(
        config(task_type="CAUSAL_LM", base_model_name_or_path="somebody/words-7b"),
        renamed(lambda name: name.replace("dinov2.encoder.layer", "model.layers")),
    ), "says task_type CAUSAL_LM: it was trained on a language model, 'somebody/words-7b'"),
    Case("another model, this base named", renamed(lambda n: n.replace("fc1", "up")), "names this base, 'vit-small-focus'"),
    Case("another model, no base named", both(config(base_model_name_or_path=None), renamed(lambda n: n.replace("fc1", "up"))),
         "adapter_config.json does not name the base that it was trained on"),
    Case("another model, another base named", both(ELSEWHERE, renamed(lambda n: n.replace("fc1", "up"))),
         r"It was trained on 'somebody/other'; name that base in the recipe"),
    Case("a head of no usual name", put(f"{PREFIX}fc.weight", 10, 384), "part of a task's head, remove it from"),
]  # fmt: skip
