"""User errors through the real entry point, and the tables of docs that list their messages.

Each case breaks a good setup, and a command ends with one message. LORA_EMBED_WRITE_DOCS=1 writes the messages to the docs,
else they are compared.
"""

import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lora_embed.cli.main import run_command
from lora_embed.store import remote
from models import edit_tensors, save_adapter, save_base

LIMIT_S = 10.0  # for one error; those found by reading alone take a few hundredths
WRITES_DOCS = os.environ.get("LORA_EMBED_WRITE_DOCS") == "1"
NEUTRAL = "/data/products"  # in the docs, the folder of a setup
ORDINARY_USER = 65534
# Parts of messages that differ between machines, or that other libraries wrote; `…` in the docs.
VARYING = re.compile(
    "|".join(
        [
            r"(?<=can be read \().+(?=\)\. Check the name)",
            r"(?<=cannot be read \().+(?=\)\. Check the name)",
            r"(?<=pixels \().+(?=\)\. Correct image_size)",
            r"(?<=safetensors file \().+(?=\)\. )",
            r"(?<=cannot be loaded: ).+(?=\. Copy or)",
            r"(?<=is damaged \().+(?=\)\. )",
            r"(?<=/products)\?[^\"]+",
            r"(?<=storage option: ).+(?= unexpected)",
            r"(?<=not_an_image \().+(?=\)\. )",
            r"\b[0-9a-f]{12,}\b",
        ]
    ),
    re.DOTALL,
)
RECIPE = {"base_model": "./base", "adapters": [{"path": "./ten", "weight": 0.5}, {"path": "./more", "weight": 0.5}]}
JOB = {
    "recipe": "recipe.yaml",
    "input": "shards",
    "table": "table",
    "precision": "float32",
    "batch_size": 16,
    "resources": {"device": "cpu", "actors": {"max": 1}},
}


