"""Decide what a run does with a job, before anything is written: `run` carries it out, `plan` shows it."""

from dataclasses import dataclass
from pathlib import Path

from lora_embed.config.models import JobConfig
from lora_embed.gates import judge
from lora_embed.model.description import Description, read_description
from lora_embed.model.keep import keep_id
from lora_embed.run.encoders import prepare_encoder
from lora_embed.run.layout import any_layout, known_layout
from lora_embed.run.open import OpenJob, open_job
from lora_embed.run.refuse import refuse_absent_fields, refuse_space, refuse_unusable
from lora_embed.run.take_over import kept_reading
from lora_embed.schema import Layout, encoder_path


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A job that a run can carry out, as far as reading shows."""

    opened: OpenJob
    encoder: Description | None  # None: a new table's, which is not built yet
    folder: Path | None = None  # where the encoder is, if the table does not have it
    layout: Layout | None = None  # None: not known before a cluster was asked
    is_current: bool = False  # the current version holds exactly this

    @property
    def remark(self) -> str:
        """What a person should know of it before it begins; empty for most jobs."""
        current = self.opened.current
        if current is None or self.encoder is None or current.space_id != self.encoder.space_id:
            return ""
        return kept_reading(current, any_layout(self.opened.job))


def decide(job: JobConfig, scratch: Path, *, replaces: bool = False, releases: bool = False, builds: bool = True) -> Decision:
    """Open a job and check all that can be checked without a cluster. `scratch` is a folder for an encoder to be built.

    Without `builds`, the encoder of a new table is not built, but its adapters are matched to its base. Raises ConfigError,
    and GateFailed for a space that a rollback holds back.
    """
    judge.limits_of(job)
    opened = open_job(job)
    if opened.encoder is not None:
        refuse_space(opened, opened.encoder, replaces=replaces, releases=releases)
        if is_current(opened):
            return Decision(opened=opened, encoder=opened.encoder, layout=opened.known_layout(), is_current=True)
    refuse_unusable(opened)
    refuse_absent_fields(opened)
    if opened.encoder is not None:
        return Decision(opened=opened, encoder=opened.encoder, layout=opened.known_layout())
    if not builds and opened.current is None:
        if not isinstance(opened.source, Path):
            from lora_embed.model.build import match_adapters  # imports torch and peft, which takes seconds

            match_adapters(opened.source)
            return Decision(opened=opened, encoder=None)
        return Decision(opened=opened, encoder=read_description(opened.source), folder=opened.source)
    folder = _build_or_take(opened, scratch)
    encoder = read_description(folder)
    refuse_space(opened, encoder, replaces=replaces, releases=releases)
    layout = known_layout(job, opened.store, encoder, opened.current)
    return Decision(opened=opened, encoder=encoder, folder=folder, layout=layout)


def is_current(opened: OpenJob) -> bool:
    """Does the current version hold exactly these shards, with this job's encoder and settings? Then no cluster is needed."""
    current, encoder = opened.current, opened.encoder
    if current is None or encoder is None or current.space_id != encoder.space_id:
        return False
    layout = opened.known_layout()
    if layout is None or opened.job.limit is not None or current.pins != layout.pins:
        return False
    return set(current.shards) == {shard.id for shard in opened.shards}


def _build_or_take(opened: OpenJob, scratch: Path) -> Path:
    """Build or take the directory of an encoder that the table does not have; it keeps the id that an older release gave."""
    folder, current, store = prepare_encoder(opened.source, scratch / "encoder"), opened.current, opened.store
    if current is None:
        return folder
    return keep_id(folder, scratch / "kept", f"{store.uri}/{encoder_path(current.space_id)}", store.options, opened.base)
