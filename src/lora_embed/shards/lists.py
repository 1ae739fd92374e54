"""A list of references → shards: ranges of its rows, which end where the rows' content says, so that a change moves few."""

import contextlib
import hashlib
import itertools
import os
import posixpath
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from lora_embed.entries import Entries
from lora_embed.errors import ConfigError, LoraEmbedError, ShardError
from lora_embed.schema import Rows, Shard
from lora_embed.shards.compressed import COMPRESSED_TAR
from lora_embed.shards.etags import etags_of
from lora_embed.shards.kinds import PACKED, kind_by_name
from lora_embed.shards.list_rows import LISTS, PARQUET, ListRows, References, Row, read_list
from lora_embed.shards.patterns import Files
from lora_embed.shards.references import ETAG, FIELD, KEY, REFERENCE, reach_of
from lora_embed.store.place import WEB, is_local, locate, place_of
from lora_embed.store.retry import LIBRARY_ERRORS
from lora_embed.store.store import Store
from lora_embed.text import in_one_line, redacted

FEWEST_ROWS, MOST_ROWS = 512, 4096  # of a range; a list's last range may have fewer
ENDS_ONE_IN = 1024  # of the rows after the first, one in so many ends a range
MOST_REFERENCES = 2**28  # of a list: each takes eight bytes in memory, and what it packs into
IN_LISTS = "image beside a list"  # a kind of files that are passed over
_ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


def without_listed(files: Files, passed: Counter[str]) -> Files:
    """The files of an input that has lists, without loose images: a list names them, and they would be embedded twice."""
    kept = Entries()
    for state in files.entries.states():
        if kind_by_name(state[0]) == "images" and state[0] not in files.named:
            passed[IN_LISTS] += 1
        else:
            kept.add(*state)
    return replace(files, entries=kept)


def hint(name: str, found: str = "") -> str:
    """What to add to a message about a file that is no shard: it may be a list, in a job without `reference_column`.

    Or an archive, by its name or by what was found in it.
    """
    if name.lower().endswith(PACKED) or "archive" in found:
        return (
            f" Of archives, only tars are read (also {', '.join(COMPRESSED_TAR)}): unpack {name}, or pack its files into a tar."
        )
    if not name.lower().endswith(LISTS) or name.lower().endswith(PARQUET):
        return ""
    return " If it is a list of paths or URIs of images, set reference_column in the job to the column that holds them."


def expand_lists(shards: list[Shard], references: References, options: dict[str, Any], where: str) -> list[Shard]:
    """The shards, with the ranges of each list in its place. Raises ConfigError without lists, and for lists without rows."""
    if not any(shard.kind == "references" for shard in shards):
        raise ConfigError(
            f"input {where}: reference_column is {references.column!r}, but there is no list of references "
            f"({', '.join(LISTS)}). Name one, or remove reference_column if the input holds the images themselves."
        )
    parts = [list_ranges(shard, references, options) if shard.kind == "references" else [shard] for shard in shards]
    if not any(parts):
        raise ConfigError(f"input {where}: its lists name no image: they have no rows. Write them again.")
    return list(itertools.chain.from_iterable(parts))


def list_ranges(shard: Shard, references: References, options: dict[str, Any]) -> list[Shard]:
    """The shards of a list, in its order. `shard` is the list as one file.

    A range ends after a row whose hash says so, and its id is a hash of its rows: rows that are added or removed change
    their own range, and seldom the next. Raises ConfigError for a list that cannot be read, or names what it may not.
    """
    (entry,) = shard.files
    root = posixpath.basename(shard.root.rstrip("/"))
    place = shard.root if "://" in shard.root else os.path.abspath(shard.root)
    folder = posixpath.join(place, posixpath.dirname(shard.name)).rstrip("/") or "/"
    where = f"{shard.root}/{shard.name}"
    reach = Rows(folder=folder, roots=references.roots, rejects_unreachable=references.rejects_unreachable)
    reached = reach_of(reach, options)
    keys, ranges, ends = array("q"), list[tuple[str, bytes, bool]](), [0]
    store = Store(shard.root, options, follows_links=True)
    with _errors_of(shard), store.explained(entry.path), store.open(entry.path, entry.size) as file:
        told = read_list(file, shard, references)
        for rows, state in _ranges(_allowed(told.rows, folder, references, where), keys, where):
            etags = etags_of([row[0] for row in rows], place_of(folder), reached) if references.checks else None
            state.update(repr(etags).encode() if etags is not None else b"")
            has_local = any(is_local(row[0], folder) for row in rows if row[0])
            ranges.append((state.hexdigest(), _packed(rows, etags, told), has_local))
            ends.append(ends[-1] + len(rows))
    repeated, times, shards = _repeated(keys), Counter[str](), []
    for first, end, (state, packed, has_local) in zip(ends, ends[1:], ranges, strict=False):
        again = (repeated[slice(*np.searchsorted(repeated, [first, end]))] - first).tolist()
        content = (root, shard.name, state, again)
        times[repr(content)] += 1  # two ranges may be equal, if all rows of both are repeated
        name = hashlib.sha256(repr((*content, times[repr(content)])).encode()).hexdigest()[:16]
        held = replace(reach, packed=packed, repeated=frozenset(again), has_local=has_local)
        files = (replace(entry, size=len(packed)),)
        shards.append(replace(shard, id=name, name=f"{shard.name}/#{name}", kind="references", files=files, rows=held))
    return shards


