"""Every merge method on the demo's two real tasks, base and single adapters beside them: `lora-embed evaluate` on 15 recipes.

Only emoji that no adapter was trained on count. Five seeded splits put two thirds of them into the bank and a third
into the queries, not stratified; both vendors' drawings of one emoji lie on one side. Prints Markdown; the whole
evaluation is written as JSON. What was embedded is kept, and a second run only evaluates.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lora_embed.demo import parts
from lora_embed.demo.tour import ADAPTERS
from lora_embed.evaluate.assess import assess
from lora_embed.evaluate.figures import BANK_SHARE
from lora_embed.evaluate.records import Evaluation
from lora_embed.evaluate.request import Request
from lora_embed.evaluate.show import to_markdown
from lora_embed.monitor import ending
from lora_embed.monitor.progress import say
from lora_embed.store.fetch import cache_root
from lora_embed.vectors.metrics import paired_difference

IMAGE_SIZE = 56  # pixels; what the adapters were trained on
COLUMNS = [(task, metric) for task in ("category", "group") for metric in ("knn", "probe")]
CATEGORY, GROUP = {"category10": 1.0}, {"group27": 1.0}
HALVES, ONES = {"category10": 0.5, "group27": 0.5}, {"category10": 1.0, "group27": 1.0}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One encoder to judge: what its recipe says of the merge."""

    method: str
    weights: dict[str, float]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its file."""
        options = [f"{key}-{value}" for key, value in self.options.items()]
        weights = [f"{weight:g}" for weight in self.weights.values()]
        return "_".join([self.method, *options, *weights] if len(weights) > 1 else [next(iter(self.weights), "base"), "alone"])

    def write(self, folder: Path, base: Path) -> str:
        """Its recipe file."""
        recipe: dict[str, Any] = {"base_model": str(base), "image_size": IMAGE_SIZE, "merge_method": self.method}
        recipe["adapters"] = [{"path": str(ADAPTERS / name), "weight": weight} for name, weight in self.weights.items()]
        path = folder / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(recipe | {"merge_options": self.options}))
        return str(path)


# Methods that add take .5/.5, the mean. TIES averages what agrees with the elected sign, so its authors' factor of 1
# for the merged change (their default where nothing is tuned) is weights 1/1; PEFT's guide starts from there as well.
CANDIDATES = (
    Candidate(method="weighted_sum", weights=HALVES),  # the reference
    Candidate(method="none", weights={}),
    Candidate(method="weighted_sum", weights=CATEGORY),
    Candidate(method="weighted_sum", weights=GROUP),
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


def verdicts(evaluation: Evaluation) -> str:
    """The mean of four figures against the reference's, in points: * holds at 95 % with the corrected error."""
    per_split = {(one.task, one.metric, one.candidate): one.per_split for one in evaluation.figures}
    means = {one.name: np.mean([per_split[*column, one.name] for column in COLUMNS], axis=0) for one in evaluation.candidates}
    lines = ["| candidate | mean of kNN and probe on both tasks, against the reference |", "| --- | --- |"]
    for name, mean in means.items():
        if name != evaluation.reference:
            found = paired_difference(list(mean), list(means[evaluation.reference]), BANK_SHARE)
            points = f"{100 * found.mean:+.1f}".replace("-", "−") + "*" * found.holds
            lines.append(f"| {name} | {points}, {found.verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--out", type=Path, default=cache_root() / "quality", help="folder for quality.json and the vectors")
    arguments = parser.parse_args()
    base = parts.fetch_base_model(cache_root(), say)
    images = [image for image in parts.fetch_images(cache_root(), say) if image.split == "test"]
    recipes = arguments.out / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "shards").is_dir():  # a shard that is written again is a changed shard
        parts.write_shards(images, arguments.out / "shards.part", per_shard=128)
        (arguments.out / "shards.part").rename(arguments.out / "shards")
    request = Request(
        recipes=tuple(candidate.write(recipes, base) for candidate in CANDIDATES),
        inputs=(str(arguments.out / "shards"),),
        labels=("category", "group"),
        group="emoji",
        splits=arguments.splits,
        precision="float32",
        work=str(arguments.out / "work"),
    )
    evaluation = assess(request)
    (arguments.out / "quality.json").write_text(evaluation.to_json() + "\n", encoding="utf-8")
    print(f"{to_markdown(evaluation)}\n\n{verdicts(evaluation)}")


if __name__ == "__main__":
    main()
    ending.end_process(0)
