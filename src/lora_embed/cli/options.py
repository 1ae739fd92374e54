"""What commands share: their options, what an argument names, and how a result is printed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_embed.config.models import JobConfig, load_job
from lora_embed.errors import ConfigError
from lora_embed.monitor.progress import shown
from lora_embed.text import without_secrets

if TYPE_CHECKING:
    from lora_embed.store.store import Store
    from lora_embed.table.read import Table

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the job file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
TableOrJob = Annotated[
    str, typer.Argument(metavar="TABLE", help="URI or path of a table, or a job file: its table, reached with its options.")
]


def job_of(named: str, overrides: list[str] | None = None) -> JobConfig | None:
    """The job whose file (.yaml or .yml) is named where a table or an input may be; None where that itself is named.

    Raises ConfigError for a job file that is wrong, and for overrides without one.
    """
    path = Path(named)
    if "://" not in named and path.suffix in (".yaml", ".yml") and not path.is_dir():
        return load_job(path, overrides)
    if overrides:
        key = overrides[0].partition("=")[0]
        raise ConfigError(f"--set {key}=…: changes a job file, and {named} is none. Name the job file in its place.")
    return None


def input_of(data: list[str]) -> JobConfig | None:
    """The job whose file stands for all of `--data`; None where inputs are named. Raises ConfigError for both at once."""
    jobs = [name for name in data if "://" not in name and Path(name).suffix in (".yaml", ".yml")]
    if jobs and len(data) > 1:
        raise ConfigError(f"--data names the job file {jobs[0]} and {len(data) - 1} inputs besides. Name the job file alone.")
    return job_of(data[0]) if jobs else None


def read_as(job: JobConfig | None) -> dict[str, Any]:
    """How a job's images are read, as evaluating and tuning take it; nothing where inputs are named without a job."""
    if job is None:
        return {}
    return {"input_options": job.input_storage_options, "image_column": job.image_column, "key_column": job.key_column}


def options_like(place: str, known: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The options of known places for another one, where it is of their kind of storage: keys are sent nowhere else."""
    kinds = {uri.partition("://")[0] for uri in known if "://" in uri}
    return options if "://" in place and place.partition("://")[0] in kinds else {}


@dataclass(frozen=True, kw_only=True)
class Named:
    """The table that TABLE names, and the job where it is a job file."""

    store: "Store"
    job: JobConfig | None

    def open(self, version: int | None) -> "Table":
        """A version, by default the current one. Raises TableError where there is none."""
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
        """Those of an image that is named beside the table."""
        return {} if self.job is None else options_like(image, self.job.input, self.input_options)


def find_table(named: str, overrides: list[str] | None) -> Named:
    """What TABLE names; the one place where commands find a table.

    Raises ConfigError for a job file that is wrong, and StorageError for a table that cannot be reached.
    """
    from lora_embed.store.store import Store

    job = job_of(named, overrides)
    store = Store(named) if job is None else Store(job.table, job.table_storage_options)
    store.check_reachable()
    return Named(store=store, job=job)


def print_result(result: dict[str, Any], as_json: bool, text: str) -> None:
    """On stdout, as JSON or for a person."""
    print(json.dumps(without_secrets(result)) if as_json else shown(text))
