"""Members of a tar → samples: members of one key make one sample, whose image is chosen among its members by their names."""

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_embed.schema import Layout, Sample, Wanted
from lora_embed.shards.fields import MOST_FIELD, fields_of_file
from lora_embed.shards.kinds import IMAGES, USUAL_IMAGES
from lora_embed.shards.tar_headers import Headers
from lora_embed.shards.tar_links import Links

MOST_DOTTED = (
    64  # images with a dot in their names that are kept in mind, until it is known whether `key.jpg` stands beside them
)
MOST_OWN_FIELDS = 4 * MOST_DOTTED  # members with fields of such images
Member = tuple[str, tarfile.TarInfo]  # extension, header


def split_name(name: str) -> tuple[str, str]:
    """A member's key and extension, as in WebDataset: `a/0001.left.png` → a/0001, left.png."""
    folder, base = posixpath.split(name.removeprefix("./"))
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def looks_like_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in IMAGES


def own_key(name: str) -> str:
    """The key of an image that is a sample of its own: its name up to the last dot."""
    return name.removeprefix("./").rpartition(".")[0]


def suffixes_of(image_member: tuple[str, ...]) -> list[str]:
    """What is appended to the key, after `#`, for each of several images of a sample: left.png → left, jpg → jpg."""
    firsts = [name.partition(";")[0] for name in image_member]
    short = [name.rpartition(".")[0] or name for name in firsts]
    return short if len(set(short)) == len(short) else firsts


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open tar, and the layout by which its members are read."""

    tar: tarfile.TarFile
    headers: Headers
    links: Links
    layout: Layout
    size: int  # of the file, in bytes

    def read_image(self, sample: Sample, member: tarfile.TarInfo) -> None:
        """Read the member, or the one that a link leads to, as the sample's image."""
        target = self.links.follow(member)
        if isinstance(target, str):
            sample.missing = target
        elif target.size > self.layout.max_bytes:  # also for a sparse member, which is small in the file
            sample.excess = target.size
        else:
            sample.data = self._content(target)

    def read_fields(self, extension: str, member: tarfile.TarInfo) -> dict[str, Any]:
        """The carried fields that a member holds: keys of JSON, or the text of a member that is named like a field."""
        target = self.links.follow(member)
        if isinstance(target, str) or target.size > MOST_FIELD:
            return {}
        data, names = self._content(target), {name for name, _ in self.layout.carry}
        return fields_of_file(extension, data, names)

    def holds_fields(self, extension: str) -> bool:
        return bool(self.layout.carry) and (extension == "json" or any(extension == name for name, _ in self.layout.carry))

    def _content(self, member: tarfile.TarInfo) -> bytes:
        if not member.issparse() and member.offset_data + member.size > self.size:  # before memory is allocated for it
            raise tarfile.ReadError("unexpected end of data")
        data = self.headers.content(self.tar, member)
        if len(data) != member.size:
            raise tarfile.ReadError("unexpected end of data")
        return data


