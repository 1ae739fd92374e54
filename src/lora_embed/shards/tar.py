"""A tar → its samples, up to its checked end."""

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from lora_embed.errors import ShardError
from lora_embed.schema import WHOLE, Layout, Sample, Shard, Span, Wanted
from lora_embed.shards.kinds import counted_as, kind_by_name
from lora_embed.shards.tar_end import cut_short, is_no_tar, prove_end
from lora_embed.shards.tar_groups import Group, Source, looks_like_image, split_name
from lora_embed.shards.tar_headers import open_headers, read_members
from lora_embed.shards.tar_links import Links


def read_tar(file: BinaryIO, shard: Shard, layout: Layout, wanted: Wanted, span: Span = WHOLE) -> Iterator[Sample]:
    """Read WebDataset: consecutive members whose file names are equal up to the first dot are one sample; see `Group`.

    Raises ShardError for a tar that is cut short or has too many headers, and any error of `tarfile` for a damaged one.
    """
    where, size = f"{shard.root}/{shard.name}", shard.files[0].size
    if size == 0:
        raise ShardError(f"{where}: has 0 bytes, but even an empty tar has at least 1,024. Upload it again, or remove it.")
    reading = _Reading(file, where, size, layout, span)
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
        self.is_at_begin = not span.begin  # no member was read yet
        self._hidden: Counter[str] = Counter()  # images whose names hide them, before the first sample

    def samples(self, wanted: Wanted) -> Iterator[Sample]:
        """The samples of the span; the last ones only when its end was checked."""
        self._file.seek(self._span.begin)
        tar, headers = open_headers(self._file, self._where)
        with tar:
            links = Links(self._file, tar, headers, self._where, self._span.begin)
            source = Source(tar=tar, headers=headers, links=links, layout=self._layout, size=self._size)
            group, number, first_hidden = None, self._span.first, ""
            for member in read_members(tar, headers, self._span.end):
                links.note(member)
                key, extension = split_name(member.name)
                if posixpath.basename(member.name).startswith("."):  # macOS adds ._name to each
                    if member.isreg() and kind_by_name(member.name) == "images":
                        first_hidden = first_hidden or member.name
                        (group.passed if group is not None else self._hidden)[counted_as(member.name, is_hidden=True)] += 1
                    continue
                if not _counts(member, extension, group is not None and group.takes(key, extension)):
                    continue
                if group is None or not group.takes(key, extension):
                    begin = None if headers.has_global else member.offset  # a reader from here on would miss global headers
                    if group is not None:
                        for sample in group.finish(begin):
                            yield sample
                            number += 1
                    group = Group(source, key, begin, number, wanted)
                    self._take_hidden(group)
                self._check_size(member)
                group.add(extension, member)
            end = tar.offset
            self._check_end(end)
            if group is not None:
                yield from group.finish(end)
            elif first_hidden:
                yield self._all_hidden(first_hidden, end)

    def _take_hidden(self, group: Group) -> None:
        self.is_at_begin = False
        group.passed.update(self._hidden)
        self._hidden.clear()

    def _all_hidden(self, name: str, end: int) -> Sample:
        """A sample that stands for a tar of hidden images alone, so that it is not taken for an empty one."""
        self._hidden[counted_as(name, is_hidden=True)] -= 1
        why = "the names of all images in the tar begin with a dot, which hides them. Rename them"
        return Sample(name.removeprefix("./"), missing=why, begin=self._span.begin, end=end, passed=dict(+self._hidden))

    def _check_size(self, member: tarfile.TarInfo) -> None:
        if member.isreg() and not member.issparse() and member.offset_data + member.size > self._size:
            raise tarfile.ReadError("unexpected end of data")

    def _check_end(self, end: int) -> None:
        expected = self._span.end
        if expected is None:
            prove_end(self._file, end, self._size, self._where)
        elif end != expected:
            raise ShardError(
                f"{self._where}: damaged tar: its members end at byte {end}, expected {expected}. Upload it again."
            )


def _counts(member: tarfile.TarInfo, extension: str, is_of_group: bool) -> bool:
    """Is a member part of a sample? A link or a device is one if it looks like an image; a link also as a field of a sample."""
    if member.isreg():
        return True
    return not member.isdir() and (looks_like_image(extension) or (is_of_group and (member.islnk() or member.issym())))
