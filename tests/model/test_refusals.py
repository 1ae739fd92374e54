"""Bases, image processors and adapters that are refused, through `lora-embed build`: docs/refusals.md lists the messages."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import ROOT
from models import save_adapter, save_base
from refused_bases import FILE_CASES, MODEL_CASES, PROCESSOR_CASES, SIZE_CASES
from user_errors import WRITES_DOCS, Case, Page, Setup, broken_setup, cause

PAGE = Page(
    ROOT / "docs" / "refusals.md",
    {
        "The base's folder and files": FILE_CASES,
        "The base's configuration and weights": MODEL_CASES,
        "The image processor": PROCESSOR_CASES,
        "Pooling and image size": SIZE_CASES,
    },
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, two adapters and a recipe."""
    folder = tmp_path_factory.mktemp("good")
    base = save_base(folder / "base")
    save_adapter(folder / "ten", base, 10, seed=1)
    save_adapter(folder / "more", base, 27, seed=2)
    Setup(folder).recipe()
    return folder


@pytest.fixture
def broken(case: Case, good: Path) -> Iterator[Path]:
    """A fresh setup with the case's error in it."""
    with broken_setup(case, good) as folder:
        yield folder


@pytest.fixture(scope="module")
def messages() -> Iterator[dict[str, str]]:
    """Case → its message, as the docs print it."""
    with PAGE.written() as caused:
        yield caused


@pytest.mark.parametrize("case", PAGE.params())
def test_what_is_refused_is_refused_with_the_reason(
    case: Case, broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], messages: dict[str, str]
) -> None:
    monkeypatch.chdir(broken)
    messages[case.what] = cause(case, broken, capsys)
    if not WRITES_DOCS:
        PAGE.compare(case, messages[case.what])
