"""A tiny search on real files: random base, random adapters, images whose looks are their labels."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jobs import write_recipe
from lora_embed.config.models import load_recipe
from lora_embed.tune.goal import Budget, Search, TaskLabel
from models import save_adapter, save_base
from samples import encoded, tar_of

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 220))


def picture(colour: int, stripes: int, seed: int) -> Image.Image:
    """32×32: one of three colours, upright or lying stripes, and noise that makes the class no certainty."""
    rng = np.random.default_rng(seed)
    wave = (np.arange(32) // 4 % 2)[:, None, None] * np.ones((32, 32, 1))
    values = (wave if stripes else wave.swapaxes(0, 1)) * COLOURS[colour] + rng.normal(0, 110, (32, 32, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def write_labelled(folder: Path, images: int = 120) -> Path:
    """Two tars: `colour` on all, `stripes` on two thirds, `pair` shared by two neighbours, one broken image, one unlabelled."""
    folder.mkdir(parents=True, exist_ok=True)
    for half in range(2):
        members = []
        for number in range(half * images // 2, (half + 1) * images // 2):
            colour, stripes = number // 2 % 3, number // 2 % 2
            labels = {"colour": colour, "pair": f"p{number // 2}"} | ({"stripes": bool(stripes)} if number % 6 < 4 else {})
            members += [(f"{number:04d}.json", json.dumps(labels).encode())]
            members += [(f"{number:04d}.png", encoded(picture(colour, stripes, number)))]
        members += [(f"broken-{half}.json", b'{"colour": 1}'), (f"broken-{half}.png", b"no image")]
        members += [(f"plain-{half}.png", encoded(picture(0, 0, 9)))]
        (folder / f"{half}.tar").write_bytes(tar_of(members))
    return folder


def tiny_search(folder: Path, evaluations: int = 8, **changes: object) -> Search:
    """A search over two random adapters of a random ViT."""
    if not (folder / "recipe.yaml").is_file():
        base = save_base(folder / "base")
        write_recipe(
            folder, base, {save_adapter(folder / name, base, 3, seed=seed): 0.5 for seed, name in ((1, "one"), (2, "two"))}
        )
        write_labelled(folder / "shards")
    settings: dict[str, object] = {
        "recipe": load_recipe(folder / "recipe.yaml"),
        "inputs": (str(folder / "shards"),),
        "tasks": (TaskLabel(field="colour", adapter="one"), TaskLabel(field="stripes")),
        "out": folder / "tuned.yaml",
        "budget": Budget(evaluations=evaluations),
        "methods": ("weighted_sum", "ties"),
        "group": "pair",
    }
    return Search(**settings | changes)  # type: ignore[arg-type]
