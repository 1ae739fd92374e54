"""What is installed: the line of versions, and the command for an extra from each place that pip installs from."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from lora_embed.cli import main
from lora_embed.installed import how_to_install


def test_version_is_one_line_that_names_what_results_depend_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run_command(["--version"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"lora-embed {version('lora-embed')} (Python {sys.version_info.major}.{sys.version_info.minor}.")
    assert all(f"{library} {version(library)}" in line for library in ("torch", "transformers", "peft", "ray"))
    assert line.count("\n") == 1


def test_version_imports_no_library_that_takes_seconds() -> None:
    shown = "import sys; from lora_embed.cli import main; main.run_command(['--version']); print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "peft", "ray"} & set(printed.splitlines()[1].split())


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file:///src/my%20code", "dir_info": {"editable": True}}, "pip install -e '/src/my code[indexes]'"),
        ({"url": "file:///src/code", "dir_info": {}}, "pip install '/src/code[indexes]'"),
        ({"url": "file:///dist/a-0.1.0.whl", "archive_info": {}}, "pip install '/dist/a-0.1.0.whl[indexes]'"),
        ({"url": "https://a.example/a.whl", "archive_info": {}}, "pip install 'lora-embed[indexes] @ https://a.example/a.whl'"),
        (None, "pip install 'lora-embed[indexes]'"),
    ],
)
def test_an_extra_comes_from_where_the_package_came_from(
    origin: dict[str, object] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "lora_embed-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-embed\nVersion: 0.1.0\n")
    if origin is not None:
        (record / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert how_to_install("indexes") == command


def test_where_only_the_files_of_the_package_are_it_comes_from_the_repository(tmp_path: Path) -> None:
    (tmp_path / "lora_embed").mkdir()
    for name in ("__init__.py", "installed.py"):
        shutil.copy(Path(main.__file__).parents[1] / name, tmp_path / "lora_embed")
    shown = "from lora_embed.installed import how_to_install; print(how_to_install('demo'))"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {shown}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={}).stdout
    assert printed.strip() == "pip install -e '.[demo]' in the folder of the repository"
