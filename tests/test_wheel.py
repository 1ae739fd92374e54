"""The package as a wheel, in an environment with the dependencies and no source tree: the README's quickstart, literally.

And the first hour of docs/first-table.md from where everything is installed; `make first-search` installs it, too.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from documented import blocks_of
from first_search import commands_by
from jobs import ROOT
from models import save_adapter, save_base
from samples import encoded, noise

PACKAGE = ROOT / "src" / "lora_embed"
README = (ROOT / "README.md").read_text()
PHOTOS = {"food": 12, "animals": 9, "travel": 15}  # folder of images → how many
FILE = re.compile(r"[\w-]+/[\w-]+\.png")
# What differs from run to run: numbers, ids of spaces, times.
CHANGES = re.compile(r"\b[0-9a-f]{12}\b|\d{4}-\d\d-\d\dT[\d:+]+|\d[\d.,]*")


def block_of(kind: str, opening: str = "") -> str:
    """The README's first block of that kind that begins so."""
    found = re.search(rf"^```{kind}\n({re.escape(opening)}.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, (kind, opening)
    return found[1]


def quickstart() -> list[tuple[str, list[str]]]:
    """The README's commands, each with the lines that it is said to print."""
    commands: list[tuple[str, list[str]]] = []
    for line in block_of("console").splitlines():
        if line.startswith("$ "):
            commands.append((line.removeprefix("$ "), []))
        else:
            commands[-1][1].append(line)
    return commands


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make wheel` does, from a copy, so that nothing is written into the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run(command, cwd=source, check=True)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a shell in which that wheel alone is installed, beside the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return variables | {"PATH": f"{folder / 'bin'}{os.pathsep}{variables['PATH']}"}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A reader's folder: the README's two files, a tiny base, two adapters and images."""
    for name in ("recipe.yaml", "job.yaml"):
        (tmp_path / name).write_text(block_of("yaml", f"# {name}\n"))
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapters" / "category10", base, 10, seed=1)
    save_adapter(tmp_path / "adapters" / "group27", base, 27, seed=2)
    for number, (folder, count) in enumerate(PHOTOS.items()):
        names = [f"image-{index}" for index in range(count)]
        names[:1] = ["watermelon"] if folder == "food" else names[:1]
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for index, name in enumerate(names):
            (tmp_path / "photos" / folder / f"{name}.png").write_bytes(encoded(noise(40, 30, seed=100 * number + index)))
    return tmp_path


def masked(line: str, folder: str) -> str:
    return FILE.sub("FILE", CHANGES.sub("N", line.replace(folder, "HERE"))).rstrip()


def run(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, (command, ended.stderr)
    return ended


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert held == {path.relative_to(ROOT / "src").as_posix() for path in files}
    assert {"lora_embed/.rayignore", "lora_embed/images/known/known.json"} <= held
    assert "lora_embed/demo/adapters/category10/adapter_model.safetensors" in held


@pytest.mark.slow
def test_the_quickstart_of_the_readme_prints_what_the_readme_says(first: Path, environment: dict[str, str]) -> None:
    site = run('python -c "import lora_embed; print(lora_embed.__file__)"', first, environment).stdout
    assert Path(site.strip()).is_relative_to(Path(environment["PATH"].partition(os.pathsep)[0]).parent)
    commands = quickstart()
    assert [command.split()[1] for command, _ in commands] == ["plan", "run", "status", "search"]
    for command, said in commands:
        ended = run(command, first, environment)
        printed = [masked(line, str(first)) for line in (ended.stderr + ended.stdout).splitlines()]
        for line in said:
            assert masked(line, "/data/first") in printed, (command, line, ended.stderr + ended.stdout)
    assert ended.stdout.splitlines()[1].endswith("food/watermelon.png")
    shown = "print(len(vectors), query.shape, nearest[0].id)"
    (first / "read.py").write_text(block_of("python") + shown)
    assert (
        run("python read.py", first, environment).stdout.split("\n")[0] == f"{sum(PHOTOS.values())} (1, 32) food/watermelon.png"
    )


@pytest.mark.slow
def test_the_first_table_page_leads_to_a_search_and_a_notebook(first: Path, environment: dict[str, str], wheel: Path) -> None:
    for name in ("recipe.yaml", "job.yaml"):
        (first / name).unlink()
    shown = "python -c \"from lora_embed.installed import how_to_install; print(how_to_install('indexes'))\""
    assert run(shown, first, environment).stdout.strip() == f"pip install '{wheel}[indexes]'"
    commands = commands_by("wheel")[2:]
    assert [command.partition("\n")[0].split()[:2] for command in commands] == [
        ["cat", ">"], ["cat", ">"], ["lora-embed", "run"], ["lora-embed", "search"]
    ]  # fmt: skip
    for command in commands:
        ended = run(command, first, environment)
    assert ended.stdout.splitlines()[1].endswith("food/watermelon.png  folder=food")
    (block,) = blocks_of("first-table.md", "Use the table")
    shown = "print(counts.to_dict(), nearest['id'][0], nearest['folder'][0], len(nearest))"
    (first / "notebook.py").write_text(block + shown)
    printed = run("python notebook.py", first, environment).stdout.strip()
    assert sorted(eval(printed[: printed.index("}") + 1]).items()) == sorted(PHOTOS.items())
    assert printed.endswith("} food/watermelon.png food 10")
