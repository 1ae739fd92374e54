"""What other code than Python writes to stderr: shown like other messages, and not lost, even if the process dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_embed.monitor import relay
from terminal import run_on_terminal

HARMLESS = f"[2026-11-30 17:11:32,723 E 349 349] core_worker.cc:2465: Actor with class name: 'A' {relay.HARMLESS[0]}."
BEGIN = """
import os, signal, subprocess, sys, threading
from lora_embed.monitor.relay import Relay
def told(line): print("told", line, file=sys.stderr)
"""
TWICE = r"""
with Relay(told):
    os.write(2, b"one\n  two\n\n")
    subprocess.run(["sh", "-c", "echo of a child >&2"])
    print("python's own", file=sys.stderr)
os.write(2, b"after\n")
with Relay(told):
    os.write(2, b"again\n")
"""
DIES = r"""
stop = threading.Lock()
stop.acquire()
with Relay(lambda line: stop.acquire()):
    for number in range(2000):
        os.write(2, b"line %d of a long message about what went wrong\n" % number)
    os.kill(os.getpid(), SIGNAL)
"""
WRONG = r"""
with Relay(told):
    os.write(2, HARMLESS + b"\nwrong\n")
"""
LIVE = r"""
import os, time
from lora_embed.monitor.progress import Progress
from lora_embed.monitor.stages import Workers
from lora_embed.schema import ChunkHead
with Progress([], Workers(actors=1)) as progress:
    progress.add(ChunkHead(shard_id="a", shard_name="a", prefix="a", samples=3))
    time.sleep(0.5)
    os.write(2, HARMLESS + b"\nthe disk is full\n")
    time.sleep(0.5)
os.write(2, b"after the job\n")
"""


def stderr_of(script: str) -> tuple[int, list[str]]:
    ended = subprocess.run([sys.executable, "-c", BEGIN + script], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    return ended.returncode, ended.stderr.splitlines()


def test_lines_are_told_while_the_block_runs_and_no_longer() -> None:
    code, lines = stderr_of(TWICE)
    assert code == 0
    assert sorted(lines) == sorted(["told one", "told   two", "told of a child", "python's own", "after", "told again"])
    assert lines[-2:] == ["after", "told again"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGABRT])
def test_what_nobody_has_read_is_not_lost_if_the_process_dies(sent: signal.Signals) -> None:
    """The thread that reads waits in vain here, as it does for Python's own lock when other code holds that and dies."""
    code, lines = stderr_of(DIES.replace("SIGNAL", str(int(sent))))
    assert code == -sent
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert numbers == list(range(numbers[0], 2000))
    assert numbers[0] < 400  # those before were in the hands of the thread


def test_what_is_harmless_is_not_shown() -> None:
    assert stderr_of(WRONG.replace("HARMLESS", repr(HARMLESS.encode()))) == (0, ["told wrong"])


def test_a_stderr_that_python_has_moved_elsewhere_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = os.fstat(2).st_ino
    with relay.Relay(lambda line: pytest.fail(line)):
        assert os.fstat(2).st_ino == before
        os.write(2, b"as it is\n")
    assert capfd.readouterr().err == "as it is\n"


def test_a_message_stands_above_the_live_line(tmp_path: Path) -> None:
    script = LIVE.replace("HARMLESS", repr(HARMLESS.encode()))
    shown = run_on_terminal([sys.executable, "-c", script], width=80, folder=tmp_path)
    assert shown.code == 0
    screens = [[line for line in screen if line] for screen in shown.screens]
    assert any(screen[0] == "the disk is full" and screen[-1].startswith("3 samples") for screen in screens if screen)
    for screen in screens:
        assert "object store" not in " ".join(screen)
        assert screen.count("the disk is full") <= 1
        assert len([line for line in screen if line.startswith("3 samples")]) <= 1
    assert screens[-1][0] == "the disk is full"
    assert screens[-1][1].startswith("3 samples · ")
    assert screens[-1][2:] == ["after the job"]
