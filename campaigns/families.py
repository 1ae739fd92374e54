"""Every model type of transformers for images, with a tiny model, two adapters and each pooling: right, or refused.

`python campaigns/families.py --repeat 10 --write` measures all types and writes docs/families.md. Each encoder is compared with
PEFT's forward with the adapters beside the weights, not merged, and the hidden states taken by hand. In each repetition the
weights, the adapters and the images are others, and the base's files lie under another prefix. Names of types limit it.
"""

import argparse
import functools
import json
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoImageProcessor, ViTImageProcessorPil

import family_page
from family_models import (
    difference,
    images,
    pooled_by_hand,
    save_adapters,
    save_bare,
    save_base,
    states_by_hand,
    with_prefix,
)
from family_specs import POOLINGS, SPECS, WRAPPERS, Spec
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import LoraEmbedError
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import Encoder, load_encoder
from lora_embed.model.ingredients import gather

SELECTIONS = {"both": (0.6, 0.4), "first": (1.0, 0.0), "second": (0.0, 1.0)}  # weights of the two adapters
PREFIXES = ("", "_orig_mod.", "module.", "backbone.")
BOUND = 1e-5  # relative L2 difference of a vector
HUB_BOUND = 1e-4  # the same where each side prepares the images by itself
LEAST = 1e-3  # by which an adapter must change the vectors; else a comparison shows nothing


@dataclass
class Row:
    """What was found of one type."""

    name: str
    spec: Spec
    figures: dict[str, float] = field(default_factory=dict)  # pooling → largest difference of all seeds and selections
    refused: dict[str, str] = field(default_factory=dict)  # pooling → message
    effect: float = np.inf  # smallest difference that an adapter makes
    problems: list[str] = field(default_factory=list)
    hub: str = ""  # with the type's own processor: "yes", or why it is refused
    repeat: int = 0  # how many seeds
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Made:
    """A base of one type and two adapters, and what the comparison needs of them."""

    row: Row
    model_class: Any
    base: Path
    placed: Path  # the base for the build, its weights perhaps under a prefix
    adapters: list[Path]

    def states(self, selection: str | None, pixels: torch.Tensor) -> dict[str, torch.Tensor | None]:
        weights = SELECTIONS[selection] if selection else (0.0, 0.0)
        return states_by_hand(self.model_class, self.base, self.row.spec, self.adapters, weights, pixels)


def build(made: Made, selection: str, pooling: str, out: Path, image_size: int | None = None) -> Encoder:
    """Adapters of weight 0 are left out; without adapters, the base alone."""
    parts = zip(made.adapters, SELECTIONS[selection], strict=False)
    specs = tuple(AdapterSpec(path=str(path), weight=weight) for path, weight in parts if weight)
    method: dict[str, Any] = {} if specs else {"merge_method": "none"}
    recipe = Recipe(base_model=str(made.placed), adapters=specs, pooling=pooling, image_size=image_size, **method)
    build_encoder(gather(recipe), out, lambda _line: None)
    return load_encoder(out, batch_size=3)


def make(row: Row, folder: Path, seed: int, config: dict[str, Any], processor: dict[str, Any]) -> Made:
    base = folder / "base"
    try:
        model_class = save_base(base, row.name, seed, config)
        adapters = save_adapters(folder, base, model_class, row.spec, seed)
    except ImportError:  # the type needs a package that is not installed: there is only what a hub's folder holds
        model_class, adapters = None, []
        save_bare(base, row.name, config)
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    prefix = "" if row.name in WRAPPERS else PREFIXES[seed % len(PREFIXES)]
    placed = with_prefix(base, folder / "placed", prefix)
    return Made(row=row, model_class=model_class, base=base, placed=placed, adapters=adapters)


def measure(row: Row, seed: int, tries: list[tuple[str, str]], folder: Path) -> None:
    """One seed of one type: pairs of a pooling and a selection of adapters, compared with what is taken by hand."""
    spec = row.spec
    processor = ViTImageProcessorPil(size={"height": spec.size, "width": spec.size})
    made = make(row, folder, seed, spec.config, processor.to_dict())
    shown = images(seed, spec.size)
    pixels = torch.tensor(np.stack(processor(shown)["pixel_values"]))
    states = functools.cache(lambda selection: made.states(selection, pixels))
    for number, (pooling, selection) in enumerate(tries):
        try:
            encoder = build(made, selection, pooling, folder / f"encoder{number}")
        except LoraEmbedError as error:
            row.refused[pooling] = message_of(error, folder)
            continue
        compare(row, pooling, encoder.embed(shown), states(selection), states(None))


