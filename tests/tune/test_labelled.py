"""Labelled shards → pixels with labels: once decoded, drawn by seed, counted to the last sample."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import job_of, run_here, tiny_recipe
from lora_embed.chain import pipeline
from lora_embed.chain.device import Device
from lora_embed.cli.options import read_as
from lora_embed.errors import ConfigError
from lora_embed.evaluate.assess import open_source
from lora_embed.evaluate.request import LabelledInput, Request
from lora_embed.images.decode import decode_image
from lora_embed.images.preprocess import Preprocessing
from lora_embed.tune.labelled import LabelledImages, Wanted, read_labelled
from samples import PREPROCESSING, encoded, parquet_of, png, poisoned, tar_of
from tuning import picture, write_labelled


def read(folder: Path, source: Path, preprocessing: Preprocessing = PREPROCESSING, **changes: Any) -> LabelledImages:
    settings: dict[str, Any] = {"fields": ("colour", "stripes"), "group": "pair", "most": 1000, "seed": 0}
    return read_labelled(LabelledInput(inputs=(str(source),)), Wanted(**settings | changes), preprocessing, folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "shards", images=24)


def test_every_sample_is_counted_and_every_row_is_its_image(tmp_path: Path, shards: Path) -> None:
    found = read(tmp_path, shards)
    assert (found.samples, found.unlabelled, found.rejects, found.decoded) == (28, 2, {"not_an_image": 2}, 24)
    assert found.classes == {"colour": ("0", "1", "2"), "stripes": ("false", "true")}
    assert found.pixels.shape == (24, 8, 8, 3)
    for row, id_ in enumerate(found.ids):
        number = int(id_.rpartition("/")[2])
        assert found.names[row] == f"p{number // 2}"
        assert found.labels["colour"][row] == number // 2 % 3
        assert found.labels["stripes"][row] == (number // 2 % 2 if number % 6 < 4 else -1)
        image = encoded(picture(number // 2 % 3, number // 2 % 2, number))
        np.testing.assert_array_equal(found.pixels[row], decode_image(image, PREPROCESSING).pixels)


def test_what_was_decoded_is_not_decoded_again_unless_it_changed(tmp_path: Path, shards: Path) -> None:
    first = read(tmp_path, shards)
    again = read(tmp_path, shards)
    assert again.decoded == 0
    assert (again.ids, again.fingerprint) == (first.ids, first.fingerprint)
    np.testing.assert_array_equal(again.pixels, first.pixels)
    larger = Preprocessing(resize=12, resample=3, crop=(10, 10), multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))
    assert read(tmp_path, shards, larger).decoded == 24
    assert read(tmp_path, shards, larger).fingerprint != first.fingerprint


def test_a_cap_draws_by_seed_and_keeps_groups_together(tmp_path: Path, shards: Path) -> None:
    found = read(tmp_path, shards, most=10, fields=("colour",))
    assert len(found.ids) == 10 <= found.decoded < 24
    assert sorted(found.names) == sorted(2 * list(set(found.names)))
    for row, id_ in enumerate(found.ids):
        number = int(id_.rpartition("/")[2])
        assert found.labels["colour"][row] == number // 2 % 3
        image = encoded(picture(number // 2 % 3, number // 2 % 2, number))
        np.testing.assert_array_equal(found.pixels[row], decode_image(image, PREPROCESSING).pixels)
    assert set(read(tmp_path, shards, most=10, fields=("colour",), seed=1).names) != set(found.names)


def test_another_label_or_group_is_other_data(tmp_path: Path, shards: Path) -> None:
    prints = {read(tmp_path, shards, **change).fingerprint for change in ({}, {"group": None}, {"fields": ("colour",)})}
    assert len(prints) == 3


def test_columns_of_parquet_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of({"key": list("abcd"), "image": [png(n) for n in range(4)], "kind": [3, 1, None, 3]}))
    found = read(tmp_path / "work", path, fields=("kind",), group=None)
    assert found.classes == {"kind": ("1", "3")}
    assert found.labels["kind"].tolist() == [1, 0, 1]
    assert found.unlabelled == 1


def test_a_field_that_labels_nothing_is_named(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"--label color: none of 28 samples has it in .*Correct the field's name"):
        read(tmp_path, shards, fields=("colour", "color"))


def test_an_image_that_kills_its_decoder_is_a_reject_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, segfault=png(1), memory=png(3))
    members = [(f"{n}.{kind}", data) for n in range(6) for kind, data in (("json", b'{"kind": %d}' % (n % 3)), ("png", png(n)))]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    found = read(tmp_path / "work", tmp_path / "a.tar", fields=("kind",), group=None)
    assert (found.samples, found.decoded, found.rejects) == (6, 4, {"decoder_crashed": 2})
    assert sorted(found.ids) == [f"a.tar/{n}" for n in (0, 2, 4, 5)]
    for row, id_ in enumerate(found.ids):
        expected = decode_image(png(int(id_[-1])), PREPROCESSING).pixels
        np.testing.assert_array_equal(found.pixels[row], expected)


def test_the_group_of_loose_images_is_read_from_the_files_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.colour").write_text("red" if number % 2 else "blue")
        (folder / f"{number}.pair").write_text(f"p{number // 2}")
    found = read(tmp_path / "work", folder, fields=("colour",))
    assert sorted(found.names) == ["p0", "p0", "p1", "p1"]


def test_evaluate_and_tune_leave_out_what_a_job_leaves_out(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch)
    recipe = tiny_recipe(tmp_path)
    job = job_of(tmp_path, recipe, shards, leave_out=[str(shards / "1.tar")])
    selection = Wanted(fields=("colour",), group=None, most=1000, seed=0)
    found = read_labelled(LabelledInput(inputs=job.input, **read_as(job)), selection, PREPROCESSING, tmp_path / "work")
    assert (found.samples, {id_.partition("/")[0] for id_ in found.ids}) == (14, {"0.tar"})
    request = Request(recipes=(str(recipe),), inputs=job.input, labels=("colour",), work=str(tmp_path / "kept"), **read_as(job))
    monkeypatch.setattr(pipeline, "ask_device", lambda topology: Device(kind="cpu", has_native_bfloat16=False))
    source, _ = open_source(request)
    assert [shard.name for shard in source.shards] == ["0.tar"]


def test_evaluate_and_tune_follow_links_to_folders_as_the_job_does(tmp_path: Path) -> None:
    for folder in ("images", "elsewhere"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            (tmp_path / folder / f"{number}.png").write_bytes(png(number))
            (tmp_path / folder / f"{number}.colour").write_text("red" if number % 2 else "blue")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    recipe = tiny_recipe(tmp_path)
    selection = Wanted(fields=("colour",), group=None, most=1000, seed=0)
    for follows, samples in ((False, 3), (True, 6)):
        job = job_of(tmp_path, recipe, tmp_path / "images", follow_folder_links=follows)
        found = read_labelled(LabelledInput(inputs=job.input, **read_as(job)), selection, PREPROCESSING, tmp_path / "work")
        assert found.samples == samples
