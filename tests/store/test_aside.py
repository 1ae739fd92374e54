"""A file or folder that is written aside is there as a whole or not at all."""

from pathlib import Path

import pytest

from lora_embed.store.aside import file_aside, folder_aside


def write_half(path: Path) -> None:
    with file_aside(path) as aside:
        aside.write_text("half")
        raise OSError("the disk is full")


def test_a_file_takes_its_place_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("first", "second"):
        with file_aside(path) as aside:
            aside.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    with pytest.raises(OSError, match="full"):
        write_half(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "second")]


def test_a_folder_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "for" / "it"
    with pytest.raises(FileNotFoundError), folder_aside(path) as aside:
        (aside / "not" / "there").touch()
    assert not list(tmp_path.iterdir())
    path.mkdir(parents=True)  # an empty one may be there
    with folder_aside(path) as aside:
        (aside / "whole").touch()
        assert not list(path.iterdir())
    assert [file.name for file in path.iterdir()] == ["whole"]
    with pytest.raises(OSError, match="not empty"), folder_aside(path):
        pass
    assert [file.name for file in path.parent.iterdir()] == ["it"]
