"""The demo: merge two real adapters, embed real images, compare the merge with its adapters, search the table."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import yaml

from lora_embed.config.models import load_job
from lora_embed.demo import parts
from lora_embed.errors import ConfigError
from lora_embed.evaluate.assess import assess
from lora_embed.evaluate.page.evaluation import write_report
from lora_embed.evaluate.request import Request
from lora_embed.evaluate.show import print_evaluation
from lora_embed.installed import how_to_install
from lora_embed.run.job import run_job
from lora_embed.search.page import write_page
from lora_embed.search.search import find_pictures, search_image
from lora_embed.store.aside import folder_aside
from lora_embed.store.fetch import cache_root
from lora_embed.table.read import open_table
from lora_embed.text import agree, number_of

ADAPTERS = Path(__file__).parent / "adapters"
WEIGHTS = {"category10": 0.5, "group27": 0.5}
CARRY = ["category:int64", "category_name", "group:int64", "group_name", "split"]
VENDOR = "google"  # the table holds one of the two drawings of each emoji, to save time
NEEDED = {"onnx": "onnx", "scikit-learn": "sklearn"}  # package → module; for the base's weights, and to compare encoders
QUERY = "twitter-1f34e"  # an apple, from the drawings that are not in the table
REMARKS = """\
# A weight multiplies the change that an adapter makes to the base. Weights need not add up to 1: two of 0.5 give the mean
# of both changes, two of 1 give both changes in full.
# image_size is the size at which these adapters were trained. Leave it out of a recipe of your own, unless yours were
# trained at another size than the base's processor gives.
"""
Say = Callable[[str], None]


def run_demo(folder: Path, say: Say) -> None:
    """Run the demo below `folder` and print what it does; steps that were done before are not repeated."""
    _check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    base = parts.fetch_base_model(cache_root(), say)
    images = {image.key: image for image in parts.fetch_images(cache_root(), say)}
    shards, recipe, job = folder / "shards", folder / "merged.yaml", folder / "job.yaml"
    _write_shards([image for image in images.values() if image.key.startswith(VENDOR)], shards, say)
    adapters = [{"path": str(ADAPTERS / name), "weight": weight} for name, weight in WEIGHTS.items()]
    _write_yaml(recipe, REMARKS, base_model=str(base), adapters=adapters, merge_method="weighted_sum", image_size=56)
    _write_yaml(job, recipe=recipe.name, input="shards", table="table", carry=CARRY)

    say("\nMerging two adapters, and embedding all images into a table")
    result = run_job(load_job(job))
    say(result.describe())

    say("\nComparing with the base and with each adapter alone, on images that no adapter was trained on")
    compared = Request(
        recipes=(str(recipe),),
        inputs=(str(shards),),
        labels=("category", "group"),
        split="split",
        alone=True,
        judges_heads=False,
        precision="float32",
        work=str(folder / "compared"),
    )
    evaluation = assess(compared)
    write_report(evaluation, folder / "comparison.html")
    print_evaluation(evaluation)

    table, query = open_table(result.table), folder / "query.png"
    say(f"\nSearching for {query}, an apple by another artist than the table's images")
    query.write_bytes(images[QUERY].path.read_bytes())
    result_of_search = search_image(table, str(query))
    pictures = find_pictures(table, result_of_search.hits, inputs=(str(shards),))
    write_page(result_of_search, pictures, folder / "nearest.html")
    print(result_of_search.describe())

    say(f"\nlora_embed.open_table({str(folder / 'table')!r})")
    say(
        f"  version {table.version}, space {table.space_id}, {number_of(table.count, 'vector')} of {table.dimension} dimensions"
    )
    say(f"comparison: {folder / 'comparison.html'}\nnearest images: {folder / 'nearest.html'}")


def _check_installed() -> None:
    """Raises ConfigError, before anything is fetched, if a package is missing that the demo needs and a job does not."""
    missing = [package for package, module in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"the demo needs {' and '.join(missing)}, which {agree(len(missing), 'is', 'are')} not installed. Install what it "
            f"needs: {how_to_install('demo')}"
        )


def _write_shards(images: list[parts.LabelledImage], folder: Path, say: Say) -> None:
    """Write the shards, but only once: a shard that is written again counts as changed."""
    if not folder.is_dir():
        with folder_aside(folder) as aside:
            parts.write_shards(images, aside, per_shard=128)
    say(f"{number_of(len(images), 'image')} in {number_of(len(list(folder.iterdir())), 'tar shard')}: {folder}")


def _write_yaml(path: Path, remarks: str = "", **settings: object) -> None:
    path.write_text(remarks + yaml.safe_dump(settings, sort_keys=False))
