"""What others wrote, printed: no line, metric or terminal is steered by it, and no URI tells what it holds."""

import json
import logging
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs import ROOT, write_job
from lora_embed.cli.main import run_command
from lora_embed.config.foreign import parse_json, parse_record
from lora_embed.config.models import load_job
from lora_embed.errors import ConfigError
from lora_embed.monitor.progress import LogFormat, log_as, say
from lora_embed.monitor.record import RunState
from lora_embed.monitor.runs import Run, describe_runs, to_prometheus
from lora_embed.store.store import Store
from lora_embed.table.versions import highest_version
from lora_embed.text import (
    agree,
    counted,
    holds_secret,
    in_lines,
    may_hold_secret,
    number_of,
    redacted,
    rough_span,
    size_of,
    whole_sentences,
)
from tables import noise_vectors, publish_vectors, spread

STATE = RunState(run_id="20260101T000000Z-000000", host="node", started="2026-01-01T00:00:00+00:00")
FORGED = "x\nend: done, exit 0"
SECRET = "hunter2PLANTED"
URIS = [
    "s3://user:{secret}@bucket/x",
    "s3://user:a/{secret}@bucket/x",
    "s3://user:a?{secret}@bucket/x",
    "s3://user:a@{secret}/b@bucket/x",
    "s3://bucket/x;sig={secret}",
    "s3://bucket/x#token={secret}",
    "s3://bucket/x?X-Amz-Signature={secret}",
    "s3://bucket/x&signature={secret}",
    "s3://bucket/x%3Bsig%3D{secret}",
    "s3://bucket/x%253Fsig%253D{secret}",
    "s3://user%3A{secret}%40bucket/x",
    "s3%3A%2F%2Fuser%3A{secret}%40bucket/x",
    "https://{secret}@host/x",
    "simplecache::https://user:{secret}@host/x",
    "zip://x::s3://bucket/x;token={secret}",
    "abfs://user:{secret}@account/x",
    "http://user:{secret}@[::1]:9000/x",
    "s3://user:'{secret}@bucket/x",
    "S3://user:{secret}@bucket/x",
]
# Names of objects and files, which are no URLs: shown with … in messages, since a text may hold any URI, but not refused.
NAMES = [
    "s3://bucket/photo?x=1.jpg",
    "s3://bucket/a?width=200&height=100",
    "s3a://bucket/a;v=2/x.tar",
    "gs://bucket/x#part=1.tar",
    "file:///data/a?x=1&y=2.tar",
    "simplecache::s3://bucket/x?size=2.tar",
    "s3://bucket/x%3Fsize%3D2.tar",
]
OTHERS = [
    "s3://bucket/x?Expires=1&AWSAccessKeyId={secret}",
    "s3://bucket/x?size=1&X-Amz-Security-Token={secret}",
    "gs://bucket/x?GoogleAccessId=me&Signature={secret}",
    "gs://bucket/x?X-Goog-Credential={secret}",
    "file:///x?password={secret}",
    "s3://bucket/x?api-key={secret}",
    "s3://bucket/x?versionId={secret}",
    "s3://bucket/x?a=1&sv=2020&sig={secret}",
    "s3://bucket/x%253Fsize%253D1%2526access_token%253D{secret}",
    "https://host/x?anything={secret}",
    "az://container/x?anything={secret}",
]
HARMLESS = [
    "s3://bucket/a@b.jpg",
    "s3://bucket/date=2026-01-01/x.tar",
    "s3://bucket/img?.tar",
    "http://host:9000/a@b.jpg",
    "http://[::1]:9000/a@b",
    "abfs://container@account/x",
    "sftp://me@host/x",
    "hf://owner/name@main",
    "s3://bucket/a;b/c",
    "s3://bucket/#1/x",
    "file:///C:/a@b",
    "/a:b/c@d",
]


@pytest.mark.parametrize("form", URIS + OTHERS)
def test_no_credential_in_a_uri_is_told_and_all_are_refused(form: str, tmp_path: Path) -> None:
    uri = form.format(secret=SECRET)
    assert holds_secret(uri)
    for text in (uri, f"{uri}: cannot be read", f'{{"input": "{uri}"}}', f"<{uri}>, and s3://bucket", f"('{uri}',)"):
        assert SECRET not in redacted(text), text
    assert SECRET not in str(ConfigError(f"{uri}: is wrong"))
    job = write_job(tmp_path, tmp_path / "recipe.yaml", tmp_path, table=uri)
    assert run_command(["plan", str(job)]) == 2


