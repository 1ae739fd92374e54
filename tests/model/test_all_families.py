"""Every model type of transformers for images, as docs/families.md lists it: right against PEFT's forward, or refused."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

import families
from families import Row, measure, row_of
from family_page import BEGIN, DOCS, image_types
from family_specs import CLASSIFIED, SPECS, Form, Spec
from short import slow_but

# One type of each kind, with a pooling that reads it wrong if the kind is not known.
KINDS = {
    "a map with channels last": ("sam_vision_model", "mean"),
    "a map, and last_hidden_state of another form": ("swin2sr", "last_mean"),
    "tokens behind the patches": ("yolos", "patch_mean"),
    "a class token that joins in a later stage": ("pvt", "patch_mean"),
    "no last_hidden_state": ("hgnet_v2", "mean"),
    "older names of all weights, below a prefix": ("segformer", "mean"),
    "BatchNorm": ("resnet", "mean"),
    "a class that changes its configuration": ("levit", "mean"),
    "read as a ViT": ("vit_mae", "cls"),
    "read as CLIP": ("metaclip_2", "patch_mean"),
    "the images' part of a language model": ("llava", "patch_mean"),
    "registers": ("dinov3_vit", "patch_mean"),
    "tokens that are the pixels of a map, and their mean": ("dinov3_convnext", "last_patch_mean"),
}
PREFIXED = 1  # a seed of which the base's weights lie under a prefix


@pytest.mark.parametrize(
    "kind", slow_but(KINDS, ["registers", "tokens that are the pixels of a map, and their mean"].__contains__)
)
def test_a_type_of_each_kind_gives_the_vectors_of_peft(kind: str, tmp_path: Path) -> None:
    name, pooling = KINDS[kind]
    row = Row(name, SPECS[name])
    measure(row, PREFIXED, [(pooling, "both")], tmp_path)
    assert not row.problems
    assert not row.refused
    assert row.figures[pooling] <= families.BOUND
    assert row.effect >= families.LEAST


@pytest.mark.slow
def test_a_convolution_that_changes_its_weight_is_refused(tmp_path: Path) -> None:
    row = Row("bit", SPECS["bit"])
    measure(row, 0, [("mean", "both")], tmp_path)
    assert "WeightStandardizedConv2d, which may change a weight" in row.refused["mean"]
    assert not row.figures


@pytest.mark.parametrize(("name", "package"), [("dinat", "natten")])
def test_a_type_that_needs_a_missing_package_is_refused_for_that(name: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    row = Row(name, SPECS[name])
    measure(row, 0, [("mean", "both")], tmp_path)
    message = (
        f"base: is a model of type '{name}', which needs a package that is not installed: .* requires the {package} library"
    )
    assert re.match(message, row.refused["mean"])
    assert row.refused["mean"].endswith(
        "environment. Install natten 0.17.5 or earlier, also on the cluster, or name another base."
    )


@pytest.mark.parametrize(
    ("form", "kind", "expected"),
    [
        (Form("tokens", 1, 1), "mean", 2.0),
        (Form("tokens", 1, 1), "patch_mean", 1.5),
        (Form("tokens", 1, 1), "cls", 0.0),
        (Form("tokens"), "cls", None),
        (None, "mean", None),
    ],
)
def test_what_is_pooled_by_hand(form: Form | None, kind: str, expected: float | None) -> None:
    """Tokens with the values 0 (a class token), 1, 2 (patches) and 5 (behind them)."""
    states: dict[str, torch.Tensor | None] = {"state": torch.tensor([0.0, 1.0, 2.0, 5.0]).view(1, 4, 1), "last": None}
    found = families.pooled_by_hand(states, Spec(config={}, state=form, has_last=False), kind)
    assert (None if found is None else found.item()) == expected


def test_the_page_has_every_family_for_classification() -> None:
    """Fails when transformers gets another one: describe it in campaigns/family_specs.py, and run `make families`."""
    known = {config.model_type for config in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING}
    assert set(CLASSIFIED) == known
    assert known <= set(re.findall(r"^\| ([\w-]+) \|", figures(), flags=re.MULTILINE))


@pytest.mark.long
def test_the_page_has_every_other_type_for_images() -> None:
    page = set(re.findall(r"[\w.-]+", figures()))
    assert {name for name in image_types() if name not in page and f"{name}." not in page} == set()


@pytest.mark.long
@pytest.mark.parametrize("name", SPECS)
def test_every_type_is_right_or_refused_as_the_page_says(name: str) -> None:
    row = row_of(name, repeat=1, first_seed=PREFIXED, hub=False)
    assert not row.problems
    works = re.search(rf"^\| {re.escape(name)} \| [^|]* \| [^|]* \| [^|]* \| [^|]* \| ", figures(), flags=re.MULTILINE)
    assert bool(row.figures) == bool(works)


def figures() -> str:
    return DOCS.read_text(encoding="utf-8").partition(BEGIN)[2]
