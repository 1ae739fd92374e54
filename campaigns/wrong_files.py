"""Jobs and recipes that are wrong in thousands of ways: seeded mutations of right ones, each read by `lora-embed plan`.

    python campaigns/wrong_files.py --seed 0 --count 2000

Each ends in a plan, or in one message that begins with `error:` and exit code 2; never in a traceback, and within seconds. Exit
code 1 if one did not. `--only NUMBER` shows one.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

import yaml

from jobs import write_tars
from lora_embed.cli.main import run_command
from models import save_adapter, save_base

LIMIT_S = 20.0  # of one plan
NO_STORE = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s", "config_kwargs": {"connect_timeout": 1}}
RECIPE: dict[str, Any] = {
    "base_model": "./base",
    "adapters": [{"path": "./ten", "weight": 0.5}, {"path": "./more", "weight": 0.5}],
    "merge_method": "ties",
    "merge_options": {"density": 0.3, "majority_sign": "total"},
    "pooling": "mean",
    "normalize": True,
    "image_size": None,
    "decode": "exact",
}
JOB: dict[str, Any] = {
    "recipe": "recipe.yaml",
    "input": ["shards/{0000..0001}.tar"],
    "table": "table",
    "precision": "float32",
    "chunk_size": 64,
    "batch_size": 16,
    "max_rejects": 0.01,
    "max_removed": 0.05,
    "max_pixels": 1000000,
    "carry": ["label:int64"],
    "image_member": ["png"],
    "leave_out": ["shards/9999.tar"],
    "limit": 3,
    "vector_type": "float32",
    "resources": {"device": "cpu", "actors": {"min": 1, "max": 1}, "cpus_per_decode": 1, "wait_s": 0},
    "reembed": {"sample": 10, "drift": 0, "skip_overlap": 0.98},
    "retain": {"versions": 3, "grace_days": 1},
    "gates": {"overlap": 0.5},
    "prices": {"cpu_hour": 0.1},
    "shared_filesystem": False,
    "follow_folder_links": True,
    "input_storage_options": {"retry_s": 0},
    "table_storage_options": {"retry_s": 0} | NO_STORE,
}
S3 = NO_STORE | {"retry_s": 0, "anon": False, "client_kwargs": {"region_name": "us-east-1"}, "use_ssl": False}
REMOTE = JOB | {"input": "s3://products/shards/*.tar", "table": "s3://products/table", "limit": None, "leave_out": []}
REMOTE |= {"input_storage_options": S3, "table_storage_options": S3}
# Values that are right nowhere, or in another place only.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, 1e308, -1e-320, 2**31, 2**63, 10**40, float("nan"), float("inf"), -float("inf"),
    "", " ", ".", "-", "auto", "null", "no", "NO", "yes", "1e-3", "0x10", "1_000", "12:30:45", "2024-02-30", "ten", "more",
    "nowhere", "./nowhere/x", "/nowhere/x.tar", "/dev/null", "recipe.yaml", "job.yaml", "base", "./ten", "shards", "shards/*",
    "shards/0000.tar", "shards/{0..3}.tar", "{0..99999999}.tar", "{a,b", "[", "[z-a]", "**", "***/x", "~nobody/x", "\0", "a\0b",
    "é" * 300, "x" * 5000, "\u202egnp.tar", "\u200b", "😀", "a\nb", "a\tb", "s3://", "s3:bucket", "s3//bucket/x", "s3://b/x",
    "s3://products/table", "s4://bucket/x", "file://x", "file:///nowhere", "memory://x", "http://[", "http://a:b/c",
    "https://", "https:///x.tar", "https://user:pw@host/x",
    "hf://", "hf://a", "hf://datasets/a/b", "owner/name", "../..", "zip://x::s3://b/y.zip", "::", "://", "C:\\images\\x.tar",
    "%s %d {0} {path}", "<b>&amp;</b>",
    "${HOME}", "$(touch /tmp/x)", "!!python/object:os.system", "float33", "meann", "gpuu",
    "dare_tie", [], [[]], [None], [1, 2], ["a", 1], ["shards", "shards"], [["shards"]], {}, {"a": {}}, {"path": "./ten"},
    {"device": "cpu"}, {1: 2}, {None: None}, {"": ""}, {"x" * 3000: 1}, [{"path": "./ten"}] * 3, [{"name": "label"}] * 2,
    [{"path": "./ten", "weight": "half"}], ["label:int65"], ["id"], ["label", "label"],
]  # fmt: skip
# Lines that YAML reads in another way than they look.
LINES = [
    "? {a: b}\n: c",
    "<<: {chunk_size: 1}", "<<: *nowhere", "x: &x [*x]", "&a a: *a", "- a", "a b c", "key: 'open", 'key: "\\q"',
    "key: !!python/object/apply:os.system [id]", "key: !!binary '***'", "key: !!timestamp tomorrow", "key: !!set {a, a}",
    "key: !!int x", "key: !!float .x", "key: !unknown x", "key: 2024-01-01", "key: 2024-13-41",
    "key: 0o17", "key: 0b2", "key: ~",
    "---\nsecond: document", "...", "%YAML 9.9", "%TAG ! x", "@at", "`tick", "key: |\n text", "key: >-", "table: twice",
    "Table: other", "input:", "recipe", "limit: yes", "chunk_size: 1:30", "precision: off", "{", "}", "]", ",", ":", "-", "#",
    "key: " + "[" * 3000, "key: " + "{a: " * 400, "!!map [a]", "? ", "no: yes", "on: off", "5: five", "[a, b]: c", "1.5: x",
    "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d]",
]  # fmt: skip


@dataclass
class Findings:
    """What became of the files."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    failures: list[str] = field(default_factory=list)

    def describe(self) -> str:
        counts = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(self.outcomes.items()))
        return "\n".join([counts, f"slowest: {self.slowest[0]:.2f} s, {self.slowest[1]}", *self.failures])


