"""A recipe's files: its base and adapters, found and hashed. Needs no torch, so a night that builds nothing starts quickly."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_embed.config.models import Recipe
from lora_embed.errors import ConfigError
from lora_embed.model.adapter import SavedAdapter, find_adapter
from lora_embed.model.base_files import Base, find_base

if TYPE_CHECKING:
    from lora_embed.model.fold import Limit

MERGE_VERSION = 2  # part of the recipe id: raise it when the numbers of a merge method change


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """A recipe, with its base and adapters found and hashed. Nothing is built yet."""

    recipe: Recipe
    base: Base
    adapters: tuple[SavedAdapter, ...]

    @cached_property
    def recipe_id(self) -> str:
        """12 hex digits: a hash of contents and options. Moved files and another order of adapters do not change it."""
        return self.recipe_id_with(None)

    def recipe_id_with(self, limit: "Limit | None") -> str:
        """The recipe id of an encoder whose merged change is cut to a limit. Raises ConfigError for wrong merge options."""
        from lora_embed.model.merge import options_of  # imports torch and peft, which takes seconds

        return self._hash(options_of(self.recipe.merge_method, self.recipe.merge_options), limit)

    def possible_ids(self) -> Iterator[str]:
        """The recipe id, possibly after an id that no recipe has.

        First an id from the merge options as they are written, which is the recipe id of methods without options. To
        complete the options of other methods, torch is imported, and everything that is wrong with the files is found.
        """
        yield self._hash(self.recipe.merge_options, None)
        self.check()
        yield self.recipe_id

    def check(self) -> None:
        """Read all tensors of the adapters. Raises AdapterMismatch, and ConfigError for wrong merge options."""
        assert self.recipe_id
        for adapter in self.adapters:
            assert isinstance(adapter.tensors, dict)

    def _hash(self, options: dict[str, Any], limit: "Limit | None") -> str:
        recipe = self.recipe
        weights = [spec.weight for spec in recipe.adapters]
        parts = {
            "base": self.base.content_hash,
            "adapters": sorted([saved.content_hash, weight] for saved, weight in zip(self.adapters, weights, strict=True)),
            "merge": [recipe.merge_method, options, MERGE_VERSION],
            "limit": asdict(limit) if limit else None,
            "pooling": [recipe.pooling, recipe.normalize, recipe.image_size],
        }
        if recipe.decode != "exact":  # otherwise left out, so that recipes keep the ids from before this key existed
            parts["decode"] = recipe.decode
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def find_ingredients(recipe: Recipe) -> Ingredients:
    """Find and hash a recipe's base and adapters. Raises AdapterMismatch, ConfigError, EncoderError or StorageError."""
    base = find_base(recipe.base_model, recipe.revision)
    adapters = tuple(find_adapter(spec.path, spec.revision) for spec in recipe.adapters)
    uri_of_hash: dict[str, str] = {}
    for adapter in adapters:
        if adapter.content_hash in uri_of_hash:
            raise ConfigError(
                f"{adapter.uri}: is the same adapter as {uri_of_hash[adapter.content_hash]}. Name it once, with the "
                "sum of weights."
            )
        uri_of_hash[adapter.content_hash] = adapter.uri
    return Ingredients(recipe=recipe, base=base, adapters=adapters)


def gather(recipe: Recipe) -> Ingredients:
    """`find_ingredients`, with everything read and checked."""
    ingredients = find_ingredients(recipe)
    ingredients.check()
    return ingredients


def with_recipe(ingredients: Ingredients, recipe: Recipe) -> Ingredients:
    """The same base with another recipe, whose adapters were all read before. Raises ConfigError for wrong merge options."""
    by_uri = {saved.uri: saved for saved in ingredients.adapters}
    changed = Ingredients(recipe=recipe, base=ingredients.base, adapters=tuple(by_uri[spec.path] for spec in recipe.adapters))
    assert changed.recipe_id
    return changed
