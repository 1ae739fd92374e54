"""Merge LoRA adapters of a vision model into one encoder and keep its embeddings of millions of images as a table.

The names below are what a notebook or a program needs. Each is imported when it is first used, so that `import lora_embed`
and reading a table load neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_embed.evaluate.assess import assess
    from lora_embed.evaluate.page import plots
    from lora_embed.evaluate.page.evaluation import write_report
    from lora_embed.evaluate.records import Evaluation
    from lora_embed.evaluate.request import Request
    from lora_embed.model.encoder import Encoder, load_encoder
    from lora_embed.search.export import open_index
    from lora_embed.search.search import search_table
    from lora_embed.store.lend import lend
    from lora_embed.table.read import Table, open_table
    from lora_embed.vectors.cka import linear_cka

__all__ = [
    "Encoder", "Evaluation", "Request", "Table", "assess", "lend", "linear_cka", "load_encoder", "open_index", "open_table",
    "plots", "search_table", "write_report",
]  # fmt: skip
_MODULES = {
    "Encoder": "model.encoder",
    "Evaluation": "evaluate.records",
    "Request": "evaluate.request",
    "Table": "table.read",
    "assess": "evaluate.assess",
    "lend": "store.lend",
    "linear_cka": "vectors.cka",
    "load_encoder": "model.encoder",
    "open_index": "search.export",
    "open_table": "table.read",
    "search_table": "search.search",
    "write_report": "evaluate.page.evaluation",
}


def __getattr__(name: str) -> Any:
    """A public name, imported from its module now."""
    if name == "plots":
        return import_module("lora_embed.evaluate.page.plots")
    if name in _MODULES:
        return getattr(import_module(f"lora_embed.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'lora_embed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
