"""Ray Data's own example of batch inference: `read_webdataset` → `map` → `map_batches` with a class → `write_parquet`.

The form of Ray's guide "Working with images": a function of a row decodes and prepares, a class of a pool of actors infers.
`read_webdataset` would decode by itself by default: then pixels travel, and nothing came of 8,000 images in four minutes.
"""

import io
import sys
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from ray.data import ActorPoolStrategy
from task import Task, image_id, read_task, record
from transformers import AutoImageProcessor, AutoModel


class Preprocess:
    """A row of `read_webdataset` → the image's id and pixel values."""

    def __init__(self, model: str) -> None:
        self._processor = AutoImageProcessor.from_pretrained(model, backend="pil")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image = Image.open(io.BytesIO(row["jpg"])).convert("RGB")
        pixels = self._processor(image, return_tensors="np")["pixel_values"][0]
        return {"id": image_id(row["path"], row["__key__"]), "pixels": pixels}


class Embed:
    """A batch of pixel values → vectors."""

    def __init__(self, model: str, progress: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModel.from_pretrained(model).eval()
        self._progress = progress

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        with torch.inference_mode():
            outputs = self._model(torch.from_numpy(batch["pixels"]), output_hidden_states=True)
        record(self._progress, len(batch["id"]))
        return {"id": batch["id"], "embedding": outputs.hidden_states[-1].mean(dim=1).numpy()}


def main(task: Task) -> None:
    ray.init(address="local", num_cpus=task.cores, include_dashboard=False, log_to_driver=False)
    store = None if task.store is None else task.filesystem()
    rows = ray.data.read_webdataset(task.shards, include_paths=True, filesystem=store, decoder=None)
    rows = rows.map(Preprocess(task.model))
    rows = rows.map_batches(
        Embed,
        fn_constructor_args=(task.model, task.progress, 1),
        batch_size=task.batch_size,
        num_cpus=0.5,  # else the actors hold all cores, and what reads for them waits for ever
        compute=ActorPoolStrategy(size=task.cores),
    )
    rows.write_parquet(task.out, filesystem=store)


if __name__ == "__main__":
    main(read_task(sys.argv[1]))
