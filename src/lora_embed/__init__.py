"""Merge LoRA adapters of a vision model into one encoder and keep its embeddings of millions of images as a table."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_embed.model.encoder import Encoder, load_encoder
    from lora_embed.table.read import Table, open_table

__all__ = ["Encoder", "Table", "load_encoder", "open_table"]


def __getattr__(name: str) -> Any:
    """Import torch or pyarrow only when an encoder or a table is asked for."""
    if name in ("Encoder", "load_encoder"):
        from lora_embed.model import encoder

        return getattr(encoder, name)
    if name in ("Table", "open_table"):
        from lora_embed.table import read

        return getattr(read, name)
    raise AttributeError(f"module 'lora_embed' has no attribute {name!r}")
