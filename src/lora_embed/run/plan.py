"""Show what a run would do, and how long it would take, without writing anything."""

import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_embed.chain import cluster, pipeline
from lora_embed.chain.items import EncoderSource, Pass, WorkItem
from lora_embed.config.models import JobConfig
from lora_embed.errors import ConfigError, IncompleteRun
from lora_embed.model.description import Description
from lora_embed.monitor.stages import Workers, add_seconds, find_bound, seconds_an_image
from lora_embed.monitor.timeline import Timeline
from lora_embed.run import work
from lora_embed.run.count import Images, count_images
from lora_embed.run.decide import Decision, decide
from lora_embed.run.layout import any_layout, ask_device, layout_of, leaves_open
from lora_embed.schema import ChunkHead, Layout, encoder_path
from lora_embed.shards.listing import describe_passed
from lora_embed.shards.read import count_samples
from lora_embed.store.store import Store
from lora_embed.table.manifest import place_of
from lora_embed.text import number_of, rough_span
from lora_embed.vectors.health import seeded_sample

SHARDS_AN_ACTOR, IMAGES_A_SHARD = 3, 32  # size of the sample that a forecast embeds


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """How long a run would take here, estimated from a few images that were embedded for it."""

    images: int  # estimated from bytes if the number is not known
    seconds: float  # the start and the embedding; publication takes a few more
    start_seconds: float
    images_per_second: float
    cost: float | None  # in the currency of the job's prices; None if the job has no prices
    bound: str  # a sentence that says what limits the speed

    def describe(self) -> str:
        """For a person."""
        cost = f", {self.cost:,.2f} at your prices" if self.cost is not None else ""
        return (
            f"forecast  about {self.images:,} images at {self.images_per_second:,.1f} a second and {self.start_seconds:.0f} s "
            f"to start: {rough_span(self.seconds)}{cost}\n          {self.bound}"
        )


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a run would do."""

    table: str
    space_id: str | None  # None: the encoder has yet to be built
    version: int | None  # current
    shards: int
    bytes: int
    images: Images  # of the input
    done: int  # shards published or complete in staging
    partly_done: int
    to_embed: int
    to_embed_bytes: int
    to_embed_images: Images
    may_take_over: int  # those of the shards to embed of whose images the table has vectors, if their bytes are the same
    removed: int  # shards of the current version in whose place the input has nothing more
    changed: int = 0  # in whose place it has another file, or other images
    added_columns: tuple[str, ...] = ()  # that the next version has, and the current one has not
    removed_columns: tuple[str, ...] = ()
    retyped_columns: tuple[str, ...] = ()  # that have another type in the next version
    remark: str = ""  # what a person should know of it
    replaced_space: str | None = None  # the space whose vectors a nightly run would replace
    passed_over: dict[str, int] = field(default_factory=dict)  # files of the input that are no shards, by kind
    forecast: Forecast | None = None

    def describe(self) -> str:
        """For a person."""
        table = f"version {self.version}" if self.version else "nothing published"
        encoder = f"space {self.space_id}" if self.space_id else "not built yet"
        replaced = f", replaces space {self.replaced_space}" if self.replaced_space else ""
        left = f"{number_of(self.to_embed, 'shard')}, {self.to_embed_bytes / 1e6:,.1f} MB: {self.to_embed_images.describe()}"
        lines = [
            f"table     {self.table}, {table}",
            f"encoder   {encoder}{replaced}",
            f"input     {number_of(self.shards, 'shard')}, {self.bytes / 1e6:,.1f} MB: {self.images.describe()}",
            *([f"passed    {describe_passed(self.passed_over)} passed over"] if self.passed_over else []),
            f"done      {number_of(self.done, 'shard')}, and {self.partly_done:,} in part",
            f"{'to read ' if self._is_known else 'to embed'}  {left}",
            *self._says_of_known(),
            *([f"columns   {'; '.join(changes)}"] if (changes := self._changes_of_columns()) else []),
            *([f"changed   {number_of(self.changed, 'shard')} of version {self.version}"] if self.changed else []),
            *([f"removed   {number_of(self.removed, 'shard')} of version {self.version}"] if self.removed else []),
            *([f"note      {self.remark}"] if self.remark else []),
            *([self.forecast.describe()] if self.forecast is not None else []),
        ]
        return "\n".join(lines)

    @property
    def _is_known(self) -> bool:
        """Whether version `version` may have images of all shards that are to be read."""
        return 0 < self.to_embed == self.may_take_over

    def _says_of_known(self) -> list[str]:
        if not self.may_take_over:
            return []
        which = "" if self._is_known else f"of {number_of(self.may_take_over, 'shard')} among these, "
        return [f"          {which}only images that version {self.version} does not have are embedded"]

    def _changes_of_columns(self) -> list[str]:
        changes = (("adds", self.added_columns), ("removes", self.removed_columns), ("changes", self.retyped_columns))
        return [f"{change} {', '.join(names)}" for change, names in changes if names]


def plan_job(job: JobConfig, *, forecasts: bool = False, replaces: bool = False) -> Outlook:
    """List input and table and find what a run would do. Writes nothing; starts no cluster unless `forecasts` is set.

    `replaces`: what a nightly run would do. The encoder is built in a temporary folder, unless the table has it or is new.
    Raises the same errors as `run_job`, as far as they can be found by reading.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        decision = decide(job, Path(scratch), replaces=replaces, builds=forecasts)
        opened, encoder, layout = decision.opened, decision.encoder, decision.layout
        store, shards, current = opened.store, opened.shards, opened.current
        if encoder is not None and layout is not None:
            items = work.find_work(job, store, encoder, layout, shards)
        else:
            items = [WorkItem(shard=shard) for shard in shards]
        prepare_s = time.monotonic() - began
        images = count_images(shards, any_layout(job), job.input_storage_options)
        published = current.shards if current is not None else {}
        gone = set(published) - {shard.id for shard in shards}
        places = {place_of(shard.name) for shard in shards}
        removed = {shard_id for shard_id in gone if place_of(published[shard_id].name) not in places}
        return Outlook(
            table=job.table,
            space_id=encoder.space_id if encoder else None,
            version=current.version if current else None,
            shards=len(shards),
            bytes=sum(shard.size for shard in shards),
            images=images,
            done=len(shards) - len(items),
            partly_done=sum(1 for item in items if item.done),
            to_embed=len(items),
            to_embed_bytes=sum(item.shard.size for item in items),
            to_embed_images=_left(job, images, len(shards), items),
            may_take_over=sum(1 for item in items if item.known is not None),
            removed=len(removed),
            changed=len(gone - removed),
            **(_changes_of_columns(dict(current.carry), job) if current is not None else {}),
            remark=decision.remark,
            replaced_space=current.space_id if current and encoder and current.space_id != encoder.space_id else None,
            passed_over=opened.listing.passed_over,
            forecast=forecast(decision, items, prepare_s) if forecasts and items else None,
        )


