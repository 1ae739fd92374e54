"""The demo: two real adapters merged, real images embedded, the table read, searched and compared; in minutes."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
import yaml
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table as TextTable

from lora_embed.config import load_job
from lora_embed.demo import parts
from lora_embed.demo.picture import Tile, neighbour_sheet
from lora_embed.evaluate import knn_accuracy
from lora_embed.run import run_job
from lora_embed.storage import cache_root
from lora_embed.table import Table, open_table

ADAPTERS = Path(__file__).parent / "adapters"
ENCODERS = {  # name → weights of its adapters
    "merged": {"category10": 0.5, "group27": 0.5},
    "base": {},
    "category10": {"category10": 1.0},
    "group27": {"group27": 1.0},
}
TASKS = {"category": "10 classes", "group": "27 classes"}
VENDOR = "google"  # one of the two drawings of each emoji: half the images, and the demo ends in time
QUERIES, NEIGHBOURS = 6, 8
Say = Callable[[str], None]


def run_demo(folder: Path, say: Say) -> None:
    """Run all of it below `folder`, printing what it does; whatever is there already is not done again."""
    base = parts.fetch_base_model(cache_root(), say)
    images = [image for image in parts.fetch_images(cache_root(), say) if image.key.startswith(VENDOR)]
    _write_shards(images, folder / "shards", say)
    tables = {}
    for name, weights in ENCODERS.items():
        say(f"\n── {name} ──")
        result = run_job(load_job(_write_job(folder, name, weights, base)))
        say(result.describe())
        tables[name] = open_table(result.table)
    _print_accuracies(tables)
    merged = tables["merged"]
    picture = folder / "nearest.png"
    _draw_nearest(merged, folder / "shards", images, picture)
    console = Console(highlight=False)
    console.print(f"\nlora_embed.open_table({str(folder / 'tables' / 'merged')!r})")
    console.print(
        f"  version {merged.version}, space {merged.space_id}, {merged.count:,} vectors of {merged.dimension} dimensions"
    )
    console.print(f"nearest images of {QUERIES} queries: {picture}")


def _write_shards(images: list[parts.LabelledImage], folder: Path, say: Say) -> None:
    """Once: a shard that is written again is a changed shard."""
    if not folder.is_dir():
        aside = folder.with_name("shards.writing")
        parts.write_shards(images, aside, per_shard=128)
        aside.rename(folder)
    say(f"{len(images):,} images in {len(list(folder.iterdir()))} tar shards: {folder}")


def _write_job(folder: Path, name: str, weights: dict[str, float], base: Path) -> Path:
    """A recipe and a job as a user would write them; returns the job's path."""
    recipe = {
        "base_model": str(base),
        "adapters": [{"path": str(ADAPTERS / adapter), "weight": weight} for adapter, weight in weights.items()],
        "merge_method": "weighted_sum" if weights else "none",
        "image_size": 56,
    }
    job = {
        "recipe": f"{name}-recipe.yaml",
        "input": "shards",
        "table": f"tables/{name}",
        "carry": ["category:int64", "category_name", "group:int64", "group_name", "split"],
    }
    (folder / f"{name}-recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    path = folder / f"{name}-job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def _print_accuracies(tables: dict[str, Table]) -> None:
    """kNN accuracy of every encoder on both tasks, from the published vectors."""
    text = TextTable(title="kNN accuracy on held-out images (k = 10, ± one standard error)", title_justify="left")
    text.add_column("encoder")
    for task, classes in TASKS.items():
        text.add_column(f"{task}, {classes}", justify="right")
    for name, table in tables.items():
        text.add_row(name, *(_accuracy(table, task) for task in TASKS))
    Console().print("", text)


def _accuracy(table: Table, task: str) -> str:
    rows = table.to_dataset().to_table(columns=["embedding", task, "split"], filter=pds.field(task).is_valid())
    vectors, labels = vectors_of(rows), rows.column(task).to_numpy()
    is_query = np.array(rows.column("split").to_pylist()) == "test"
    accuracy = knn_accuracy(vectors[~is_query], labels[~is_query], vectors[is_query], labels[is_query])
    error = float(np.sqrt(accuracy * (1 - accuracy) / is_query.sum()))
    return f"{accuracy:.1%} ± {error:.1%}"


def vectors_of(rows: pa.Table) -> NDArray[np.float32]:
    """The embedding column as (n, d)."""
    column = rows.column("embedding").combine_chunks()
    return np.asarray(column.flatten()).reshape(len(rows), -1).astype(np.float32)


def _draw_nearest(table: Table, shards: Path, images: list[parts.LabelledImage], out: Path) -> None:
    """Embed held-out images with the table's own encoder, as a service would, and draw their nearest training images."""
    columns = ["shard", "key", "embedding", "group_name"]
    bank = table.to_dataset().to_table(columns=columns, filter=(pds.field("split") == "train") & pds.field("group").is_valid())
    held_out = [image for image in images if image.split == "test" and image.group_name is not None]
    queries = held_out[:: max(1, len(held_out) // QUERIES)][:QUERIES]
    found = table.encoder().embed([Image.open(image.path) for image in queries])
    vectors = vectors_of(bank)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = found / np.linalg.norm(found, axis=1, keepdims=True) @ vectors.T
    rows = []
    for query, scores in zip(queries, similarity, strict=True):
        nearest = [int(row) for row in np.argsort(-scores)[:NEIGHBOURS]]
        tiles = [_tile(bank.slice(row, 1).to_pylist()[0], shards, float(scores[row])) for row in nearest]
        rows.append((Tile(image=Image.open(query.path), label=query.group_name or ""), tiles))
    neighbour_sheet(rows, out)


def _tile(row: dict[str, str], shards: Path, score: float) -> Tile:
    with tarfile.open(shards / row["shard"]) as tar:
        stream = tar.extractfile(f"{row['key']}.png")
        assert stream is not None
        return Tile(image=Image.open(io.BytesIO(stream.read())), label=row["group_name"], score=score)
