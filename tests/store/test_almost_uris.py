"""A text that looks like a URI is one, or is refused: otherwise a whole table would land in a local folder of that name."""

import re
from pathlib import Path

import pytest

from lora_embed import open_table
from lora_embed.config.models import load_job
from lora_embed.errors import ConfigError
from lora_embed.store.fetch import fetch_directory
from lora_embed.store.place import check_uri
from lora_embed.store.store import Store

ALMOST = {
    "s3//bucket/table": "s3://bucket/table",
    "s3:/bucket/table": "s3://bucket/table",
    "s3:bucket/table": "s3://bucket/table",
    "S3//bucket/table": "S3://bucket/table",
    "gs//bucket/x": "gs://bucket/x",
    "gcs:/bucket/x": "gcs://bucket/x",
    "hf:/datasets/owner/name": "hf://datasets/owner/name",
    "http:/host/list.csv": "http://host/list.csv",
    "https//host/list.csv": "https://host/list.csv",
    "file://tmp/x": "file:///tmp/x",
    "file:/tmp/x": "file:///tmp/x",
    "local://./x": "local:///x",
    "memory:/x": "memory://x",
}


@pytest.mark.parametrize("text", ALMOST)
def test_what_is_almost_a_uri_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = re.escape(f"{text}: looks like a URI, but would be taken for a local path. Write {ALMOST[text]}, or ")
    job = tmp_path / "job.yaml"
    for key in ("table", "input", "recipe"):
        good = {"table": "t", "input": "i", "recipe": "r"} | {key: text}
        job.write_text("".join(f"{name}: {value}\n" for name, value in good.items()))
        with pytest.raises(ConfigError, match=message):
            load_job(job)
    for opened in (open_table, Store, lambda uri: fetch_directory(uri, None, ("*",))):
        with pytest.raises(ConfigError, match=message):
            opened(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/x",
        "file:///tmp/x",
        "/data/s3//x",
        "./s3//x",
        "data//x",
        "c:/x",
        "a:b",
        "table",
        "s3",
        "s3/x",
        "",
        "memory://x",
    ],
)
def test_paths_and_uris_are_taken_as_they_are(text: str) -> None:
    check_uri(text)


def test_a_path_that_exists_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    check_uri("s3//bucket")