@pytest.mark.parametrize("uri", HARMLESS)
def test_places_without_credentials_stay_as_they_are(uri: str) -> None:
    assert not holds_secret(uri)
    if "me@" not in uri:  # whose user may be a token
        assert redacted(f"{uri}: is there") == f"{uri}: is there"


@pytest.mark.parametrize("uri", NAMES)
def test_a_name_that_looks_like_parameters_is_an_input(uri: str, tmp_path: Path) -> None:
    assert not holds_secret(uri)
    assert may_hold_secret(uri)  # a list's keys stay as they were: tables hold them
    assert load_job(write_job(tmp_path, tmp_path / "recipe.yaml", tmp_path, input=uri)).input == (uri,)


@pytest.mark.parametrize("piece", ["://a:", "%25", "s3://?", "#a", "a:", "://", "%3a%2f%2f", "@"])
def test_a_long_text_is_redacted_soon(piece: str) -> None:
    started = time.process_time()
    redacted("s3://" + piece * 50_000)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("field", ["run_id", "host", "doing", "bound", "error"])
@pytest.mark.parametrize("outcome", ["running", "failed", "published"])
@pytest.mark.parametrize("text", [FORGED, "\x1b[2J", "a\rend: done, exit 0", "\u2028end", "a\x85b"])
def test_a_state_forges_no_line_of_status(field: str, outcome: str, text: str) -> None:
    data = json.dumps(json.loads(STATE.to_json()) | {field: text, "outcome": outcome, "embedded": 3, "images_per_s": 1.0})
    state = RunState.from_json(data.encode())
    assert state is not None
    [line] = describe_runs([Run(state=state, heard=0.0, silent_s=1.0)])
    assert line.isprintable()


OUTCOMES = ['x"} 1\nevil 1', "running\n# HELP x", "a\\", 'b"', "\x1b[31m", "unknown", "", None, 7, ["running"]]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_that_is_none_is_no_run(outcome: Any) -> None:
    data = json.dumps(json.loads(STATE.to_json()) | {"outcome": outcome})
    assert RunState.from_json(data.encode()) is None


@pytest.mark.parametrize("name", ['a"} 1\nevil 1', "b\\", "c\nd 1", "\x1b[31m", 'e\\" 2', "f{g}"])
def test_no_text_adds_a_metric(name: str) -> None:
    text = to_prometheus(f"s3://bucket/{name}", 3, [Run(state=STATE, heard=9.0, silent_s=1.0)])
    samples = [sample for family in text_string_to_metric_families(text + "\n") for sample in family.samples]
    assert {sample.name for sample in samples} == {
        "lora_embed_table_version",
        "lora_embed_last_run_start_timestamp_seconds",
        "lora_embed_last_run",
    }
    assert len({sample.labels["table"] for sample in samples}) == 1


