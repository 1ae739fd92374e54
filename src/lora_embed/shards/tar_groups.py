"""Members of a tar → samples: members of one key make one sample, whose image is chosen among its members by their names."""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any

from lora_embed.schema import Layout, Sample, Wanted
from lora_embed.shards.fields import MOST_FIELD, fields_of_file
from lora_embed.shards.kinds import ARCHIVES, IMAGES, USUAL_IMAGES
from lora_embed.shards.tar_headers import Headers
from lora_embed.shards.tar_links import Links

_USUAL, _IMAGES = (frozenset(ending[1:] for ending in endings) for endings in (USUAL_IMAGES, IMAGES))
MOST_DOTTED = 64  # images with a dot in their names that are remembered until it is known whether `key.jpg` stands beside them
MOST_OWN_FIELDS = 4 * MOST_DOTTED  # members with fields of such images
Member = tuple[str, tarfile.TarInfo]  # extension, header


def split_name(name: str) -> tuple[str, str]:
    """A member's key and extension, as in WebDataset: `a/0001.left.png` → a/0001, left.png."""
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    key = f"{folder}{slash}{stem}" if "//" not in name else posixpath.join(posixpath.dirname(name), stem)
    return key, extension.lower()


def looks_like_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in _IMAGES


def own_key(name: str) -> str:
    """The key of an image that is a sample of its own: its name up to the last dot."""
    return name.removeprefix("./").rpartition(".")[0]


def suffixes_of(image_member: tuple[str, ...]) -> list[str]:
    """What is appended to the key, after `#`, for each of several images of a sample: left.png → left, jpg → jpg."""
    firsts = [name.partition(";")[0] for name in image_member]
    short = [name.rpartition(".")[0] or name for name in firsts]
    return short if len(set(short)) == len(short) else firsts


def _without_image(extensions: set[str]) -> str:
    """Why a sample has no image: the endings of what it has, and what helps where that is an archive."""
    if archive := next((ending for ending in sorted(extensions) if f".{ending}".endswith(ARCHIVES)), None):
        return f"is an archive (.{archive}) in a tar, which is not read. Unpack the tar, and name what it holds as input"
    there = ", ".join(sorted(extensions - {""})[:10])
    return f"the sample has no image, but {there}" if there else "the sample has no image, but a file without an ending"


class Source:
    """An open tar, and the layout by which its members are read."""

    def __init__(self, tar: tarfile.TarFile, headers: Headers, links: Links, layout: Layout, size: int) -> None:
        self._tar, self._headers, self._links, self._max_bytes = tar, headers, links, layout.max_bytes
        self._size = size  # of the file, in bytes
        self._names = frozenset(name for name, _ in layout.carry)
        self.named = [frozenset(name.split(";")) for name in layout.image_member]
        self.suffixes = [f"#{suffix}" for suffix in suffixes_of(layout.image_member)] if len(self.named) > 1 else [""]
        self._field_endings = self._names | {"json"} if self._names else frozenset[str]()

    def check_size(self, member: tarfile.TarInfo) -> None:
        """Raises ReadError for a member that is longer than the file, before memory is allocated for it."""
        if member.offset_data + member.size > self._size and member.isreg() and not member.issparse():
            raise tarfile.ReadError("unexpected end of data")

    def read_image(self, sample: Sample, member: tarfile.TarInfo) -> None:
        """Read the member, or the one that a link leads to, as the sample's image."""
        target = self._links.follow(member)
        if isinstance(target, str):
            sample.missing = target
        elif target.size > self._max_bytes:  # also for a sparse member, which is small in the file
            sample.excess = target.size
        else:
            sample.data = self._content(target)

    def read_fields(self, extension: str, member: tarfile.TarInfo) -> dict[str, Any]:
        """The carried fields that a member holds: keys of JSON, or the text of a member that is named like a field."""
        target = self._links.follow(member)
        if isinstance(target, str) or target.size > MOST_FIELD:
            return {}
        return fields_of_file(extension, self._content(target), self._names)

    def holds_fields(self, extension: str) -> bool:
        return extension in self._field_endings

    def _content(self, member: tarfile.TarInfo) -> bytes:
        self.check_size(member)
        data = self._headers.content(self._tar, member)
        if len(data) != member.size:
            raise tarfile.ReadError("unexpected end of data")
        return data


class Group:
    """Consecutive members of one key: one sample, or one for each name of `image_member`.

    Without `image_member`, the image is the first member of a usual ending (`key.jpg`), or else of another image's ending.
    If there are only images with a dot in their names (`key.left.png`), each is a sample of its own.
    """

    def __init__(self, source: Source, key: str, begin: int | None, first: int, wanted: Wanted) -> None:
        self.key = key
        self.passed: dict[str, int] = {}
        self._source, self._begin, self._first, self._wanted = source, begin, first, wanted
        self._named, self._samples = source.named, [Sample(key + suffix) for suffix in source.suffixes]
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
        self._source.check_size(member)
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
            fits = extension in (self._named[number] if self._named else _USUAL)
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
            if self._named and not all(self._is_chosen):
                self._say_what_is_missing()
            elif not self._is_chosen[0]:
                self._samples[0].missing = _without_image(self._taken)
            count = len(self._samples)
        elif self._others:
            samples, count = self._other_image(), 1
        else:
            chosen = self._one_of_each_key()
            samples, count = self._own_samples(chosen), len(chosen)
        for number, sample in enumerate(samples):
            if number == 0:
                sample.begin, sample.passed = self._begin, self.passed
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
        self.passed[f".{extension}"] = self.passed.get(f".{extension}", 0) + 1

    def _say_what_is_missing(self) -> None:
        for number, sample in enumerate(self._samples):
            if not self._is_chosen[number]:
                there = ", ".join(sorted(self._taken)[:10])
                sample.missing = f"the sample has no member {' or '.join(sorted(self._named[number]))}, but {there}"
