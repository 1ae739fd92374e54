"""README and docs: links lead somewhere, files that are named exist, lists are whole, the map is up to date."""

import re
from pathlib import Path
from typing import get_args

import pytest
import typer.main

import draw_architecture
from jobs import ROOT
from lora_embed.cli.main import app
from lora_embed.config.models import JobConfig, Recipe
from lora_embed.model.merge import CONCAT, METHODS
from lora_embed.schema import Reason

DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.glob("*.md"))
FOLDERS = [ROOT, DOCS, ROOT / "src" / "lora_embed", ROOT / "deploy" / "kuberay"]
HOMES = [ROOT / "src" / "lora_embed", ROOT / "campaigns"]
# Files of a user, of an encoder and of a measurement, which lie elsewhere.
ELSEWHERE = {"a.yaml", "recipe.yaml", "job.yaml", "half.yaml", "ties.yaml", "tuned.yaml", "merged.yaml", "bench.svg"}
NAMED = re.compile(r"(?<![\w./<>*-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|yaml|toml|txt|svg)(?![\w/*])")


def anchors(page: Path) -> set[str]:
    """The links that a page's headings have, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    """A path counts from one of `FOLDERS`; a bare name of a module may lie anywhere below `HOMES`."""
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for name in NAMED.findall(code):
            if name in ELSEWHERE or any((folder / name).exists() for folder in FOLDERS):
                continue
            assert "/" not in name, f"{name} is named, and is nowhere"
            assert any(list(folder.rglob(name)) for folder in HOMES), f"{name} is named, and is nowhere"


def test_a_file_that_is_nowhere_would_be_found() -> None:
    assert NAMED.findall("python benchmarks/cluster_model.py --nodes 4, deploy/kuberay/job.yaml") == [
        "benchmarks/cluster_model.py",
        "deploy/kuberay/job.yaml",
    ]
    assert not (ROOT / "benchmarks" / "cluster_model.py").exists()


def test_readme_is_short_and_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert "`make demo`" in text
    assert "`make test`" in text
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")}


def test_readme_has_every_command() -> None:
    table = (ROOT / "README.md").read_text().partition("## Commands")[2].partition("\n## ")[0]
    commands = typer.main.get_command(app)
    assert set(re.findall(r"`([a-z]+)[ `]", table.partition("| --- |")[2])) >= set(commands.commands)  # type: ignore[attr-defined]


def test_the_reference_has_every_key_and_method() -> None:
    text = (DOCS / "configuration.md").read_text()
    for key in {*JobConfig.model_fields, *Recipe.model_fields}:
        assert re.search(rf"^{key}:|`{key}`", text, flags=re.MULTILINE), key
    for method in (*METHODS, CONCAT, "none"):
        assert re.search(rf"\b{method}\b", text), method


def test_the_docs_name_every_reason_of_a_reject_and_no_others() -> None:
    reasons = re.search(r"a row with a reason: ([^.]*)\.", (DOCS / "decoding.md").read_text())
    assert reasons is not None
    assert sorted(re.findall(r"`(\w+)`", reasons[1])) == sorted(get_args(Reason))


def test_the_map_and_the_picture_are_those_of_the_source() -> None:
    """Else run `make map`, and look at the picture."""
    text = draw_architecture.PAGE.read_text()
    assert draw_architecture.page(text) == text
    assert draw_architecture.PICTURE.read_text() == draw_architecture.picture()


def test_the_picture_leaves_out_what_follows_from_other_arrows_alone() -> None:
    imports = {"top": {"middle", "low"}, "middle": {"low"}, "low": set(), "other": {"low"}}
    assert draw_architecture.direct(imports) == {"top": {"middle"}, "middle": {"low"}, "low": set(), "other": {"low"}}
    assert draw_architecture.levels(imports) == {"top": 2, "middle": 1, "low": 0, "other": 1}


def test_every_module_says_what_it_is_for() -> None:
    modules = [
        path for folder in ("src", "jobs", "scripts", "campaigns", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    assert modules
    assert not [path for path in modules if not draw_architecture.opening(path)]
