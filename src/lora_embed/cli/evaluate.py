"""`lora-embed evaluate` and `jobs/evaluate.py`: make a request from options, evaluate it, print and write the result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from lora_embed.cli.options import Group, Json, MessageLog, input_of, options_like, read_as
from lora_embed.config.models import JobConfig
from lora_embed.config.paths import absolute
from lora_embed.config.values import PrecisionOrAuto
from lora_embed.errors import ConfigError, StorageError
from lora_embed.monitor.progress import LogFormat

if TYPE_CHECKING:
    from lora_embed.evaluate.request import Request

PRECISIONS = get_args(PrecisionOrAuto)
_LISTED = f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
Many = list[str] | None
Data = Annotated[Many, typer.Option(metavar="INPUT", help="Labelled shards, as `input` of a job, or a job file. Repeatable.")]


def evaluate(
    recipe: Annotated[Many, typer.Option(help="Recipe file or encoder directory. Repeatable.")] = None,
    data: Data = None,
    label: Annotated[Many, typer.Option(metavar="FIELD", help="Field with a task's class. Repeatable.")] = None,
    group: Group = None,
    split: Annotated[str | None, typer.Option(metavar="FIELD", help="Your own split: bank or train, query or test …")] = None,
    splits: Annotated[int, typer.Option(help="Number of seeded splits; two thirds of the images are the bank.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the splits.")] = 0,
    reference: Annotated[str | None, typer.Option(metavar="NAME", help="Candidate to compare with, else the base.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Also evaluate the base and each single adapter.")] = False,
    heads: Annotated[bool, typer.Option(help="Evaluate the adapters' own heads on every candidate.")] = True,
    head: Annotated[Many, typer.Option(metavar="ADAPTER=FIELD", help="The task of an adapter's head.")] = None,
    classes: Annotated[Many, typer.Option(metavar="FIELD=FILE", help="Classes in the order of a head's outputs.")] = None,
    precision: Annotated[str, typer.Option(help=f"{_LISTED}.")] = "auto",
    work: Annotated[str | None, typer.Option(metavar="URI", help="Folder to keep encoders and vectors in.")] = None,
    shared_filesystem: Annotated[bool, typer.Option("--shared-filesystem", help="All nodes mount the local paths.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the evaluation as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the evaluation as an HTML page.")] = None,
    as_json: Json = False,
    log_format: MessageLog = LogFormat.TEXT,
) -> None:
    """Compare recipes on labelled images: metrics on seeded splits, and paired differences to a reference."""
    _check_options(precision, out, report)
    from lora_embed.evaluate.request import Request

    job = input_of(data or [])
    request = Request(
        recipes=tuple(absolute(Path.cwd(), path) for path in recipe or ()),
        inputs=tuple(absolute(Path.cwd(), path) for path in data or ()) if job is None else job.input,
        labels=tuple(label or ()),
        group=group,
        split=split,
        splits=splits,
        seed=seed,
        reference=reference,
        alone=alone,
        judges_heads=heads,
        heads=dict(_pair("--head", "ADAPTER=FIELD", text) for text in head or ()),
        head_classes=dict(_read_classes(text) for text in classes or ()),
        precision=precision,
        work=None if work is None else absolute(Path.cwd(), work),
        shared_filesystem=shared_filesystem,
        **({} if job is None else _reached_as(job, work or "")),
    )
    _evaluate(request, out, report, as_json)


def _evaluate(request: "Request", out: Path | None, report: Path | None, as_json: bool) -> None:
    from lora_embed.evaluate.assess import assess
    from lora_embed.evaluate.page.evaluation import write_report
    from lora_embed.evaluate.show import print_evaluation

    evaluation = assess(request)
    if out is not None:
        out.write_text(evaluation.to_json() + "\n", encoding="utf-8", errors="backslashreplace")
    if report is not None:
        write_report(evaluation, report)
    if as_json:
        print(evaluation.to_json())
    else:
        print_evaluation(evaluation)


def _check_options(precision: str, out: Path | None, report: Path | None) -> None:
    """Check options before minutes of work. Raises ConfigError, and StorageError for files that cannot be written."""
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision is {precision!r}, expected {_LISTED}")
    for option, path in (("--out", out), ("--report", report)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise StorageError(f"{option} {path}: is a directory, or its directory does not exist. Name a file.")


def _reached_as(job: JobConfig, work: str) -> dict[str, Any]:
    """A job's settings for reading its images, and its table's storage options for a work folder of the same kind."""
    return read_as(job) | {"work_options": options_like(work, (job.table,), job.table_storage_options)}


def _pair(option: str, expected: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise ConfigError(f"{option} {text}: expected {option} {expected}")
    return name, value


def _read_classes(text: str) -> tuple[str, tuple[str, ...]]:
    """Read a task's classes, one a line, in the order of a head's outputs."""
    name, path = _pair("--classes", "FIELD=FILE", text)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--classes {text}: {path} cannot be read: {reason}. Give a file with one class per line.") from None
    return name, tuple(line.strip() for line in lines if line.strip())
