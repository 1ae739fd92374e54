"""Notes of a build on its adapters: what their files do not hold, and what was left out of their names."""

from collections.abc import Iterator, Sequence

from lora_embed.model.adapter import CONFIG_NAME, first_names
from lora_embed.model.base_files import Base
from lora_embed.model.files import ADAPTER_WEIGHTS
from lora_embed.model.match import Adapter
from lora_embed.text import number_of


def remarks(base: Base, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Each note as a sentence without a full stop."""
    places = {adapter.saved.folder.resolve() for adapter in adapters}
    is_named = base.folder.resolve() in places or base.uri.rstrip("/") in {adapter.uri.rstrip("/") for adapter in adapters}
    if (base.folder / ADAPTER_WEIGHTS).is_file() and not is_named:
        yield (
            f"the folder of {base.uri} also holds an adapter, which transformers applies when it opens the base there; it is "
            "not part of this encoder. Name that folder under adapters if you want it"
        )
    for adapter in adapters:
        if adapter.left_out:
            yield (
                f"{adapter.uri}: {first_names([repr(part) for part in adapter.left_out])} was left out of the names of its "
                "tensors. It was trained on a model around the base, or on a wrapped one; without that, all names match"
            )
        if adapter.untargeted:
            yield (
                f"{adapter.uri}: holds tensors for {number_of(len(adapter.untargeted), 'module')} that {CONFIG_NAME} does not "
                f"target ({first_names(list(adapter.untargeted), 1)}). PEFT passes over them when it loads the adapter; "
                "here they are folded. If that is not meant, save the adapter again"
            )
        if adapter.lost_statistics:
            yield (
                f"{adapter.uri}: does not hold the running statistics of "
                f"{number_of(len(adapter.lost_statistics), 'batch normalisation')} "
                f"({first_names(list(adapter.lost_statistics), 1)}), so the base's are used. If these layers were in training "
                "mode, their statistics moved, PEFT did not save them, and the encoder differs from the trained model. Train "
                "with these layers in eval mode, or name them in modules_to_save"
            )
