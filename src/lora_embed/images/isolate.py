"""Decoding and reading in child processes: what crashes, hangs or fills the memory costs its child alone.

An image that does so is a reject, a shard an error of its own.
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
from typing import Any

from lora_embed.errors import LoraEmbedError
from lora_embed.images.decode import MAX_PIXELS, BadImage, Decoded, Prepare, decode_image

TRIES = 2  # a child may die of something else than its image, such as the machine's memory killer
# Address space for one image beyond what its process holds already. Measured with 100 megapixels: WebP takes 28 bytes a
# pixel, a transparent PNG 20, JPEG and GIF 13.
ROOM_BYTES = 4 * 2**30
ROOM_BYTES_PER_PIXEL = 40  # of max_pixels, where that is more
IMAGE_S = 120.0  # for one image, of which a hundred megapixels take seconds
_CRASHED = "decoder_crashed"
_READY = "ready"
_START_S = 120.0  # for Python and its imports, on a machine with much else to do
_END_S = 10.0  # from the end of a child's pipe to its own
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def decode_or_die(data: bytes, preprocessing: Prepare, max_pixels: int = MAX_PIXELS) -> Decoded:
    """`decode_image`, whose process the kernel ends after `IMAGE_S` seconds: an image that hangs is one that crashes."""
    signal.setitimer(signal.ITIMER_REAL, IMAGE_S)
    try:
        return decode_image(data, preprocessing, max_pixels)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class IsolatedDecoder:
    """`decode_image` in one child process, started with the first image and anew after each image that kills it.

    An image that ends two children, takes all their memory, or has no answer from them in `timeout_s` raises BadImage
    with the reason `decoder_crashed`. ChildProcessError where no child can be started. For one thread at a time.
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
        """End the child; another image would start another."""
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
                self._child = child  # only now: after an interrupt, the next image would get this one's answer
        finally:
            if self._child is None:
                child.end()
        return answer


class Child:
    """A running child that answers requests one by one: bytes of memory it may take more, a function, and its arguments."""

    def __init__(self, name: str) -> None:
        self._name = name
        # Not multiprocessing's spawn, which imports the parent's __main__ again, a Ray worker; and found wherever the
        # parent found it, -P keeping the working directory out.
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
            raise ChildProcessError(f"a process for what killed another did not start: {started}")

    def ask(self, request: tuple[Any, ...], timeout_s: float) -> Any:
        """What the function returned or raised there, or how the child ended instead, as `decoder_crashed`."""
        with contextlib.suppress(OSError):  # it is gone; the answer says how
            self._pipe.send(request)
        return self._answer(timeout_s)

    def end(self) -> None:
        """Kill it: it holds nothing that is of use."""
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
            return "closed its pipe"
        if code >= 0:
            return f"ended with exit code {code}"
        names = {entry.value: entry.name for entry in signal.Signals}
        return f"was killed by signal {-code} ({names.get(-code, 'no name')})"


def is_crash(answer: Any) -> bool:
    return isinstance(answer, BadImage) and answer.reason == _CRASHED


def serve(parent: Connection) -> None:
    """What the child does: answer the requests of its parent until it is gone."""
    _prepare()
    with contextlib.suppress(EOFError, ConnectionError):
        parent.send(_READY)
        while True:
            room, function, *arguments = parent.recv()
            try:
                if room:
                    limit_memory(room)
                parent.send(function(*arguments))
            except (BadImage, LoraEmbedError, OSError) as error:  # answers
                parent.send(error)
            except BaseException as error:  # a bug: for the parent to raise
                error.add_note(traceback.format_exc())
                parent.send(error)
                raise


def keep_freed_memory() -> None:
    """Have this process keep what it frees, up to 256 MB, instead of giving it to the kernel and having it cleared again.

    Each image and batch takes some MB and frees them: else a third of a small model's time goes into page faults.
    Of glibc, mallopt(3); elsewhere it does nothing.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes: what is larger is the kernel's at once
        mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)


def limit_memory(room: int) -> None:
    """Let this process take that many bytes of address space more; beyond, allocations fail. Linux only."""
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = held + room if most == resource.RLIM_INFINITY else min(held + room, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _prepare() -> None:
    """Die with the parent, before it when memory is short, and without a word or a core dump."""
    if sys.platform == "linux":
        # A decoder that hangs would not see the end of the pipe. Linux sends this when the parent's thread ends, too:
        # the next image then finds its first child dead and gets another.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # standard error, until here the parent's: why a start fails is read there


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
