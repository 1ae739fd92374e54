"""The commands that read a published table, or change which content is current."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lora_embed.cli.options import Json, Set, TableOrJob, Version, find_table, print_result
from lora_embed.config.recognise import IMAGE, TABLE, recognise
from lora_embed.errors import ConfigError
from lora_embed.text import agree, counted, number_of


def rollback(
    table: TableOrJob,
    to: Annotated[int, typer.Option(metavar="VERSION", help="The earlier version whose content becomes current again.")],
    why: Annotated[str, typer.Option(help="The reason, kept in the new version.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Publish an earlier version's content as the next version, and hold back the space that it replaces."""
    from lora_embed.table.versions import roll_back

    reason, store = _reason(why), find_table(table, set_).store
    manifest = roll_back(store, to, reason)
    held_back = f"; held back: {', '.join(manifest.held)}" if manifest.held else ""
    result = {"table": store.uri, "version": manifest.version, "space_id": manifest.space_id, "held": manifest.held}
    print_result(
        result, as_json, f"version {manifest.version} has the content of version {to}, space {manifest.space_id}{held_back}"
    )


def explain(
    table: TableOrJob,
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of a row.")],
    version: Version = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show where a row came from: image, shard, encoder, adapters, and the first version that holds it."""
    from lora_embed.table.lineage import explain_row

    explanation = explain_row(find_table(table, set_).open(version), id)
    print_result(asdict(explanation), as_json, explanation.describe())


def forget(
    table: TableOrJob,
    ids: Annotated[list[str], typer.Argument(metavar="ID…", help="Ids of images.")],
    why: Annotated[str, typer.Option(help="The reason, kept in the new version.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Publish a version without these images, keep them out of later versions, and retire the versions that hold them."""
    from lora_embed.table.lineage import forget as forget_images

    reason = _reason(why)
    forgotten = forget_images(find_table(table, set_).store, ids, reason)
    print_result(asdict(forgotten), as_json, forgotten.describe())


def gc(
    table: TableOrJob,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed; write nothing.")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Retire old versions, and remove files that no version has needed for the grace period, as each run does."""
    from lora_embed.table.retention import collect_garbage

    target = find_table(table, set_)
    retain = target.job.retain if target.job is not None else None
    collected = collect_garbage(target.store.uri, target.store.options, retain, is_dry_run=dry_run)
    print_result(asdict(collected), as_json, collected.describe())


def status(
    table: TableOrJob,
    metrics: Annotated[bool, typer.Option("--metrics", help="Print gauges for Prometheus on stdout.")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show a table's versions, its staged parts, the live runs, and how the last runs ended."""
    from lora_embed.monitor.runs import describe_runs, read_runs, to_prometheus
    from lora_embed.table.status import describe_table

    store = find_table(table, set_).store
    state, runs = describe_table(store.uri, store.options), read_runs(store)
    described = "\n".join([state.describe(), *describe_runs(runs)])
    text = to_prometheus(store.uri, state.version, runs) if metrics else described
    print_result(asdict(state) | {"runs": [run.to_dict() for run in runs]}, as_json, text)


def verify(table: TableOrJob, version: Version = None, set_: Set = None, as_json: Json = False) -> None:
    """Read a version's files again and check their SHA-256, counts and ids, and that the encoder exists."""
    from lora_embed.table.verify import verify_table

    opened = find_table(table, set_).open(version)
    verify_table(opened)
    counts = opened.manifest.counts
    files = len(opened.manifest.files) + len(opened.manifest.rejects)
    result = {"table": opened.store.uri, "version": opened.version, "files": files, "counts": counts}
    print_result(
        result,
        as_json,
        f"version {opened.version}: {number_of(files, 'file')}, {counted(counts)}; sums, counts and ids are right",
    )


def export(
    table: TableOrJob,
    to: Annotated[str, typer.Option(metavar="KIND", help="faiss-flat, faiss-ivf, faiss-hnsw or lance.")],
    out: Annotated[Path, typer.Option(help="New directory to write the index to.")],
    version: Version = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Write a version's vectors as an index for search by cosine similarity."""
    from lora_embed.search.export import export_index

    index = export_index(find_table(table, set_).open(version), to, out)
    text = f"{out}: {index.kind} index of {number_of(index.count, 'vector')}, version {index.version}, space {index.space_id}"
    print_result({"index": str(out)} | asdict(index), as_json, text)


def search(
    table: TableOrJob,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Path or URI of the image to look for.")],
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Number of images to find.")] = 10,
    index: Annotated[Path | None, typer.Option(help="Search this index, written by `export`.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page that shows the images found.")] = None,
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="INPUT", help="With --page: read pictures from there, if it is the table's input."),
    ] = None,
    version: Version = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Find the images of a table that are nearest to an image, which the table's own encoder embeds."""
    from lora_embed.search.search import find_pictures, search_image

    _refuse_swapped(table, image)
    target = find_table(table, set_)
    opened = target.open(version)
    result = search_image(opened, image, k, index, target.options_of(image))
    text = result.describe()
    if page is not None:
        from lora_embed.search.page import write_page

        pictures = find_pictures(opened, result.hits, target.input_options, (*target.inputs, *(input_ or ())))
        write_page(result, pictures, page)
        shown = f"{len(pictures)} of {number_of(len(result.hits), 'image')}"
        text += f"\n{page}: shows {shown} with {agree(len(result.hits), 'its picture', 'their pictures')}"
    names = ("image", "table", "version", "space_id", "method", "count")
    fields = {name: getattr(result, name) for name in names} | {"hits": [asdict(hit) for hit in result.hits]}
    print_result(fields, as_json, text)


def _refuse_swapped(table: str, image: str) -> None:
    """Raises ConfigError for TABLE and IMAGE in the wrong order, and for an image that is something else."""
    thing, other = recognise(image), recognise(table)
    if thing is TABLE and other is not TABLE:
        first = f"{table} is {other.name}, and " if other is not None else ""
        raise ConfigError(f"{first}{image} is a table, but TABLE comes first. Write: lora-embed search {image} {table}")
    if thing is not None and thing is not IMAGE:
        raise ConfigError(thing.instead_of(image, image, "an image"))


def _reason(why: str) -> str:
    if not why.strip():
        raise ConfigError("--why is empty. Give the reason: the version keeps it.")
    return why


TABLE_COMMANDS = (rollback, explain, forget, gc, status, verify, export, search)
