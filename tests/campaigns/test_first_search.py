"""The commands of docs/first-table.md, which `make first-search` runs: few, and their two files are what a run takes."""

import re
import shutil
from pathlib import Path

import pytest

from first_search import commands_by, run
from lora_embed import demo
from lora_embed.config.models import load_job, load_recipe


@pytest.mark.parametrize(("way", "most"), [("source", 7), ("wheel", 6)])
def test_few_commands_lead_from_nothing_to_a_search(way: str, most: int) -> None:
    commands = commands_by(way)
    assert len(commands) <= most
    assert commands[-1].startswith("lora-embed search")
    assert [command.startswith("git clone") for command in commands].count(True) == (way == "source")
    assert not [command for command in commands if re.search(r"\bmake\b", command)]
    assert not [command for command in commands if "…" in command and not command.startswith("cat >")]


def test_the_two_files_of_the_page_are_valid_and_have_nothing_of_the_demo(tmp_path: Path) -> None:
    files = [command for command in commands_by("source") if command.startswith("cat >")]
    folder = tmp_path / "first"
    shutil.copytree(Path(demo.__file__).parent / "adapters", folder / "adapters")
    (folder / "base").mkdir()
    timed = run(files, folder, home=tmp_path)
    assert [step.command for step in timed] == ["cat > recipe.yaml <<END", "cat > job.yaml <<END"]
    assert all(0 <= step.seconds < 60 for step in timed)
    recipe, job = load_recipe(folder / "recipe.yaml"), load_job(folder / "job.yaml")
    assert [adapter.weight for adapter in recipe.adapters] == [0.5, 0.5]
    assert recipe.image_size is None
    assert "demo" not in "".join(files)
    assert [carried.name for carried in job.carry] == ["folder"]
