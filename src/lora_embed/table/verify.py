"""Read published files again and compare them with their manifest."""

import hashlib
import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lora_embed.errors import VerificationFailed
from lora_embed.schema import encoder_path
from lora_embed.store.store import Store
from lora_embed.table.manifest import FileEntry
from lora_embed.table.parquet import RESTORE, RETURN, count_values, damage_named, missing
from lora_embed.table.read import Table
from lora_embed.text import agree, number_of
from lora_embed.vectors.health import hash_each


def verify_file(store: Store, entry: FileEntry, *, is_data: bool) -> NDArray[np.uint64]:
    """Read a published file again; check its SHA-256, rows per shard and, in a data file, that no id occurs twice.

    Returns hashes of its ids. Raises VerificationFailed with what differs.
    """
    where = f"{store.uri}/{entry.path}"
    data = store.read(entry.path)
    if data is None:
        raise VerificationFailed(missing(where))
    if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise VerificationFailed(
            f"{where}: was changed since it was published: its {len(data)} bytes have another SHA-256 than the {entry.bytes} "
            f"bytes in the manifest. {RESTORE}"
        )
    with damage_named(where):
        table = pq.read_table(io.BytesIO(data), columns=["id", "shard"])
        per_shard = count_values(table.column("shard").cast(pa.string()))
        ids = table.column("id").cast(pa.string()).to_pylist()
    expected = {shard.name: shard.vectors if is_data else shard.rejects for shard in entry.shards}
    if per_shard != {name: rows for name, rows in expected.items() if rows} or table.num_rows != entry.rows:
        raise VerificationFailed(f"{where}: its numbers of rows per shard differ from those in the manifest. {RESTORE}")
    if is_data and (twice := len(ids) - len(set(ids))):
        raise VerificationFailed(
            f"{where}: {number_of(twice, 'id')} {agree(twice, 'occurs', 'occur')} more than once, expected each id once. "
            f"{RESTORE}"
        )
    return hash_each(id_.encode() for id_ in ids)


def verify_table(opened: Table) -> None:
    """Check every file of a version against its manifest, and that no id occurs in two files.

    Memory holds eight bytes of each id. Raises VerificationFailed with the first difference.
    """
    manifest = opened.manifest
    if opened.store.read(f"{encoder_path(manifest.space_id)}/encoder.json") is None:
        raise VerificationFailed(
            f"{opened.store.uri}: the encoder of space {manifest.space_id} is missing. Run the job again, which builds it."
        )
    hashes = [np.array([], np.uint64)]
    hashes += [verify_file(opened.store, entry, is_data=True) for entry in manifest.files]
    for entry in manifest.rejects:
        verify_file(opened.store, entry, is_data=False)
    all_hashes = np.sort(np.concatenate(hashes))
    if len(alike := all_hashes[1:][all_hashes[1:] == all_hashes[:-1]]):
        _refuse_twice(opened, alike)
    if len(all_hashes) != manifest.counts["vectors"]:
        raise VerificationFailed(
            f"{opened.store.uri}: holds {number_of(len(all_hashes), 'vector')}, its manifest says "
            f"{manifest.counts['vectors']}. {RETURN}"
        )


def _refuse_twice(opened: Table, alike: NDArray[np.uint64]) -> None:
    """Look up the ids with these hashes. Raises VerificationFailed for one id in two files; two ids may share a hash."""
    counted: Counter[str] = Counter()
    for batch in opened.batches(["id"]):
        ids = batch.column("id").to_pylist()
        is_alike = np.isin(hash_each(id_.encode() for id_ in ids), alike, kind="sort")  # other kinds are wrong in numpy 2.0
        counted.update(id_ for id_, suspect in zip(ids, is_alike, strict=True) if suspect)
    if twice := sorted(id_ for id_, times in counted.items() if times > 1):
        raise VerificationFailed(
            f"{opened.store.uri}: {number_of(len(twice), 'id')} {agree(len(twice), 'occurs', 'occur')} in more than one data "
            f"file: {twice[0]} …. {RETURN}"
        )
