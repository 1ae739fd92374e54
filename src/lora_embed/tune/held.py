"""Judge encoders on the images that the search did not use, and check that the built winner has the same vectors."""

import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_embed.config.models import Recipe
from lora_embed.errors import EncoderError
from lora_embed.evaluate.figures import BANK_SHARE, cka_relations, tasks_of
from lora_embed.evaluate.records import Candidate, Evaluation, Relation, Trial
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from lora_embed.model.refold import BATCH, Refolder
from lora_embed.model.relate import relate_adapters
from lora_embed.monitor.progress import say
from lora_embed.text import utc
from lora_embed.tune.goal import Search
from lora_embed.tune.holdout import Splits, differences_of, figures_of, refuse_thin
from lora_embed.tune.labelled import LabelledImages

FINAL_SPLITS = 5
PROVEN = 64  # images for which the built winner must give the same vectors as in the search
TUNED, EQUAL, BASE, BEST = "tuned", "equal", "base", "best tried"
Rows = NDArray[np.int64]


class Held:
    """Embeds the held-back images with one encoder after another, and makes their evaluation."""

    def __init__(self, search: Search, refolder: Refolder, images: LabelledImages, rows: Rows) -> None:
        self._search, self._refolder, self._images, self._rows = search, refolder, images, rows
        self._splits = Splits.of([images.names[row] for row in rows], FINAL_SPLITS, search.seed)
        self._labels = {task: labels[rows] for task, labels in images.labels.items()}
        refuse_thin(self._labels, self._splits, "held back")
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._candidates: dict[str, Candidate] = {}

    @property
    def count(self) -> int:
        """Number of images held back."""
        return len(self._rows)

    def add(self, name: str, recipe: Recipe) -> None:
        """Embed the images with a recipe's encoder."""
        started = time.perf_counter()
        self._refolder.fold(recipe)
        space_id, folded = self._refolder.space_id(), time.perf_counter()
        twin = next((candidate.name for candidate in self._candidates.values() if candidate.space_id == space_id), None)
        if twin is None:
            self._vectors[name] = self._refolder.embed(self._images.pixels, self._rows)
        else:
            self._vectors[name] = self._vectors[twin]
        self._candidates[name] = Candidate(
            name=name,
            method=recipe.merge_method,
            weights={adapter: spec.weight for adapter, spec in zip(recipe.adapter_names, recipe.adapters, strict=True)},
            options=recipe.merge_options,
            recipe_id=self._refolder.identify(recipe),
            space_id=space_id,
            dimension=self._vectors[name].shape[1],
            build_s=folded - started,
            encoder_bytes=self._refolder.encoder_bytes,
            forward_s=time.perf_counter() - folded,
        )
        say(f"held back, {name}: {self._candidates[name].forward_s:.1f} s")

    def prove(self, recipe: Recipe) -> None:
        """Build the winner from its recipe. Raises EncoderError if its vectors differ from those in the search."""
        device = self._refolder.encoder.device.type
        with tempfile.TemporaryDirectory(dir=self._search.work_folder) as scratch:
            description = build_encoder(gather(recipe), Path(scratch) / "encoder", lambda line: None)
            built = load_encoder(Path(scratch) / "encoder", device=device, batch_size=BATCH[device])
            vectors = built.embed_pixels(self._images.pixels[self._rows[:PROVEN]])
        expected = self._vectors[TUNED][:PROVEN]
        if description.space_id != self._candidates[TUNED].space_id or not np.array_equal(vectors, expected):
            raise EncoderError(
                f"the built winner is of space {description.space_id} and its vectors differ by up to "
                f"{np.abs(vectors - expected).max():.2g}, expected space {self._candidates[TUNED].space_id} and the same "
                "vectors as in the search. This is a bug: please report it with the recipe."
            )

    def evaluation(self, trials: tuple[Trial, ...], own: dict[str, str], seconds: dict[str, float]) -> Evaluation:
        """The evaluation of all encoders that were added."""
        order = [BASE, *(name for name in self._vectors if name not in (BASE, EQUAL, BEST, TUNED)), EQUAL, BEST, TUNED]
        spaces = {name: self._vectors[name] for name in order}
        figures = figures_of(spaces, self._labels, self._splits)
        pairs = [(name, EQUAL) for name in order if name != EQUAL]
        pairs += [(TUNED, name) for name in order if name not in (EQUAL, TUNED)]
        images = self._images
        return Evaluation(
            created=utc(),
            inputs=self._search.inputs,
            samples=images.samples,
            decoded=len(images.ids),
            rejects=images.rejects,
            seconds=seconds,
            splits=FINAL_SPLITS,
            bank_share=BANK_SHARE,
            seed=self._search.seed,
            tasks=tasks_of(images.classes, self._labels),
            candidates=tuple(self._candidates[name] for name in order),
            reference=EQUAL,
            figures=figures,
            differences=differences_of(figures, pairs),
            relations=_relations(self._refolder, self._search.recipe)
            + cka_relations({name: spaces[name] for name in order[:-3]}),
            trials=trials,
        )


def _relations(refolder: Refolder, recipe: Recipe) -> tuple[Relation, ...]:
    """How similar the adapters' weights are, over all layers and in each."""
    called = dict(zip((spec.path for spec in recipe.adapters), recipe.adapter_names, strict=True))
    names = [called[path] for path in refolder.adapters]
    return tuple(
        Relation(kind=kind, one=names[first], other=names[second], layer=layer, value=value)
        for kind, first, second, layer, value in relate_adapters(refolder.ingredients.base, list(refolder.adapters.values()))
    )
