"""The command `lora-embed tune`: make a search from its options, run it, print the result."""

import enum
import json
from pathlib import Path
from typing import Annotated

import typer

from lora_embed.cli.options import Group, Json, MessageLog, input_of, read_as
from lora_embed.errors import ConfigError
from lora_embed.monitor.progress import LogFormat


class Objective(enum.StrEnum):
    """What the search maximises."""

    WORST = "worst"
    MEAN = "mean"


Data = Annotated[
    list[str], typer.Option(metavar="INPUT", help="Labelled shards: tar, Parquet, pattern; or a job file. Repeatable.")
]
Best = Annotated[Objective, typer.Option(help="Maximise the worst task's gain over its adapter, or the mean.")]


def tune(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML): the base and 2 to 5 adapters.")],
    data: Data,
    label: Annotated[
        list[str], typer.Option(metavar="[ADAPTER=]FIELD[:IMPORTANCE]", help="Field with a task's label. Repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Recipe file to write.")],
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Time for trials; 10 unless --evaluations is given.")] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Number of merges to try.")] = None,
    objective: Best = Objective.WORST,
    methods: Annotated[str | None, typer.Option(metavar="METHOD,…", help="Methods to try; all by default.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Write the best trial even if its lead is within noise.")] = False,
    group: Group = None,
    images: Annotated[int, typer.Option(min=1, help="Labelled images to use at most, drawn by seed.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of splits and of the search.")] = 0,
    work: Annotated[Path | None, typer.Option(help="Folder for trials and pixels; beside --out by default.")] = None,
    as_json: Json = False,
    log_format: MessageLog = LogFormat.TEXT,
) -> None:
    """Search the weights and method of a merge on labelled images; test the winner on images that the search did not use."""
    from lora_embed.config.models import load_recipe

    loaded, job = load_recipe(recipe), input_of(data)
    names = _names_in(methods)
    from lora_embed.tune.goal import Budget, Search, read_label  # imports torch, which takes seconds
    from lora_embed.tune.tune import tune as tune_recipe

    search = Search(
        recipe=loaded,
        inputs=tuple(data) if job is None else job.input,
        tasks=tuple(map(read_label, label)),
        out=out,
        budget=Budget(evaluations=evaluations, minutes=10.0 if minutes is None and evaluations is None else minutes),
        objective=objective.value,
        methods=names,
        takes_best=best,
        group=group,
        seed=seed,
        most_images=images,
        work=work,
        **read_as(job),
    )
    tuned = tune_recipe(search)
    print(json.dumps(tuned.as_json()) if as_json else tuned.describe())


def _names_in(methods: str | None) -> tuple[str, ...]:
    """The names that `--methods` lists; none without the option. Raises ConfigError for an option that names none."""
    names = tuple(name.strip() for name in (methods or "").split(",") if name.strip())
    if methods is not None and not names:
        raise ConfigError(f"--methods is {methods!r}, which names no method. Name one or more, or omit the option for all.")
    return names