def places_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and positions that lead to each value."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_of(inner, (*at, key))


def misspelt(rng: random.Random, word: str) -> str:
    """A word with a letter twice, without one, with two swapped, in capitals, or with another sign in it."""
    at = rng.randrange(len(word)) if word else 0
    ways = [word[:at] + word[at:][:1] * 2 + word[at + 1 :], word[:at] + word[at + 1 :], word.upper(), word.replace("_", "-")]
    ways += [word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :], f"{word} ", f"\ufeff{word}", f"{word}é"]
    return rng.choice(ways)


def bend_value(rng: random.Random, data: dict[str, Any]) -> str:
    """Change one place of the right content: another value, no value, another key, a level more or less."""
    *above, last = rng.choice(list(places_of(data)))
    owner: Any = data
    for key in above:
        owner = owner[key]
    how = rng.choice(["value"] * 5 + ["gone", "misspelt", "wrapped", "more", "text", "other"])
    if how == "gone":
        del owner[last]
    elif how == "misspelt" and isinstance(owner, dict):
        owner[misspelt(rng, str(last))] = owner.pop(last)
    elif how == "misspelt":
        owner[last] = misspelt(rng, str(owner[last]))
    elif how == "wrapped":
        owner[last] = rng.choice([[owner[last]], {"value": owner[last]}, {str(last): owner[last]}])
    elif how == "more" and isinstance(owner, dict):
        owner[rng.choice(["extra", "", "recipe", "adapters", "é", "limit", "a.b"])] = rng.choice(VALUES)
    elif how == "text":
        owner[last] = str(owner[last])
    elif how == "other":
        *path, end = rng.choice(list(places_of(data)))
        value: Any = data
        for key in (*path, end):
            value = value[key]
        owner[last] = yaml.safe_load(yaml.safe_dump(value))
    else:
        owner[last] = rng.choice(VALUES)
    return f"{how} at {'.'.join(map(str, (*above, last)))}"


