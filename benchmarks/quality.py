"""Quality of every merge method on the demo's two real tasks, base and single adapters beside them; prints Markdown.

Only emoji that no adapter was trained on count. Five seeded splits put two thirds of them into the bank and a third
into the queries, not stratified; both vendors' drawings of one emoji lie on one side. Every encoder sees the same
splits, so differences to the reference are paired. What was embedded is kept, and a second run only evaluates.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_embed.config import AdapterSpec, Recipe
from lora_embed.demo import parts
from lora_embed.demo.tour import ADAPTERS
from lora_embed.evaluate import PairedDifference, knn_accuracy, paired_difference, probe_accuracy, split_by_name
from lora_embed.fetch import cache_root
from lora_embed.model.build import build_encoder, gather
from lora_embed.model.encoder import load_encoder
from lora_embed.progress import say

IMAGE_SIZE = 56  # pixels; what the adapters were trained on
BANK_SHARE = 2 / 3
TASKS = ("category", "group")
METRICS: dict[str, Callable[..., float]] = {"kNN": knn_accuracy, "probe": probe_accuracy}
COLUMNS = tuple(f"{task} {metric}" for task in TASKS for metric in METRICS)
MEAN = "mean of the four"
CATEGORY, GROUP = {"category10": 1.0}, {"group27": 1.0}
HALVES, ONES = {"category10": 0.5, "group27": 0.5}, {"category10": 1.0, "group27": 1.0}

Figures = dict[str, list[float]]  # column → one accuracy per split


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One encoder to judge: what its recipe says of the merge."""

    method: str
    weights: dict[str, float]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Method and options, as the table's first column says them."""
        if len(self.weights) < 2:
            return f"{next(iter(self.weights), 'base')} alone"
        return ", ".join([f"`{self.method}`", *(f"{key} {value}" for key, value in self.options.items())])

    @property
    def shown_weights(self) -> str:
        return "/".join(f"{weight:g}".removeprefix("0") for weight in self.weights.values()) or "–"

    def recipe(self, base: Path) -> Recipe:
        adapters = tuple(AdapterSpec(path=str(ADAPTERS / name), weight=weight) for name, weight in self.weights.items())
        return Recipe(
            base_model=str(base),
            adapters=adapters,
            merge_method=self.method,
            merge_options=self.options,
            image_size=IMAGE_SIZE,
        )


# Methods that add take .5/.5, the mean. TIES averages what agrees with the elected sign, so its authors' factor of 1
# for the merged change (their default where nothing is tuned) is weights 1/1; PEFT's guide starts from there as well.
REFERENCE = Candidate(method="weighted_sum", weights=HALVES)
CANDIDATES = (
    Candidate(method="none", weights={}),
    Candidate(method="weighted_sum", weights=CATEGORY),
    Candidate(method="weighted_sum", weights=GROUP),
    REFERENCE,
    Candidate(method="weighted_sum", weights=ONES),
    Candidate(method="linear", weights=HALVES),
    Candidate(method="svd", weights=HALVES, options={"rank": 8}),
    Candidate(method="ties", weights=ONES, options={"density": 0.2}),
    Candidate(method="dare_linear", weights=HALVES, options={"density": 0.5}),
    Candidate(method="dare_linear", weights=HALVES, options={"density": 0.5, "seed": 1}),  # what its chance is worth
    Candidate(method="dare_ties", weights=ONES, options={"density": 0.5}),
    Candidate(method="magnitude_prune", weights=HALVES, options={"density": 0.5}),
    Candidate(method="iso_c", weights=HALVES),
    Candidate(method="iso_c", weights=ONES),
    Candidate(method="concat", weights=ONES),
)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """One encoder's vectors (n, d), and what it took: seconds to build, bytes of weights files."""

    vectors: NDArray[np.float32]
    build_s: float
    encoder_bytes: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One encoder's figures, and their differences to the reference's on the same splits."""

    candidate: Candidate
    build_s: float
    encoder_bytes: int
    figures: Figures
    differences: dict[str, PairedDifference]  # by column, and of the mean of all columns


def embed_once(candidate: Candidate, base: Path, images: Sequence[parts.LabelledImage], folder: Path) -> Embedded:
    """Build, embed and keep; what is kept is found again by the recipe's id, which names contents and options."""
    ingredients = gather(candidate.recipe(base))
    path = folder / f"{ingredients.recipe_id}.npz"
    keys = np.array([image.key for image in images])
    if not path.is_file() or not np.array_equal(np.load(path)["keys"], keys):
        with tempfile.TemporaryDirectory() as scratch:
            encoder = Path(scratch) / "encoder"
            started = time.perf_counter()
            build_encoder(ingredients, encoder, lambda line: None)
            build_s = time.perf_counter() - started
            size = sum(file.stat().st_size for file in encoder.rglob("*.safetensors"))
            vectors = load_encoder(encoder).embed([Image.open(image.path) for image in images])
        aside = path.with_suffix(".part.npz")
        np.savez(aside, keys=keys, vectors=vectors, build_s=build_s, encoder_bytes=size)
        aside.rename(path)
    kept = np.load(path)
    return Embedded(vectors=kept["vectors"], build_s=float(kept["build_s"]), encoder_bytes=int(kept["encoder_bytes"]))


