"""Run one command and measure its whole process tree: wall time, CPU time and peak memory. Linux only.

The benchmark's process takes in orphans (`PR_SET_CHILD_SUBREAPER`), so that what a command leaves behind is counted and
ended: Ray's daemons outlive the driver that started them by a moment.
"""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
PERIOD_S = 0.1  # between two looks at what has arrived
LOOKS, FIRST_LOOK = 20, 3  # to one look at the memory, which takes a core 25 ms and more for a dozen processes
GRACE_S = 10.0  # for what a command leaves behind to end by itself


@dataclass(frozen=True, kw_only=True)
class Metered:
    """What one command took. `exit_code` is None where it ran past its limit and was killed."""

    exit_code: int | None
    started: float  # seconds since the epoch
    whole_s: float  # until the command itself ended
    cpu_s: float  # user and system time of all its processes
    peak_pss_bytes: int  # largest sum over the tree at one time; shared pages are counted once
    peak_rss_bytes: int  # the same with shared pages counted in each process


def adopt_orphans() -> None:
    """Make this process the parent of what its descendants leave behind, also when it is told to end; before any `run`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run(command: list[str], log: Path, environment: dict[str, str], limit_s: float, watch: Callable[[], object]) -> Metered:
    """Run a command to its end or its limit; its output goes to `log`. `watch` is called ten times a second."""
    before, others = _cpu_of_ended(), {child.pid for child in psutil.Process().children()}
    pss = rss = 0
    started = time.time()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
    exit_code: int | None = None
    looks = 0
    try:
        while exit_code is None and time.time() - started < limit_s:
            watch()
            if looks % LOOKS == FIRST_LOOK:
                sizes = _memory(_descendants(others))
                pss, rss = max(pss, sizes[0]), max(rss, sizes[1])
            looks += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                exit_code = process.wait(timeout=PERIOD_S)
        ended = time.time()
    finally:
        _end(others, 0 if exit_code is None else GRACE_S)
        process.wait()
    return Metered(
        exit_code=exit_code,
        started=started,
        whole_s=ended - started,
        cpu_s=_cpu_of_ended() - before,
        peak_pss_bytes=pss,
        peak_rss_bytes=rss,
    )


def _cpu_of_ended() -> float:
    """Seconds of all descendants that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _descendants(others: set[int]) -> set[psutil.Process]:
    """All processes below this one but those that were there before, and what is below those."""
    found: set[psutil.Process] = set()
    for child in psutil.Process().children():
        if child.pid not in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {child, *child.children(recursive=True)}
    return found


def _memory(processes: Iterable[psutil.Process]) -> tuple[int, int]:
    """(PSS, RSS) in bytes, summed."""
    pss = rss = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it ended meanwhile, or is ending
            full = process.memory_full_info()
            pss, rss = pss + full.pss, rss + full.rss
    return pss, rss


def _end(others: set[int], grace_s: float) -> None:
    """Wait for all that is left of a command, and after `grace_s` kill it."""
    end = time.time() + grace_s
    while left := _descendants(others):
        for process in left:
            with contextlib.suppress(ChildProcessError):  # not a child of this one, or waited for
                os.waitpid(process.pid, os.WNOHANG)
            if time.time() > end:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
