"""The page docs/families.md: its words, and a row of figures for each family as `test_families.py` measures them."""

from pathlib import Path

from models import FAMILIES

DOCS = Path(__file__).resolve().parents[1] / "docs" / "families.md"
INTRODUCTION = """# Base models by family

What is tested for each family of base models, on tiny models with random weights, saved by transformers and adapted by
PEFT. `make matrix` runs `tests/model/test_families.py` and writes this page; `make test` runs the same tests.

- **Forms of a base.** A headless model, a model with a classifier, and for CLIP and SigLIP the dual encoder, of which the
  vision part is taken: each gives the same encoder, bit for bit. Poolers and attention pooling are left out, and a weight
  that is not in the files is never made up.
- **What `mean` pools** is `hidden_states[-1].mean(dim=1)`, as transformers gives it; for maps, the mean over height and
  width. In families where that state lies before the final norm, `last_mean` pools the state after it.
- **Prefix tokens** are the class, distillation and register tokens before the patches; `patch_mean` leaves them out.
- **Sizes.** ViT, DeiT, CLIP and SigLIP take images of their own size only; the others take a recipe's `image_size` too.
- **Adapters** may be trained on the classification model or the plain one; of one trained on a whole dual encoder, the
  text's part is dropped as a head is.
- **Difference to PEFT**: the encoder's vectors against the classification model with the adapter beside its weights, LoRA
  on linear layers and on one convolution; largest relative L2 of a row, allowed is 1e-5.
- **Pooling difference**: the same against the literal `hidden_states[-1]` of the saved encoder, opened by `AutoModel`.
- **Weights found** by the names of transformers 4 and of 5, with and without the prefix of a classification model; it is
  all of them in each row.

BEiT with `use_mean_pooling: false` has a final norm, and is then pooled before it. DINOv2 with SwiGLU layers (the giant)
joined two of today's weights in transformers 4: adapters of that time on `weights_in` are refused by name. SigLIP 2 of
fixed resolution is SigLIP in its files; its variant with flexible resolution takes other inputs and is refused. Any other
family that `AutoModel` gives for images is accepted when the checks of `lora-embed build` pass.

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
