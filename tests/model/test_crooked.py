"""Adapters as they should not be, made from real ones: each is refused with the reason, or folded into the right weights."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crooked import BODY, CASES, LATE, SAME, A, B, Case, Tensors, mapped, tensors
from crooked_names import NAMES
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import AdapterMismatch, ConfigError, StorageError
from lora_embed.model.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from lora_embed.model.base import load_headless
from lora_embed.model.base_files import Base
from lora_embed.model.ingredients import gather
from lora_embed.model.match import Adapter, match_adapter, target_of
from lora_embed.model.member import fold_members
from lora_embed.model.whole import Target
from short import slow_but_every


@pytest.fixture(scope="module")
def good(real_adapters: dict[str, Path], target: Target) -> Adapter:
    return match_adapter(read_adapter(str(real_adapters["category10"])), target)


@pytest.fixture
def folder(tmp_path: Path, real_adapters: dict[str, Path]) -> Path:
    return Path(shutil.copytree(real_adapters["category10"], tmp_path / "ten"))


@pytest.mark.parametrize("case", [*CASES, *slow_but_every(6, NAMES)], ids=lambda case: case.what)
def test_crooked_adapters_are_refused_or_right(case: Case, folder: Path, target: Target, good: Adapter) -> None:
    case.edit(folder)
    if case.says is not SAME:
        with pytest.raises(case.error, match=case.says) as caught:
            match_adapter(read_adapter(str(folder)), target)
        assert not (folder / "opened").exists()
        assert str(folder) in str(caught.value)
        return
    found = match_adapter(read_adapter(str(folder)), target)
    assert found.changes.keys() == good.changes.keys()
    assert all(torch.equal(delta(found, name), delta(good, name)) for name in good.changes)


def delta(adapter: Adapter, name: str) -> torch.Tensor:
    return adapter.changes[name].delta(torch.zeros(1))


def test_each_case_has_a_name_of_its_own() -> None:
    assert len({case.what for case in [*CASES, *NAMES]}) == len(CASES) + len(NAMES) >= 200


@pytest.mark.parametrize("case", LATE, ids=lambda case: case.what)
def test_what_shows_in_the_fold_alone(case: Case, folder: Path, base: Base, target: Target) -> None:
    case.edit(folder)
    if "DoRA" in case.what:
        tensors(lambda found: lengths(found, base))(folder)
    adapter = match_adapter(read_adapter(str(folder)), target)
    recipe = Recipe(base_model=base.uri, adapters=(AdapterSpec(path=str(folder)),))
    with pytest.raises(case.error, match=case.says):
        fold_members(base, recipe, [adapter], None)


def lengths(found: Tensors, base: Base) -> Tensors:
    """DoRA's magnitudes as they are before training: the lengths of the base's own rows."""
    weights = dict(load_headless(base.folder, base.uri).named_parameters())
    modules = {name.removesuffix(".lora_B.weight") for name in found if name.endswith(".lora_B.weight")}
    own = {module: weights[f"{module.removeprefix(BODY)}.weight"].detach() for module in modules}
    return found | {f"{module}.lora_magnitude_vector": weight.norm(dim=1) for module, weight in own.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_folded_as_it_was_saved(folder: Path, target: Target, dtype: torch.dtype) -> None:
    mapped(lambda tensor: tensor.to(dtype))(folder)
    adapter, saved = match_adapter(read_adapter(str(folder)), target), load_file(folder / WEIGHTS_NAME)
    expected = 2.0 * (saved[B].double() @ saved[A].double())
    assert torch.equal(delta(adapter, "encoder.layer.0.attention.q_proj.weight"), expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 768, "num_attention_heads": 12}, "48 of the 48 weights that it changes match no weight of other"),
        ({"num_hidden_layers": 6}, "24 of the 48 weights that it changes match no weight of other"),
        ({"num_hidden_layers": 13}, r"has no tensors for encoder\.layer\.12\.attention\.q_proj"),
        ({"model_type": "vit"}, "48 of the 48 weights that it changes match no weight of other"),
    ],
)
def test_another_base_is_refused(folder: Path, base: Base, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    own = json.loads((base.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(own | changes))
    other = target_of(Base(uri="other", folder=tmp_path, content_hash=""))
    with pytest.raises(AdapterMismatch, match=says):
        match_adapter(read_adapter(str(folder)), other)


def test_a_copy_is_the_same_adapter(folder: Path, base: Base, real_adapters: dict[str, Path]) -> None:
    specs = (AdapterSpec(path=str(real_adapters["category10"])), AdapterSpec(path=str(folder), weight=0.5))
    with pytest.raises(ConfigError, match=r"is the same adapter as .*category10. Name it once, with the sum of weights"):
        gather(Recipe(base_model=base.uri, adapters=specs))


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may read anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_what_may_not_be_read_is_named(folder: Path, name: str) -> None:
    (folder / name).chmod(0)
    with tempfile.TemporaryDirectory() as place:  # which others may enter
        Path(place).chmod(0o755)
        moved = shutil.move(folder, Path(place) / "ten")
        with ordinary_user(), pytest.raises(StorageError, match=f"{name}: cannot be read .Permission denied"):
            read_adapter(str(moved))