def _ranges(rows: Iterator[Row], keys: "array[int]", where: str) -> Iterator[tuple[list[Row], Any]]:
    """Consecutive rows with a hash of their content, and in `keys` a hash of each row's key."""
    gathered, state = list[Row](), hashlib.sha256()
    for row in rows:
        keys.append(hash(row[1]))
        gathered.append(row)
        digest = hashlib.blake2b(repr(row).encode("utf-8", "backslashreplace"), digest_size=16).digest()
        state.update(digest)
        is_end = len(gathered) >= FEWEST_ROWS and int.from_bytes(digest[:4], "big") % ENDS_ONE_IN == 0
        if is_end or len(gathered) == MOST_ROWS:
            yield gathered, state
            gathered, state = [], hashlib.sha256()
        if len(keys) > MOST_REFERENCES:
            raise ConfigError(f"{where}: has more than {MOST_REFERENCES:,} rows. Make several lists of it.")
    if gathered:
        yield gathered, state


def _packed(rows: list[Row], etags: list[str] | None, told: ListRows) -> bytes:
    """The rows as a compressed Arrow stream; `references.read_references` opens it."""
    names = [(REFERENCE, pa.string()), (KEY, pa.string()), *((FIELD + name, kind) for name, kind in told.fields)]
    columns = {name: pa.array(values, kind) for (name, kind), values in zip(names, zip(*rows, strict=True), strict=True)}
    batch = pa.record_batch(columns if etags is None else columns | {ETAG: pa.array(etags, pa.string())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=_ZSTD) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _repeated(keys: "array[int]") -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers of the rows whose key an earlier row has, in order."""
    hashes = np.array(keys, np.int64)
    order = np.argsort(hashes, kind="stable")
    return np.sort(order[1:][hashes[order][1:] == hashes[order][:-1]])


def _allowed(rows: Iterator[Row], folder: str, references: References, where: str) -> Iterator[Row]:
    """The rows. Raises ConfigError where a reference leads to a place that neither the list nor the job allows."""
    home = place_of(folder)
    own = home.store
    roots = [place_of(root) for root in references.roots]
    web = tuple(f"{kind}://" for kind in WEB)
    at_once = (
        tuple(f"{place.rstrip('/')}/" for place in (own, *(root.uri for root in roots)) if not place.startswith(web)) + web
    )
    for number, row in enumerate(rows, 1):
        reference = row[0] or ""
        is_allowed = reference.startswith(at_once) and (".." not in reference or reference.startswith(web))
        if not is_allowed and (reference.startswith("/") or ":" in reference):
            with contextlib.suppress(ValueError):  # it can name nothing: the reader makes a reject of it
                place = locate(reference, home)
                if place.store != own and not place.is_web and not any(place.is_below(root) for root in roots):
                    named = "/" if place.store == "/" else place.store
                    raise ConfigError(
                        f"{where}: row {number} names {redacted(reference)}, but a list may name only files of its own store "
                        "and addresses on the web. If images may be read there, set reference_roots in the job, for example "
                        f"to [{posixpath.dirname(place.uri) if named == '/' else named}]."
                    )
        yield row


@contextlib.contextmanager
def _errors_of(shard: Shard) -> Iterator[None]:
    """Turn any error of a list into ConfigError. A list that was made to harm can raise any kind."""
    try:
        yield
    except ShardError as error:
        raise ConfigError(str(error)) from None
    except (LoraEmbedError, *LIBRARY_ERRORS):
        raise
    except Exception as error:
        if getattr(error, "errno", None) is not None:
            raise
        cause = f"{type(error).__name__}: {in_one_line(error)}".removesuffix(": ")
        raise ConfigError(
            f"{shard.root}/{shard.name}: cannot be read to its end as a list of references ({cause}). Write it again."
        ) from error
