"""Repositories of the Hugging Face hub: taken where `hf://` or a base's plain name says so, and never for a missing folder.

From the hub's own cache, laid out as its library lays it out, since tests reach no hub.
"""

import json
from pathlib import Path

import pytest
import yaml

from lora_embed import load_encoder
from lora_embed.cli.main import run_command
from lora_embed.config.models import load_recipe
from lora_embed.errors import StorageError
from lora_embed.evaluate.candidates import find_entrants
from lora_embed.model.adapter import read_adapter
from lora_embed.model.base_files import find_base
from lora_embed.model.build import build_encoder
from lora_embed.model.fold import Limit
from lora_embed.model.ingredients import gather
from models import save_adapter, save_base

NEWEST, TAGGED = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache; the current folder is another one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "hub"


def repository(hub: Path, name: str, commit: str = NEWEST, revision: str = "main") -> Path:
    """The folder, not there yet, that holds a repository's files at a revision."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return folder / "snapshots" / commit


def write_recipe(folder: Path, base: str, *adapters: str) -> Path:
    method = {} if adapters else {"merge_method": "none"}
    text = yaml.safe_dump({"base_model": base, "adapters": [{"path": path} for path in adapters]} | method)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def refusal(recipe: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What `build` says; it builds nothing."""
    out = recipe.parent / "encoder"
    assert run_command(["build", str(recipe), "--out", str(out)]) == 2
    assert not out.exists()
    return capfd.readouterr().err


