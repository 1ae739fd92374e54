"""Open a job before anything is written: list its input, read its recipe, and find what its table already holds."""

from dataclasses import dataclass
from pathlib import Path

from lora_embed.config.models import JobConfig
from lora_embed.config.recognise import INPUT, TABLE, recognise, refuse_other
from lora_embed.errors import ConfigError
from lora_embed.model.description import Description
from lora_embed.model.ingredients import Ingredients
from lora_embed.run.encoders import find_encoder, find_source, named_base
from lora_embed.run.layout import known_layout
from lora_embed.schema import Layout, Shard
from lora_embed.shards.list_rows import References
from lora_embed.shards.listing import Listing, list_input
from lora_embed.store.store import Store
from lora_embed.table import versions
from lora_embed.table.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class OpenJob:
    """A job, and what was found by reading its input, recipe and table."""

    job: JobConfig
    store: Store  # the table's
    listing: Listing
    source: Ingredients | Path  # a recipe's files, read and hashed, or the directory of an encoder
    current: Manifest | None
    encoder: Description | None  # the encoder built from this source before, if the table's storage holds it completely

    @property
    def shards(self) -> list[Shard]:
        return self.listing.shards

    @property
    def base(self) -> str | None:
        """The place of the encoder's base that the user named. Raises EncoderError for a base that lies elsewhere."""
        return named_base(self.source)

    def known_layout(self) -> Layout | None:
        """None if the table lacks the encoder, or `auto` was never resolved. Raises TableError for settings that differ."""
        return known_layout(self.job, self.store, self.encoder, self.current) if self.encoder is not None else None


def references_of(job: JobConfig) -> References | None:
    """How the job's lists of references are read; None for a job whose input holds the images itself."""
    if job.reference_column is None:
        return None
    return References(
        column=job.reference_column,
        key_column=job.key_column,
        fields=tuple(field.name for field in job.carry),
        roots=job.reference_roots,
        checks=job.check_references,
        rejects_unreachable=job.reject_unreachable,
    )


def _refuse_mixed_up(job: JobConfig) -> None:
    """Raises ConfigError where the job's table is something else, or its input is a table."""
    if recognise(job.table) is not INPUT:
        refuse_other(job.table, TABLE, "a table, or a folder for a new one", f"table {job.table}")
    for place in job.input:
        if recognise(place) is TABLE:
            raise ConfigError(TABLE.instead_of(f"input {place}", place, "tars, Parquet files or images"))


def open_job(job: JobConfig) -> OpenJob:
    """List the job's input, read its recipe and find its table's current version.

    Raises ConfigError and StorageError, also for a table that cannot be written to.
    """
    _refuse_mixed_up(job)
    store = Store(job.table, job.table_storage_options)
    store.check_reachable()
    store.check_writable()
    current = versions.manifest_to_follow(store)
    listing = list_input(
        job.input,
        job.input_storage_options,
        fields=[carried.name for carried in job.carry],
        follows=job.follow_folder_links,
        references=references_of(job),
        leave_out=job.leave_out,
        known=[shard.name for shard in current.shards.values()] if current is not None else (),
    )
    source = find_source(job.recipe)
    return OpenJob(job=job, store=store, listing=listing, source=source, current=current, encoder=find_encoder(source, store))