def evaluate(vectors: NDArray[np.float32], images: Sequence[parts.LabelledImage], splits: int) -> Figures:
    """Accuracies by column, one per split. Images without a label of a task take no part in it."""
    emoji = [image.key.partition("-")[2] for image in images]
    banks = [split_by_name(emoji, BANK_SHARE, seed) for seed in range(splits)]
    figures: Figures = {}
    for task in TASKS:
        labels = np.array([-1 if getattr(image, task) is None else getattr(image, task) for image in images])
        for metric, accuracy in METRICS.items():
            figures[f"{task} {metric}"] = [
                accuracy(vectors[bank], labels[bank], vectors[query], labels[query])
                for bank, query in ((all_bank & (labels >= 0), ~all_bank & (labels >= 0)) for all_bank in banks)
            ]
    return figures


def compare(figures: Figures, reference: Figures) -> dict[str, PairedDifference]:
    """Differences to the reference, by column and of the mean of all columns."""
    found = {column: paired_difference(figures[column], reference[column], BANK_SHARE) for column in COLUMNS}
    means = [np.mean([of[column] for column in COLUMNS], axis=0) for of in (figures, reference)]
    return found | {MEAN: paired_difference(means[0], means[1], BANK_SHARE)}


def run(images: Sequence[parts.LabelledImage], base: Path, folder: Path, splits: int) -> list[Row]:
    """All candidates, in order."""
    embedded, figures = [], []
    for number, candidate in enumerate(CANDIDATES, 1):
        started = time.perf_counter()
        embedded.append(embed_once(candidate, base, images, folder))
        figures.append(evaluate(embedded[-1].vectors, images, splits))
        seconds = time.perf_counter() - started
        say(f"{number}/{len(CANDIDATES)} {candidate.name} {candidate.shown_weights}: {seconds:.0f} s")
    reference = figures[CANDIDATES.index(REFERENCE)]
    return [
        Row(
            candidate=candidate,
            build_s=made.build_s,
            encoder_bytes=made.encoder_bytes,
            figures=found,
            differences=compare(found, reference),
        )
        for candidate, made, found in zip(CANDIDATES, embedded, figures, strict=True)
    ]


def verdict(row: Row) -> str:
    """In words: the mean of the four figures against the reference's, then each figure that differs, in points."""
    if row.candidate == REFERENCE:
        return "the reference"
    mean = row.differences[MEAN]
    apart = [f"{column} {_points(row.differences[column])}" for column in COLUMNS if _differs(row.differences[column])]
    return "; ".join([f"{mean.verdict} ({_points(mean)})", *apart])


def _differs(difference: PairedDifference) -> bool:
    return difference.verdict != "within noise"


def _points(difference: PairedDifference) -> str:
    return f"{100 * difference.mean:+.1f}{'*' if difference.holds else ''}".replace("-", "−")


def markdown(rows: Sequence[Row]) -> str:
    """The table, accuracies in percent."""
    header = ["method", "weights", *COLUMNS, "build s", "encoder MB", "verdict"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [
            f"{100 * np.mean(row.figures[column]):.1f} ± {100 * np.std(row.figures[column], ddof=1):.1f}" for column in COLUMNS
        ]
        cost = [f"{row.build_s:.1f}", f"{row.encoder_bytes / 1e6:.1f}"]
        lines.append([row.candidate.name, row.candidate.shown_weights, *cells, *cost, verdict(row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def explanation(images: Sequence[parts.LabelledImage], splits: int) -> str:
    """What the table's figures are."""
    groups = sum(image.group is not None for image in images)
    return (
        f"Percent, mean ± standard deviation over {splits} splits of {len(images):,} images that no adapter was trained on "
        f"({groups:,} of them in a group). Verdict: difference of the {MEAN} to `{REFERENCE.method}` "
        f"{REFERENCE.shown_weights}, in points, then each figure that differs by more than two standard errors of the "
        "paired difference. Splits of one image set are not independent, which makes those errors too small; * holds with "
        "the error corrected for it, at 95 % for one comparison, not for all of the table at once."
    )


def as_json(rows: Sequence[Row], images: Sequence[parts.LabelledImage], splits: int) -> dict[str, Any]:
    return {
        "images": len(images),
        "splits": splits,
        "bank_share": BANK_SHARE,
        "reference": asdict(REFERENCE),
        "rows": [asdict(row) | {"name": row.candidate.name, "verdict": verdict(row)} for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--out", type=Path, default=cache_root() / "quality", help="folder for quality.json and the vectors")
    arguments = parser.parse_args()
    if arguments.splits < 2:
        parser.error("--splits: two or more, or nothing can be said of noise")
    base = parts.fetch_base_model(cache_root(), say)
    images = [image for image in parts.fetch_images(cache_root(), say) if image.split == "test"]
    (arguments.out / "vectors").mkdir(parents=True, exist_ok=True)
    rows = run(images, base, arguments.out / "vectors", arguments.splits)
    found = json.dumps(as_json(rows, images, arguments.splits), indent=1)
    (arguments.out / "quality.json").write_text(found + "\n", encoding="utf-8")
    print(f"{markdown(rows)}\n\n{explanation(images, arguments.splits)}")


if __name__ == "__main__":
    main()
