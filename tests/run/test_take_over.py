"""Images that a version has already are not embedded again: their vectors are taken over, bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import job_of, read_rejects, read_rows, run_here, tiny_recipe, vectors_by_id
from lora_embed.chain import chunks
from lora_embed.run.job import RunResult, run_job
from lora_embed.shards import image_groups
from lora_embed.store.store import Store
from lora_embed.table import known
from lora_embed.table.lineage import forget
from models import save_adapter
from samples import png, tar_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_here(monkeypatch)
    tiny_recipe(tmp_path)
    return tmp_path


def run(folder: Path, source: str, **options: Any) -> RunResult:
    options = {"max_rejects": 1.0, "max_removed": 1.0, "gates": {"duplicates": 1.0}} | options
    return run_job(job_of(folder, folder / "recipe.yaml", folder / source, **options))


def rows(folder: Path, table: str = "table") -> dict[str, bytes]:
    return vectors_by_id(read_rows(folder / table))


def write_images(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:04d}.png").write_bytes(png(number))
    return folder


def test_one_more_image_in_a_folder_is_the_only_one_embedded(folder: Path) -> None:
    write_images(folder / "photos", range(66))
    assert run(folder, "photos").embedded == 66
    before = rows(folder)
    write_images(folder / "photos", range(66, 67))
    result = run(folder, "photos")
    assert (result.embedded, result.taken, result.version) == (1, 66, 2)
    after = rows(folder)
    assert {key: after[key] for key in before} == before
    run(folder, "photos", table="anew")
    assert rows(folder, "anew") == after
    old, new = (read_rows(folder / name).drop_columns("embedding") for name in ("anew", "table"))
    assert old.equals(new)


def test_a_folder_that_doubles_embeds_nothing_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its groups are divided, so none of them has the name of an old one."""
    monkeypatch.setattr(image_groups, "IMAGES_PER_GROUP", 8)
    write_images(folder / "photos", range(40))
    run(folder, "photos", chunk_size=4)
    before = rows(folder)
    groups = set(read_rows(folder / "table")["shard"].to_pylist())
    write_images(folder / "photos", range(40, 160))
    result = run(folder, "photos", chunk_size=4)
    assert (result.embedded, result.taken) == (120, 40)
    assert groups - set(read_rows(folder / "table")["shard"].to_pylist()), "no group was divided"
    after = rows(folder)
    assert len(after) == 160
    assert {key: after[key] for key in before} == before


def test_an_image_that_was_replaced_is_embedded(folder: Path) -> None:
    """The name is not what counts: one file gets another content, another one the content of the first."""
    write_images(folder / "photos", range(5))
    run(folder, "photos")
    before = rows(folder)
    (folder / "photos/0001.png").write_bytes(png(99))
    (folder / "photos/0002.png").write_bytes(png(1))
    result = run(folder, "photos")
    assert (result.embedded, result.taken) == (1, 4)
    after = rows(folder)
    assert after["0002.png"] == before["0001.png"]
    assert after["0001.png"] not in before.values()


