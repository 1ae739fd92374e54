"""Decode images and read shards in child processes, so that a crash, a hang or full memory ends only the child.

An image that does so is a reject. A shard that does so is an error of that shard.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from lora_embed.errors import LoraEmbedError
from lora_embed.images.decode import MAX_PIXELS, BadImage, Decoded, Prepare, decode_image

TRIES = 2  # a child may also die for another reason than its image, for example when the kernel frees memory
# Address space for one image, in addition to what its process already uses. Measured with 100 megapixels: WebP takes 28 bytes
# a pixel, a transparent PNG 20, JPEG and GIF 13.
ROOM_BYTES = 4 * 2**30
ROOM_BYTES_PER_PIXEL = 40  # times max_pixels, if that is more
IMAGE_S = 120.0  # for one image; 100 megapixels take seconds
_CRASHED: Final = "decoder_crashed"
_READY = "ready"
_START_S = 120.0  # for Python and its imports, on a busy machine
_END_S = 10.0  # between the end of a child's pipe and the end of the child
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def decode_or_die(data: bytes, preprocessing: Prepare, max_pixels: int = MAX_PIXELS) -> Decoded:
    """`decode_image` in this process, which the kernel ends after `IMAGE_S` seconds: a hang becomes a crash."""
    signal.setitimer(signal.ITIMER_REAL, IMAGE_S)
    try:
        return decode_image(data, preprocessing, max_pixels)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class IsolatedDecoder:
    """`decode_image` in a child process, which starts with the first image and again after each image that kills it.

    An image that twice kills its child, fills the child's memory or takes longer than `timeout_s` raises BadImage with the
    reason `decoder_crashed`. Raises ChildProcessError if no child can be started. For one thread at a time.
    """

    def __init__(self, timeout_s: float = IMAGE_S) -> None:
        self._timeout_s = timeout_s
        self._child: Child | None = None

    def __call__(self, data: bytes, preprocessing: Prepare, max_pixels: int = MAX_PIXELS) -> Decoded:
        for _ in range(TRIES):
            room = max(ROOM_BYTES, ROOM_BYTES_PER_PIXEL * max_pixels)
            answer = self._ask((room, decode_image, data, preprocessing, max_pixels))
            if isinstance(answer, Decoded):
                return answer
            if not is_crash(answer):
                raise answer
        raise BadImage(_CRASHED, f"{answer}, {TRIES} tries")

    def close(self) -> None:
        """End the child. The next image would start another one."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def __enter__(self) -> "IsolatedDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: tuple[Any, ...]) -> Any:
        child, self._child = self._child or Child("decoder"), None
        try:
            answer = child.ask(request, self._timeout_s)
            if isinstance(answer, Decoded | BadImage) and not is_crash(answer):
                self._child = child  # only now: after an interrupt, the next image would get this image's answer
        finally:
            if self._child is None:
                child.end()
        return answer


class Child:
    """A child process that answers requests one by one. A request: bytes of additional memory, a function, its arguments."""

    def __init__(self, name: str) -> None:
        self._name = name
        # Not by multiprocessing's spawn, which would import the parent's __main__ again, a Ray worker. The child finds this
        # package where the parent found it; -P keeps the current folder out of its search path.
        self._pipe, end = multiprocessing.Pipe()
        with end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lora_embed.images.isolate", str(end.fileno())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                pass_fds=[end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt at the terminal is the parent's to handle
            )
        started = self._answer(_START_S)
        if started != _READY:
            self.end()
            raise ChildProcessError(f"a child process could not be started: {started}")

    def ask(self, request: tuple[Any, ...], timeout_s: float) -> Any:
        """The function's result or error; if the child ended instead, BadImage with the reason `decoder_crashed`."""
        with contextlib.suppress(OSError):  # the child is gone; `_answer` says how it ended
            self._pipe.send(request)
        return self._answer(timeout_s)

    def end(self) -> None:
        """Kill the child, which holds nothing that is still needed."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _answer(self, timeout_s: float) -> Any:
        try:
            if self._pipe.poll(timeout_s):
                return self._pipe.recv()
            return BadImage(_CRASHED, f"the {self._name} gave no answer in {timeout_s:g} s")
        except (EOFError, OSError):
            return BadImage(_CRASHED, f"the {self._name} {self._ending()}")

    def _ending(self) -> str:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "closed its pipe without an answer"
        if code >= 0:
            return f"ended with exit code {code}"
        names = {entry.value: entry.name for entry in signal.Signals}
        return f"was killed by signal {-code} ({names.get(-code, 'no name')})"


def is_crash(answer: Any) -> bool:
    return isinstance(answer, BadImage) and answer.reason == _CRASHED


def serve(parent: Connection) -> None:
    """The main loop of the child: answer the parent's requests until the parent is gone."""
    _prepare()
    with contextlib.suppress(EOFError, ConnectionError):
        parent.send(_READY)
        while True:
            room, function, *arguments = parent.recv()
            try:
                if room:
                    limit_memory(room)
                parent.send(function(*arguments))
            except (BadImage, LoraEmbedError, OSError) as error:  # these are answers too
                parent.send(error)
            except BaseException as error:  # a bug, which the parent raises
                error.add_note(traceback.format_exc())
                parent.send(error)
                raise


def keep_freed_memory() -> None:
    """Make this process keep up to 256 MB of freed memory instead of returning it to the kernel.

    Each image and batch allocates and frees some MB; otherwise a small model spends a third of its time on page faults.
    Uses mallopt(3) of glibc; with other C libraries it does nothing.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest value allowed: larger blocks go straight back to the kernel
        mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)


def limit_memory(room: int) -> None:
    """Let this process take `room` more bytes of address space; further allocations fail. Linux only."""
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + room if most == resource.RLIM_INFINITY else min(used + room, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _prepare() -> None:
    """Make this process end with its parent, be killed first when memory is short, and write no message or core dump."""
    if sys.platform == "linux":
        # A decoder that hangs would not notice the end of the pipe. Linux sends this signal also when only the parent's
        # thread ends: then the next image finds its child dead and gets another.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # until here, standard error is the parent's and shows why a start fails


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
