"""Errors of this package come out of Ray whole: of several lines, with causes, from tasks and from constructors of actors."""

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data

from jobs import job_of, tiny_recipe, write_tars
from lora_embed import errors
from lora_embed.chain import pipeline
from lora_embed.cli.main import run_command
from lora_embed.errors import EncoderError, GateFailed, IncompleteRun, LoraEmbedError, carried_error, carries_errors
from lora_embed.run.job import run_job

MESSAGES = {
    "one line": "nothing was published",
    "several": "2 of 9 shards are not complete, so nothing was published:\n  a.tar: cut short\n  b.tar: is gone\n\nlast",
    "blank": "first\n\n\n   indented \n\ttab\ttab  ",
    "like a traceback": 'golden mismatch\n  File "/x/ray/_raylet.pyx", line 3, in f\n    call()\n    ^^^^\nValueError: no',
    "like a chain": "one\n\nDuring handling of the above exception, another exception occurred:\n\nTraceback",
    "like another": "one\nlora_embed.errors.ConfigError: two\nlora-embed-error:AAAA;\nlora-embed-error:W10=;",
    "characters": "größer \U0001f600 \u2028 \x1b[31mred\x00 \r\n %s {x} \\ 'quoted' \"twice\"",
    "long": "head\n" + "x" * 100_000 + "\n" + "\n".join(f"  shard {number:06d}.tar: gone" for number in range(4_000)) + "\nend",
}


def failing_actor() -> Any:
    """A class of this function's own, so that workers need not import this module, and torch with it."""

    class Fails:
        """Its constructor raises, also with a cause or while another error is handled."""

        @carries_errors
        def __init__(self, message: str, how: str) -> None:
            if how == "alone":
                raise GateFailed(message)
            try:
                raise EncoderError("the cause\nof it")
            except EncoderError as cause:
                if how == "from":
                    raise GateFailed(message) from cause
                raise GateFailed(message)  # noqa: B904 - the context is what is tried

        def __call__(self, batch: Any) -> Any:
            return batch

    return Fails


def raised_by_actor(message: str, how: str) -> LoraEmbedError:
    actor: Any = ray.remote(failing_actor()).options(num_cpus=0).remote(message, how)
    with pytest.raises(LoraEmbedError) as caught, pipeline._package_errors():
        ray.get(actor.__call__.remote(1))
    return caught.value


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("how", ["alone", "from", "within"])
def test_an_error_of_a_constructor_comes_out_whole(how: str) -> None:
    for name, message in MESSAGES.items():
        error = raised_by_actor(message, how)
        assert (type(error), str(error) == message) == (GateFailed, True), (name, str(error)[:300])


@pytest.mark.usefixtures("cluster")
def test_an_error_of_a_task_comes_out_whole() -> None:
    def fail(message: str) -> None:
        raise GateFailed(message)

    for message in MESSAGES.values():
        with pytest.raises(GateFailed) as caught:
            pipeline.map_tasks(fail, (), [message])
        assert str(caught.value) == message


@pytest.mark.usefixtures("cluster")
def test_an_error_of_a_constructor_comes_out_of_a_dataset_whole() -> None:
    pool = ray.data.ActorPoolStrategy(size=1)
    arguments = (MESSAGES["several"], "from")
    rows = ray.data.from_items([{"a": 1}]).map_batches(failing_actor(), fn_constructor_args=arguments, compute=pool, num_cpus=0)
    with pytest.raises(GateFailed, match="^" + re.escape(MESSAGES["several"]) + "$"), pipeline._package_errors():
        rows.take_all()


@pytest.mark.usefixtures("cluster")
def test_what_was_not_packed_is_read_to_the_end_of_its_traceback() -> None:
    class Plain:
        def __init__(self) -> None:
            try:
                raise EncoderError("the cause\nof it")
            except EncoderError as cause:
                raise GateFailed(MESSAGES["several"]) from cause

        def do(self) -> None: ...

    actor: Any = ray.remote(Plain).options(num_cpus=0).remote()
    with pytest.raises(GateFailed) as caught, pipeline._package_errors():
        ray.get(actor.do.remote())
    assert str(caught.value) == MESSAGES["several"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_golden_vectors_that_are_not_met_end_a_run_with_the_whole_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By an actor's own constructor, whose encoder says in several lines what it misses."""
    source = write_tars(tmp_path / "shards", shards=1, images=2)
    job = job_of(tmp_path, tiny_recipe(tmp_path), source)
    run_job(job, publishes=False)
    (golden,) = Path(job.table, "encoders").glob("*/golden/vectors.npy")
    golden.write_bytes(b"damaged\nin two lines")
    (source / "1.tar").write_bytes((source / "0000.tar").read_bytes())
    assert run_command(["run", str(tmp_path / "job.yaml")]) == 2
    said = capfd.readouterr().err
    assert re.search(r"error: .*vectors\.npy: is damaged \(.*Build the encoder again", said, re.S)


def test_text_that_tells_of_no_error_of_ours_is_none() -> None:
    assert carried_error("ValueError: no\n  lora_embed.errors.GateFailed: quoted") is None
    assert carried_error("lora-embed-error:!!; lora-embed-error:MQ==; lora-embed-error:A;") is None
    assert str(carried_error("lora_embed.errors.OfAnotherRelease: a\nb")) == "a\nb"
    assert type(carried_error("lora_embed.errors.redacted: a")) is IncompleteRun
    for name in ("errno", "json", "Any"):
        assert hasattr(errors, name)
        assert type(carried_error(f"lora_embed.errors.{name}: a")) is IncompleteRun