def tar(folder: Path, numbers: list[int]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a.tar").write_bytes(tar_of([(f"{number:04d}.png", png(number)) for number in numbers]))


def parquet(folder: Path, numbers: list[int]) -> None:
    folder.mkdir(exist_ok=True)
    table = pa.table({"id": [str(number) for number in numbers], "image": [png(number) for number in numbers]})
    pq.write_table(table, folder / "a.parquet")


def references(folder: Path, numbers: list[int]) -> None:
    write_images(folder, range(20))
    (folder / "a.csv").write_text("url,folder\n" + "".join(f"{number:04d}.png,shards\n" for number in numbers))


@pytest.mark.parametrize(
    ("write", "options"), [(tar, {}), (parquet, {"key_column": "id"}), (references, {"reference_column": "url"})]
)
def test_a_changed_file_embeds_what_is_new_in_it(folder: Path, write: Any, options: dict[str, Any]) -> None:
    write(folder / "shards", [3, 4, 5, 6, 7])
    assert run(folder, "shards", chunk_size=2, **options).embedded == 5
    write(folder / "shards", [1, 3, 5, 6, 7, 9])
    result = run(folder, "shards", chunk_size=2, **options)
    assert (result.embedded, result.taken) == (2, 4)
    taken = rows(folder)
    run(folder, "shards", chunk_size=2, table="anew", **options)
    assert rows(folder, "anew") == taken


def test_rejects_stay_rejects_and_limits_hold_for_what_is_taken_over(folder: Path) -> None:
    write_images(folder / "photos", range(4))
    (folder / "photos/bad.png").write_bytes(png(7)[:-30])
    run(folder, "photos")
    assert read_rejects(folder / "table") == {"bad.png": "corrupt_image"}
    write_images(folder / "photos", range(4, 5))
    result = run(folder, "photos")
    assert (result.embedded, result.taken) == (2, 4)
    assert read_rejects(folder / "table") == {"bad.png": "corrupt_image"}
    write_images(folder / "photos", range(5, 6))
    result = run(folder, "photos", max_pixels=100)
    assert result.taken == 0
    assert set(read_rejects(folder / "table").values()) == {"too_many_pixels"}


def test_another_encoder_or_type_takes_nothing_over(folder: Path) -> None:
    write_images(folder / "photos", range(5))
    run(folder, "photos")
    write_images(folder / "photos", range(6))
    shutil.rmtree(folder / "ten")
    save_adapter(folder / "ten", folder / "base", 10, seed=5)
    job = job_of(folder, folder / "recipe.yaml", folder / "photos", gates={"duplicates": 1.0}, reembed={"sample": 0})
    result = run_job(job, replaces=True)
    assert (result.embedded, result.taken) == (6, 0)


def test_halved_vectors_are_taken_over_in_their_type(folder: Path) -> None:
    write_images(folder / "photos", range(5))
    run(folder, "photos", vector_type="float16")
    before = read_rows(folder / "table")
    write_images(folder / "photos", range(6))
    assert run(folder, "photos", vector_type="float16").taken == 5
    after = read_rows(folder / "table")
    assert after["embedding"].type == before["embedding"].type
    assert after["embedding"][:5].to_pylist() == before["embedding"].to_pylist()


def test_what_was_forgotten_stays_forgotten(folder: Path) -> None:
    write_images(folder / "photos", range(5))
    run(folder, "photos")
    forget(Store(str(folder / "table")), ["0002.png"], "asked")
    write_images(folder / "photos", range(6))
    result = run(folder, "photos")
    assert (result.embedded, result.taken) == (2, 4)
    assert "0002.png" not in rows(folder)
    assert read_rejects(folder / "table") == {"0002.png": "forgotten"}


def loose(folder: Path, numbers: list[int]) -> None:
    write_images(folder, range(max(numbers) + 1))


COLUMN = {tar: {}, parquet: {}, loose: {}, references: {"reference_column": "url"}}


@pytest.mark.parametrize("write", COLUMN, ids=lambda write: write.__name__)
def test_a_column_is_added_and_removed_without_reading_an_image(
    folder: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "shards", [1, 2, 3])
    run(folder, "shards", chunk_size=2, **COLUMN[write])
    before = rows(folder)
    with monkeypatch.context() as patched:
        if write is not references:  # a range of a list is another shard if it has another field
            patched.setattr(chunks._Chunk, "add", lambda *_, **__: pytest.fail("an image was read"))
        result = run(folder, "shards", chunk_size=2, carry=["folder"], **COLUMN[write])
    assert (result.embedded, result.taken, result.version) == (0, len(before), 2)
    assert set(read_rows(folder / "table")["folder"].to_pylist()) == {"shards"}
    assert rows(folder) == before
    assert run(folder, "shards", chunk_size=2, carry=["folder"], **COLUMN[write]).published is False
    result = run(folder, "shards", chunk_size=2, **COLUMN[write])
    assert (result.embedded, result.version) == (0, 3)
    assert "folder" not in read_rows(folder / "table").column_names
    assert rows(folder) == before


def hostile(folder: Path) -> None:
    """Rejects before, between and after the images, and keys that occur twice."""
    images = [(f"{number}.png", png(number)) for number in range(4)]
    bad = [(f"bad{number}.png", png(9)[:-30]) for number in range(3)]
    members = [bad[0], images[0], images[1], images[1], bad[1], images[2], ("0.png", png(7)), images[3], bad[2]]
    (folder / "a.tar").write_bytes(tar_of(members))


def test_rejects_are_taken_over_with_their_reasons(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "shards").mkdir()
    hostile(folder / "shards")
    run(folder, "shards", chunk_size=2)
    before, rejects = rows(folder), read_rejects(folder / "table")
    assert set(rejects.values()) == {"corrupt_image", "duplicate_id"}
    result = run(folder, "shards", chunk_size=3, carry=["folder"])
    assert (result.taken, result.counts["samples"], result.counts["rejects"]) == (4, 9, 5)
    assert rows(folder) == before
    assert read_rejects(folder / "table") == rejects


def test_a_version_that_has_other_samples_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a release that reads a shard differently: the second chunk has another key than the version says."""
    tar(folder / "shards", [1, 2, 3, 4])
    run(folder, "shards", chunk_size=2)
    follow = known.KnownVectors.follow
    monkeypatch.setattr(known.KnownVectors, "follow", lambda self, key: None if key == "0004" else follow(self, key))
    result = run(folder, "shards", chunk_size=2, carry=["folder"])
    assert (result.embedded, result.taken, result.counts["vectors"]) == (0, 4, 4)


@pytest.mark.parametrize("limit", [{"max_pixels": 100}, {"max_bytes": 100}], ids=str)
@pytest.mark.parametrize("write", [tar, parquet], ids=lambda write: write.__name__)
def test_lower_limits_hold_where_a_column_is_added(folder: Path, write: Any, limit: dict[str, int]) -> None:
    write(folder / "shards", [1, 2, 3])
    run(folder, "shards")
    result = run(folder, "shards", carry=["folder"], **limit)
    assert (result.taken, result.counts["rejects"]) == (0, 3)


@pytest.mark.parametrize("write", [parquet], ids=["parquet"])
def test_another_column_of_images_is_not_taken_for_the_same(folder: Path, write: Any) -> None:
    """The shard is the same file, but its samples are others."""
    (folder / "shards").mkdir()
    table = pa.table({"left": [png(1), png(2)], "right": [png(3), png(2)]})
    pq.write_table(table, folder / "shards/a.parquet")
    run(folder, "shards", image_column="left")
    result = run(folder, "shards", image_column="right", carry=["folder"])
    assert (result.embedded, result.taken) == (1, 1)


def test_a_column_and_an_image_are_added_at_once(folder: Path) -> None:
    write_images(folder / "photos", range(5))
    run(folder, "photos")
    before = rows(folder)
    write_images(folder / "photos", range(6))
    result = run(folder, "photos", carry=["folder"])
    assert (result.embedded, result.taken) == (1, 5)
    after = rows(folder)
    assert {key: after[key] for key in before} == before
