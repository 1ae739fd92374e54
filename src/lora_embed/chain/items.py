"""The work that the chain is given: shards, and which of their chunks are already committed."""

from dataclasses import dataclass

from lora_embed.schema import Shard
from lora_embed.store.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """A shard to embed: all chunks that are not yet committed or, in a trial run, its first samples."""

    shard: Shard
    done: frozenset[int] = frozenset()
    limit: int | None = None
    staged: "Staged | None" = None  # None: reading begins at the shard's start


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Where the parts of a shard's committed chunks are, and the number of its last chunk if that is known."""

    store: Store
    space_id: str
    last: int | None


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one worker gets at a time: one large work item, or several small ones."""

    items: tuple[WorkItem, ...]
