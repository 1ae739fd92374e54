"""Updates of a real encoder on real images: good ones pass the gates, those that were broken on purpose do not."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from test_checks import LIMITS, failed, figures, health

from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.demo.parts import LabelledImage
from lora_embed.gates import checks
from lora_embed.model.build import build_encoder
from lora_embed.model.description import read_description
from lora_embed.model.encoder import Encoder, load_encoder, load_members
from lora_embed.model.ingredients import gather
from lora_embed.vectors.health import seeded_sample
from models import save_base

Change = Callable[[torch.nn.Module], object]
PATCHES = "embeddings.patch_embeddings.projection.weight"


def altered(folder: Path, change: Change = lambda model: None, **preprocessing: tuple[float, ...]) -> Encoder:
    """An encoder whose weights, or what it does to pixels, were changed in memory."""
    description = read_description(folder)
    models = load_members(folder, description, str(folder))
    with torch.no_grad():
        change(models[0])
    description = replace(description, preprocessing=replace(description.preprocessing, **preprocessing))
    return Encoder(models, description, device="cpu", precision="float32", batch_size=16)


def test_a_tiny_encoder_that_collapses_is_stopped(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    build_encoder(gather(Recipe(base_model=str(base), merge_method="none")), tmp_path / "encoder", lambda line: None)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(100)]
    before = load_encoder(tmp_path / "encoder").embed(images)
    assert failed(health(before, before)) == set()
    blind = altered(tmp_path / "encoder", lambda model: model.get_parameter(PATCHES).zero_())
    assert {"collapsed", "spread", "constant", "duplicates"} == failed(health(blind.embed(images), before))


@dataclass(frozen=True, kw_only=True)
class Real:
    """A sample of real images, and an encoder of the demo's adapters at half weight each, as published before."""

    images: list[LabelledImage]
    folder: Path
    before: NDArray[np.float32]

    def judged(self, encoder: Encoder) -> set[str]:
        """Gates that fail when the encoder is to replace the one before."""
        vectors = encoder.embed([Image.open(image.path) for image in self.images])
        ids = [image.key for image in self.images]
        found = checks.compare(ids, self.before, vectors, [image.category for image in self.images])
        assert found is not None
        was = read_description(self.folder).preprocessing
        arithmetic = checks.processor(asdict(was), asdict(encoder.description.preprocessing))
        measured = checks.health_gates(figures(vectors), figures(self.before), same_space=False, limits=LIMITS)
        return failed({gate.name: gate for gate in [*measured, *checks.comparison_gates(found, LIMITS), arithmetic]})


def built(base: Path, adapters: dict[Path, float], out: Path) -> Path:
    specs = tuple(AdapterSpec(path=str(path), weight=weight) for path, weight in adapters.items())
    build_encoder(gather(Recipe(base_model=str(base), adapters=specs, image_size=56)), out, lambda line: None)
    return out


@pytest.fixture(scope="module")
def real(
    base_model: Path, real_adapters: dict[str, Path], real_images: list[LabelledImage], tmp_path_factory: pytest.TempPathFactory
) -> Real:
    folder = tmp_path_factory.mktemp("gates") / "before"
    built(base_model, dict.fromkeys(real_adapters.values(), 0.5), folder)
    chosen = set(seeded_sample([image.key for image in real_images if image.split == "test"], 160))
    images = [image for image in real_images if image.key in chosen]
    return Real(images=images, folder=folder, before=load_encoder(folder).embed([Image.open(image.path) for image in images]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "expected"),
    [((1.0, 1.0), set()), ((20.0, 0.5), {"collapsed", "spread", "neighbours", "accuracy"})],
)
def test_real_adapters_at_other_weights(
    real: Real, base_model: Path, real_adapters: dict[str, Path], tmp_path: Path, weights: tuple[float, ...], expected: set[str]
) -> None:
    """At 1/1 it is a good update, at weight 20 it is not."""
    update = built(base_model, dict(zip(real_adapters.values(), weights, strict=True)), tmp_path / "encoder")
    assert real.judged(load_encoder(update)) == expected


def test_a_real_encoder_that_collapses_is_stopped(real: Real) -> None:
    """A constant that drowns everything, and pixels that hardly count; neither gives a value that is not finite."""
    drowned = altered(real.folder, lambda model: model.get_parameter("encoder.layer.11.mlp.fc2.bias").add_(100))
    assert "spread" in real.judged(drowned)
    faint = altered(real.folder, lambda model: model.get_parameter(PATCHES).mul_(0.01))
    assert {"spread", "collapsed", "neighbours", "accuracy"} <= real.judged(faint)


def test_a_wrong_processor_is_stopped_by_what_it_says_where_vectors_do_not_tell(real: Real) -> None:
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    negative = tuple(-one / other for one, other in zip(deviation, mean, strict=True))
    swapped = altered(real.folder, multiply=tuple(1 / 255 / value for value in mean), add=negative)
    assert real.judged(swapped) == {"processor"}
    not_rescaled = altered(real.folder, multiply=tuple(1 / value for value in deviation))
    assert {"processor", "neighbours", "accuracy"} <= real.judged(not_rescaled)
