"""One model in memory that becomes the encoder of one recipe after another, so that a search over recipes is cheap."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from lora_embed.config.models import Recipe
from lora_embed.images.preprocess import Pixels
from lora_embed.model import merge
from lora_embed.model.build import match_adapters, one_thread, open_base
from lora_embed.model.encoder import Encoder
from lora_embed.model.fold import Merge, fold
from lora_embed.model.ingredients import Ingredients, with_recipe
from lora_embed.model.space import space_id_of
from lora_embed.model.weights import weights_of

BLOCK = 1024  # images that are copied from a mapped file at a time
# Images a second of a ViT-S/14 at 56 pixels, 2 cores: 153 on two threads, 157 to 167 in batches of 64 to 128, 179 by two
# processes of one thread. The last 7 % are not worth a second model and a copy of the weights for each trial.
BATCH = {"cpu": 64, "cuda": 256}


class Refolder:
    """A base with its matched adapters, which can be folded again for each recipe of these adapters.

    It folds with the code of a build, each time into the base's own weights, so its vectors equal those of a built encoder.
    """

    def __init__(self, ingredients: Ingredients, device: str) -> None:
        self.ingredients = ingredients
        self.adapters = {adapter.uri: adapter for adapter in match_adapters(ingredients)}  # by the path in the recipe
        self._model, description = open_base(ingredients)
        self._weights = {name: parameter.data for name, parameter in weights_of(self._model).items()}
        self._encoder = Encoder([self._model], description, device=device, precision="float32", batch_size=BATCH[device])

    @property
    def encoder(self) -> Encoder:
        """The encoder of the recipe that was folded last. Its description is that of the base."""
        return self._encoder

    @property
    def encoder_bytes(self) -> int:
        """Size of the encoder's weights in bytes, which is the same after each fold."""
        return sum(weight.nbytes for weight in self._weights.values())

    def identify(self, recipe: Recipe) -> str:
        """The id of a recipe."""
        return with_recipe(self.ingredients, recipe).recipe_id

    @one_thread()
    def fold(self, recipe: Recipe) -> None:
        """Fold a recipe into the model. Raises like `fold.fold` and the methods of `merge`."""
        for name, parameter in weights_of(self._model).items():
            parameter.data = self._weights[name]
        for _ in self._folded(recipe):
            pass
        torch.nn.Module.to(self._model, self._encoder.device)

    def space_id(self) -> str:
        """The space id of the recipe that was folded last. The model must be on the CPU."""
        about = self._encoder.description
        return space_id_of([self._model], about.preprocessing, about.pooling, about.normalize, about.form)

    def embed(self, pixels: Pixels, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows of prepared pixels (n, H, W, 3), which may be a mapped file → float32 (len(rows), d)."""
        blocks = [self._encoder.embed_pixels(pixels[rows[start : start + BLOCK]]) for start in range(0, len(rows), BLOCK)]
        return np.concatenate(blocks) if blocks else np.empty((0, self._encoder.dimension), np.float32)

    def _folded(self, recipe: Recipe) -> Iterator[object]:
        if not recipe.adapters:
            return iter(())
        options = merge.options_of(recipe.merge_method, recipe.merge_options)
        weights = tuple(spec.weight for spec in recipe.adapters)
        adapters = tuple(self.adapters[spec.path] for spec in recipe.adapters)
        merged = Merge(adapters=adapters, weights=weights, method=recipe.merge_method, options=options)
        return fold(self._model, merged)
