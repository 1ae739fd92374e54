"""What a run says with `--log-format json`, and the line that sums it up."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from jobs import ROOT, run_here, tiny_recipe, write_job, write_tars
from lora_embed.cli.main import nightly_job, run_command
from lora_embed.monitor.ending import MOST_CHARACTERS, Ending, exit_code_of, gist
from s3 import free_ports
from samples import png, tar_of

FACTS = {"table": "s3://bucket/tables/products", "run_id": "20261127T020003Z-ab12cd"}


def json_run(script: str, job: Path, **environment: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, stdout and the objects of stderr; every line of it must be one."""
    command = [sys.executable, str(ROOT / "jobs" / script), "--config", str(job), "--log-format", "json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment)
    return ended.returncode, ended.stdout, [json.loads(line) for line in ended.stderr.splitlines()]


@pytest.mark.slow
def test_a_run_that_fails_says_so_in_objects(tmp_path: Path) -> None:
    source = write_tars(tmp_path / "shards", shards=2, images=6)
    (source / "0001.tar").write_bytes((source / "0001.tar").read_bytes()[:2000])
    (source / "0002.tar").write_bytes(tar_of([("a.png", png(99)), ("text.png", b"plain text")]))
    job = write_job(tmp_path, tiny_recipe(tmp_path), source, chunk_size=4)
    [port] = free_ports(1)
    code, output, said = json_run("embed.py", job, LORA_EMBED_METRICS_PORT=str(port))
    assert (code, output) == (1, "")
    assert {one["table"] for one in said} == {str(tmp_path / "table")}
    [run_id] = {one["run_id"] for one in said}
    assert (tmp_path / "table" / "runs" / run_id / "state.json").exists()
    assert [one["time"] for one in said] == sorted(one["time"] for one in said)
    assert all(one["time"].endswith("Z") and datetime.fromisoformat(one["time"]) for one in said)
    events = {event: [one for one in said if one["event"] == event] for event in {one["event"] for one in said}}
    assert [one["url"].rpartition(":")[2] for one in events["metrics"]] == [f"{port}/metrics"]
    [failed] = events["shard_failed"]
    assert (failed["level"], failed["shard"], failed["may_pass"]) == ("warning", "0001.tar", False)
    [rejects] = events["rejects"]
    assert (rejects["shard"], rejects["chunk"], rejects["rejects"]) == ("0002.tar", 0, {"not_an_image": 1})
    progress = events["progress"][-1]
    assert (progress["samples"], progress["rejects"], progress["shards"], progress["shards_failed"]) == (8, 1, 3, 1)
    [error] = events["error"]
    assert (error["level"], error["error"]) == ("error", "IncompleteRun")
    assert said[-1]["event"] == "end"
    assert (said[-1]["exit_code"], said[-1]["outcome"], said[-1]["embedded"], said[-1]["shards_done"]) == (1, "failed", 8, 2)


def test_a_refusal_is_an_object_too(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("recipe: recipe.yaml\ninput: shards\ntabel: table\n")
    code, output, (error, end) = json_run("reembed_nightly.py", tmp_path / "job.yaml")
    assert (code, output) == (2, "")
    assert (error["event"], error["level"], error["error"]) == ("error", "error", "ConfigError")
    assert "unknown key 'tabel'" in error["message"]
    assert (end["event"], end["exit_code"]) == ("end", 2)
    assert end["message"].startswith("end: refused, exit 2 · ")


def test_a_log_file_on_a_full_disk_is_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    run_command(["status", "/nowhere"])
    logger, handler = logging.getLogger("of.a.library"), logging.FileHandler("/dev/full")
    logger.addHandler(handler)
    logger.error("is written nowhere")
    logger.removeHandler(handler)
    with contextlib.suppress(OSError):
        handler.close()
    assert "Traceback" not in capfd.readouterr().err


def test_the_last_line_sums_a_run_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=2, images=6)
    job = write_job(tmp_path, tiny_recipe(tmp_path), source)

    def last_line(*arguments: str) -> str:
        capfd.readouterr()
        nightly_job(["--config", str(job), *arguments])
        return capfd.readouterr().err.splitlines()[-1]

    published = last_line()
    pattern = r"end: done, exit 0 · …\S+/table · version 1 published · 12 embedded in 0:\d\d · bound by \w+ · run \S+"
    assert re.fullmatch(pattern, published), published
    assert re.search(r" · version 1 is current · 0 embedded in 0:\d\d · run \S+$", last_line())
    (source / "0002.tar").write_bytes(tar_of([("text.png", b"plain text")]))
    stopped = last_line()
    assert stopped.startswith("end: not done, exit 1 · ")
    assert " · rejects: 1 of 1 new sample cannot be embedded" in stopped
    assert " · a person must decide · run " in stopped
    assert max(len(published), len(stopped)) <= MOST_CHARACTERS
    assert run_command(["status", str(tmp_path / "table")]) == 0  # no run: no last line
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("cause", ["short", "long " * 200])
def test_a_last_line_fits_a_message(cause: str) -> None:
    advice = "run the same command again"
    facts = FACTS | {"table": "s3://bucket/" + "folder/" * 20 + "products", "embedded": 12_345_678, "outcome": "failed"}
    line = Ending(code=1, seconds=45_296.0, cause=cause, advice=advice).describe(facts)
    assert len(line) <= MOST_CHARACTERS
    assert line.startswith("end: not done, exit 1 · …")
    assert line.endswith(f" · {advice} · run {FACTS['run_id']}")
    assert f" · {cause[:6].strip()}" in line


@pytest.mark.parametrize(
    ("message", "summary"),
    [
        ("one line", "one line"),
        ("two\nlines", "two lines"),
        ("not published:\n  the only cause", "the only cause"),
        ("not published:\n  the first cause\n  another\n  and another", "the first cause (and 2 more)"),
    ],
)
def test_a_message_is_summed_up_by_its_first_cause(message: str, summary: str) -> None:
    assert gist(message) == summary


def test_a_full_disk_says_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: Path("/dev/full").write_text("x")) == 1
    said = capsys.readouterr().err
    assert "No space left on device. Free space there. What is committed stays." in said
    assert "Traceback" not in said
