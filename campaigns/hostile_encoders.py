"""Encoders and adapters bent on purpose: seeded mutations of real ones, each of which loads or is refused in one message.

`python campaigns/hostile_encoders.py --seed 7 --count 20000` watches from outside: a folder that no user names holds a file,
a pipe and a model, and inotify tells of all that is opened there or made; requests would arrive at a listener. A case fails
that takes longer than 10 s, ends in another error than this package's own, or leaves anything but an encoder in its table.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

from jobs import write_recipe
from lora_embed.config.models import load_recipe
from lora_embed.errors import LoraEmbedError
from lora_embed.model.adapter import read_adapter
from lora_embed.model.base_files import find_base
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import load_encoder
from lora_embed.model.fold import Limit
from lora_embed.model.ingredients import gather
from lora_embed.model.match import match_adapter, target_of
from lora_embed.run.encoders import find_source, named_base, store_encoder
from lora_embed.store.store import Store
from models import save_adapter, save_base

LIMIT_S = 10.0
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 8}
CHECKED = 25  # one of so many encoders is held against its golden vectors too, which takes a second
_OPEN, _MADE = 0x20, 0x100 | 0x80 | 0x40 | 0x200 | 0x2  # of inotify(7): opened; created, moved, deleted, written
_STORED = re.compile(r"encoders/[0-9a-f]{12}/((adapter|golden|member-\d+)/)?[\w.-]+|recipes/[0-9a-f]{12}\.json")


@dataclass
class Findings:
    """What became of the cases, by the kind of thing that was bent."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    failures: list[str] = field(default_factory=list)

    def describe(self) -> str:
        lines = [f"{kind}: {outcome} {count:,}" for (kind, outcome), count in sorted(self.outcomes.items())]
        return "\n".join([*lines, f"slowest: {self.slowest[0]:.2f} s, {self.slowest[1]}", *self.failures])


class Outside:
    """What no user named: a folder that is watched for every opening and change, and a port that waits for requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_base(folder, patch_size=4, **TINY)
        (folder / "secret.txt").write_text("a secret")
        os.mkfifo(folder / "pipe")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._inotify, os.fsencode(folder), _OPEN | _MADE) > 0

    def happened(self) -> list[str]:
        """Files that were opened or changed, and requests, since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            events, at = os.read(self._inotify, 65536), 0
            while at < len(events):
                _, mask, _, length = struct.unpack_from("iIII", events, at)
                name = events[at + 16 : at + 16 + length].rstrip(b"\0").decode()
                found.append(f"{'opened' if mask & _OPEN else 'changed'} {name or 'the folder'} outside")
                at += 16 + length
        with contextlib.suppress(BlockingIOError):
            self._listener.accept()[0].close()
            found.append("sent a request")
        return found


def hostile_values(rng: random.Random, outside: Outside) -> Any:
    """A value for any field."""
    secret, deep = str(outside.folder / "secret.txt"), "../" * rng.randrange(1, 6)
    return rng.choice(
        [
            None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**9), 0.5, 1e308, float("nan"), float("inf"), "", " ", "\0",
            ".", "..", "/", "~", "-", secret, str(outside.folder), f"{deep}outside", f"{deep}outside/secret.txt", "a" * 100_000,
            f"file://{outside.folder}", outside.url, f"{outside.url}/model", f"simplecache::{outside.url}/x", "hf://nobody/none",
            "s3://127.0.0.1/x", "memory://x", "abcdef012345\n", "ABCDEF012345", "0123456789ab", "\ud800", "‮evil",
            "<script>alert(1)</script>", "(a+)+$", "(.*)*x", "((a*)*)*b", "(?:", "[", "(" * 2000, "x{999999999999}",
            r"(\w|\w\.)+!", r"(([a-z_0-9.]+)+)+!",
            "weights.bin", "nobody/kernel", "os.system", [], [None], {}, {"a": {}}, ["x"] * 10_000, [[[]]], [10**9] * 3,
        ]
    )  # fmt: skip


def places_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON document."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places_of(one, (*at, key))


KNOWN = (
    "quantization_config", "transformers_weights", "configuration_files", "auto_map", "attn_implementation", "dtype",
    "_attn_implementation", "num_hidden_layers", "num_labels", "layer_types", "id2label", "model_type", "backbone",
    "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "base",
    "modules_to_save", "base_model_name_or_path", "space_version", "members", "tap", "use_pretrained_backbone", "size",
    "weight_map", "vision_config", "image_size", "hidden_size", "hidden_act", "patch_size", "image_processor_type", "use_dora",
)  # fmt: skip


