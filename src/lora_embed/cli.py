"""The command line: parse, call, print."""

import enum
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_embed.cli_evaluate import evaluate
from lora_embed.cli_tune import tune
from lora_embed.config import load_job, load_recipe
from lora_embed.ending import end_process, exit_code_of
from lora_embed.errors import ConfigError
from lora_embed.progress import LogFormat, log_as, note, say, shown
from lora_embed.record import without_secrets

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Merge LoRA adapters into one encoder, and keep its embeddings of many images as a versioned Parquet table.",
)

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the job file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML).")]
Log = Annotated[LogFormat, typer.Option("--log-format", callback=log_as, help="How stderr is written.")]
TableUri = Annotated[str, typer.Argument(metavar="TABLE", help="URI or path of a table.")]


class Store(enum.StrEnum):
    """How an encoder's weights are kept."""

    MODEL = "model"
    ADAPTER = "adapter"


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")],
    out: Annotated[Path, typer.Option(help="Directory to write the encoder to.")],
    store: Annotated[Store, typer.Option(help="Whole weights, or the base's name and one merged LoRA adapter.")] = Store.MODEL,
    rank: Annotated[int | None, typer.Option(min=1, help="With --store adapter: its largest rank.")] = None,
    energy: Annotated[float, typer.Option(help="With --store adapter: share of the change's squared norm to keep.")] = 1.0,
    as_json: Json = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Merge a recipe's adapters into an encoder directory, with its merge report."""
    from lora_embed.model.build import build_encoder, gather
    from lora_embed.model.fold import Limit

    if store is Store.MODEL and (rank is not None or energy != 1.0):
        raise ConfigError("--rank and --energy say how much of the merge an adapter keeps. Add --store adapter.")
    if not 0 < energy <= 1:
        raise ConfigError(f"--energy is {energy:g}, expected more than 0 and at most 1")
    limit = Limit(rank=rank, energy=energy) if store is Store.ADAPTER else None
    description = build_encoder(gather(load_recipe(recipe)), out, say, limit)
    result = {"encoder": str(out), "space_id": description.space_id, "dimension": description.dimension}
    _print(result, as_json, f"{out}: encoder of space {description.space_id}, {description.dimension} dimensions")