def _changes_of_columns(columns: dict[str, str], job: JobConfig) -> dict[str, tuple[str, ...]]:
    """How a job's carried fields differ from a version's columns (name → type), as fields of an Outlook."""
    carried = {field.name: field.type for field in job.carry}
    return {
        "added_columns": tuple(name for name in carried if name not in columns),
        "removed_columns": tuple(name for name in columns if name not in carried),
        "retyped_columns": tuple(
            f"{name} from {columns[name]} to {kind}" for name, kind in carried.items() if columns.get(name, kind) != kind
        ),
    }


def _left(job: JobConfig, of_all: Images, shards: int, items: list[WorkItem]) -> Images:
    """The images of the work items without those of chunks that are done; `of_all` are the images of all shards."""
    counted = of_all
    if len(items) < shards:
        counted = count_images([item.shard for item in items], any_layout(job), job.input_storage_options)
    left = max(0, counted.number - sum(len(item.done) for item in items) * job.chunk_size)
    return replace(counted, number=left if job.limit is None else min(left, job.limit))


def forecast(decision: Decision, items: list[WorkItem], prepare_s: float) -> Forecast:
    """Embed the first images of a few shards on the cluster, discard the vectors, and estimate the time of a run.

    `prepare_s` are the seconds that were needed to list the input and build the encoder, which a run needs too. Raises
    ConfigError if the encoder is not on the table's storage and other nodes cannot reach it on this machine; IncompleteRun if
    no image of the sample can be read.
    """
    timeline = Timeline()
    job, store, encoder = decision.opened.job, decision.opened.store, decision.encoder
    assert encoder is not None, "it was built"
    cluster.connect()
    topology = cluster.choose_topology(job.resources)
    uri = _place_of(decision, encoder)
    layout = decision.layout or layout_of(job, ask_device(topology) if leaves_open(job) else {})
    limit = max(IMAGES_A_SHARD, 2 * layout.batch_size)  # batches that are mostly padding would give a wrong estimate
    layout = replace(layout, limit=limit)
    sample = _sample(items, SHARDS_AN_ACTOR * topology.workers.actors, limit)
    options = job.table_storage_options if uri.startswith(store.uri) else {}
    place = EncoderSource(uri=uri, options=options, description=encoder, base=decision.opened.base)
    shared = replace(Pass.of(job, Store("memory://forecast"), encoder, layout), encoders=(place,))
    chunks = []
    for stats in pipeline.embed_items(sample, shared, topology):
        timeline.add(stats.samples, stats.seconds, stats.ended)
        if not stats.error:
            chunks.append(stats)
    images = _count_images(job, layout, items, sample)
    return reckon(job, chunks, images, prepare_s + (timeline.began_s or 0.0), topology.workers)


