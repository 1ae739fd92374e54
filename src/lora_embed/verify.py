"""Published files read again and held against their manifest."""

import hashlib
import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lora_embed.errors import VerificationFailed
from lora_embed.manifest import FileEntry
from lora_embed.schema import encoder_path
from lora_embed.storage import Store
from lora_embed.table import Table


def verify_file(store: Store, entry: FileEntry, *, is_data: bool) -> set[str]:
    """Read a published file again and check its sum, rows per shard and, in a data file, that ids differ; its ids.

    Raises VerificationFailed with what differs.
    """
    where = f"{store.uri}/{entry.path}"
    data = store.read(entry.path)
    if data is None:
        raise VerificationFailed(f"{where}: is gone, though the version refers to it")
    if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise VerificationFailed(f"{where}: {len(data)} bytes that are not the {entry.bytes} it was published with")
    table = pq.read_table(io.BytesIO(data), columns=["id", "shard"])
    counted = pc.value_counts(table.column("shard").cast(pa.string())).to_pylist()
    per_shard = {value["values"]: value["counts"] for value in counted}
    expected = {shard.name: shard.vectors if is_data else shard.rejects for shard in entry.shards}
    if per_shard != {name: rows for name, rows in expected.items() if rows} or table.num_rows != entry.rows:
        raise VerificationFailed(f"{where}: rows per shard differ from the manifest's counts")
    ids = set(table.column("id").to_pylist())
    if is_data and len(ids) != table.num_rows:
        raise VerificationFailed(f"{where}: {table.num_rows - len(ids)} ids stand there twice")
    return ids


def verify_table(opened: Table) -> None:
    """Check every file of a version against its manifest, and that no id stands in two of them.

    Raises VerificationFailed with the first thing that differs.
    """
    manifest = opened.manifest
    if opened.store.read(f"{encoder_path(manifest.space_id)}/encoder.json") is None:
        raise VerificationFailed(f"{opened.store.uri}: the encoder of space {manifest.space_id} is gone")
    seen: set[str] = set()
    for entry in manifest.files:
        ids = verify_file(opened.store, entry, is_data=True)
        if twice := seen & ids:
            raise VerificationFailed(
                f"{opened.store.uri}/{entry.path}: {len(twice)} ids stand in another file too: {min(twice)} …"
            )
        seen |= ids
    for entry in manifest.rejects:
        verify_file(opened.store, entry, is_data=False)
    if len(seen) != manifest.counts["vectors"]:
        raise VerificationFailed(f"{opened.store.uri}: holds {len(seen)} vectors, its manifest says {manifest.counts}")
