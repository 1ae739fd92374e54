"""The inputs: what each workload is, its tars, and the models that all contestants load."""

import io
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from lora_embed.config.models import Recipe
from lora_embed.demo import parts
from lora_embed.model.build import build_encoder
from lora_embed.model.ingredients import gather
from lora_embed.monitor.progress import say
from lora_embed.store.fetch import cache_root
from pictures import fetch_jpegs

PHOTO, LARGE_PHOTO = (500, 375), (4000, 3000)  # pixels
DISTINCT = {PHOTO: 1500, LARGE_PHOTO: 24}  # pictures; beyond that they come again under other keys
ALL = ("lora-embed", "guide", "dataloader", "ray-data", "daft", "daft-bytes")
FEW = ("lora-embed", "guide", "dataloader", "ray-data", "daft")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One job that all contestants do. `chunk_size` is lora-embed's, in images."""

    name: str
    about: str
    model: str  # a key of `MODELS`
    shards: int
    per_shard: int
    chunk_size: int
    photo: tuple[int, int] = PHOTO  # width, height
    probe: int = 256  # images that each core's limits are measured on
    contestants: tuple[str, ...] = FEW
    limit_s: float = 900.0  # of one run
    short: tuple[int, int] = (4, 16)  # shards, images per shard
    short_contestants: tuple[str, ...] = ("lora-embed", "guide")

    @property
    def images(self) -> int:
        return self.shards * self.per_shard

    def shortened(self) -> "Workload":
        """The same at a size that takes seconds, with fewer contestants: to see that everything works."""
        shards, per_shard = self.short
        return replace(self, shards=shards, per_shard=per_shard, chunk_size=8, probe=16, contestants=self.short_contestants)


WORKLOADS = (
    Workload(
        name="feeding", about="tiny ViT, 500×375 JPEGs: decoding is nearly all", model="tiny", shards=8, per_shard=1000,
        chunk_size=64, contestants=ALL, short=(4, 32), short_contestants=ALL,
    ),
    Workload(
        name="feeding-20k", about="the same with 20,000 images", model="tiny", shards=20, per_shard=1000, chunk_size=64,
        short=(4, 32),
    ),
    Workload(
        name="large", about="tiny ViT, 12-megapixel JPEGs", model="tiny", shards=4, per_shard=24, chunk_size=8,
        photo=LARGE_PHOTO, probe=16, short=(2, 16),
    ),
    Workload(
        name="compute", about="ViT-S/14, 500×375 JPEGs: the model is nearly all", model="vit-s", shards=8, per_shard=48,
        chunk_size=16, probe=32, contestants=(*FEW, "lora-embed-bfloat16"), short=(2, 16),
    ),
    Workload(
        name="compute-b", about="ViT-B/16, 500×375 JPEGs", model="vit-b", shards=6, per_shard=50, chunk_size=10, probe=16,
        contestants=("lora-embed", "guide", "dataloader", "ray-data"), short=(2, 16),
    ),
    Workload(
        name="tiny-shards", about="tiny ViT, many tars of four images", model="tiny", shards=400, per_shard=4, chunk_size=64,
        short=(24, 2),
    ),
    Workload(
        name="huge-shards", about="tiny ViT, all images in one tar", model="tiny", shards=1, per_shard=4000, chunk_size=64,
        short=(1, 64),
    ),
    Workload(
        name="flat-5k", about="memory at 5,000 images", model="tiny", shards=10, per_shard=500, chunk_size=64,
        contestants=("lora-embed",), short=(2, 16), short_contestants=("lora-embed",),
    ),
    Workload(
        name="flat-50k", about="memory at 50,000 images", model="tiny", shards=100, per_shard=500, chunk_size=64,
        contestants=("lora-embed",), short=(4, 16), short_contestants=("lora-embed",),
    ),
    Workload(
        name="s3", about="tiny ViT, tars and table in a real local S3 server", model="tiny", shards=8, per_shard=250,
        chunk_size=64,
    ),
    Workload(
        name="resume", about="tiny ViT, a job of which all but one chunk in a hundred is done; tars in S3", model="tiny",
        shards=10, per_shard=500, chunk_size=50, contestants=("lora-embed",), short=(4, 32), short_contestants=("lora-embed",),
    ),
)  # fmt: skip


def write_shards(workload: Workload, folder: Path) -> list[Path]:
    """Write a workload's tars; returns their paths."""
    jpegs = fetch_jpegs(workload.photo, min(DISTINCT[workload.photo], workload.images))
    folder.mkdir(parents=True)
    paths = [folder / f"{number:05d}.tar" for number in range(workload.shards)]
    for number, path in enumerate(paths):
        first = number * workload.per_shard
        with tarfile.open(path, "w") as tar:
            for image in range(first, first + workload.per_shard):
                data = jpegs[image % len(jpegs)].read_bytes()
                info = tarfile.TarInfo(f"{image:06d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return paths


def build_model(name: str, folder: Path) -> Path:
    """An encoder's directory, which all contestants load: lora-embed as its recipe, the others by `AutoModel`."""
    if name == "vit-s":
        base = parts.fetch_base_model(cache_root(), say)  # a real one; the others have random weights
    else:
        base = folder / f"{name}-base"
        torch.manual_seed(0)
        ViTModel(VIT_CONFIGS[name], add_pooling_layer=False).save_pretrained(base)
        ViTImageProcessor().save_pretrained(base)
    build_encoder(gather(Recipe(base_model=str(base), adapters=(), merge_method="none")), folder / name, say)
    return folder / name


VIT_CONFIGS = {
    "tiny": ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, patch_size=32),
    "vit-b": ViTConfig(),
}
