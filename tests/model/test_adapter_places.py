"""Where adapters lie: in folders of folders, in the base's own folder, in several files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import AdapterMismatch, EncoderError
from lora_embed.model.adapter import read_adapter
from lora_embed.model.base import load_headless
from lora_embed.model.base_files import find_base
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from models import save_adapter, save_base
from trained import difference, states, train

NOTE = "also holds an adapter, which transformers applies when it opens the base there; it is not part of this encoder"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def build(base: Path | str, out: Path, *adapters: Path | str) -> list[str]:
    lines: list[str] = []
    specs = tuple(AdapterSpec(path=str(path)) for path in adapters)
    settings = {} if adapters else {"merge_method": "none"}
    build_encoder(gather(Recipe(base_model=str(base), adapters=specs, **settings)), out, lines.append)
    return [line for line in lines if NOTE in line]


def put_beside(base: Path, adapter: Path) -> None:
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, base)


def test_an_adapter_in_the_bases_folder_is_applied_once_at_most(base: Path, tmp_path: Path) -> None:
    other, body = save_adapter(tmp_path / "other", base, seed=2), AutoModel.from_pretrained(base)
    expected = {"base": states(body)}
    train(body, tmp_path / "adapter")
    expected["adapter"] = states(body)
    put_beside(base, tmp_path / "adapter")
    assert difference(states(AutoModel.from_pretrained(base)), expected["base"]) > 1e-2  # transformers has applied it
    assert len(build(base, tmp_path / "none")) == 1
    assert torch.equal(states(load_headless(tmp_path / "none", "none")), expected["base"])
    assert build(base, tmp_path / "own", base) == []
    assert difference(states(load_headless(tmp_path / "own", "own")), expected["adapter"]) <= 1e-5
    assert build(f"file://{base}", tmp_path / "by uri", f"file://{base}") == []
    assert len(build(base, tmp_path / "both", other)) == 1
    shutil.rmtree(base)
    with_other = load_encoder(tmp_path / "both").space_id
    base = save_base(tmp_path / "base")
    assert build(base, tmp_path / "clean", other) == []
    assert load_encoder(tmp_path / "clean").space_id == with_other


def test_adapters_in_folders_of_a_folder_are_named(base: Path, tmp_path: Path) -> None:
    """PEFT saves an adapter with a name in a folder of that name."""
    for name in ("ten", "more"):
        save_adapter(tmp_path / "all" / name, base)
    with pytest.raises(
        AdapterMismatch, match=r"it has no adapter_config\.json\. Its folders more, ten are adapters\. Name one"
    ):
        read_adapter(str(tmp_path / "all"))
    for uri in (str(tmp_path / "all" / "ten"), f"file://{tmp_path}/all/ten"):
        assert read_adapter(uri).content_hash == read_adapter(str(tmp_path / "all" / "ten")).content_hash


def in_parts(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        save_file({name: tensors[name] for name in names}, folder / f"adapter_model-0000{number}-of-00002.safetensors")


def in_parts_with_an_empty_one(folder: Path) -> None:
    in_parts(folder)
    save_file({}, folder / "adapter_model-00001-of-00002.safetensors")


def without_tensors(folder: Path) -> None:
    save_file({}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (in_parts, r"found adapter_model-00001-of-00002\.safetensors.*in several files\. Save it again in one file"),
        (in_parts_with_an_empty_one, r"in several files\. Save it again in one file"),
        (without_tensors, "holds no LoRA tensors, so it would change nothing"),
    ],
)
def test_an_adapter_in_parts_is_refused_as_that(change: Callable[[Path], None], says: str, base: Path, tmp_path: Path) -> None:
    change(save_adapter(tmp_path / "adapter", base))
    with pytest.raises(AdapterMismatch, match=says):
        build(base, tmp_path / "encoder", tmp_path / "adapter")


def test_other_files_beside_the_weights_are_not_read(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    expected = read_adapter(str(adapter)).content_hash
    (adapter / "adapter_model.bin").write_bytes(b"a pickle")
    save_file({"x": torch.ones(1)}, adapter / "adapter_model.fp16.safetensors")
    save_adapter(adapter / "checkpoint-100", base, seed=7)
    assert read_adapter(str(adapter)).content_hash == expected


def test_an_adapter_is_no_base(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    with pytest.raises(
        EncoderError, match=r"is an adapter, not a model\. Name it under adapters, and the model it was trained"
    ):
        find_base(str(adapter), None)