def bend_json(rng: random.Random, path: Path, outside: Outside) -> str:
    """Another value, no value, or one more, at some place of a document."""
    data = json.loads(path.read_text())
    places = list(places_of(data))
    value = hostile_values(rng, outside)
    if rng.random() < 0.4 or not places:
        key = rng.choice(KNOWN)
        data[key] = {str(hostile_values(rng, outside))[:5000]: value} if rng.random() < 0.4 else value
        what = f"{key} {data[key]!r:.60}"
    else:
        *above, last = rng.choice(places)
        owner = data
        for key in above:
            owner = owner[key]
        if rng.random() < 0.1:
            del owner[last]
        elif isinstance(owner[last], str) and rng.random() < 0.3:
            owner[last] = owner[last] + str(value)
        else:
            owner[last] = value
        what = f"{'.'.join(map(str, (*above, last)))} {value!r:.60}"
    path.write_bytes(json.dumps(data).encode(rng.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]), "replace"))
    return what


def bend_bytes(rng: random.Random, path: Path, outside: Outside) -> str:
    data = bytearray(path.read_bytes())
    how = rng.choice(["cut", "flip", "empty", "grow", "deep", "pickle", "zeros"])
    if how == "flip":
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(min(len(data), rng.choice([64, 2000, len(data)])))] = rng.randrange(256)
    bent = {
        "cut": data[: rng.randrange(len(data))], "flip": data, "empty": b"", "grow": bytes(data) * 3, "deep": b"[" * 200_000,
        "pickle": b"cos\nsystem\n(S'touch /tmp/opened'\ntR.", "zeros": bytes(len(data)),
    }  # fmt: skip
    path.write_bytes(bent[how])
    return how


def bend_header(rng: random.Random, path: Path, outside: Outside) -> str:
    """The header of a safetensors file, with its length put right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, how = header[name], rng.choice(["shape", "dtype", "offsets", "name", "twice", "zero"])
    if how == "shape":
        entry["shape"] = rng.choice([[], [2**62, 4], [-1], [0, 10**12], [1] * 100, entry["shape"][::-1], [10**6, 0]])
    elif how == "dtype":
        entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "U64", "X", ""])
    elif how == "offsets":
        entry["data_offsets"] = rng.choice([[0, 0], [0, 2**40], [-4, 0], [2**63, 2**63 + 4], entry["data_offsets"][::-1]])
    elif how == "name":
        other = rng.choice(
            ["x" * 5000, "../x", "", "{0.__class__}", "a.b.lora_A.weight", name.upper(), name + ".lora_B.weight"]
        )
        header[other] = header.pop(name)
    elif how == "twice":
        header[name.replace("base_model.model.", "")] = dict(entry)
    else:
        entry["shape"], entry["data_offsets"] = [0, *entry["shape"][1:]], [0, 0]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"{how} of {name}"


def bend_kind(rng: random.Random, path: Path, outside: Outside) -> str:
    """Something else in a file's place: a link, a folder, a pipe, nothing."""
    how = rng.choice(["link", "link to a pipe", "link to itself", "linked folder", "folder", "pipe", "gone", "relative link"])
    path.unlink()
    if how == "link":
        same = outside.folder / path.name
        path.symlink_to(same if same.exists() else outside.folder / "secret.txt")
    elif how == "relative link":
        path.symlink_to(os.path.relpath(outside.folder / "secret.txt", path.parent))
    elif how == "link to a pipe":
        path.symlink_to(outside.folder / "pipe")
    elif how == "link to itself":
        path.symlink_to(path)
    elif how == "linked folder":
        if path.parent.parent.name in ("whole", "kept"):  # a folder within; the one that the user names may be a link
            shutil.rmtree(path.parent)
            path.parent.symlink_to(outside.folder)
        else:
            path.symlink_to(outside.folder)
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    return how


def bend_beside(rng: random.Random, path: Path, outside: Outside) -> str:
    """One file more."""
    folder = path.parent
    secret = rng.choice(
        [str(outside.folder / "model.safetensors"), "../outside/model.safetensors", "weights.bin", "x/m.safetensors"]
    )
    how = rng.choice(["index", "adapter_config.json", "weights.bin", "link", "pipe"])
    if how == "index":
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": secret}}))
    elif how == "adapter_config.json":
        told = {"peft_type": "LORA", "base_model_name_or_path": rng.choice([str(outside.folder), outside.url, "nobody/none"])}
        (folder / how).unlink(missing_ok=True)
        (folder / how).write_text(json.dumps(told | {"target_modules": ["q_proj"], "task_type": None}))
    elif how == "weights.bin":
        (folder / rng.choice([how, "pytorch_model.bin", ".env", "x.py", "sitecustomize.py"])).write_bytes(
            b"cos\nsystem\n(S'true'\ntR."
        )
    elif how == "link":
        (folder / rng.choice(["secret.txt", "more.safetensors", "z"])).symlink_to(outside.folder / "secret.txt")
    else:
        os.mkfifo(folder / rng.choice(["more.safetensors", "more.json"]))
    return how


