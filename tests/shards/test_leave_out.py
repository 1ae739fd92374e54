"""Files that a job leaves out of its input: by their path, by a folder, by wildcards; all are counted."""

from pathlib import Path

import pytest

from lora_embed.config.models import load_job
from lora_embed.errors import ConfigError
from lora_embed.shards.listing import Listing, list_input
from samples import touch_files


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    touch_files(tmp_path / "in", "a/0.tar", "a/1.tar", "b/0.tar", "b/[x].tar", "photos/1.jpg", "photos/2.jpg")
    return tmp_path / "in"


def listing(source: Path, *left_out: str) -> Listing:
    return list_input((str(source),), {}, leave_out=left_out)


@pytest.mark.parametrize(
    ("left_out", "stay", "number"),
    [
        ("{}/a/1.tar", ["a/0.tar", "b/0.tar", "b/[x].tar", "photos"], 1),
        ("file://{}/a/1.tar", ["a/0.tar", "b/0.tar", "b/[x].tar", "photos"], 1),
        ("{}/b", ["a/0.tar", "a/1.tar", "photos"], 2),
        ("{}/b/", ["a/0.tar", "a/1.tar", "photos"], 2),
        ("{}/*/0.tar", ["a/1.tar", "b/[x].tar", "photos"], 2),
        ("{}/**/*.tar", ["photos"], 4),
        ("{}/b/[x].tar", ["a/0.tar", "a/1.tar", "b/0.tar", "photos"], 1),  # a path as it is written wins over a pattern
        ("{}/photos/2.jpg", ["a/0.tar", "a/1.tar", "b/0.tar", "b/[x].tar", "photos"], 1),
    ],
)
def test_what_is_left_out_is_counted_and_the_rest_stays(tars: Path, left_out: str, stay: list[str], number: int) -> None:
    found = listing(tars, left_out.format(tars))
    assert [shard.name if shard.kind == "tar" else shard.prefix for shard in found.shards] == stay
    assert found.passed_over == {"left out": number}
    assert found.unused == ()


def test_an_image_that_is_left_out_is_in_no_group(tars: Path) -> None:
    paths = [file.path for shard in listing(tars, f"{tars}/photos/1.jpg").shards for file in shard.files]
    assert "photos/2.jpg" in paths
    assert "photos/1.jpg" not in paths


def test_a_shard_keeps_its_id_when_others_are_left_out(tars: Path) -> None:
    before = {shard.name: shard.id for shard in listing(tars).shards}
    after = {shard.name: shard.id for shard in listing(tars, f"{tars}/a/1.tar").shards}
    assert after == {name: state for name, state in before.items() if name != "a/1.tar"}


def test_a_name_that_is_in_no_input_is_said(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listing(tars, f"{tars}/a/7.tar", f"{tars}/a/1.tar")
    assert found.unused == (f"{tars}/a/7.tar",)
    found.say_passed()
    assert f"leave_out names {tars}/a/7.tar, but the input holds no such file" in capsys.readouterr().err


def test_an_input_of_which_nothing_is_left_is_refused(tars: Path) -> None:
    with pytest.raises(ConfigError, match=r"matches no tar.* It passes over 6 files \(left out 6\)"):
        listing(tars, str(tars))


def test_paths_that_are_left_out_count_from_the_jobs_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text("recipe: r\ninput: in\ntable: t\nleave_out: in/a/1.tar\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_job(tmp_path / "job.yaml").leave_out == (f"{tmp_path}/in/a/1.tar",)
    named = load_job(tmp_path / "job.yaml", ["leave_out=[s3://bucket/x/*.tar, y]"])
    assert named.leave_out == ("s3://bucket/x/*.tar", f"{tmp_path}/elsewhere/y")
