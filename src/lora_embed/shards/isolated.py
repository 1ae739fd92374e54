"""Reading a shard in a child process, or in a process that the kernel ends: what hangs or crashes costs that shard alone."""

import signal
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, cast

from lora_embed.errors import ShardError
from lora_embed.images.isolate import Child, is_crash
from lora_embed.schema import WHOLE, Layout, Sample, Shard, Span, Wanted
from lora_embed.shards.read import read_samples
from lora_embed.store.store import Store

READ_S = 120.0  # from one sample of a shard to the next, beyond what its store is waited for
READ_ROOM_BYTES = 8 * 2**30  # for reading a shard: its row group, what that unpacks to, and Arrow's own


def read_or_die(shard: Shard, layout: Layout, options: dict[str, Any], wanted: Wanted, span: Span = WHOLE) -> Iterator[Sample]:
    """`read_samples`, whose process the kernel ends where a sample does not come in `READ_S` and the store's own patience."""
    limit_s = READ_S + Store(shard.root, options).retry_s
    with closing(cast(Generator[Sample], read_samples(shard, layout, options, wanted, span))) as samples:
        while True:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            try:
                sample = next(samples, None)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if sample is None:
                return
            yield sample


def read_isolated(
    shard: Shard, layout: Layout, options: dict[str, Any], wanted: Wanted, span: Span = WHOLE
) -> Iterator[Sample]:
    """`read_samples` in a child of its own. What ends the child, or leaves it without a sample for so long, is a ShardError."""
    patience_s = Store(shard.root, options).retry_s
    child = Child("reader")
    try:
        request: tuple[Any, ...] = (READ_ROOM_BYTES, _begin_reading, shard, layout, options, wanted, span)
        while (answer := child.ask(request, READ_S + patience_s)) is not None:
            if isinstance(answer, Sample):
                yield answer
            elif is_crash(answer):
                raise ShardError(
                    f"{shard.root}/{shard.name}: cannot be read, {answer}. Write it anew; none of it is published."
                )
            else:
                raise answer
            request = (0, _next_sample)
    finally:
        child.end()


_reading: Iterator[Sample] = iter(())  # in the child


def _begin_reading(*arguments: Any) -> Sample | None:
    global _reading
    _reading = read_samples(*arguments)
    return _next_sample()


def _next_sample() -> Sample | None:
    return next(_reading, None)