class Group:
    """Consecutive members of one key: one sample, or one for each name of `image_member`.

    Without `image_member`, the image is the first member of a usual ending (`key.jpg`), or else of another image's ending.
    If there are only images with a dot in their names (`key.left.png`), each is a sample of its own.
    """

    def __init__(self, source: Source, key: str, begin: int | None, first: int, wanted: Wanted) -> None:
        self.key, self.passed = key, Counter[str]()
        self._source, self._begin, self._first, self._wanted = source, begin, first, wanted
        self._named = [name.split(";") for name in source.layout.image_member]
        suffixes = suffixes_of(source.layout.image_member)
        self._samples = [Sample(f"{key}#{suffix}") for suffix in suffixes] if len(suffixes) > 1 else [Sample(key)]
        self._is_chosen = [False] * len(self._samples)
        self._taken: set[str] = set()  # extensions
        self._others: list[Member] = []  # images of another ending
        self._dotted: list[Member] = []
        self._fields: list[Member] = []
        self._own_fields: list[Member] = []

    def takes(self, key: str, extension: str) -> bool:
        """Does a member belong to this group? A second one of the same extension begins a group of the same key."""
        return key == self.key and extension not in self._taken and len(self._dotted) < MOST_DOTTED

    def add(self, extension: str, member: tarfile.TarInfo) -> None:
        self._taken.add(extension)
        if self._choose(extension, member):
            return
        if self._source.holds_fields(extension):
            self._fields.append((extension, member))
            if any(self._wanted(self._first + number) for number in range(len(self._samples))):
                values = self._source.read_fields(extension, member)
                for sample in self._samples:
                    sample.fields.update(values)
        elif self._named and looks_like_image(extension):
            self._pass_over(extension)
        elif looks_like_image(extension):
            (self._dotted if "." in extension else self._others).append((extension, member))
        elif self._source.holds_fields(extension.rpartition(".")[2]) and len(self._own_fields) < MOST_OWN_FIELDS:
            self._own_fields.append((extension, member))

    def _choose(self, extension: str, member: tarfile.TarInfo) -> bool:
        """Take a member as the image of a sample, if it is one; it is read at once, since what follows lies behind it."""
        for number, sample in enumerate(self._samples):
            fits = extension in self._named[number] if self._named else f".{extension}" in USUAL_IMAGES
            if fits and not self._is_chosen[number]:
                self._is_chosen[number] = True
                if self._wanted(self._first + number):
                    self._source.read_image(sample, member)
                return True
        return False

    def finish(self, end: int | None) -> Iterator[Sample]:
        """The samples of the group, which ends at this byte."""
        if self._named or self._is_chosen[0] or not (self._others or self._dotted):
            samples: Iterator[Sample] = iter(self._samples)
            for extension, _ in [*self._others, *self._dotted]:
                self._pass_over(extension)
            self._say_what_is_missing()
            count = len(self._samples)
        elif self._others:
            samples, count = self._other_image(), 1
        else:
            chosen = self._one_of_each_key()
            samples, count = self._own_samples(chosen), len(chosen)
        for number, sample in enumerate(samples):
            if number == 0:
                sample.begin, sample.passed = self._begin, dict(self.passed)
            sample.end = end if number == count - 1 else None
            yield sample

    def _other_image(self) -> Iterator[Sample]:
        (_, member), *rest = self._others
        for extension, _ in [*rest, *self._dotted]:
            self._pass_over(extension)
        if self._wanted(self._first):
            self._source.read_image(self._samples[0], member)
        yield self._samples[0]

    def _one_of_each_key(self) -> dict[str, tarfile.TarInfo]:
        """The first image of each own key; `a.b.png` beside `a.b.jpg` is passed over."""
        chosen: dict[str, tarfile.TarInfo] = {}
        for extension, member in self._dotted:
            if chosen.setdefault(own_key(member.name), member) is not member:
                self._pass_over(extension)
        return chosen

    def _own_samples(self, chosen: dict[str, tarfile.TarInfo]) -> Iterator[Sample]:
        for number, (key, member) in enumerate(chosen.items()):
            sample = Sample(key)
            if self._wanted(self._first + number):
                self._source.read_image(sample, member)
                own = [(extension, field) for extension, field in self._own_fields if own_key(field.name) == key]
                for extension, field in [*self._fields, *own]:
                    sample.fields.update(self._source.read_fields(extension.rpartition(".")[2], field))
            yield sample

    def _pass_over(self, extension: str) -> None:
        self.passed[f".{extension}"] += 1

    def _say_what_is_missing(self) -> None:
        for number, sample in enumerate(self._samples):
            if self._named and not self._is_chosen[number]:
                there = ", ".join(sorted(self._taken)[:10])
                sample.missing = f"the sample has no member {' or '.join(self._named[number])}, but {there}"