@app.command()
def plan(
    job: JobFile,
    set_: Set = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="Embed a few images on the cluster to say how long.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a run would do, by listing alone; write nothing."""
    from lora_embed.outlook import plan_job

    outlook = plan_job(load_job(job, set_), forecasts=forecast)
    _print(asdict(outlook), as_json, outlook.describe())


@app.command()
def run(
    job: JobFile,
    set_: Set = None,
    publish: Annotated[bool, typer.Option(help="Publish a version once everything is embedded.")] = True,
    as_json: Json = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Build the encoder if needed, embed what is missing, verify, publish."""
    _run(job, set_, as_json, publishes=publish)


@app.command()
def publish(
    job: JobFile,
    set_: Set = None,
    release: Annotated[bool, typer.Option("--release", help="Publish a space that a rollback holds back.")] = False,
    accept: Annotated[list[str] | None, typer.Option(metavar="GATE", help="Let a failed gate through.")] = None,
    why: Annotated[str, typer.Option(help="The reason for that, kept in the version.")] = "",
    as_json: Json = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Publish what is staged as the next version, without embedding anything."""
    from lora_embed.run import publish_job

    if accept and not why.strip():
        raise ConfigError("--accept lets a failed gate through. Say why with --why: the version keeps the reason.")
    result = publish_job(load_job(job, set_), releases=release, accepted=dict.fromkeys(accept or [], why))
    _print(asdict(result), as_json, result.describe())


@app.command()
def rollback(
    table: TableUri,
    to: Annotated[int, typer.Option(metavar="VERSION", help="The version whose content is to be current again.")],
    why: Annotated[str, typer.Option(help="The reason, kept in the new version.")],
    as_json: Json = False,
) -> None:
    """Make an earlier version's content the next version, and hold back the space that it replaces."""
    from lora_embed.storage import Store as TableStore
    from lora_embed.versions import roll_back

    manifest = roll_back(TableStore(table, {}), to, _reason(why))
    held = f"; held back: {', '.join(manifest.held)}" if manifest.held else ""
    result = {"table": table, "version": manifest.version, "space_id": manifest.space_id, "held": manifest.held}
    _print(result, as_json, f"version {manifest.version} has the content of version {to}, space {manifest.space_id}{held}")


@app.command()
def explain(table: TableUri, id: str, version: int | None = None, as_json: Json = False) -> None:
    """Say where a row came from: image, shard, encoder, adapters, and the first version that holds it."""
    from lora_embed.lineage import explain_row
    from lora_embed.table import open_table

    explanation = explain_row(open_table(table, version), id)
    _print(asdict(explanation), as_json, explanation.describe())


@app.command()
def forget(
    table: TableUri,
    ids: Annotated[list[str], typer.Argument(metavar="ID…", help="Ids of images.")],
    why: Annotated[str, typer.Option(help="The reason, kept in the new version.")],
    as_json: Json = False,
) -> None:
    """Publish a version without these images, keep them out, and retire the versions that hold them."""
    from lora_embed.lineage import forget as forget_images
    from lora_embed.storage import Store as TableStore

    forgotten = forget_images(TableStore(table, {}), ids, _reason(why))
    _print(asdict(forgotten), as_json, forgotten.describe())


@app.command()
def gc(
    table: TableUri,
    job: Annotated[Path | None, typer.Option("--job", metavar="JOB", help="Job file whose `retain` counts.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Retire old versions, and remove what no version has needed for the grace period, as each night does."""
    from lora_embed.retention import collect_garbage

    loaded = load_job(job) if job is not None else None
    options, retain = (loaded.table_storage_options, loaded.retain) if loaded is not None else ({}, None)
    collected = collect_garbage(table, options, retain, is_dry_run=dry_run)
    _print(asdict(collected), as_json, collected.describe())


@app.command()
def status(
    table: TableUri,
    metrics: Annotated[bool, typer.Option("--metrics", help="Print gauges for Prometheus on stdout.")] = False,
    as_json: Json = False,
) -> None:
    """Show a table's versions, what is staged for the next, the runs that go on and how the last ones ended."""
    from lora_embed.runs import describe_runs, read_runs, to_prometheus
    from lora_embed.status import describe_table
    from lora_embed.storage import Store as TableStore

    state, runs = describe_table(table), read_runs(TableStore(table, {}))
    described = "\n".join([state.describe(), *describe_runs(runs)])
    text = to_prometheus(table, state.version, runs) if metrics else described
    _print(asdict(state) | {"runs": [run.to_dict() for run in runs]}, as_json, text)


@app.command()
def verify(table: TableUri, version: int | None = None, as_json: Json = False) -> None:
    """Read a version's files again and check sums, counts, ids and space."""
    from lora_embed.table import open_table
    from lora_embed.verify import verify_table

    opened = open_table(table, version)
    verify_table(opened)
    counts = opened.manifest.counts
    files = len(opened.manifest.files) + len(opened.manifest.rejects)
    result = {"table": table, "version": opened.version, "files": files, "counts": counts}
    _print(result, as_json, f"version {opened.version}: {files} files, {_counted(counts)}; sums, counts and ids are right")


@app.command()
def export(
    table: TableUri,
    to: Annotated[str, typer.Option(metavar="KIND", help="faiss-flat, faiss-ivf, faiss-hnsw or lance.")],
    out: Annotated[Path, typer.Option(help="New directory to write the index to.")],
    version: Annotated[int | None, typer.Option(help="Another version than the current one.")] = None,
    as_json: Json = False,
) -> None:
    """Write a version's vectors as an index for search by cosine."""
    from lora_embed.export import export_index
    from lora_embed.table import open_table

    about = export_index(open_table(table, version), to, out)
    text = f"{out}: {about.kind} index of {about.count:,} vectors, version {about.version}, space {about.space_id}"
    _print({"index": str(out)} | asdict(about), as_json, text)


@app.command()
def search(
    table: TableUri,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Path or URI of the image to look for.")],
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many to find.")] = 10,
    index: Annotated[Path | None, typer.Option(help="Search this index, which `export` wrote, not all vectors.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page that shows what was found.")] = None,
    version: Annotated[int | None, typer.Option(help="Another version than the current one.")] = None,
    as_json: Json = False,
) -> None:
    """Find the images of a table that are nearest to one, by the table's own encoder."""
    from lora_embed.search import find_pictures, search_image, write_page
    from lora_embed.table import open_table

    opened = open_table(table, version)
    found = search_image(opened, image, k, index)
    text = found.describe()
    if page is not None:
        pictures = find_pictures(opened, found.hits)
        write_page(found, pictures, page)
        text += f"\n{page}: {len(pictures)} of {len(found.hits)} with their pictures"
    names = ("image", "table", "version", "space_id", "method", "count")
    result = {name: getattr(found, name) for name in names} | {"hits": [asdict(hit) for hit in found.hits]}
    _print(result, as_json, text)


@app.command()
def demo(folder: Annotated[Path, typer.Argument(help="Where everything is written.")] = Path("demo-run")) -> None:
    """All of it on real images, in minutes: merge, embed, publish, compare, search."""
    from lora_embed.demo.tour import run_demo

    folder.mkdir(parents=True, exist_ok=True)
    run_demo(folder, say)


app.command()(tune)
app.command()(evaluate)


def embed(
    config: Annotated[Path, typer.Option(help="Job file (YAML).")],
    set_: Set = None,
    publish: bool = True,
    as_json: Json = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Build the encoder if needed, embed what is missing, verify, publish."""
    _run(config, set_, as_json, publishes=publish)


def reembed_nightly(
    config: Annotated[Path, typer.Option(help="Job file (YAML).")],
    set_: Set = None,
    release: Annotated[bool, typer.Option("--release", help="Publish a space that a rollback holds back.")] = False,
    as_json: Json = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Embed what is stale: new and changed shards, or everything where the recipe makes another space; publish."""
    _run(config, set_, as_json, replaces=True, releases=release)


def embed_job(arguments: list[str]) -> int:
    """`jobs/embed.py`: `--config JOB [--set KEY=VALUE …] [--no-publish] [--json]`; returns the exit code."""
    return _exit_code_of_job(embed, arguments)


def nightly_job(arguments: list[str]) -> int:
    """`jobs/reembed_nightly.py`: `--config JOB [--set KEY=VALUE …] [--release] [--json]`; returns the exit code."""
    return _exit_code_of_job(reembed_nightly, arguments)


def evaluate_job(arguments: list[str]) -> int:
    """`jobs/evaluate.py`, with the options of `lora-embed evaluate`; returns the exit code."""
    return _exit_code_of_job(evaluate, arguments)


def _exit_code_of_job(command: Callable[..., None], arguments: list[str]) -> int:
    entry = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    entry.command()(command)
    return exit_code_of(lambda: entry(arguments, prog_name=f"{command.__name__}.py"))


def main() -> None:
    """The `lora-embed` command."""
    end_process(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """`lora-embed` with these arguments; returns the exit code."""
    return exit_code_of(lambda: app(arguments, prog_name="lora-embed"))


def _run(path: Path, overrides: list[str] | None, as_json: bool, **how: bool) -> None:
    note(is_run=True)  # from here on a last line says how it ended
    job = load_job(path, overrides)
    from lora_embed.run import run_job

    result = run_job(job, **how)
    _print(asdict(result), as_json, result.describe())


def _reason(why: str) -> str:
    if not why.strip():
        raise ConfigError("--why is empty. Say why: the version keeps the reason.")
    return why


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(without_secrets(result)) if as_json else shown(text))