@dataclass(frozen=True)
class Setup:
    """A good job in a folder of its own, to be broken."""

    folder: Path

    def job(self, **changes: Any) -> None:
        write_yaml(self.folder / "job.yaml", JOB | changes)

    def recipe(self, **changes: Any) -> None:
        write_yaml(self.folder / "recipe.yaml", RECIPE | changes)

    def text(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def processor(self, **settings: Any) -> None:
        self.text("base/preprocessor_config.json", json.dumps(settings))

    def adapter_config(self, **changes: Any) -> None:
        path = self.folder / "ten" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        edit_tensors(self.folder / "ten", change)

    def remove(self, *names: str) -> None:
        for name in names:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def cut(self, name: str) -> None:
        path = self.folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def list(self, name: str, text: str, **changes: Any) -> None:
        """The job's input is a list of references."""
        (self.folder / name).parent.mkdir(parents=True)
        (self.folder / name).write_text(text)
        self.job(input=name, **changes)

    def move(self, name: str, target: str) -> None:
        (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).rename(self.folder / target)


@dataclass(frozen=True)
class Case:
    """One user error: its name in the docs, what breaks a good setup, and what the message must say."""

    what: str
    breaks: Callable[[Setup], Any]
    says: list[str]  # parts of its message: what, where, what to do
    arguments: list[str] = field(default_factory=lambda: ["run", "job.yaml"])
    code: int = 2  # exit code
    published: bool = False  # the setup's table holds version 1
    builds: bool = False  # shows only when the encoder is built; what was done until then may be told before the message
    starts: bool = False  # needs the cluster; likewise
    slow: bool = False  # a case of `make test-slow`
    as_ordinary_user: bool = False  # root may read and write anything


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def write_models(folder: Path) -> Path:
    """A tiny base, two adapters and their recipe, in the folder of a setup."""
    base = save_base(folder / "base")
    save_adapter(folder / "ten", base, 10, seed=1)
    save_adapter(folder / "more", base, 27, seed=2)
    Setup(folder).recipe()
    return folder


def nothing(_setup: Setup) -> None:
    """For what is wrong with the command alone."""


@dataclass(frozen=True)
class Page:
    """A page of the docs with tables of messages: what happened, the message, and advice that is written by hand."""

    path: Path
    sections: Mapping[str, Sequence[Case]]  # heading → the cases of its table, in order

    @property
    def cases(self) -> list[Case]:
        return [case for cases in self.sections.values() for case in cases]

    def params(self) -> list[Any]:
        """The cases for `parametrize`."""
        return [pytest.param(case, id=case.what, marks=[pytest.mark.slow] * case.slow) for case in self.cases]

    def rows(self) -> dict[str, tuple[str, str]]:
        """First column of the tables → the message's cell, and the advice beside it."""
        rows = re.findall(r"^\| ([^|]+) \| (`[^|]+`) \| ([^|]*?) ?\|$", self.path.read_text(encoding="utf-8"), re.MULTILINE)
        return {what: (message, advice) for what, message, advice in rows}

    def compare(self, case: Case, message: str) -> None:
        printed = self.rows().get(case.what, ("", ""))[0]
        assert masked(printed) == masked(message), f"{self.path} has another message; `make errors` writes this one"

    def assert_lists_these_cases(self) -> None:
        names = [case.what for case in self.cases]
        assert len(set(names)) == len(names)
        assert list(self.rows()) == names

    @contextmanager
    def written(self) -> Iterator[dict[str, str]]:
        """A dictionary for the messages of cases; at the end they are written to the page, if that is asked for."""
        caused: dict[str, str] = {}
        yield caused
        if WRITES_DOCS:
            page, before = self.path.read_text(encoding="utf-8"), self.rows()
            for heading, cases in self.sections.items():
                rows = "".join(_row(case.what, caused.get(case.what), *before.get(case.what, ("", ""))) for case in cases)
                start = page.index("| --- | --- | --- |\n", page.index(f"\n## {heading}\n")) + len("| --- | --- | --- |\n")
                page = page[:start] + rows + page[start:][re.match(r"(?:\|.*\n)*", page[start:]).end() :]
            self.path.write_text(page, encoding="utf-8")


def _row(what: str, message: str | None, before: str, advice: str) -> str:
    """A case's row: its message, or where it was not caused the one that is there, and the advice that is there."""
    return f"| {what} | {message or before} | {advice} |\n".replace("|  |", "| |")


def _cell(message: str) -> str:
    """A message as a cell of a table in Markdown, each of its lines as code."""
    assert "|" not in message
    return "<br>".join(f"`` {line} ``" if "`" in line else f"`{line}`" for line in message.splitlines())


def masked(text: str) -> str:
    """Text without its numbers, which differ between machines."""
    return re.sub(r"\d+", "#", text)


def everything(folder: Path, *, times_of_folders: bool = True) -> dict[str, tuple[int, int]]:
    """Size and time of all files and folders. The time of a folder changes if anything was written in it for a while."""
    states = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    timed = {path: times_of_folders or not stat.S_ISDIR(state.st_mode) for path, state in states.items()}
    return {str(path): (state.st_size, state.st_mtime_ns if timed[path] else 0) for path, state in states.items()}


@contextmanager
def broken_setup(case: Case, good: Path) -> Iterator[Path]:
    """A copy of a good setup with the case's error in it; perhaps with the rights of an ordinary user, as root has all."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(shutil.copytree(good, Path(place) / "products"))
        if case.as_ordinary_user:
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o777 if path.is_dir() else 0o644)
        case.breaks(Setup(folder))
        with _ordinary_user() if case.as_ordinary_user and os.geteuid() == 0 else nullcontext():
            yield folder


@contextmanager
def _ordinary_user() -> Iterator[None]:
    os.setresuid(ORDINARY_USER, ORDINARY_USER, -1)
    try:
        yield
    finally:
        os.setresuid(0, 0, -1)


def cause(case: Case, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the case's command in a setup that the case has broken; returns the message as a cell of the docs.

    The current folder must be that of the setup. The command must end in time, with one message, and write nothing.
    """
    remote._connect_cached.cache_clear()  # it knows `table` in the folder of the case before
    before = everything(folder.parent, times_of_folders=not case.builds)  # an encoder is built aside
    capsys.readouterr()
    started = time.monotonic()
    code = run_command(case.arguments)
    seconds = time.monotonic() - started
    output, errors = capsys.readouterr()

    assert code == case.code, errors
    assert everything(folder.parent, times_of_folders=not case.builds) == before
    assert seconds < LIMIT_S
    assert output == ""
    assert "Traceback" not in errors
    assert errors.count("error: ") == 1
    progress, message = errors.split("error: ")
    message = message.partition("\nend: ")[0]  # what a run that had begun says last
    assert case.builds or case.starts or not progress
    for part in case.says:
        assert part in message, message
    return as_documented(message)


def as_documented(message: str) -> str:
    """A message as a cell of the docs' tables, without what differs between machines."""
    message = re.sub(r"/tmp\S*?/(good\d*|products)(?=[/:\s])", NEUTRAL, message.strip())
    return _cell(VARYING.sub("…", message))
