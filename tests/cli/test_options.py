"""The commands that run a job take the same options."""

import inspect
from collections.abc import Callable

from lora_embed.cli.main import embed, publish, reembed_nightly, run


def options_of(command: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """The options of a command that takes a job: all that follow the job file."""
    return dict(list(inspect.signature(command).parameters.items())[1:])


def test_the_script_that_embeds_takes_the_options_of_run() -> None:
    """The nights have a script of their own."""
    assert options_of(embed) == {name: option for name, option in options_of(run).items() if name != "nightly"}


def test_the_nightly_script_takes_them_too_and_always_publishes() -> None:
    releases = {"release": options_of(publish)["release"]}
    without = {name: option for name, option in options_of(run).items() if name not in ("publish", "nightly")}
    assert options_of(reembed_nightly) == without | releases
