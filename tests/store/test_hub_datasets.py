"""Datasets of the Hugging Face hub as inputs: `hf://datasets/owner/name`, from a local server that answers like the hub."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Any
from urllib.parse import unquote

import pytest

from lora_embed.errors import ConfigError
from lora_embed.shards.list_rows import References
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import read_samples
from lora_embed.store import remote
from samples import layout, parquet_of, png, tar_of
from web_server import Answer, web_server

COMMIT = "a" * 40
FILES = {
    "data/0.tar": tar_of([("a.png", png(1)), ("b.png", png(2))]),
    "data/1.parquet": parquet_of({"image": [png(3)], "key": ["c"]}),
    "lists/2.csv": b"url\n../images/d.png\nimages/none.png\n",
    "lists/3.csv": b"url\nhf://datasets/owner/other/d.png\n",
    "images/d.png": png(4),
}


@dataclass
class Hub:
    """What the hub's library asks for, of one dataset: its commit, the files below a folder, and the files."""

    files: dict[str, bytes]
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)

    def get(self, path: str, _: Any = None) -> Answer:
        self.asked.append(path)
        path, _, query = unquote(path).partition("?")
        about = "/api/datasets/owner/name"
        if path == about:
            return self._json({"id": "owner/name", "sha": COMMIT, "siblings": []})
        if path.startswith(f"{about}/tree/main"):
            return self._json(self._below(path.removeprefix(f"{about}/tree/main").strip("/"), deep="recursive=true" in query))
        data = self.files.get(path.removeprefix("/datasets/owner/name/resolve/main/"))
        return (404, {}, b"") if data is None else (200, {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data)

    def _json(self, content: Any) -> Answer:
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def _below(self, folder: str, *, deep: bool) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for path, data in self.files.items():
            if not folder or path.startswith(f"{folder}/"):
                rest = path.removeprefix(f"{folder}/" if folder else "")
                for end in range(1, rest.count("/") + 1 if deep else min(rest.count("/"), 1) + 1):
                    above = "/".join(path.split("/")[: folder.count("/") + bool(folder) + end])
                    entries[above] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": above}
                if deep or "/" not in rest:
                    entries[path] = {"type": "file", "oid": sha1(data).hexdigest(), "size": len(data), "path": path}
        return list(entries.values())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    remote._connect_cached.cache_clear()
    hub = Hub(dict(FILES))
    with web_server(hub) as server:  # type: ignore[arg-type]
        hub.endpoint = server.url
        yield hub


def options(hub: Hub) -> dict[str, Any]:
    return {"endpoint": hub.endpoint, "token": False, "retry_s": 1}


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("", ["data/0.tar", "data/1.parquet", "images/#0000of0001"]),
        ("/data", ["0.tar", "1.parquet"]),
        ("/data/*.tar", ["0.tar"]),
        ("/data/{0..0}.tar", ["0.tar"]),
        ("/data/1.parquet", ["1.parquet"]),
    ],
)
def test_a_dataset_is_an_input_like_a_folder(hub: Hub, place: str, names: list[str]) -> None:
    shards = list_shards((f"hf://datasets/owner/name{place}",), options(hub))
    assert [shard.name for shard in shards] == names
    expected = {"tar": [png(1), png(2)], "parquet": [png(3)], "images": [png(4)]}
    for shard in shards:
        samples = read_samples(shard, layout(), options(hub), lambda number: True)
        assert [sample.data for sample in samples] == expected[shard.kind]


def test_a_file_of_equal_size_and_other_content_is_stale(hub: Hub) -> None:
    def ids() -> dict[str, str]:
        remote._connect_cached.cache_clear()
        return {shard.name: shard.id for shard in list_shards(("hf://datasets/owner/name/data",), options(hub))}

    before = ids()
    assert ids() == before
    hub.files["data/0.tar"] = tar_of([("a.png", png(5)), ("b.png", png(6))])
    assert len(hub.files["data/0.tar"]) == len(FILES["data/0.tar"])
    now = ids()
    assert now["0.tar"] != before["0.tar"]
    assert now["1.parquet"] == before["1.parquet"]


def test_a_list_in_a_dataset_names_its_images_and_no_other_dataset(hub: Hub) -> None:
    where = "hf://datasets/owner/name/lists"
    (shard,) = list_shards((f"{where}/2.csv",), options(hub), references=References(column="url"))
    found = list(read_samples(shard, layout(), options(hub), lambda number: True))
    assert [(sample.data, sample.problem) for sample in found] == [
        (png(4), None), (None, ("no_image", "images/none.png does not exist")),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="a list may name only files of its own store"):
        list_shards((f"{where}/3.csv",), options(hub), references=References(column="url"))
