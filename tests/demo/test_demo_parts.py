"""The demo's real parts: fetched whole and unchanged, labelled as the README says, written as repeatable shards."""

import hashlib
import json
import os
import re
import tarfile
from pathlib import Path

import pytest

from lora_embed.demo import parts
from lora_embed.demo.archives import PartError
from lora_embed.demo.parts import LabelledImage
from lora_embed.demo.tour import run_demo
from lora_embed.errors import ConfigError
from lora_embed.installed import how_to_install

BASE_MODEL_SHA256 = "8b38fc0f3652d5a3cd0a5f3b71eb3b0b68a34460a68814528cb1e25177fe6e30"  # of the converted weights


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    return Path(os.environ.get("LORA_EMBED_CACHE") or Path.home() / ".cache" / "lora-embed")


@pytest.fixture(scope="session")
def images(demo_cache: Path) -> list[LabelledImage]:
    return parts.fetch_images(demo_cache, print)


def emoji_of(image: LabelledImage) -> str:
    return image.key.partition("-")[2]


def test_converted_base_model_is_the_pinned_one(demo_cache: Path) -> None:
    folder = parts.fetch_base_model(demo_cache, print)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == BASE_MODEL_SHA256


def test_every_weight_of_the_base_model_is_used(demo_cache: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = parts.fetch_base_model(demo_cache, print)
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Dinov2Model"
    assert not any(info.values()), info


def test_a_part_in_the_cache_is_not_fetched_again(demo_cache: Path) -> None:
    parts.fetch_base_model(demo_cache, print)
    said: list[str] = []
    parts.fetch_base_model(demo_cache, said.append)
    assert said == []


def test_two_tasks_of_ten_and_twenty_seven_classes(images: list[LabelledImage]) -> None:
    assert len(images) == 3822
    assert {image.category for image in images} == set(range(10))
    assert {image.group for image in images} == {None, *range(27)}
    assert sum(image.group is not None for image in images) == 2378


@pytest.mark.parametrize("task", ["category", "group"])
def test_a_label_indexes_the_class_names(images: list[LabelledImage], task: str) -> None:
    names = parts.class_names(images, task)
    pairs = {(getattr(image, task), getattr(image, f"{task}_name")) for image in images} - {(None, None)}
    assert pairs == set(enumerate(names))


def test_no_emoji_is_in_both_splits(images: list[LabelledImage]) -> None:
    train, test = ({emoji_of(image) for image in images if image.split == split} for split in ("train", "test"))
    assert not train & test
    assert (len(train), len(test)) == (1325, 586)


def test_every_class_is_in_both_splits(images: list[LabelledImage]) -> None:
    for split in ("train", "test"):
        assert {image.category for image in images if image.split == split} == set(range(10))
        assert {image.group for image in images if image.split == split} == {None, *range(27)}


def test_keys_suit_webdataset(images: list[LabelledImage]) -> None:
    keys = [image.key for image in images]
    assert keys == sorted(set(keys))
    assert not any(character in key for key in keys for character in "./ ")


def test_shards_are_the_same_bytes_in_any_order(images: list[LabelledImage], tmp_path: Path) -> None:
    first = parts.write_shards(images[:50], tmp_path / "first", per_shard=20)
    second = parts.write_shards(images[49::-1], tmp_path / "second", per_shard=20)
    assert [path.name for path in first] == ["emoji-00000.tar", "emoji-00001.tar", "emoji-00002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_shard_holds_the_published_bytes_and_the_labels(images: list[LabelledImage], tmp_path: Path) -> None:
    (shard,) = parts.write_shards(images[:3], tmp_path, per_shard=10)
    with tarfile.open(shard) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(content) == [f"{image.key}.{kind}" for image in images[:3] for kind in ("json", "png")]
    for image in images[:3]:
        assert content[f"{image.key}.png"] == image.path.read_bytes()
        assert json.loads(content[f"{image.key}.json"]) == {
            "emoji": image.key.partition("-")[2],
            "category": image.category,
            "category_name": image.category_name,
            "group": image.group,
            "group_name": image.group_name,
            "split": image.split,
        }


def test_a_corrupt_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "downloads" / parts.BASE_MODEL_ARCHIVE.file_name
    archive.parent.mkdir()
    archive.write_bytes(b"half a download")
    with pytest.raises(PartError, match=f"{archive.name}: its SHA-256 is [0-9a-f]{{64}}, expected 90a0b02e"):
        parts.fetch_base_model(tmp_path, print)
    assert not (tmp_path / parts.BASE_MODEL_NAME).exists()


def test_an_interrupted_part_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with parts._made_whole(tmp_path / "part") as making:
            (making / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_without_npm_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PartError, match=re.escape(how_to_install("demo"))):
        parts.fetch_images(tmp_path, print)


def test_the_demo_names_what_is_missing_before_it_fetches_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("LORA_EMBED_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"the demo needs onnx and scikit-learn, which are not installed.*pip install"):
        run_demo(tmp_path / "demo", print)
    assert list(tmp_path.iterdir()) == []