def bend(rng: random.Random, folder: Path, outside: Outside) -> str:
    """One to three mutations of files of a directory; says which."""
    told = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            break
        path = rng.choice([file for file in files if file.suffix in (".json", ".safetensors")] * 3 + files)
        ways: list[Callable[[random.Random, Path, Outside], str]] = [bend_bytes, bend_kind, bend_beside]
        if path.suffix == ".json":
            ways = [bend_json] * 8 + ways
        elif path.suffix == ".safetensors":
            ways = [bend_header] * 4 + ways
        # Of one that was bent before.
        with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            told.append(f"{path.relative_to(folder)}: {rng.choice(ways)(rng, path, outside)}")
    return "; ".join(told)


class Campaign:
    """Real ones to bend, made once, and a place to use them in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        base = save_base(root / "base", patch_size=4, **TINY)
        adapter = save_adapter(
            root / "real" / "adapter", base, 3, r=1, target_modules=["q_proj"], rank_pattern={"layers.0.*": 1}
        )
        recipe = load_recipe(write_recipe(root, base, {adapter: 1.0}, image_size=8))
        for name, limit in (("whole", None), ("kept", Limit())):
            build_encoder(gather(recipe), root / "real" / name, lambda line: None, limit)
        self.target = target_of(find_base(str(base), None))
        (root / "outside").mkdir()
        self.outside = Outside(root / "outside")
        self.place = root / "case"

    def use(self, kind: str, folder: Path, *, checks: bool) -> None:
        """What users do with what somebody gave them."""
        if kind == "adapter":
            match_adapter(read_adapter(str(folder)), self.target)
            return
        source = find_source(str(folder))
        named_base(source)
        store_encoder(folder, Store(str(self.place / "table")))
        load_encoder(folder, check=checks)

    def run(self, seed: int, findings: Findings) -> None:
        rng = random.Random(seed)
        kind = rng.choice(["whole", "kept", "adapter", "adapter"])
        self.place.mkdir()
        folder = self.place / kind
        shutil.copytree(self.root / "real" / kind, folder)
        what = f"seed {seed}, {kind}: {bend(rng, folder, self.outside)}"
        self.outside.happened()  # of the bending itself
        before = {path for path in self.place.rglob("*") if "table" not in path.relative_to(self.place).parts}
        outcome = "loads"
        started = time.monotonic()
        try:
            with ends_after(3 * LIMIT_S):
                self.use(kind, folder, checks=seed % CHECKED == 0)
        except LoraEmbedError as error:
            outcome = f"refused ({type(error).__name__})"
            if "\n" in str(error).strip() or len(str(error)) > 3000:
                findings.failures.append(f"{what}: its message is no message: {str(error)[:200]!r}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            outcome = "another error"
            findings.failures.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        took = time.monotonic() - started
        findings.outcomes[kind, outcome] += 1
        findings.slowest = max(findings.slowest, (took, what))
        findings.failures += [f"{what}: {happened}" for happened in self.outside.happened()]
        if took > LIMIT_S:
            findings.failures.append(f"{what}: took {took:.1f} s")
        for path in self.place.rglob("*"):
            inside = path.relative_to(self.place).as_posix()
            if inside.startswith("table/") and path.is_file():
                if not _STORED.fullmatch(inside.removeprefix("table/")) or path.is_symlink():
                    findings.failures.append(f"{what}: left {inside}")
            elif path not in before and not inside.startswith("table"):
                findings.failures.append(f"{what}: left {inside}")
        shutil.rmtree(self.place)


@contextlib.contextmanager
def ends_after(seconds: float) -> Iterator[None]:
    """TimeoutError in whatever runs then."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end in {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_campaign(root: Path, seed: int, count: int) -> Findings:
    """`count` cases from that seed on, below `root`."""
    campaign, findings = Campaign(root), Findings()
    for number in range(count):
        campaign.run(seed * 1_000_000 + number, findings)
        if number % 1000 == 999:
            print(f"{number + 1:,} cases, {len(findings.failures)} failures", file=sys.stderr, flush=True)
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--count", type=int, default=20_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        started = time.monotonic()
        findings = run_campaign(Path(root), given.seed, given.count)
        print(findings.describe())
        print(f"{given.count:,} cases in {time.monotonic() - started:,.0f} s, {len(findings.failures)} failures")
    sys.exit(bool(findings.failures))


if __name__ == "__main__":
    main()
