"""Daft: `read_webdataset` → its own image decoder → a class with a batch method → `write_parquet`.

The form of Daft's pages on `@daft.cls` and on batch inference. Variant "webdataset" reads the tars with
`scantask_max_parallel=1`, without which version 0.7.26 was seen to stop for ever on two cores; variant "bytes" is handed
the images' bytes in memory, read by tarfile. Daft decodes JPEGs by a decoder of its own, whose pixels differ.
"""

import sys
import tarfile
from typing import Any

import daft
import torch
from daft import DataType, Series, col
from daft.functions import decode_image, decode_image_file, get, split
from daft.io import IOConfig, S3Config
from PIL import Image
from task import Task, image_id, read_task, record
from transformers import AutoConfig, AutoImageProcessor, AutoModel


def embedder(task: Task) -> Any:
    """Decoded images → vectors; one process per core, each with one thread."""
    dimension = AutoConfig.from_pretrained(task.model).hidden_size

    @daft.cls(use_process=True, max_concurrency=task.cores)
    class Embed:
        def __init__(self, model: str, progress: str) -> None:
            torch.set_num_threads(1)
            self._processor = AutoImageProcessor.from_pretrained(model, backend="pil")
            self._model = AutoModel.from_pretrained(model).eval()
            self._progress = progress

        @daft.method.batch(return_dtype=DataType.fixed_size_list(DataType.float32(), dimension), batch_size=task.batch_size)
        def __call__(self, images: Series) -> Any:
            pictures = [Image.fromarray(pixels) for pixels in images.to_pylist()]
            with torch.inference_mode():
                outputs = self._model(**self._processor(pictures, return_tensors="pt"), output_hidden_states=True)
            record(self._progress, len(pictures))
            return list(outputs.hidden_states[-1].mean(dim=1).numpy())

    return Embed(task.model, task.progress)


def read_members(task: Task) -> dict[str, list[Any]]:
    """Ids and bytes of all images, in memory."""
    store, read = task.filesystem(), {"id": [], "jpg": []}
    for shard in task.shards:
        with store.open_input_stream(shard) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None, member.name
                read["id"].append(image_id(shard, member.name.partition(".")[0]))
                read["jpg"].append(data.read())
    return read


def read_images(task: Task) -> daft.DataFrame:
    """Rows of `id` and `image`."""
    if task.variant == "bytes":
        return daft.from_pydict(read_members(task)).select("id", decode_image(col("jpg"), mode="RGB").alias("image"))
    prefix = "" if task.store is None else "s3://"
    rows = daft.read_webdataset([prefix + shard for shard in task.shards], io_config=io_config(task))
    name = get(split(rows["__url__"], "/"), -1) + "/" + rows["__key__"]
    return rows.select(name.alias("id"), decode_image_file(col("jpg"), mode="RGB").alias("image"))


def io_config(task: Task) -> IOConfig | None:
    if task.store is None:
        return None
    keys = {"key_id": task.store["key"], "access_key": task.store["secret"]}
    return IOConfig(s3=S3Config(endpoint_url=task.store["endpoint"], region_name="us-east-1", **keys))


def main(task: Task) -> None:
    daft.set_execution_config(scantask_max_parallel=1)
    rows = read_images(task)
    rows = rows.select("id", embedder(task)(rows["image"]).alias("embedding"))
    rows.write_parquet(task.out if task.store is None else f"s3://{task.out}", io_config=io_config(task))


if __name__ == "__main__":
    main(read_task(sys.argv[1]))
