"""Run the chain on a Ray cluster: waves of blocks, three stages, and tasks for verification and compaction."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import ray
import ray.data
import ray.data.exceptions
import ray.exceptions

from lora_embed.chain.actors import EmbedImages, EmbedShards, VectorChunk, WriteParts
from lora_embed.chain.chunks import decode_blocks
from lora_embed.chain.cluster import MAX_RETRIES, Topology
from lora_embed.chain.device import Device, inspect_device
from lora_embed.chain.items import Block, Pass, WorkItem
from lora_embed.chain.ray_private import map_rows, was_tried_before
from lora_embed.errors import IncompleteRun, LoraEmbedError, WorkersLost, carried_error
from lora_embed.schema import ChunkHead

WAVE, BLOCKS_IN_WAVE = 2000, 32  # blocks in one Dataset: at least, and per reader; each Dataset starts new actors
BLOCK_BYTES, BLOCK_ITEMS = 32 * 2**20, 64  # limits of a block into which small shards are grouped
BLOCKS_PER_READER = 8  # at least, if there are enough shards, so that readers finish at about the same time
R = TypeVar("R")


def embed_items(items: list[WorkItem], shared: Pass, topology: Topology) -> Iterator[ChunkHead]:
    """Embed work items and commit their parts; yields the head of each chunk with its counts or its error.

    Raises EncoderError if an actor does not reproduce the golden vectors, WorkersLost if Ray gives up.
    """
    for row in _run_chain(items, shared, topology):
        yield ChunkHead.from_json(row["head"])


def embed_with_each(items: list[WorkItem], shared: Pass, topology: Topology) -> Iterator[VectorChunk]:
    """Read and decode work items once, and embed each image with every encoder of the pass; yields the vectors.

    Raises as `embed_items` does.
    """
    for row in _run_chain(items, shared, topology):
        yield VectorChunk.from_row(row)


def _run_chain(items: list[WorkItem], shared: Pass, topology: Topology) -> Iterator[dict[str, Any]]:
    """The chain, in waves: blocks of work items → decoded chunks → vectors → committed parts (if the pass writes parts).

    One row is one chunk and is passed on alone (`batch_size=1`), so that chunks stay whole and inside one shard.
    """
    decode_arguments = (shared.layout, shared.prepare, shared.input_options, was_tried_before)
    for blocks in _waves(items, topology.workers.readers):
        rows = ray.data.from_items([{"block": block} for block in blocks], override_num_blocks=len(blocks))
        if topology.decode is None:
            actor_arguments = (shared, topology.kind, was_tried_before)
            rows = map_rows(rows, EmbedShards, fn_constructor_args=actor_arguments, **topology.embed)
        else:
            rows = map_rows(rows, decode_blocks, fn_args=decode_arguments, **topology.decode)
            rows = map_rows(rows, EmbedImages, fn_constructor_args=(shared, topology.kind), **topology.embed)
            if shared.writes_parts:
                rows = map_rows(rows, WriteParts, fn_constructor_args=(shared,), **topology.write)
        with _package_errors():
            yield from rows.iter_rows()


def _waves(items: list[WorkItem], readers: int) -> Iterator[list[Block]]:
    blocks, wave = plan_blocks(items, readers), max(WAVE, BLOCKS_IN_WAVE * readers)
    return (blocks[start : start + wave] for start in range(0, len(blocks), wave))


def plan_blocks(items: list[WorkItem], readers: int) -> list[Block]:
    """Make blocks of one large item or several small ones, in order, but enough blocks to keep all readers busy."""
    most = max(1, min(BLOCK_ITEMS, len(items) // (readers * BLOCKS_PER_READER)))
    blocks: list[list[WorkItem]] = []
    size = 0
    for item in items:
        if not blocks or len(blocks[-1]) >= most or size + item.shard.size > BLOCK_BYTES:
            blocks.append([])
            size = 0
        blocks[-1].append(item)
        size += item.shard.size
    return [Block(items=tuple(block)) for block in blocks]


def ask_device(topology: Topology) -> Device:
    """Inspect, in a Ray task, the kind of device that actors will get."""
    device: Device = ray.get(ray.remote(inspect_device).options(**topology.device).remote(topology.kind))
    return device


def map_tasks(
    task: Callable[..., R], shared: tuple[Any, ...], arguments: list[Any], *, each_has: int = 1, here: bool = False
) -> list[R]:
    """Call `task(*shared, argument)` for each argument, in Ray tasks of `each_has` arguments each; results are in order.

    A bounded number of tasks runs at a time. With `here`, everything runs in this process, because starting a worker takes
    seconds.
    """

    # A local function with types of no module of ours, so that a worker does not import this module and torch.
    def do(group: list[Any]) -> list[Any]:
        return [task(*shared, argument) for argument in group]

    if here:
        return do(arguments)
    groups = [arguments[start : start + each_has] for start in range(0, len(arguments), each_has)]
    remote: Any = ray.remote(do).options(num_cpus=1, max_retries=MAX_RETRIES)
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    results: dict[int, list[R]] = {}
    pending: dict[Any, int] = {}
    queue = iter(enumerate(groups))
    with _package_errors():
        while len(results) < len(groups):
            while len(pending) < most and (following := next(queue, None)) is not None:
                pending[remote.remote(following[1])] = following[0]
            ready, _ = ray.wait(list(pending))
            for reference in ready:
                results[pending.pop(reference)] = ray.get(reference)
    return [result for number in range(len(groups)) for result in results[number]]


@contextlib.contextmanager
def _package_errors() -> Iterator[None]:
    """Raise an error of this package without Ray's wrapper; any other error of Ray ends the run with its cause."""
    try:
        yield
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        package_error = _find_package_error(error)
        if package_error is not None:
            raise package_error from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if isinstance(error, ray.exceptions.OutOfMemoryError):  # its last line is an address
            lines = ["a node ran low on memory, so Ray ended workers there: use fewer actors, smaller chunks or larger nodes"]
        # Another attempt would raise the same exception, or again make no progress for half an hour.
        is_final = isinstance(error, ray.exceptions.RayTaskError | ray.data.exceptions.ExecutionTimeoutError)
        if isinstance(error, ray.data.exceptions.ExecutionTimeoutError):
            lines = ["no worker has finished a chunk for too long; check that the cluster has nodes and that they respond"]
        kind = IncompleteRun if is_final else WorkersLost
        raise kind(
            f"Ray gave up the run: {lines[-1][:300]}. What was embedded is kept. Run the same command again to continue."
        ) from error


def _find_package_error(error: BaseException | None) -> LoraEmbedError | None:
    """The error of this package that was raised in a task, or restored from the text of an actor's constructor's error."""
    cause = getattr(error, "cause", None)  # first, since Ray's error also has the cause's class, but a traceback for text
    if isinstance(cause, LoraEmbedError):
        return cause
    if error is None or isinstance(error, LoraEmbedError):
        return error
    return carried_error(str(error)) or _find_package_error(error.__cause__)