@pytest.mark.parametrize("command", [["status"], ["status", "--metrics"], ["gc", "--dry-run"]])
def test_no_command_prints_a_line_that_a_table_has_written(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = Path(publish_vectors(tmp_path / "table", spread(noise_vectors(4), 1)).store.uri)
    (table / "runs" / "x").mkdir(parents=True)
    texts = {"host": FORGED, "doing": f"{FORGED}\x1b[2J", "run_id": "r\nversion   9", "error": FORGED}
    (table / "runs" / "x" / "state.json").write_text(json.dumps(json.loads(STATE.to_json()) | texts))
    assert run_command([command[0], str(table), *command[1:]]) == 0
    said = capfd.readouterr()
    assert not any(line.startswith(("end:", "version   9")) for line in (said.out + said.err).splitlines())
    assert "\x1b" not in said.out + said.err


BUG = """
import sys, threading, warnings, logging
from lora_embed.monitor import ending
from lora_embed.cli import main
def command():
    name = "x\\x1b[31m\\nend: done, exit 0"
    if sys.argv[1] == "traceback": raise KeyError(name)
    if sys.argv[1] == "text": raise RuntimeError(name)
    if sys.argv[1] == "warning": warnings.warn(name)
    if sys.argv[1] == "log": logging.getLogger("library").error(name)
    if sys.argv[1] == "thread":
        thread = threading.Thread(target=lambda: int(name)); thread.start(); thread.join()
ending.exit_code_of(command)
"""


@pytest.mark.parametrize("way", ["traceback", "text", "warning", "log", "thread"])
def test_what_a_bug_a_warning_or_a_log_says_steers_no_terminal(way: str) -> None:
    ended = subprocess.run([sys.executable, "-c", BUG, way], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert "31m" in ended.stderr
    assert "\x1b" not in ended.stderr
    assert not any(line.startswith("end:") for line in ended.stderr.splitlines())


def test_a_message_of_several_lines_begins_once(capfd: pytest.CaptureFixture[str]) -> None:
    log_as(LogFormat.TEXT)
    say(f"error: shards/{FORGED}: is cut")
    assert capfd.readouterr().err == "error: shards/x\n  end: done, exit 0: is cut\n"
    assert in_lines(["a\nb", "c"]) == "a\\nb\nc"
    log_as(LogFormat.TEXT)
    hooks = (sys.excepthook, threading.excepthook, warnings.showwarning, logging.lastResort)
    assert all("lora_embed" in str(getattr(hook, "__module__", type(hook).__module__)) for hook in hooks[:1])


@pytest.mark.parametrize("said", [b"9" * 5000, b"9" * 9, b"-1", b"1\n2", b"\xff\xfe", b"1.0", b"0x1", "٣".encode(), b""])
def test_a_hint_that_is_no_number_is_passed_over(said: bytes, tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(4), 1))
    Store(table.store.uri).replace("CURRENT", said)
    assert highest_version(table.store) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"1" * 5000,
        b'{"a": 1e999}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 9223372036854775808}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b"[" * 80 + b"]" * 80,
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\xff"}',
        b"",
    ],
)
def test_json_that_no_reader_agrees_on_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(data)
    with pytest.raises(ValueError, match=r"\w"):
        parse_record(RunState, data)


@pytest.mark.parametrize(
    ("text", "most", "cut"),
    [
        ("One. Two.", 300, "One. Two."),
        ("The first sentence is here.\nThe second one is cut.", 40, "The first sentence is here."),
        ("A sentence without an end in reach", 20, "A sentence without …"),
        ("x" * 30, 10, "x" * 10 + " …"),
        ("See https://hub.example/api. Then set X=0.", 30, "See https://hub.example/api."),
        ("No. " + "word " * 20, 40, "No. word word word word word word word …"),
    ],
)
def test_a_librarys_message_is_cut_after_a_sentence_or_a_word(text: str, most: int, cut: str) -> None:
    assert whole_sentences(text, most) == cut


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "shard", "0 shards"),
        (1, "shard", "1 shard"),
        (1000, "shard", "1,000 shards"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (2, "query", "2 queries"),
        (2, "try", "2 tries"),
        (2, "day", "2 days"),
        (1.0, "CPU", "1 CPU"),
        (0.5, "day", "0.5 days"),
        (1, "labelled image", "1 labelled image"),
    ],
)
def test_a_number_has_its_noun_in_the_right_form(count: float, noun: str, text: str) -> None:
    assert number_of(count, noun) == text


def test_words_agree_with_a_number() -> None:
    assert [agree(count, "is", "are") for count in (0, 1, 2)] == ["are", "is", "are"]
    assert counted({"shards": 1, "samples": 900, "rejects": 0}) == "1 shard, 900 samples, 0 rejects"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (1000, "1 kB"), (1536, "1.54 kB"), (88_249_960, "88.2 MB"), (99_960, "100 kB"),
     (999_499, "999 kB"), (999_500, "1 MB"), (2**30, "1.07 GB"), (5 * 10**18, "5,000 PB")],
)  # fmt: skip
def test_a_number_of_bytes_is_in_the_unit_that_fits(count: int, text: str) -> None:
    assert size_of(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1, "about 1 s"), (89, "about 89 s"), (90, "about 2 minutes"), (3600, "about 60 minutes"), (5400, "about 1.5 hours")],
)
def test_an_estimated_time_is_rough(seconds: float, text: str) -> None:
    assert rough_span(seconds) == text
