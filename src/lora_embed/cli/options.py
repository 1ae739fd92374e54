"""Code that commands share: options, finding the job or table that an argument names, printing a result."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_embed.config.models import JobConfig, load_job
from lora_embed.config.recognise import TABLE, refuse_other
from lora_embed.errors import ConfigError, TableError
from lora_embed.monitor.progress import LogFormat, log_as, shown
from lora_embed.text import number_of, without_secrets

if TYPE_CHECKING:
    from lora_embed.store.store import Store
    from lora_embed.table.read import Table

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the job file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Version = Annotated[int | None, typer.Option(help="The version to read; by default the current one.")]
MessageLog = Annotated[LogFormat, typer.Option("--log-format", callback=log_as, help="Format of messages on stderr.")]
Group = Annotated[str | None, typer.Option(metavar="FIELD", help="Images with the same value stay in one part.")]
TableOrJob = Annotated[
    str, typer.Argument(metavar="TABLE", help="URI or path of a table, or a job file, for its table and storage options.")
]


def job_of(argument: str, overrides: list[str] | None = None) -> JobConfig | None:
    """The job, if a job file (.yaml or .yml) is named in place of a table or an input; else None.

    Raises ConfigError for a wrong job file, and for overrides without a job file.
    """
    path = Path(argument)
    if "://" not in argument and path.suffix in (".yaml", ".yml") and not path.is_dir():
        return load_job(path, overrides)
    if overrides:
        key = overrides[0].partition("=")[0]
        raise ConfigError(f"--set {key}=…: changes a key of a job file, but {argument} is not a job file. Name the job file.")
    return None


def input_of(data: list[str]) -> JobConfig | None:
    """The job, if `--data` names a job file; None if it names inputs. Raises ConfigError for both at once."""
    jobs = [name for name in data if "://" not in name and Path(name).suffix in (".yaml", ".yml")]
    if jobs and len(data) > 1:
        raise ConfigError(
            f"--data names the job file {jobs[0]} and {number_of(len(data) - 1, 'other input')}. Name only the job file."
        )
    return job_of(data[0]) if jobs else None


def read_as(job: JobConfig | None) -> dict[str, Any]:
    """A job's settings for reading its images, as `evaluate` and `tune` take them; empty without a job."""
    if job is None:
        return {}
    names = ("image_column", "key_column", "image_member", "leave_out", "follow_folder_links")
    from lora_embed.run.open import references_of  # here, since it imports more than most commands need

    settings = {"input_options": job.input_storage_options, "references": references_of(job)}
    return settings | {name: getattr(job, name) for name in names}


def options_like(place: str, known_uris: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Storage options of known places, if another place has the same kind of storage; else none, so keys stay secret."""
    kinds = {uri.partition("://")[0] for uri in known_uris if "://" in uri}
    return options if "://" in place and place.partition("://")[0] in kinds else {}


@dataclass(frozen=True, kw_only=True)
class Named:
    """The table that TABLE names, and the job if TABLE is a job file."""

    store: "Store"
    job: JobConfig | None

    def open(self, version: int | None) -> "Table":
        """Open a version, by default the current one. Raises TableError if it does not exist."""
        from lora_embed.table.read import open_table

        return open_table(self.store.uri, version, self.store.options)

    @property
    def input_options(self) -> dict[str, Any]:
        """Storage options of the images that the table is made from."""
        return {} if self.job is None else self.job.input_storage_options

    @property
    def inputs(self) -> tuple[str, ...]:
        """Places of the images that the table is made from, as the user's own job file names them."""
        return () if self.job is None else self.job.input

    def options_of(self, image: str) -> dict[str, Any]:
        """Storage options of an image that is named beside the table."""
        return {} if self.job is None else options_like(image, self.job.input, self.input_options)


def find_table(argument: str, overrides: list[str] | None) -> Named:
    """Find the table that TABLE names.

    Raises ConfigError for a job file that is wrong, and StorageError for a table that cannot be reached.
    """
    from lora_embed.store.local import correct_the_path
    from lora_embed.store.store import Store

    job = job_of(argument, overrides)
    if job is None:
        refuse_other(argument, TABLE, "a table, or a job file")
    store = Store(argument) if job is None else Store(job.table, job.table_storage_options)
    store.check_reachable()
    if store.is_local and not Path(store.full_path("")).exists():
        remedy = correct_the_path(argument) if job is None else f"`lora-embed run {argument}` makes it."
        raise TableError(f"{store.uri}: there is no table yet. {remedy}")
    return Named(store=store, job=job)


def print_result(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a result on stdout, as JSON or as text."""
    print(json.dumps(without_secrets(result)) if as_json else shown(text))
