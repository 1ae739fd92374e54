"""The public top level: what the docs teach is offered there, and nothing else is taught."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_embed
from jobs import ROOT

HEAVY = ("torch", "transformers", "ray", "peft")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names of the package itself, not of what it offers to programs: files in the repository and metrics.
NOT_PYTHON = re.compile(r"lora_embed[/_]|src/lora_embed")


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("name", lora_embed.__all__)
def test_a_public_name_is_there(name: str) -> None:
    value = getattr(lora_embed, name)
    assert value.__doc__
    assert name in dir(lora_embed)


def test_a_name_that_is_not_offered_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'open_tabel'"):
        _ = lora_embed.open_tabel


def test_readers_of_type_hints_see_the_same_names() -> None:
    tree = ast.parse(Path(lora_embed.__file__).read_text())
    (hinted,) = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.name for node in ast.walk(hinted) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(lora_embed.__all__)


@pytest.mark.parametrize(
    "name", ["open_table", "search_table", "open_index", "Evaluation", "write_report", "lend", "linear_cka"]
)
def test_what_reads_and_shows_needs_neither_torch_nor_ray(name: str) -> None:
    code = f"import sys, lora_embed; lora_embed.{name}; print(*[library for library in {HEAVY} if library in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert loaded.stdout.split() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs_teach_public_names_alone(page: Path) -> None:
    for block in blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_embed"):
                assert node.module == "lora_embed"
                assert {alias.name for alias in node.names} <= set(lora_embed.__all__)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lora_embed":
                assert node.attr in lora_embed.__all__
    for dotted in re.findall(r"`lora_embed\.(\w+)", page.read_text()):
        assert dotted in lora_embed.__all__
