"""The commands and job scripts: parse options, call a function, print its result."""

import enum
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lora_embed.cli.evaluate import evaluate
from lora_embed.cli.options import Json, Set, print_result
from lora_embed.cli.tables import TABLE_COMMANDS
from lora_embed.cli.tune import tune
from lora_embed.config.models import load_job, load_recipe
from lora_embed.errors import ConfigError
from lora_embed.installed import versions
from lora_embed.monitor.ending import end_process, exit_code_of
from lora_embed.monitor.progress import LogFormat, log_as, note, say
from lora_embed.text import number_of

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Merge LoRA adapters into one encoder, and keep its embeddings of many images as a versioned Parquet table.",
)

# The options of `run` and of the job scripts, which take the same ones: a test compares their lists.
JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML).")]
Config = Annotated[Path, typer.Option(help="Job file (YAML).")]
Publish = Annotated[bool, typer.Option(help="Publish a version once everything is embedded.")]
Nightly = Annotated[
    bool, typer.Option("--nightly", help="As the nightly job, which may replace the vectors of another encoder.")
]
Release = Annotated[bool, typer.Option("--release", help="Publish a space that a rollback holds back.")]
Log = Annotated[LogFormat, typer.Option("--log-format", callback=log_as, help="Format of progress and messages on stderr.")]


class Store(enum.StrEnum):
    """How an encoder's weights are stored."""

    MODEL = "model"
    ADAPTER = "adapter"


def _show_versions(asked: bool) -> None:
    if asked:
        print(versions())
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_versions, help="Show the versions in use and exit.")
    ] = False,
) -> None:
    """Options that stand before the name of a command."""


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")],
    out: Annotated[Path, typer.Option(help="Directory to write the encoder to.")],
    store: Annotated[Store, typer.Option(help="Store whole weights, or one merged adapter and the base's name.")] = Store.MODEL,
    rank: Annotated[int | None, typer.Option(min=1, help="With --store adapter: the adapter's largest rank.")] = None,
    energy: Annotated[float, typer.Option(help="With --store adapter: share of the change's squared norm to keep.")] = 1.0,
    as_json: Json = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Merge a recipe's adapters into an encoder directory, with its merge report."""
    from lora_embed.model.description import check_out
    from lora_embed.model.ingredients import find_ingredients

    if store is Store.MODEL and (rank is not None or energy != 1.0):
        raise ConfigError("--rank and --energy limit the adapter that --store adapter writes. Add --store adapter.")
    if not 0 < energy <= 1:
        raise ConfigError(f"--energy is {energy:g}, expected more than 0 and at most 1")
    loaded = load_recipe(recipe)
    check_out(out)
    found = find_ingredients(loaded)
    from lora_embed.model.build import build_encoder  # imports torch, which takes seconds
    from lora_embed.model.fold import Limit
    from lora_embed.report.encoder import write_encoder_page

    found.check()
    limit = Limit(rank=rank, energy=energy) if store is Store.ADAPTER else None
    description = build_encoder(found, out, say, limit)
    report = write_encoder_page(out)
    result = {"encoder": str(out), "space_id": description.space_id, "dimension": description.dimension, "report": str(report)}
    size = number_of(description.dimension, "dimension")
    print_result(result, as_json, f"{out}: encoder of space {description.space_id}, {size}\nreport: {report}")


@app.command()
def plan(
    job: JobFile,
    set_: Set = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="Embed a few images to estimate the time.")] = False,
    nightly: Nightly = False,
    as_json: Json = False,
) -> None:
    """Show what a run would do, or why it would refuse; write nothing."""
    from lora_embed.run.plan import plan_job

    outlook = plan_job(load_job(job, set_), forecasts=forecast, replaces=nightly)
    idle = "\nforecast  there is nothing to embed" if forecast and outlook.forecast is None else ""
    print_result(asdict(outlook), as_json, f"{outlook.describe()}{idle}")


@app.command()
def run(
    job: JobFile,
    set_: Set = None,
    publish: Publish = True,
    nightly: Nightly = False,
    as_json: Json = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Build the encoder if needed, embed what is missing, verify, publish."""
    _run(job, set_, as_json, publishes=publish, replaces=nightly)


@app.command()
def publish(
    job: JobFile,
    set_: Set = None,
    release: Release = False,
    accept: Annotated[list[str] | None, typer.Option(metavar="GATE", help="Publish even if this gate fails.")] = None,
    why: Annotated[str, typer.Option(help="The reason for --accept, kept in the version.")] = "",
    as_json: Json = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Publish what is staged as the next version, without embedding anything."""
    from lora_embed.run.job import publish_job

    if accept and not why.strip():
        raise ConfigError("--accept publishes although a gate fails. Give the reason with --why: the version keeps it.")
    result = publish_job(load_job(job, set_), releases=release, accepted=dict.fromkeys(accept or [], why))
    print_result(asdict(result), as_json, result.describe())


@app.command()
def demo(folder: Annotated[Path, typer.Argument(help="Folder to write everything to.")] = Path("demo-run")) -> None:
    """Show everything on real images, in minutes: merge, embed, publish, compare, search."""
    from lora_embed.demo.tour import run_demo

    run_demo(folder, say)


for command in (*TABLE_COMMANDS, tune, evaluate):
    app.command()(command)


def embed(
    config: Config, set_: Set = None, publish: Publish = True, as_json: Json = False, log_format: Log = LogFormat.TEXT
) -> None:
    """Build the encoder if needed, embed what is missing, verify, publish."""
    _run(config, set_, as_json, publishes=publish)


def reembed_nightly(
    config: Config, set_: Set = None, release: Release = False, as_json: Json = False, log_format: Log = LogFormat.TEXT
) -> None:
    """Embed new and changed shards, or everything if the recipe makes another space; then publish."""
    _run(config, set_, as_json, replaces=True, releases=release)


def embed_job(arguments: list[str]) -> int:
    """Run `jobs/embed.py`: `--config JOB [--set KEY=VALUE …] [--no-publish] [--json]`; returns the exit code."""
    return _exit_code_of_job(embed, arguments)


def nightly_job(arguments: list[str]) -> int:
    """Run `jobs/reembed_nightly.py`: `--config JOB [--set KEY=VALUE …] [--release] [--json]`; returns the exit code."""
    return _exit_code_of_job(reembed_nightly, arguments)


def evaluate_job(arguments: list[str]) -> int:
    """Run `jobs/evaluate.py`, with the options of `lora-embed evaluate`; returns the exit code."""
    return _exit_code_of_job(evaluate, arguments)


def _exit_code_of_job(command: Callable[..., None], arguments: list[str]) -> int:
    entry = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    entry.command()(command)
    return exit_code_of(lambda: entry(arguments, prog_name=f"{command.__name__}.py"))


def main() -> None:
    """The `lora-embed` command."""
    end_process(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run `lora-embed` with these arguments; returns the exit code."""
    return exit_code_of(lambda: app(arguments, prog_name="lora-embed"))


def _run(path: Path, overrides: list[str] | None, as_json: bool, **options: bool) -> None:
    note(is_run=True)  # so that the process ends with a last line
    job = load_job(path, overrides)
    from lora_embed.run.job import run_job

    result = run_job(job, **options)
    print_result(asdict(result), as_json, result.describe())
