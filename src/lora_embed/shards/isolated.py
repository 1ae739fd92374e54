"""Read a shard in a child process, or with a time limit by the kernel: a hang or a crash costs only that shard."""

import signal
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, cast

from lora_embed.errors import ShardError
from lora_embed.images.isolate import Child, is_crash
from lora_embed.schema import WHOLE, Layout, Sample, Shard, Span, Wanted
from lora_embed.shards.read import read_samples
from lora_embed.store.store import Store

READ_S = 120.0  # between two samples of a shard, in addition to the time that its store may take
READ_ROOM_BYTES = 8 * 2**30  # for reading a shard: a row group, packed and unpacked, and Arrow's own memory


def read_or_die(shard: Shard, layout: Layout, options: dict[str, Any], wanted: Wanted, span: Span = WHOLE) -> Iterator[Sample]:
    """`read_samples` in this process, which the kernel ends if the next sample takes longer than `READ_S` and `retry_s`."""
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
    """`read_samples` in a child process. Raises ShardError if the child ends, or the next sample takes too long."""
    retry_s = Store(shard.root, options).retry_s
    child = Child("reader")
    try:
        request: tuple[Any, ...] = (READ_ROOM_BYTES, _begin_reading, shard, layout, options, wanted, span)
        while (answer := child.ask(request, READ_S + retry_s)) is not None:
            if isinstance(answer, Sample):
                yield answer
            elif is_crash(answer):
                raise ShardError(
                    f"{shard.root}/{shard.name}: cannot be read: {answer}. Write the file again; nothing of it is published."
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
