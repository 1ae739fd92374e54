"""A tar → its samples, up to its checked end."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from lora_embed.errors import MAKE_AGAIN, ShardError
from lora_embed.schema import WHOLE, Layout, Sample, Shard, Span, Wanted
from lora_embed.shards.compressed import Unpacked
from lora_embed.shards.kinds import counted_as, kind_by_name
from lora_embed.shards.tar_end import cut_short, is_no_tar, prove_end
from lora_embed.shards.tar_groups import Group, Source, looks_like_image, split_name
from lora_embed.shards.tar_headers import open_headers, read_members
from lora_embed.shards.tar_links import Links

UNKNOWN = 2**63  # bytes: the size of a tar that is unpacked while it is read


def read_tar(file: BinaryIO, shard: Shard, layout: Layout, wanted: Wanted, span: Span = WHOLE) -> Iterator[Sample]:
    """Read WebDataset: consecutive members whose file names are equal up to the first dot are one sample; see `Group`.

    Raises ShardError for a tar that is cut short or has too many headers, and any error of `tarfile` for a damaged one.
    """
    where, size = f"{shard.root}/{shard.name}", shard.size
    if size == 0:
        raise ShardError(f"{where}: has 0 bytes, but even an empty tar has at least 1,024. {MAKE_AGAIN}, or remove it.")
    reading = _Reading(file, where, UNKNOWN if isinstance(file, Unpacked) else size, layout, span)
    try:
        yield from reading.samples(wanted)
    except (tarfile.TarError, EOFError) as error:
        if reading.is_at_begin and (says := is_no_tar(file, where)):
            raise ShardError(says) from None
        raise ShardError(cut_short(where, size, str(error))) from None


class _Reading:
    """One reading of a tar, or of a span of it."""

    def __init__(self, file: BinaryIO, where: str, size: int, layout: Layout, span: Span) -> None:
        self._file, self._where, self._size, self._layout, self._span = file, where, size, layout, span
        self._is_unpacked = size == UNKNOWN  # then no reader can begin within
        self.is_at_begin = not span.begin  # no member was read yet
        self._hidden: dict[str, int] = {}  # images whose names hide them, before the first sample

    def samples(self, wanted: Wanted) -> Iterator[Sample]:
        """The samples of the span; the last ones only when its end was checked."""
        self._file.seek(self._span.begin)
        tar, headers = open_headers(self._file, self._where)
        with tar:
            links = Links(self._file, tar, headers, self._where, self._span.begin)
            source = Source(tar, headers, links, self._layout, self._size)
            group, number, first_hidden = None, self._span.first, ""
            for member in read_members(tar, headers, self._span.end):
                links.note(member)
                key, extension = split_name(member.name)
                if key[-1:] in ("", "/") and member.name[-1:] != "/":  # the name begins with a dot; macOS adds ._name to each
                    if member.isreg() and kind_by_name(member.name) == "images":
                        first_hidden = first_hidden or member.name
                        _count_hidden(member, group.passed if group is not None else self._hidden)
                    continue
                is_of_group = group is not None and group.takes(key, extension)
                if not member.isreg() and not _counts(member, extension, is_of_group):
                    continue
                if group is None or not is_of_group:
                    can_begin = not headers.has_global and not self._is_unpacked  # a reader would miss global headers
                    begin = member.offset if can_begin else None
                    if group is not None:
                        for sample in group.finish(begin):
                            yield sample
                            number += 1
                    group = Group(source, key, begin, number, wanted)
                    self._take_hidden(group)
                group.add(extension, member)
            end = tar.offset
            self._check_end(end)
            if group is not None:
                yield from group.finish(None if self._is_unpacked else end)
            elif first_hidden:
                yield self._all_hidden(first_hidden, end)

    def _take_hidden(self, group: Group) -> None:
        self.is_at_begin = False
        group.passed, self._hidden = self._hidden, {}

    def _all_hidden(self, name: str, end: int) -> Sample:
        """A sample that stands for a tar of hidden images alone, so that it is not taken for an empty one."""
        self._hidden[counted_as(name, is_hidden=True)] -= 1  # which is this sample
        why = "the names of all images in the tar begin with a dot, which hides them. Rename them"
        return Sample(
            name.removeprefix("./"),
            missing=why,
            begin=self._span.begin,
            end=end,
            passed={kind: n for kind, n in self._hidden.items() if n},
        )

    def _check_end(self, end: int) -> None:
        expected = self._span.end
        if expected is None:
            prove_end(self._file, end, None if self._is_unpacked else self._size, self._where)
        elif end != expected:
            raise ShardError(f"{self._where}: damaged tar: its members end at byte {end}, expected {expected}. {MAKE_AGAIN}.")


def _count_hidden(member: tarfile.TarInfo, passed: dict[str, int]) -> None:
    kind = counted_as(member.name, is_hidden=True)
    passed[kind] = passed.get(kind, 0) + 1


def _counts(member: tarfile.TarInfo, extension: str, is_of_group: bool) -> bool:
    """Is a link or a device part of a sample? It is one if it looks like an image; a link also as a field of a sample."""
    return not member.isdir() and (looks_like_image(extension) or (is_of_group and (member.islnk() or member.issym())))
