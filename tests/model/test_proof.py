"""The proof on file: made from what was saved, by other code, and a merge over the bound is not written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

from lora_embed.config import values
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import AdapterMismatch, EncoderError
from lora_embed.model import build as building
from lora_embed.model import fold as folding
from lora_embed.model import match as matching
from lora_embed.model import member as members
from lora_embed.model import merge
from lora_embed.model.base_files import Base
from lora_embed.model.build import build_encoder
from lora_embed.model.change import LowRank
from lora_embed.model.ingredients import gather
from models import edit_tensors, save_adapter, save_base


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    base = save_base(tmp_path / "base")
    one, two = save_adapter(tmp_path / "one", base, seed=1), save_adapter(tmp_path / "two", base, 27, seed=2, use_rslora=True)
    return Recipe(
        base_model=str(base), adapters=(AdapterSpec(path=str(one), weight=0.7), AdapterSpec(path=str(two), weight=0.3))
    )


def build(recipe: Recipe, out: Path) -> dict[str, object]:
    build_encoder(gather(recipe), out, lambda message: None)
    report: dict[str, object] = json.loads((out / "merge_report.json").read_text())
    return report


@pytest.mark.parametrize("method", sorted(merge.METHODS))
def test_every_method_is_proven_and_its_error_is_what_rounding_leaves(tmp_path: Path, recipe: Recipe, method: str) -> None:
    (member,) = build(recipe.model_copy(update={"merge_method": method}), tmp_path / "encoder")["members"]
    assert len(member["weights"]) == 6
    assert all(0 < weight["error"] < 1e-6 for weight in member["weights"].values())
    assert member["largest_error_beyond_rounding"] == 0


def test_a_method_without_a_formula_is_not_proven_by_another_one(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge.METHODS, "new", merge.iso_c)
    monkeypatch.setitem(values.MERGE_OPTIONS, "new", {})
    with pytest.raises(NotImplementedError, match="merge method 'new' has no formula"):
        build(recipe.model_copy(update={"merge_method": "new"}), tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def broken_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = matching._scale
    monkeypatch.setattr(matching, "_scale", lambda *arguments: right(*arguments) * 1.001)


def broken_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    right = merge.weighted_sum
    swapped = lambda parts, before: right([replace(p, weight=1 - p.weight) for p in parts], before)  # noqa: E731
    monkeypatch.setitem(merge.METHODS, "weighted_sum", swapped)


def broken_file(part: str) -> Callable[[pytest.MonkeyPatch], None]:
    """One weight of the saved file, found by a part of its name, is a hundredth larger."""
    right = members.write_member

    def write(member: members.Member, folder: Path, base: Base) -> None:
        right(member, folder, base)
        edit_one(folder / "model.safetensors", part, 1.01)

    return lambda monkeypatch: monkeypatch.setattr(building, "write_member", write)


def broken_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = folding.merge.merge
    monkeypatch.setattr(
        folding.merge, "merge", lambda *arguments: ((name, delta.bfloat16().double()) for name, delta in right(*arguments))
    )


def broken_method(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """What a method calls does a thousandth or more of it wrong: PEFT's functions, or torch's decomposition as it is used."""

    def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
        if hasattr(merge_utils, name):
            right = getattr(merge_utils, name)
            wrong = lambda tensor, *rest, **named: right(tensor * 1.02, *rest, **named)  # noqa: E731
            monkeypatch.setattr(merge_utils, name, wrong if name != "calculate_majority_sign_mask" else inverted)
        else:
            right = getattr(merge, name)
            monkeypatch.setattr(merge, name, lambda *arguments: max(1, right(*arguments) - 1))

    inverted = lambda tensor, method: tensor.sign() == torch.where(tensor.sum(dim=0) >= 0, -1, 1)  # noqa: E731
    return breaks


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("ties", "prune"), ("ties", "calculate_majority_sign_mask"), ("ties", "disjoint_merge"), ("dare_linear", "prune"),
        ("dare_ties", "disjoint_merge"), ("magnitude_prune", "prune"), ("svd", "_rank_of"), ("iso_c", "_rank_of"),
    ],
)  # fmt: skip
def test_a_method_that_goes_wrong_is_seen_whichever_it_is(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, method: str, broken: str
) -> None:
    broken_method(broken)(monkeypatch)
    with pytest.raises(EncoderError, match="differs from the one recomputed from the adapter files"):
        build(recipe.model_copy(update={"merge_method": method}), tmp_path / "encoder")


def test_equal_entries_and_options_are_proven(tmp_path: Path) -> None:
    """Of an adapter whose entries are all alike a method may keep any; the proof knows which."""
    base = save_base(tmp_path / "base")
    alike = save_adapter(tmp_path / "alike", base, seed=1)
    edit_tensors(alike, lambda tensors: {n: torch.full_like(t, 0.01) for n, t in tensors.items()})
    two = save_adapter(tmp_path / "two", base, 27, seed=2)
    specs = (AdapterSpec(path=str(alike), weight=0.6), AdapterSpec(path=str(two), weight=-0.4))
    options: dict[str, dict[str, object]] = {
        "ties": {"density": 0.3, "majority_sign": "frequency"}, "dare_ties": {"density": 1.0}, "dare_linear": {"seed": 9},
        "magnitude_prune": {"density": 0.01}, "svd": {"rank": 3, "energy": 0.99},
    }  # fmt: skip
    for method, given in options.items():
        made = Recipe(base_model=str(base), adapters=specs, merge_method=method, merge_options=given)
        (member,) = build(made, tmp_path / method)["members"]
        assert all(weight["error"] < 1e-6 for weight in member["weights"].values()), method


def edit_one(path: Path, part: str, factor: float) -> None:
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if part in name)
    save_file(tensors | {name: tensors[name] * factor}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (broken_scale, "differs from the one recomputed from the adapter files by 1.*e-03 of its norm"),
        (broken_weights, "differs from the one recomputed"),
        (broken_file("value.weight"), "differs from the one recomputed"),
        (broken_file("layernorm"), "differs from its base in weights that no adapter changes"),
        (broken_rounding, "differs from the one recomputed"),
    ],
)
def test_a_merge_that_went_wrong_is_not_written(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, breaks: Callable[[pytest.MonkeyPatch], None], message: str
) -> None:
    breaks(monkeypatch)
    with pytest.raises(EncoderError, match=message):
        build(recipe, tmp_path / "out" / "encoder")
    assert not (tmp_path / "out").exists()


def test_the_report_says_how_the_adapters_lie_to_each_other(tmp_path: Path, recipe: Recipe) -> None:
    (member,) = build(recipe, tmp_path / "encoder")["members"]
    adapters = building.match_adapters(gather(recipe))
    deltas = [
        np.concatenate([(weight * adapter.changes[name].delta(None)).numpy().ravel() for name in sorted(adapter.changes)])
        for adapter, weight in zip(adapters, (0.7, 0.3), strict=True)
    ]
    one, two = deltas
    relations = member["relations"]
    assert relations["cosine"][0][1] == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-5)
    assert relations["sign_conflicts"][0][1] == pytest.approx(float((np.sign(one) != np.sign(two)).mean()), abs=1e-5)
    overlaps = []
    for name in adapters[0].changes:
        bases = [np.linalg.qr(adapter.changes[name].up.double().numpy())[0] for adapter in adapters]
        overlaps.append((np.linalg.svd(bases[0].T @ bases[1], compute_uv=False) ** 2).mean())
    assert relations["subspace_overlap"][0][1] == pytest.approx(float(np.mean(overlaps)), abs=1e-5)
    assert [adapter["norm"] for adapter in member["adapters"]] == pytest.approx([np.linalg.norm(d) for d in deltas], rel=1e-5)
    assert all(isinstance(change, LowRank) for adapter in adapters for change in adapter.changes.values())


def test_the_page_says_what_the_report_says(tmp_path: Path, recipe: Recipe) -> None:
    report = build(recipe, tmp_path / "encoder")
    page = (tmp_path / "encoder" / "README.md").read_text()
    assert "6 weights changed" in page
    assert all(f"`{adapter.path}` | {adapter.weight} |" in page for adapter in recipe.adapters)
    (member,) = report["members"]
    assert f"| 1, 2 | {member['relations']['cosine'][0][1]:.3f} |" in page
    assert all(name in page for name in member["weights"])
    assert all(file["sha256"] in page for file in report["files"].values())


def test_a_change_that_rounding_alone_would_make_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    untrained = save_adapter(tmp_path / "dora", base, use_dora=True, init_lora_weights=True)
    with pytest.raises(AdapterMismatch, match="changes the base by less than float32 rounding"):
        build(Recipe(base_model=str(base), adapters=(AdapterSpec(path=str(untrained)),)), tmp_path / "encoder")
    faint = save_adapter(tmp_path / "faint", base, seed=3)
    edit_tensors(faint, lambda tensors: {n: t * 1e-8 if "lora_B" in n else t for n, t in tensors.items()})
    with pytest.raises(AdapterMismatch, match="changes the base by less than float32 rounding"):
        build(Recipe(base_model=str(base), adapters=(AdapterSpec(path=str(faint)),)), tmp_path / "encoder")


def test_another_base_by_name_and_another_processor_are_noted(tmp_path: Path, recipe: Recipe) -> None:
    adapter = Path(recipe.adapters[0].path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "google/vit-large"}))
    processor = json.loads((Path(recipe.base_model) / "preprocessor_config.json").read_text())
    (adapter / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.1, 0.2, 0.3]}))
    notes: list[str] = []
    build_encoder(gather(recipe), tmp_path / "encoder", notes.append)
    said = [note for note in notes if note.startswith("note: ")]
    assert "trained on google/vit-large, but are merged into" in said[0]
    assert "prepares images in another way than the base's" in said[1]
    assert json.loads((tmp_path / "encoder" / "merge_report.json").read_text())["notes"] == [
        s.removeprefix("note: ") for s in said
    ]
    assert torch.get_num_threads() == 1
