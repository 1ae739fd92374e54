"""Images that somebody bent on purpose: mutants of small good ones, made with knowledge of each format's headers.

A file is split into its pieces (chunks, segments, blocks, directory entries), which are changed, repeated, dropped, moved or
taken from another file, and put together again with sizes and check sums set right, so that a decoder goes on to what was
changed. One seed makes the same mutants everywhere.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from image_files import FORMATS, Format, Pieces

# Sizes, counts and offsets that programs trip over, beside what stood there plus or minus a little.
TRICKY = (
    0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 32, 64, 127, 128, 255, 256, 999, 1000, 1001, 4096, 16383, 16384, 32767, 32768,
    65534, 65535, 65536, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**63,
)  # fmt: skip


class Mutant(NamedTuple):
    """One image: its format by name, the way it was made, and its bytes."""

    format: str
    made: str
    data: bytes


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    """`count` mutants, the formats in turns."""
    rng = random.Random(seed)
    names = sorted(FORMATS)
    for number in range(count):
        name = names[number % len(names)]
        yield mutate(rng, name)


def mutate(rng: random.Random, name: str) -> Mutant:
    """One to four changes of a seed of this format."""
    how = FORMATS[name]
    seeds = how.seeds()
    pieces = how.split(rng.choice(seeds))
    made = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        change = rng.choices(CHANGES, WEIGHTS)[0]
        pieces = change(rng, how, pieces)
        made.append(change.__name__)
    data = how.join(pieces)
    if rng.random() < 0.15:
        data, made = data[: rng.randrange(len(data) + 1)], [*made, "cut"]
    if rng.random() < 0.1:
        data, made = flipped(rng, data), [*made, "flip"]
    return Mutant(name, "+".join(made), data)


def flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def field(rng: random.Random, how: Format, pieces: Pieces) -> Pieces:
    """Another number where a size, a count or an offset stands."""
    numbered = [(place, fields) for place, piece in enumerate(pieces) if (fields := how.fields(piece))]
    if not numbered:
        return flip(rng, how, pieces)
    place, fields = rng.choice(numbered)
    piece = bytearray(pieces[place])
    for start, size in rng.sample(fields, min(len(fields), rng.choice((1, 1, 2)))):
        order = "big" if how.big_endian else "little"
        before = int.from_bytes(piece[start : start + size], order)  # type: ignore[arg-type]
        near = before + rng.choice((-1, 1, 2, before, 255, 256, 10_000))
        value = rng.choice((rng.choice(TRICKY), near, rng.randrange(256**size), rng.randrange(1200))) % 256**size
        piece[start : start + size] = value.to_bytes(size, order)  # type: ignore[arg-type]
    return [*pieces[:place], bytes(piece), *pieces[place + 1 :]]


def some_place(rng: random.Random, pieces: Pieces) -> int:
    """Seldom the first piece, by which a file is known: all decoders turn the others away at the door."""
    return rng.randrange(1, len(pieces)) if len(pieces) > 1 and rng.random() < 0.95 else 0


def flip(rng: random.Random, how: Format, pieces: Pieces) -> Pieces:
    place = some_place(rng, pieces)
    return [*pieces[:place], flipped(rng, pieces[place]), *pieces[place + 1 :]]


def repeat(rng: random.Random, how: Format, pieces: Pieces) -> Pieces:
    place = some_place(rng, pieces)
    times = min(rng.choice((2, 3, 50, 400)), 2**22 // (len(pieces[place]) + 1) + 2)
    return [*pieces[:place], *[pieces[place]] * times, *pieces[place + 1 :]]


def drop(rng: random.Random, how: Format, pieces: Pieces) -> Pieces:
    place = some_place(rng, pieces)
    return [*pieces[:place], *pieces[place + 1 :]] or [b""]


def move(rng: random.Random, how: Format, pieces: Pieces) -> Pieces:
    moved = list(pieces)
    piece = moved.pop(some_place(rng, moved))
    moved.insert(rng.randrange(len(moved) + 1), piece)
    return moved


def splice(rng: random.Random, how: Format, pieces: Pieces) -> Pieces:
    """The beginning of one file, and the end of another or a piece of it."""
    others = how.split(rng.choice(how.seeds()))
    place = some_place(rng, pieces)
    if rng.random() < 0.5:
        return [*pieces[:place], *others[rng.randrange(len(others)) :]]
    return [*pieces[:place], rng.choice(others), *pieces[place:]]


def extra(rng: random.Random, how: Format, pieces: Pieces) -> Pieces:
    """Something that the format allows and few files have: large, nested, contradictory."""
    extras = how.extras()
    if not extras:
        return field(rng, how, pieces)
    new = rng.choice(extras)
    alike = [place for place, piece in enumerate(pieces) if how.alike(piece, new)]
    if alike and rng.random() < 0.8:
        place = rng.choice(alike)
        return [*pieces[:place], new, *pieces[place + 1 :]]
    place = rng.randrange(1, len(pieces)) if len(pieces) > 1 else 0
    return [*pieces[:place], *[new] * rng.choice((1, 1, 1, 3)), *pieces[place:]]


def resize(rng: random.Random, how: Format, pieces: Pieces) -> Pieces:
    """A piece longer or shorter than it was."""
    place = some_place(rng, pieces)
    piece, middle = pieces[place], rng.randrange(len(pieces[place]) + 1)
    grown = piece[:middle] + rng.randbytes(rng.choice((1, 2, 16, 3000))) + piece[middle:]
    return [*pieces[:place], rng.choice((piece[:middle], grown)), *pieces[place + 1 :]]


CHANGES = (field, flip, repeat, drop, move, splice, extra, resize)
WEIGHTS = (10, 3, 1, 1, 1, 2, 2, 2)
