"""The page of an encoder: what its merge report says, with hostile names as text, and never copied from other people."""

from pathlib import Path

import pytest

from jobs import tiny_recipe, write_recipe
from lora_embed.cli.main import run_command
from lora_embed.model.description import FILES, REPORT, files_of, read_description
from lora_embed.model.files import read_json
from lora_embed.report.encoder import PAGE, encoder_page
from models import save_adapter, save_base
from pages import plain_text


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an encoder that the command built from two adapters."""
    folder = tmp_path_factory.mktemp("built")
    assert run_command(["build", str(tiny_recipe(folder)), "--out", str(folder / "encoder")]) == 0
    return folder / "encoder"


def test_a_build_leaves_a_page_of_its_merge_report(built: Path) -> None:
    report, encoder = read_json(built / REPORT), read_description(built)
    text = plain_text((built / PAGE).read_text())
    (member,) = report["members"]
    assert f"Encoder {encoder.space_id}" in text
    assert "2 adapters were merged into" in text
    assert f"{len(member['weights'])} weights" in text
    for adapter in member["adapters"]:
        assert f"{adapter['uri']} {adapter['weight']:g} {adapter['norm']:.3g} {adapter['weights_changed']}" in text
    assert f"{member['relations']['cosine'][0][1]:.3f}".replace("-", "−") in text
    assert f"The vectors of the golden images differ by up to {member['largest_difference_of_vectors']:.1e}" in text.replace(
        "−", "-"
    )
    for weight, row in member["weights"].items():
        assert f"{weight} {100 * row['change'] / row['before']:.2f} %" in text
    (file,) = report["files"].values()
    assert file["sha256"] in text
    assert "The build had no remark." in text


def test_remarks_of_a_build_are_on_its_page_as_text(built: Path) -> None:
    report = read_json(built / REPORT) | {"notes": ["<script>alert(1)</script> was left out of the names"]}
    page = encoder_page(report, read_description(built))
    assert "<li>&lt;script&gt;alert(1)&lt;/script&gt; was left out of the names.</li>" in page
    assert "<script" not in page


def test_the_page_of_a_folder_is_not_among_the_files_that_are_copied(built: Path) -> None:
    """A page in a folder from other people may run scripts."""
    copied = {path.name for path in files_of(built, read_description(built), str(built))}
    assert REPORT in copied
    assert PAGE not in copied
    assert PAGE not in FILES


def test_an_encoder_of_the_base_alone_and_one_stored_as_an_adapter_have_pages(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    recipe = write_recipe(tmp_path, base, {save_adapter(tmp_path / "ten", base, 10, seed=1): 1.0})
    assert run_command(["build", str(recipe), "--out", str(tmp_path / "small"), "--store", "adapter"]) == 0
    text = plain_text((tmp_path / "small" / PAGE).read_text())
    assert "1 adapter was merged into" in text
    assert "The encoder is stored as an adapter of" in text
    recipe = write_recipe(tmp_path, base, {}, merge_method="none")
    assert run_command(["build", str(recipe), "--out", str(tmp_path / "alone")]) == 0
    text = plain_text((tmp_path / "alone" / PAGE).read_text())
    assert "alone. Nothing was merged." in text
    assert "Weight by weight" not in text