def bend_text(rng: random.Random, text: str) -> tuple[str, bytes]:
    """Change the text of a right file: lines, letters, its encoding."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    how = rng.choice(["line"] * 6 + ["twice", "cut", "indent", "tab", "letters", "encoding", "bytes", "nothing", "joined"])
    if how == "line":
        lines.insert(at, rng.choice(LINES))
    elif how == "twice":
        lines.insert(at, rng.choice(lines))
    elif how == "indent":
        lines[at] = " " * rng.randrange(1, 4) + lines[at]
    elif how == "tab":
        lines[at] = f"\t{lines[at]}" if rng.random() < 0.5 else lines[at].replace(" ", "\t")
    elif how == "joined":
        lines[at : at + 2] = ["".join(lines[at : at + 2])]
    text = "\n".join(lines) + "\n"
    if how == "cut":
        text = text[: rng.randrange(len(text))]
    elif how == "letters":
        for _ in range(rng.randrange(1, 6)):
            spot = rng.randrange(len(text))
            text = text[:spot] + rng.choice(":-[]{}#&*!|>'\"%@`, \n\t\r\0\x85\u2028é😀0") + text[spot + 1 :]
    if how == "encoding":
        encoding = rng.choice(["utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "utf-7"])
        return f"{how} {encoding}", f"# é\n{text}".encode(encoding)
    if how == "bytes":
        return how, rng.choice(
            [rng.randbytes(400), b"", b"\xff\xfe", b"PK\3\4" + rng.randbytes(60), b"\0" * 50, b"\x80abc: 1\n"]
        )
    return how, b"" if how == "nothing" else text.encode("utf-8", "surrogatepass")


def bent(rng: random.Random, right: dict[str, Any]) -> tuple[str, bytes]:
    """A wrong form of a right file, and what is wrong with it."""
    data = yaml.safe_load(yaml.safe_dump(right))
    says = [bend_value(rng, data) for _ in range(rng.choice([1, 1, 1, 2, 4]))] if rng.random() < 0.7 else []
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=rng.random() < 0.5, default_flow_style=rng.choice([None, True]))
    if says:
        return ", ".join(says), text.encode("utf-8", "surrogatepass")
    return bend_text(rng, text)


def overrides(rng: random.Random) -> list[str]:
    """Options `--set` with keys and values of all kinds, sometimes."""
    if rng.random() < 0.8:
        return []
    key = ".".join(map(str, rng.choice(list(places_of(JOB)))))
    key = rng.choice([key, misspelt(rng, key), "", ".", "a.b.c", "gates.", "carry.0", f"{key}.x"])
    value = rng.choice([rng.choice(LINES), str(rng.choice(VALUES)), "[a", "{a: b", "&a [*a]", "!!int x", "é", ""])
    return ["--set", rng.choice([f"{key}={value}", key, f"={value}", f"{key}=={value}"]).replace("\0", "")]


@dataclass(frozen=True)
class Place:
    """A folder with a base, adapters and shards, and the right files."""

    folder: Path

    def write(self, rng: random.Random) -> tuple[str, list[str]]:
        """Write a wrong job or a wrong recipe beside the right other; returns what is wrong, and the command."""
        for name, right in (("job.yaml", JOB), ("recipe.yaml", RECIPE)):
            (self.folder / name).write_text(yaml.safe_dump(right, sort_keys=False))
        more = overrides(rng)
        name, right = rng.choice([*[("job.yaml", JOB)] * 3, *[("recipe.yaml", RECIPE)] * 2, ("job.yaml", REMOTE)])
        says, content = bent(rng, right) if not more or rng.random() < 0.3 else ("nothing", None)
        if content is not None:
            (self.folder / name).write_bytes(content)
        return f"{name}: {says} {more or ''}".rstrip(), ["plan", str(self.folder / "job.yaml"), *more]


def make_place(folder: Path) -> Place:
    base = save_base(folder / "base")
    save_adapter(folder / "ten", base, 10, seed=1)
    save_adapter(folder / "more", base, 27, seed=2)
    write_tars(folder / "shards", shards=2, images=2)
    return Place(folder)


class TooLong(BaseException):
    """A plan that took longer than `LIMIT_S`."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(code: int, said: str) -> str:
    """What is wrong with how a command ended; empty if nothing is."""
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback (most recent call last)" in said:
        return "a traceback"
    if code == 0:
        return "an error, but exit code 0" if errors else ""
    if code != 2:
        return f"exit code {code}"
    if len(errors) != 1:
        return f"{len(errors)} messages, expected one"
    beside = [line for line in lines[: lines.index(errors[0])] if not line.startswith(" ") and "; trying again for" not in line]
    if beside:
        return f"said before the message: {beside[0][:200]}"
    return "a message that says nothing" if len(said) < 40 else ""


def run_all(place: Place, seed: int, numbers: range | list[int], show: Callable[[str], None] | None = None) -> Findings:
    """Plan with each wrong file, and judge how that ended."""
    found = Findings()
    for number in numbers:
        what, command = place.write(random.Random(f"{seed} {number}"))
        output, errors = io.StringIO(), io.StringIO()
        began, code, problem = time.monotonic(), None, ""
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), at_most(LIMIT_S):
                code = run_command(command)
        except TooLong:
            problem = f"longer than {LIMIT_S:g} s"
        except BaseException:  # noqa: BLE001 (whatever gets out of a command is a bug)
            problem = f"a traceback: {traceback.format_exc()}"
        seconds = time.monotonic() - began
        said = errors.getvalue()
        problem = problem or judge(code if code is not None else 1, said)
        found.outcomes["failed" if problem else "planned" if code == 0 else "refused"] += 1
        found.slowest = max(found.slowest, (seconds, f"{number}: {what[:100]}"))
        if problem:
            found.failures.append(f"{number}: {what[:300]}: {problem}\n{said[-600:]}")
        if show is not None:
            show(f"{number} {seconds:.2f} s: {what[:200]}\n  {said[:1500] or output.getvalue()}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--only", type=int, nargs="+", help="these alone, by number, with all that is said")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder))
        os.chdir(folder)
        numbers: range | list[int] = arguments.only or range(arguments.count)
        found = run_all(place, arguments.seed, numbers, print if arguments.only else None)
        os.chdir("/")
    print(f"seed {arguments.seed}: {found.describe()}")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