def test_an_adapter_that_is_not_there_is_not_taken_from_a_stranger(
    tmp_path: Path, hub: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(repository(hub, "adapters/category10"), base)
    said = refusal(write_recipe(tmp_path, "./base", "adapters/category10"), capfd)
    assert f"adapters[0].path is adapters/category10, but there is no directory {tmp_path}/adapters/category10." in said
    assert "write hf://adapters/category10 if you mean that repository of the Hugging Face hub." in said
    with pytest.raises(
        StorageError, match=r"there is no directory .*/elsewhere/adapters/category10. Correct .* hf://adapters/"
    ):
        read_adapter("adapters/category10")
    save_adapter(tmp_path / "adapters" / "category10", base, seed=2)
    here = gather(load_recipe(tmp_path / "recipe.yaml")).adapters[0]
    assert here.folder == tmp_path / "adapters" / "category10"


def test_an_adapter_of_the_hub_is_that_of_its_revision(tmp_path: Path, hub: Path) -> None:
    base = save_base(tmp_path / "base")
    newest = save_adapter(repository(hub, "someone/flowers"), base)
    tagged = save_adapter(repository(hub, "someone/flowers", TAGGED, "v1"), base, seed=2)
    deeper = save_adapter(newest / "checkpoints" / "last", base, seed=3)
    expected = {
        ("hf://someone/flowers", None): newest,
        ("hf://someone/flowers", "v1"): tagged,
        ("hf://someone/flowers@v1", None): tagged,
        ("hf://someone/flowers@v1", "v1"): tagged,
        (f"hf://someone/flowers@{TAGGED}", None): tagged,
        ("hf://someone/flowers/checkpoints/last", None): deeper,
        ("hf://someone/flowers@main/checkpoints/last/", None): deeper,
    }
    for (uri, revision), folder in expected.items():
        assert read_adapter(uri, revision).content_hash == read_adapter(str(folder)).content_hash
    assert len({read_adapter(str(folder)).content_hash for folder in expected.values()}) == 3


@pytest.mark.parametrize(
    ("uri", "revision", "says"),
    [
        (
            "hf://someone/flowers",
            "v9",
            r"hf://someone/flowers: this repository of the hub cannot be read \(.+\)\. Check the name",
        ),
        ("hf://someone/flowers@v1", "v2", "names revision v1, but the key revision is v2. Remove one of them."),
        ("hf://", None, "is not a repository of the hub; expected hf://owner/name"),
        ("hf://someone/flowers/../../..", None, "is not a repository of the hub"),
        ("hf://../flowers", None, "is not a repository of the hub"),
    ],
)
def test_what_names_no_repository_is_refused(hub: Path, uri: str, revision: str | None, says: str) -> None:
    repository(hub, "someone/flowers").mkdir(parents=True)
    with pytest.raises(StorageError, match=says):
        read_adapter(uri, revision)


def test_a_base_is_named_as_before_and_no_path_of_it_is_a_stranger(
    tmp_path: Path, hub: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    of_the_hub = save_base(repository(hub, "facebook/dinov2-small"))
    plain = gather(load_recipe(write_recipe(tmp_path, "facebook/dinov2-small"))).base
    assert (plain.uri, plain.folder) == ("facebook/dinov2-small", of_the_hub)
    assert find_base("hf://facebook/dinov2-small@main", None).folder == of_the_hub
    (tmp_path / "models").mkdir()
    save_base(repository(hub, "models/vit"))
    said = refusal(write_recipe(tmp_path, "models/vit"), capfd)
    assert f"base_model is models/vit, but there is no directory {tmp_path}/models/vit." in said
    assert "write hf://models/vit if" in said
    assert "no such directory" in refusal(write_recipe(tmp_path, "./facebook/dinov2-small"), capfd)
    assert "no such directory" in refusal(write_recipe(tmp_path, "models/vit/large"), capfd)
    said = refusal(write_recipe(tmp_path, "modles/vit"), capfd)
    assert "modles/vit: is neither a local directory nor a repository of the hub that can be read" in said


def test_an_encoder_that_is_not_there_is_not_taken_from_a_stranger(tmp_path: Path, hub: Path) -> None:
    there = repository(hub, "encoders/products")
    build_encoder(gather(load_recipe(write_recipe(tmp_path, str(save_base(tmp_path / "base"))))), there, lambda line: None)
    with pytest.raises(StorageError, match=r"no directory .*/elsewhere/encoders/products. Correct the path, or write hf://enc"):
        load_encoder("encoders/products")
    assert load_encoder("hf://encoders/products").space_id == load_encoder(there).space_id


def test_an_encoder_kept_as_an_adapter_finds_its_base_on_the_hub(tmp_path: Path, hub: Path) -> None:
    """By its plain name, as encoders were written before, and by the new one; libraries of the hub are told the plain one."""
    base = save_base(repository(hub, "facebook/dinov2-small"))
    save_adapter(tmp_path / "ten", base)
    spaces = set()
    for number, name in enumerate(("facebook/dinov2-small", "hf://facebook/dinov2-small", "hf://facebook/dinov2-small@main")):
        out = tmp_path / f"encoder{number}"
        build_encoder(gather(load_recipe(write_recipe(tmp_path, name, "./ten"))), out, lambda line: None, Limit())
        spaces.add(load_encoder(out).space_id)
        assert json.loads((out / "encoder.json").read_text())["base"]["uri"] == name
        written = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == "facebook/dinov2-small"
    assert len(spaces) == 1


def test_encoders_whose_recipes_name_adapters_in_the_old_way_are_judged_without_heads(
    tmp_path: Path, hub: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The name might be anybody's by now; the same recipe is identified as before, since contents count."""
    base = save_base(tmp_path / "base")
    save_adapter(repository(hub, "someone/flowers"), base)
    ingredients = gather(load_recipe(write_recipe(tmp_path, "./base", "hf://someone/flowers")))
    out = tmp_path / "encoder"
    built = build_encoder(ingredients, out, lambda line: None)
    assert find_entrants([str(out)], alone=False)[0].ingredients is not None
    (out / "recipe.yaml").write_text((out / "recipe.yaml").read_text().replace("hf://", ""))
    (entrant,) = find_entrants([str(out)], alone=False)
    assert (entrant.ingredients, entrant.folder) == (None, out)
    assert "judged without its adapters' heads" in capfd.readouterr().err
    save_adapter(tmp_path / "flowers", base)
    assert gather(load_recipe(write_recipe(tmp_path, "./base", "./flowers"))).recipe_id == built.recipe_id
