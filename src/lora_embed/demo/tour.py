"""The demo: two real adapters merged, real images embedded, the table read, searched and compared; in minutes."""

import io
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as TextTable

from lora_embed.chain import cluster, pipeline
from lora_embed.config.models import Recipe, load_job, load_recipe
from lora_embed.demo import parts
from lora_embed.demo.picture import Tile, neighbour_sheet
from lora_embed.images.decode import decode_image
from lora_embed.model.build import build_encoder, gather
from lora_embed.model.encoder import Encoder, load_encoder
from lora_embed.run.job import run_job
from lora_embed.schema import Layout, Shard
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import read_samples
from lora_embed.store.fetch import cache_root
from lora_embed.table.read import Table, open_table
from lora_embed.vectors.metrics import knn_accuracy

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
LAYOUT = Layout(precision="float32", batch_size=16)
Say = Callable[[str], None]


def run_demo(folder: Path, say: Say) -> None:
    """Run all of it below `folder`, printing what it does; whatever is there already is not done again."""
    base = parts.fetch_base_model(cache_root(), say)
    images = [image for image in parts.fetch_images(cache_root(), say) if image.key.startswith(VENDOR)]
    _write_shards(images, folder / "shards", say)

    say("\nMerging two adapters, and embedding all images into a table")
    merged = ENCODERS["merged"]
    result = run_job(load_job(_write_job(folder, _write_recipe(folder, "merged", merged, base))))
    say(result.describe())
    table = open_table(result.table)

    say("\nComparing with the base and with each adapter alone")
    rows = table.to_dataset().to_table(columns=["key", "embedding", *TASKS, "split"])
    vectors = {"merged": vectors_of(rows)}
    for name in [name for name in ENCODERS if name != "merged"]:
        recipe = load_recipe(_write_recipe(folder, name, ENCODERS[name], base))
        found = _embed_once(folder / "compared" / name, recipe, folder / "shards", say)
        vectors[name] = np.stack([found[key] for key in rows.column("key").to_pylist()])
    _print_accuracies(rows, vectors)

    picture = folder / "nearest.png"
    _draw_nearest(table, folder / "shards", images, picture)
    say(f"\nlora_embed.open_table({str(folder / 'table')!r})")
    say(f"  version {table.version}, space {table.space_id}, {table.count:,} vectors of {table.dimension} dimensions")
    say(f"nearest images of {QUERIES} queries: {picture}")


def _write_shards(images: list[parts.LabelledImage], folder: Path, say: Say) -> None:
    """Once: a shard that is written again is a changed shard."""
    if not folder.is_dir():
        aside = folder.with_name("shards.writing")
        parts.write_shards(images, aside, per_shard=128)
        aside.rename(folder)
    say(f"{len(images):,} images in {len(list(folder.iterdir()))} tar shards: {folder}")


def _write_recipe(folder: Path, name: str, weights: dict[str, float], base: Path) -> Path:
    recipe = {
        "base_model": str(base),
        "adapters": [{"path": str(ADAPTERS / adapter), "weight": weight} for adapter, weight in weights.items()],
        "merge_method": "weighted_sum" if weights else "none",
        "image_size": 56,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _write_job(folder: Path, recipe: Path) -> Path:
    carry = ["category:int64", "category_name", "group:int64", "group_name", "split"]
    path = folder / "job.yaml"
    path.write_text(
        yaml.safe_dump({"recipe": recipe.name, "input": "shards", "table": "table", "carry": carry}, sort_keys=False)
    )
    return path


def _embed_once(folder: Path, recipe: Recipe, shards: Path, say: Say) -> dict[str, NDArray[np.float32]]:
    """Vectors by key under another encoder, without a table; kept in `folder`."""
    if not (folder / "vectors.npz").is_file():
        if not (folder / "encoder").is_dir():
            build_encoder(gather(recipe), folder / "encoder", say)
        cluster.connect()
        listed = list_shards((str(shards),), {})
        found = pipeline.map_tasks(embed_shard, (str(folder / "encoder"),), listed)
        keys = [key for part in found for key in part]
        np.savez(folder / "vectors.npz", keys=np.array(keys), vectors=np.stack([part[key] for part in found for key in part]))
    kept = np.load(folder / "vectors.npz")
    return dict(zip(kept["keys"].tolist(), kept["vectors"], strict=True))


def embed_shard(encoder: str, shard: Shard) -> dict[str, NDArray[np.float32]]:
    """Vectors of one shard's images by key."""
    torch.set_num_threads(1)
    loaded = _load_once(encoder)
    prepare = loaded.description.preprocessing
    samples = [sample for sample in read_samples(shard, LAYOUT, {}, wanted=lambda number: True) if sample.data]
    pixels = np.stack([decode_image(sample.data or b"", prepare).pixels for sample in samples])
    return {sample.key: vector for sample, vector in zip(samples, loaded.embed_pixels(pixels), strict=True)}


@lru_cache(maxsize=1)
def _load_once(encoder: str) -> Encoder:
    return load_encoder(encoder)


def _print_accuracies(rows: pa.Table, vectors: dict[str, NDArray[np.float32]]) -> None:
    """kNN accuracy of every encoder on both tasks, the same images in bank and queries."""
    text = TextTable(box=SIMPLE_HEAD)
    text.add_column("kNN accuracy on held-out images")
    for task, classes in TASKS.items():
        text.add_column(f"{task} ({classes})", justify="right")
    for name in ENCODERS:
        text.add_row(name, *(_accuracy(rows, vectors[name], task) for task in TASKS))
    Console(width=100).print(text, "k = 10, votes weighted by cosine; ± one standard error")


def _accuracy(rows: pa.Table, vectors: NDArray[np.float32], task: str) -> str:
    labelled = rows.column(task).is_valid().to_numpy()
    is_query = labelled & (np.array(rows.column("split").to_pylist()) == "test")
    in_bank = labelled & ~is_query
    labels = rows.column(task).fill_null(-1).to_numpy()
    accuracy = knn_accuracy(vectors[in_bank], labels[in_bank], vectors[is_query], labels[is_query])
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
