"""Real tables, bent at random, and every command on each: nothing outside is written or read, nothing hangs, one message.

`python campaigns/hostile_tables.py --count 20000` bends the tables that older commits wrote, and one of today. Commands run in
a child; this process watches from outside: a folder of secrets by inotify, a listener that no request may reach, the child's
home, temporary and working directories, and its time.
"""

import argparse
import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import random
import shutil
import socket
import struct
import sys
import tarfile
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

import pytest

from jobs import run_here
from old_table import TABLES
from samples import png

LIMIT_S = 10.0
COMMITS = ("b0781d5", "ccc375e")
_ACCESS, _MODIFY, _ATTRIB, _MOVED, _CREATE, _DELETE, _OPEN = 0x1, 0x2, 0x4, 0xC0, 0x100, 0x200, 0x20


class Watch:
    """What is done to folders, by anybody, since the last look: inotify."""

    def __init__(self, folders: list[Path]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(os.O_NONBLOCK)
        self._names: dict[int, Path] = {}
        mask = _ACCESS | _MODIFY | _ATTRIB | _MOVED | _CREATE | _DELETE | _OPEN
        for top in folders:
            for folder in [top, *(path for path in top.rglob("*") if path.is_dir())]:
                number = self._libc.inotify_add_watch(self._file, os.fsencode(folder), mask)
                assert number >= 0, os.strerror(ctypes.get_errno())
                self._names[number] = folder

    def look(self) -> list[str]:
        """What happened, as sentences."""
        try:
            data = os.read(self._file, 2**20)
        except BlockingIOError:
            return []
        found, place = [], 0
        while place < len(data):
            number, mask, _, size = struct.unpack_from("iIII", data, place)
            name = data[place + 16 : place + 16 + size].rstrip(b"\0").decode(errors="replace")
            place += 16 + size
            found.append(f"{self._names.get(number)}/{name}: events {mask:#x}")
        return found


@dataclass(frozen=True)
class World:
    """The folders of one campaign."""

    folder: Path
    port: int

    @property
    def case(self) -> Path:
        return self.folder / "case"

    @property
    def secrets(self) -> Path:
        return self.folder / "secrets"

    @property
    def quiet(self) -> list[Path]:
        """Where nothing is to be written."""
        return [self.folder / name for name in ("home", "work")]


def make_world(folder: Path, port: int) -> World:
    world = World(folder, port)
    with tarfile.open(TABLES) as tar:
        tar.extractall(folder / "good", filter="data")
    (world.secrets / "deep").mkdir(parents=True)
    for commit in COMMITS:
        data = next((folder / "good" / commit / "table" / "data").rglob("*.parquet"))
        shutil.copy(data, world.secrets / f"{commit}.parquet")
    (world.secrets / "deep" / "keys.json").write_text('{"space_id": "0123456789ab", "format": 1}')
    for path in (*world.quiet, folder / "cache", folder / "tmp"):
        path.mkdir()
    return world


# --- bending -------------------------------------------------------------------------------------------------------------


def texts(rng: random.Random, world: World) -> str:
    """What a stranger might write where a text stands."""
    outward = "../" * rng.randint(1, 9)
    return rng.choice([
        f"{outward}secrets/b0781d5.parquet", f"{outward}secrets", str(world.secrets / "deep" / "keys.json"),
        f"data/{outward}secrets/ccc375e.parquet", f"file://{world.secrets}/b0781d5.parquet", f"http://127.0.0.1:{world.port}/x",
        f"s3://127.0.0.1:{world.port}/x", f"simplecache::http://127.0.0.1:{world.port}/x", "hf://owner/name", "owner/name",
        "..", ".", "", "/", "~", "$HOME", "a\0b", "a\nend: done, exit 0", "\x1b[31mred", "\u202eevil", "<script>x()</script>",
        "x" * rng.choice([300, 5000]), "9" * 5000, "-1", "NaN", "\ud800", "%2e%2e%2f", "a" * 12, "0123456789ab", "{{7*7}}",
        "`id`", "$(id)", "'; drop", "con", "ünï", "list<item: int>", "object", "float32",
    ])  # fmt: skip


def values(rng: random.Random, world: World) -> Any:
    """What a stranger might write where anything stands."""
    deep: Any = 0
    for _ in range(rng.choice([5, 50, 400])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice([
        texts(rng, world), texts(rng, world), texts(rng, world), None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308,
        float("nan"), float("inf"), [], {}, [texts(rng, world)], {texts(rng, world): 1}, [None], [[]], deep,
    ])  # fmt: skip


def places_in(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and position of a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        yield (*way, key)
        yield from places_in(below, (*way, key))


def bend_json(data: bytes, rng: random.Random, world: World) -> bytes:
    """Other values, keys or encoding."""
    try:
        found = json.loads(data)
    except ValueError:
        return data
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        ways = list(places_in(found))
        if not ways:
            break
        *above, key = rng.choice(ways)
        holder = found
        for step in above:
            holder = holder[step]
        what = rng.random()
        if what < 0.7:
            holder[key] = values(rng, world)
        elif what < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[texts(rng, world)] = values(rng, world)
        else:
            holder.extend([holder[key]] * rng.choice([1, 3, 1000]))
    text = json.dumps(found)
    return rng.choices(
        [text.encode(), text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), text.encode()[: rng.randrange(len(text) + 1)]],
        weights=[20, 1, 1, 2],
    )[0]


def bend_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, changed, grown, or something else altogether."""
    bent = bytearray(data)
    what = rng.random()
    if what < 0.2:
        return bytes(bent[: rng.randrange(len(bent) + 1)])
    if what < 0.3:
        return rng.choice([b"", b"\0" * 1000, b"[" * 100_000, b"9" * 5000, b"PAR1PAR1", b"{}", b"null", b"\xff" * 64])
    near_the_end = rng.random() < 0.6  # where Parquet keeps its footer
    for _ in range(rng.choice([1, 1, 3, 20])):
        if bent:
            low = max(0, len(bent) - 600) if near_the_end else 0
            bent[rng.randrange(low, len(bent))] = rng.randrange(256)
    return bytes(bent) + (os.urandom(3) if what > 0.95 else b"")


def replace_place(path: Path, rng: random.Random, world: World) -> None:
    """A link, a pipe, a folder where a file is, or the other way round."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    what = rng.randrange(6)
    if what == 0:
        os.mkfifo(path)
    elif what == 1:
        path.mkdir()
    elif what == 2:
        path.write_bytes(os.urandom(10))
    else:
        path.symlink_to(rng.choice([
            world.secrets, world.secrets / "deep" / "keys.json", world.secrets / "b0781d5.parquet", "..", ".", "/dev/zero",
            path.name, "nowhere", "../" * 12 + str(world.secrets / "ccc375e.parquet").lstrip("/"), "/proc/self/environ",
        ]))  # fmt: skip


NEW_NAMES = [
    "versions/00000009.json", "versions/99999999.json", "versions/x.json", "runs/20260101T000000Z-000000/state.json",
    "runs/x/record.json", "recipes/000000000000.json", "encoders/0123456789ab/encoder.json", "retired/00000007.json",
    "staging/x/y/z.parquet", "staging/000000000000/000000000000/0000000000000000-00000000-last.parquet", "_tmp/x", "_tmp/d/e",
    "data/x", "rejects/b1fc4d78d19d/x.parquet", "builds/b1fc4d78d19d.json", "CURRENT", "table.json",
]  # fmt: skip


def bend(table: Path, rng: random.Random, world: World) -> str:
    """One to three changes of a table; what they were."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = sorted(path for path in table.rglob("*") if not path.is_symlink())
        path = rng.choice(found)
        jsons = [other for other in found if other.suffix == ".json" and other.is_file()]
        what = rng.random()
        if what < 0.5 and jsons:
            path = rng.choice(jsons if rng.random() < 0.5 else [one for one in jsons if "versions" in one.parts] or jsons)
            path.write_bytes(bend_json(path.read_bytes(), rng, world))
            what_was_done = "json"
        elif what < 0.75 and path.is_file():
            path.write_bytes(bend_bytes(path.read_bytes(), rng))
            what_was_done = "bytes"
        elif what < 0.9:
            replace_place(path, rng, world)
            what_was_done = "replaced"
        else:
            path = table / rng.choice(NEW_NAMES)
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                if rng.random() < 0.4:
                    replace_place(path, rng, world)
                else:
                    like = rng.choice(jsons) if jsons else path
                    path.write_bytes(bend_json(like.read_bytes(), rng, world) if like.is_file() else b"1")
            what_was_done = "added"
        done.append(f"{what_was_done} {path.relative_to(table)}")
    return ", ".join(done)


# --- commands, in the child ----------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "status": lambda case: ["status", str(case / "table")],
    "status as JSON": lambda case: ["status", str(case / "table"), "--json"],
    "verify": lambda case: ["verify", str(case / "table")],
    "explain": lambda case: ["explain", str(case / "table"), "a.tar/003"],
    "search": lambda case: ["search", str(case / "table"), str(case / "query.png"), "-k", "2"],
    "search with a page": lambda case: [
        "search",
        str(case / "table"),
        str(case / "query.png"),
        "--page",
        str(case / "page.html"),
    ],
    "forget": lambda case: ["forget", str(case / "table"), "a.tar/003", "--why", "asked"],
    "gc": lambda case: ["gc", str(case / "table")],
    "rollback": lambda case: ["rollback", str(case / "table"), "1", "--why", "worse"],
    "metrics": lambda case: ["status", str(case / "table"), "--metrics"],
    "export": lambda case: ["export", str(case / "table"), "--to", "faiss-flat", "--out", str(case / "index")],
    "night": lambda case: ["nightly", "--config", str(case / "job.yaml")],
}


def serve(pipe: Connection, world: World) -> None:
    """The child: runs what it is told, and answers with exit code and output; a traceback is code -1."""
    os.environ |= {"HOME": str(world.folder / "home"), "TMPDIR": str(world.folder / "tmp"), "HF_HUB_OFFLINE": "1"}
    os.environ["LORA_EMBED_CACHE"] = str(world.folder / "cache")
    tempfile.tempdir = None
    os.chdir(world.folder / "work")
    from lora_embed.cli import main

    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        while True:
            arguments: list[str] | None = pipe.recv()
            if arguments is None:
                return
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    nightly = arguments[0] == "nightly"
                    code = main.nightly_job(arguments[1:]) if nightly else main.run_command(arguments)
                except BaseException:  # noqa: BLE001
                    code = -1
                    traceback.print_exc(file=said)
            pipe.send((code, said.getvalue()[-6000:]))


class Child:
    """The process that runs commands; started anew when one hung or died."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._world), daemon=True)
        self._process.start()
        theirs.close()
        self.run(["status", "nowhere"], limit_s=120)

    def run(self, arguments: list[str], limit_s: float = LIMIT_S) -> tuple[int, str]:
        """Exit code and output; -2 where it took too long, -3 where it died."""
        try:
            self._pipe.send(arguments)
            if self._pipe.poll(limit_s):
                code, said = self._pipe.recv()
                return int(code), str(said)
            answer = (-2, f"took longer than {limit_s:g} s")
        except (EOFError, OSError):
            answer = (-3, "died")
        self._process.kill()
        self._process.join()
        self._start()
        return answer

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(5)
        self._process.kill()


def listen() -> tuple[socket.socket, list[str]]:
    """A port of the loopback address, and who has come."""
    server, came = socket.create_server(("127.0.0.1", 0)), []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                came.append(str(connection.recv(100)))
                connection.close()

    threading.Thread(target=accept, daemon=True).start()
    return server, came


def campaign(seed: int, count: int, folder: Path, commands_of_a_case: int = 3) -> tuple[Counter[str], list[str]]:
    """Bend tables and run commands on each; how they ended, and everything that should not have been."""
    server, came = listen()
    world = make_world(folder, server.getsockname()[1])
    child, ended, wrong = Child(world), Counter[str](), []
    watch = Watch([world.secrets, *world.quiet])
    watch.look()
    try:
        for number in range(count):
            rng = random.Random(f"{seed}-{number}")
            shutil.rmtree(world.case, ignore_errors=True)
            shutil.copytree(world.folder / "good" / rng.choice(COMMITS), world.case)
            (world.case / "query.png").write_bytes(png(1))
            what = bend(world.case / "table", rng, world)
            for name in rng.sample(sorted(COMMANDS), commands_of_a_case):
                code, said = child.run(COMMANDS[name](world.case))
                ended[f"{name}: {code}"] += 1
                happened = watch.look() + came
                if code not in (0, 1, 2) or happened or "Traceback" in said:
                    wrong.append(f"case {number} ({what}), {name}: exit {code} {happened}\n{said[-1500:]}")
                    came.clear()
    finally:
        child.end()
        server.close()
    return ended, wrong


def run_campaign(run: Callable[[int, int, Path], tuple[Counter[str], list[str]]], description: str | None) -> int:
    """A campaign as a program: its seed and count from the command line; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ended, wrong = run(arguments.seed, arguments.count, Path(scratch))
    for name, times in sorted(ended.items()):
        print(f"{times:7,} {name}")
    print("\n".join(wrong[:50]))
    print(f"{arguments.count:,} cases, {sum(ended.values()):,} commands, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_campaign(campaign, __doc__))
