"""webdataset in a torch DataLoader: workers decode and preprocess, the main process runs the model and writes.

The form of webdataset's README (`WebDataset(…).decode("pil").to_tuple(…).map(…).batched(…)` in a `WebLoader` with
workers). A shard is read by one worker. From S3 it reads presigned addresses through `curl`, its documented way over HTTP.
"""

import os
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from PIL import Image
from task import Task, image_id, read_task, record
from transformers import AutoImageProcessor, AutoModel


class Preprocess:
    """A sample's (url, key, image) → (id, pixel values)."""

    def __init__(self, model: str) -> None:
        self._processor = AutoImageProcessor.from_pretrained(model, backend="pil")

    def __call__(self, sample: tuple[str, str, Image.Image]) -> tuple[str, torch.Tensor]:
        url, key, image = sample
        return image_id(url, key), self._processor(image, return_tensors="pt")["pixel_values"][0]


def collate(samples: list[tuple[str, torch.Tensor]]) -> tuple[list[str], torch.Tensor]:
    return [name for name, _ in samples], torch.stack([pixels for _, pixels in samples])


def load(task: Task) -> Any:
    """Batches of (ids, pixel values)."""
    dataset = (
        wds.WebDataset(task.shards, shardshuffle=False, empty_check=False)
        .decode("pil")
        .to_tuple("__url__", "__key__", "jpg")
        .map(Preprocess(task.model))
        .batched(task.batch_size, collation_fn=collate)
    )
    workers = min(task.cores, len(task.shards))
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4)


@torch.inference_mode()
def main(task: Task) -> None:
    model = AutoModel.from_pretrained(task.model).eval()
    ids, vectors = [], []
    for names, pixels in load(task):
        outputs = model(pixels, output_hidden_states=True)
        vectors.append(outputs.hidden_states[-1].mean(dim=1).numpy())
        ids += names
        record(task.progress, len(names))
    table = pa.table({"id": ids, "embedding": list(np.concatenate(vectors))})
    pq.write_table(table, f"{task.out}/embeddings.parquet", filesystem=task.filesystem())


if __name__ == "__main__":
    os.environ["WDS_VERBOSE_CACHE"] = "0"
    main(read_task(sys.argv[1]))