def reckon(job: JobConfig, chunks: list[ChunkHead], images: int, start_seconds: float, workers: Workers) -> Forecast:
    """Estimate from the times of some chunks. If there are enough, each actor's first chunk, which fills caches, is ignored."""
    counted = [stats for stats in (chunks[workers.actors :] or chunks) if stats.samples]
    if not counted:
        raise IncompleteRun("no image of the forecast's sample could be read. Check the input with `lora-embed run`.")
    samples = sum(stats.samples for stats in counted)
    typical = {
        stage: statistics.median(stats.seconds.get(stage, 0.0) / stats.samples for stats in counted) * samples
        for stage in {stage for stats in counted for stage in stats.seconds}
    }
    spent: dict[str, float] = {}
    add_seconds(spent, typical)
    an_image = seconds_an_image(spent, samples, workers)
    seconds = start_seconds + images * an_image
    has_prices = job.prices.cpu_hour is not None or job.prices.gpu_hour is not None
    cpus, gpus = workers.readers * workers.cpus_per_decoder, workers.actors if workers.decoders else 0
    an_hour = cpus * (job.prices.cpu_hour or 0.0) + gpus * (job.prices.gpu_hour or 0.0)
    return Forecast(
        images=images,
        seconds=round(seconds, 1),
        start_seconds=round(start_seconds, 1),
        images_per_second=round(1 / an_image, 2) if an_image else 0.0,
        cost=round(seconds / 3600 * an_hour, 4) if has_prices else None,
        bound=find_bound(spent, an_image * samples, workers).says,
    )


def _place_of(decision: Decision, encoder: Description) -> str:
    """Where actors load the encoder: from the table's storage, or from this machine if it is the only node."""
    job, store = decision.opened.job, decision.opened.store
    if decision.folder is None:
        return f"{store.uri}/{encoder_path(encoder.space_id)}"
    if cluster.count_nodes() > 1 and not job.shared_filesystem:
        raise ConfigError(
            f"{job.table}: does not hold the encoder yet, and other nodes cannot reach it on this machine. Run the job once "
            "with --set limit=1, which stores the encoder, then ask for the forecast again."
        )
    return str(decision.folder)


def _sample(items: list[WorkItem], count: int, limit: int) -> list[WorkItem]:
    """The first images of a few shards, chosen by seed; chunks that are already done are embedded again."""
    by_name = {item.shard.name: item for item in items}
    chosen = seeded_sample(by_name, count)
    return [replace(by_name[name], done=frozenset(), limit=limit) for name in chosen]


def _count_images(job: JobConfig, layout: Layout, items: list[WorkItem], sample: list[WorkItem]) -> int:
    """Estimate the number of images to embed from the bytes of all shards and the images of the sampled ones."""
    sampled = sum(count_samples(item.shard, layout, job.input_storage_options, job.limit or 10**9) for item in sample)
    size = sum(item.shard.size for item in sample)
    total = round(sampled * sum(item.shard.size for item in items) / max(size, 1))
    done = sum(len(item.done) * layout.chunk_size for item in items)
    return max(0, (min(total, job.limit) if job.limit is not None else total) - done)
