"""Inputs of the night's benchmark: tars, loose images in one folder, or a list of references. Few contents have many names.

Each kind says which settings of a job name it, which images the first run embeds, which content any image has, and how the
input changes before the night.
"""

import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_embed.schema import Shard, from_ipc
from lora_embed.shards.references import KEY
from lora_embed.store.store import Store
from samples import png, tar_of

CONTENTS, IMAGES = 16, 3  # images of a tar
ADDED = 2 * 10**6  # seed of an image that no other image equals
WHOLE_SHARDS = {"chunk_size": 4096}  # more than the samples of any shard, so that each has one part


@dataclass(frozen=True)
class Tars:
    """Tars of three images each; one changes, one goes, one comes."""

    place: str
    count: int
    images_each: int = IMAGES
    grows: int = 0  # images, by `change`
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def input(self) -> str:
        return f"{self.place}/shards"

    @property
    def first(self) -> str:
        return f"{self.input}/{{{0:08d}..{CONTENTS - 1:08d}}}.tar"

    @property
    def added(self) -> str:
        """The id of an image that is new in the night."""
        return f"{self.count:08d}.tar/1"

    def write(self) -> None:
        """The tars, linked to few contents, so that a hundred thousand take no more room than sixteen."""
        members = [[(f"{image}.png", png(tar * IMAGES + image)) for image in range(IMAGES)] for tar in range(CONTENTS)]
        _write_links(self.place, "shards", [tar_of(some) for some in members], "tar", self.count)

    def names(self, shard: Shard) -> list[tuple[str, int]]:
        """The keys of a shard's images, with the numbers of their contents."""
        tar = int(shard.name[:8]) % CONTENTS
        return [(str(image), tar * IMAGES + image) for image in range(IMAGES)]

    def content(self, name: str, key: str) -> int:
        """The number of the content of an image that the first run embedded."""
        return int(name[:8]) * IMAGES + int(key)

    def change(self) -> None:
        """Tars at a third, at two thirds and at the end of the order of names."""
        tar_at = Path(self.input)
        changed, removed = (tar_at / f"{number:08d}.tar" for number in (self.count // 3, 2 * self.count // 3))
        changed.unlink()
        changed.write_bytes(tar_of([(f"{image}.png", png(10**6 + image)) for image in range(IMAGES)]))
        removed.unlink()
        added = [(f"{image}.png", png(ADDED + image)) for image in range(IMAGES)]
        (tar_at / f"{self.count:08d}.tar").write_bytes(tar_of(added))


@dataclass(frozen=True)
class Loose:
    """Loose images in one folder; some come in the middle of the order of names, one at its end, and one goes."""

    place: str
    count: int
    images_each: int = 1
    new: int = 2  # images that come
    settings: dict[str, Any] = field(default_factory=lambda: dict(WHOLE_SHARDS))

    @property
    def grows(self) -> int:
        return self.new - 1

    @property
    def input(self) -> str:
        return f"{self.place}/images"

    @property
    def first(self) -> str:
        return f"{self.input}/{{{0:08d}..{CONTENTS - 1:08d}}}.png"

    @property
    def added(self) -> str:
        return f"{self.count:08d}.png"

    def write(self) -> None:
        _write_links(self.place, "images", [png(image) for image in range(CONTENTS)], "png", self.count)

    def names(self, shard: Shard) -> list[tuple[str, int]]:
        keys = [posixpath.basename(entry.path) for entry in shard.files]
        return [(key, self.content("", key)) for key in keys]

    def content(self, name: str, key: str) -> int:
        return int(key[:8]) % CONTENTS

    def change(self) -> None:
        images = Path(self.input)
        (images / f"{2 * self.count // 3:08d}.png").unlink()
        for number in range(self.new - 1):
            (images / f"{self.count // 3 + number:08d}a.png").write_bytes(png(10**6 + number))
        (images / self.added).write_bytes(png(ADDED))


@dataclass(frozen=True)
class References:
    """A list of references, each to one of few objects; a row comes in its middle, one at its end, and one goes."""

    place: str
    count: int
    images_each: int = 1
    grows: int = 1
    settings: dict[str, Any] = field(default_factory=lambda: WHOLE_SHARDS | {"reference_column": "image", "key_column": "id"})

    @property
    def input(self) -> str:
        return f"{self.place}/list.csv"

    @property
    def first(self) -> str:
        return f"{self.place}/first.csv"

    @property
    def added(self) -> str:
        return f"list.csv/{self.count:08d}"

    def write(self) -> None:
        store = Store(self.place)
        for image in range(CONTENTS):
            store.replace(f"images/{image}.png", png(image))
        self._write_list("first.csv", list(map(_row, range(CONTENTS))))
        self._write_list("list.csv", list(map(_row, range(self.count))))

    def names(self, shard: Shard) -> list[tuple[str, int]]:
        assert shard.rows is not None
        return [(key, self.content("", key)) for key in from_ipc(shard.rows.packed).column(KEY).to_pylist()]

    def content(self, name: str, key: str) -> int:
        return int(key[:8]) % CONTENTS

    def change(self) -> None:
        store = Store(self.place)
        rows = list(map(_row, range(self.count)))
        for name, seed in (("middle", 10**6), ("end", ADDED)):
            store.replace(f"images/{name}.png", png(seed))
        del rows[2 * self.count // 3]
        rows.insert(self.count // 3, f"images/middle.png,{self.count // 3:08d}a")
        self._write_list("list.csv", [*rows, f"images/end.png,{self.count:08d}"])

    def _write_list(self, name: str, rows: list[str]) -> None:
        Store(self.place).replace(name, "\n".join(["image,id", *rows, ""]).encode())


KINDS: dict[str, type[Tars | Loose | References]] = {"tars": Tars, "loose": Loose, "references": References}


def _row(number: int) -> str:
    return f"images/{number % CONTENTS}.png,{number:08d}"


def _write_links(place: str, folder: str, contents: list[bytes], ending: str, count: int) -> None:
    """`count` names in a folder. A file has at most 60,000 names, since file systems limit them."""
    names, kept = Path(place) / folder, Path(place) / "contents"
    names.mkdir()
    kept.mkdir()
    for number in range(count):
        content = number % len(contents)
        source = kept / f"{content}-{number // (60_000 * len(contents))}.{ending}"
        if not source.exists():
            source.write_bytes(contents[content])
        os.link(source, names / f"{number:08d}.{ending}")
