"""Bases, image processors and adapters that are refused, through `lora-embed build`: docs/refusals.md lists the messages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import ROOT
from refused import PAGE
from user_errors import WRITES_DOCS, Case, broken_setup, cause, write_models


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, two adapters and a recipe."""
    return write_models(tmp_path_factory.mktemp("good"))


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


@pytest.mark.skipif(WRITES_DOCS, reason="they are written after the last test")
def test_the_page_lists_exactly_these_cases() -> None:
    PAGE.assert_lists_these_cases()


SOURCE = ROOT / "src" / "lora_embed"
NAMES_OF_ERRORS = {"AdapterMismatch", "EncoderError", "ConfigError", "StorageError", "ProcessorRefused", "_refused"}
OF_PROCESSORS = ("processors.py", "geometry.py", "preprocess.py")  # of `images/`; they complete sentences
OF_ENCODERS = {"description.py", "encoder.py", "follow.py", "golden.py"}  # of `model/`: what they refuse is no base or adapter


def refusals() -> Iterator[tuple[str, str]]:
    """Every message that `model/` and the rules of image processors raise or return, as a pattern, with its place."""
    files = [path for path in sorted((SOURCE / "model").glob("*.py")) if path.name not in OF_ENCODERS]
    for path in [*files, *(SOURCE / "images" / name for name in OF_PROCESSORS)]:
        names = NAMES_OF_ERRORS | ({"ValueError"} if path.parent.name == "images" else set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_error = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args
            if is_error and (pattern := pattern_of(node.args[0])) is not None:
                yield f"{path.parent.name}/{path.name}:{node.lineno}", pattern


def pattern_of(message: ast.expr) -> str | None:
    """A pattern of a text in the source: any text may stand where it holds a value. None for a text without words."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    texts = [str(part.value) if isinstance(part, ast.Constant) else None for part in parts]
    words = sum(len(text) for text in texts if text)
    return "".join(".*" if text is None else re.escape(" ".join(text.split(" "))) for text in texts) if words > 12 else None


BUG = "only a bug of lora-embed would cause it"
ENCODER = "only an encoder.json that was changed causes it"
UNCAUSED = {  # words of messages that no base and no adapter causes here → why
    "is a bug of lora-embed": BUG,
    "the saved change differs from the one recomputed": BUG,
    "so it cannot be stored as an adapter": BUG,
    "tap is": ENCODER,
    "which does not go with fit": ENCODER,
    "gives images of different sizes: resize has no": ENCODER,
    "which needs a crop": ENCODER,
    "different states each time": "no type of today's transformers does so; test_strange_bases.py makes such a model",
    "has other tokens among its patches": "likewise",
}


@pytest.mark.skipif(WRITES_DOCS, reason="they are written after the last test")
def test_every_refusal_stands_on_the_page() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (PAGE.path, ROOT / "docs" / "errors.md")]
    rows = [line for page in pages for line in page.splitlines()]
    absent = {place: pattern for place, pattern in refusals() if not any(re.search(pattern, row) for row in rows)}
    patterns = absent.values()
    assert not [words for words in UNCAUSED if not any(re.escape(words) in pattern for pattern in patterns)]
    assert not {
        place: pattern for place, pattern in absent.items() if not any(re.escape(words) in pattern for words in UNCAUSED)
    }
