"""What the chain is given to do: shards, and which of their chunks are committed already."""

from dataclasses import dataclass

from lora_embed.schema import Shard
from lora_embed.store.store import Store


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """A shard to embed: all of it but the chunks that are committed already, or its first samples in a trial run."""

    shard: Shard
    done: frozenset[int] = frozenset()
    limit: int | None = None
    staged: "Staged | None" = None  # None: reading begins at the shard's start, whatever is done


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Where the parts of a shard's committed chunks are, and the number of its last chunk, once its end was proven."""

    store: Store
    space_id: str
    last: int | None


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one worker is given at once: one large work item, or several small ones."""

    items: tuple[WorkItem, ...]
