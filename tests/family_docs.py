"""The page docs/families.md: its words, and a row of figures for each family as `test_families.py` measures them."""

from pathlib import Path

from models import FAMILIES

DOCS = Path(__file__).resolve().parents[1] / "docs" / "families.md"
INTRODUCTION = """# Base models by family

What is tested for each family of base models, with tiny models that have random weights, are saved by transformers and
get an adapter by PEFT. `make matrix` runs `tests/model/test_families.py` and writes this page; `make test` runs the same tests.

- **Forms of a base.** A base may be a headless model, a model with a classifier, or, for CLIP and SigLIP, the model of images
  and texts, of which the vision part is taken. All forms give the same encoder, bit for bit. Poolers and attention pooling
  are left out, and a weight that is not in the files is never made up.
- **What `mean` pools** is `hidden_states[-1].mean(dim=1)`, as transformers gives it; for models whose state is a map, the
  mean over height and width. Where that state lies before the final norm, `last_mean` pools the state after it.
- **Prefix tokens** are the class, distillation and register tokens before the patches; `patch_mean` leaves them out.
- **Sizes.** ViT, DeiT, CLIP and SigLIP take images of their own size only; the others take a recipe's `image_size` too.
- **Adapters** may be trained on the classification model or on the headless one. If an adapter was trained on images and
  texts, its part for texts is dropped, as a head is.
- **Difference to PEFT**: the encoder's vectors are compared with those of the classification model with the adapter loaded
  by PEFT and not merged, LoRA on linear layers and on one convolution. The figure is the largest relative L2 difference of
  a vector; at most 1e-5 is allowed.
- **Pooling difference**: the same compared with `hidden_states[-1]` of the saved encoder, opened by `AutoModel`.
- **Weights found**: how many weights are found by the names of transformers 4 and of 5, with and without the prefix of a
  classification model. In each row it is all of them.

BEiT with `use_mean_pooling: false` has a final norm, and `mean` pools the state before it. In DINOv2 with SwiGLU layers (the
giant), transformers 4 kept two of today's weights as one, `weights_in`: an adapter of that time on it is refused, and the
message names it. SigLIP 2 of fixed resolution is SigLIP in its files; the variant with flexible resolution takes other
inputs and is refused. Any other family that `AutoModel` opens for images is accepted if the checks of `lora-embed build` pass.

| family | class | what `mean` pools | prefix tokens | difference to PEFT | pooling difference | weights found: 4 | 5 |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def cells(key: str) -> str:
    """A row's words, which are the same on every machine."""
    family = FAMILIES[key]
    if family.pools == "map":
        pools, prefix = "height and width of the final map", "–"
    else:
        pools, prefix = f"all tokens, {family.state}", str(family.prefix_tokens)
    return f"| {key} | `{family.classifier.__name__}` | {pools} | {prefix} |"


def measures(row: dict[str, float]) -> str:
    """A row's figures: differences to one digit, and how many weights were found by name."""
    differences = [f"{row[name]:.0e}" if row[name] else "0" for name in ("peft", "pooling")]
    return " | ".join([*differences, f"{row['weights of 4']:.0f}", f"{row['weights of 5']:.0f}"]) + " |"
