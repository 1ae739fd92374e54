"""The plain loop of a guide: open, preprocess a batch, forward, pool the last hidden state; one table at the end.

One process, in float32; the forward is done by a GPU where there is one, else by all cores, as torch does by default.
"""

import io
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from task import Task, image_id, read_task, record
from transformers import AutoImageProcessor, AutoModel


def read_images(task: Task) -> Iterator[tuple[str, Image.Image]]:
    """(id, image) of all shards, in their order."""
    store = task.filesystem()
    for shard in task.shards:
        with store.open_input_stream(shard) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None, member.name
                yield image_id(shard, member.name.partition(".")[0]), Image.open(io.BytesIO(data.read())).convert("RGB")


@torch.inference_mode()
def main(task: Task) -> None:
    processor = AutoImageProcessor.from_pretrained(task.model, backend="pil")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(task.model).to(device).eval()
    ids, vectors = [], []
    images = read_images(task)
    while batch := list(islice(images, task.batch_size)):
        inputs = processor([image for _, image in batch], return_tensors="pt").to(device)
        outputs = model(**inputs, output_hidden_states=True)
        vectors.append(outputs.hidden_states[-1].mean(dim=1).cpu().numpy())
        ids += [name for name, _ in batch]
        record(task.progress, len(batch))
    table = pa.table({"id": ids, "embedding": list(np.concatenate(vectors))})
    pq.write_table(table, f"{task.out}/embeddings.parquet", filesystem=task.filesystem())


if __name__ == "__main__":
    main(read_task(sys.argv[1]))