def message_of(error: LoraEmbedError, folder: Path) -> str:
    return " ".join(str(error).replace(f"{folder}/", "").replace("placed", "base").split())


def compare(row: Row, pooling: str, vectors: NDArray[Any], states: dict[str, Any], untrained: dict[str, Any]) -> None:
    expected, before = (pooled_by_hand(of, row.spec, pooling) for of in (states, untrained))
    if expected is None or before is None:
        row.problems.append(f"{pooling}: built, but there is no such state or token")
        return
    row.figures[pooling] = max(row.figures.get(pooling, 0.0), difference(vectors, expected))
    row.effect = min(row.effect, difference(before, expected))


def measure_hub(row: Row, seed: int, folder: Path) -> None:
    """The same with the type's own processor at its default settings, and images of the size that it gives."""
    settings = family_page.processor_settings(row.name, row.spec)
    if settings is None:
        row.hub = "no processor of its own"
        return
    made = make(row, folder, seed, family_page.hub_config(row.spec), settings)
    shown = images(seed, 224)
    pooling = "mean" if "mean" in row.figures else "last_mean"
    for image_size in (None, 224):
        try:
            encoder = build(made, "first", pooling, folder / "encoder", image_size)
        except LoraEmbedError as error:
            row.hub = message_of(error, folder)
            if "image_size" not in row.hub:
                return
            continue
        row.hub = "with `image_size`" if image_size else "yes"
        if not isinstance(row.spec.processor, dict):  # else its class cannot be made here
            processor = AutoImageProcessor.from_pretrained(folder / "encoder", backend="pil")
            pixels = torch.tensor(np.stack(processor(shown)["pixel_values"]))
            expected = pooled_by_hand(made.states("first", pixels), row.spec, pooling)
            found = np.inf if expected is None else difference(encoder.embed(shown), expected)
            row.problems += [f"with its own processor: off by {found:.1e}"] * (found > HUB_BOUND)
        return


def row_of(name: str, *, repeat: int, first_seed: int, hub: bool) -> Row:
    """Everything of one type, in a process of its own. With the first seed all poolings are tried, with the others one each."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    row, start = Row(name, SPECS[name], repeat=repeat), time.monotonic()
    alone = [("mean", "first"), ("mean", "second")]
    attempt(row, functools.partial(measure, row, first_seed, [*((pooling, "both") for pooling in POOLINGS), *alone]))
    for number in range(1, repeat):
        pooling = POOLINGS[number % len(POOLINGS)]
        selection = [*SELECTIONS][(number + number // len(POOLINGS)) % len(SELECTIONS)]
        attempt(row, functools.partial(measure, row, first_seed + number, [(pooling, selection)]))
    if hub and row.figures:
        attempt(row, functools.partial(measure_hub, row, first_seed))
    row.problems += [f"{pooling}: off by {found:.1e}" for pooling, found in row.figures.items() if not found <= BOUND]
    row.problems += [f"{pooling}: built once and refused once" for pooling in row.figures if pooling in row.refused]
    if row.effect < LEAST:
        row.problems.append(f"the adapters change vectors by {row.effect:.1e} only")
    row.seconds = time.monotonic() - start
    return row


def attempt(row: Row, step: Callable[[Path], None]) -> None:
    """Run a step in a folder of its own; an error that is not this package's own is a problem of the type."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            step(Path(folder))
        except Exception as error:  # noqa: BLE001 - any other error is a finding
            places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            row.problems.append(f"{type(error).__name__}: {str(error)[:300]} at {', '.join(places[-5:])}")


def rows(names: list[str], processes: int, **options: Any) -> Iterator[Row]:
    """A row for each type, in the order of `names`."""
    measured = functools.partial(row_of, **options)
    if processes == 1:
        yield from map(measured, names)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(measured, names)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure tiny models of every type for images, and write docs/families.md.")
    parser.add_argument("names", nargs="*", metavar="TYPE", help="all by default")
    parser.add_argument("--repeat", type=int, default=1, help="seeds of each type")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--no-hub", action="store_true", help="leave out the types' own processors")
    parser.add_argument("--write", action="store_true", help="write docs/families.md; all types must be measured")
    options = parser.parse_args()
    if options.write and options.names:
        parser.error("--write needs all types")
    found = []
    chosen = options.names or list(SPECS)
    for row in rows(chosen, options.processes, repeat=options.repeat, first_seed=options.seed, hub=not options.no_hub):
        print(family_page.line(row), flush=True)
        found.append(row)
    if options.write:
        family_page.write(found)
    bad = [row for row in found if row.problems]
    print(f"{len(found)} types, {sum(bool(row.figures) for row in found)} work, {len(bad)} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
