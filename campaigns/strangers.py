"""Index folders, run states, job files and recipes, bent at random, and commands on each: as `hostile_tables.py` for tables.

`python campaigns/strangers.py --seed 7 --count 20000` prints how they ended. A child runs the commands; this process watches
from outside what is read and written, who is asked, what is started, and the time.
"""

import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from hostile_tables import (
    COMMITS,
    Child,
    Watch,
    World,
    bend_bytes,
    bend_json,
    listen,
    make_world,
    replace_place,
    run_campaign,
    texts,
    values,
)
from lora_embed.monitor.record import RunState
from lora_embed.search.export import KINDS, export_index
from lora_embed.table.read import open_table
from samples import png

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x9b\u202a-\u202e]")
RUN = "20260101T000000Z-0a1b2c"
OUTCOMES = ("running", "published", "current", "not published", "failed")
Case = tuple[str, list[list[str]]]  # what was bent, and the commands


def make_good(world: World) -> None:
    """An index of each kind, of the table of a commit."""
    table = open_table(str(world.folder / "good" / COMMITS[0] / "table"))
    for kind in KINDS:
        export_index(table, kind, world.folder / "good" / kind)


def bent_index(rng: random.Random, world: World) -> Case:
    """One or two changes of an index's folder."""
    kind = rng.choice(list(KINDS))
    folder = Path(shutil.copytree(world.folder / "good" / kind, world.case / "index"))
    done = [kind]
    for _ in range(rng.choice([1, 1, 2])):
        path = rng.choice(sorted(path for path in folder.rglob("*") if not path.is_symlink()))
        what = rng.random()
        if path.name == "index.json" and path.is_file() and what < 0.8:
            path.write_bytes(bend_json(path.read_bytes(), rng, world))
        elif path.is_file() and what < 0.8:
            path.write_bytes(bend_bytes(path.read_bytes(), rng))
        elif what < 0.9:
            replace_place(path, rng, world)
        else:
            for link in [path for path in folder.rglob("*") if path.is_symlink()]:
                link.unlink()  # else the copy would be written where it leads
            (folder / rng.choice(list(KINDS))).mkdir(exist_ok=True)
            shutil.copytree(
                world.folder / "good" / rng.choice(list(KINDS)), folder, dirs_exist_ok=True, ignore_dangling_symlinks=True
            )
        done.append(path.name)
    query = str(world.case / "query.png")
    return " ".join(done), [["search", str(world.case / "table"), query, "-k", "3", "--index", str(folder)]]


def bent_state(rng: random.Random, world: World) -> Case:
    """A few states of runs, of which some fields are a stranger's."""
    for number in range(rng.choice([1, 3])):
        state = RunState(run_id=RUN, host="node", started="2026-01-01T00:00:00+00:00", outcome=rng.choice(OUTCOMES))  # type: ignore[arg-type]
        data = bend_json(state.to_json(), rng, world)
        if rng.random() < 0.5:  # of the right types
            found = json.loads(state.to_json())
            found |= {
                name: texts(rng, world) for name in rng.sample(["run_id", "host", "doing", "bound", "error", "outcome"], 3)
            }
            data = json.dumps(found).encode()
        data = bend_bytes(data, rng) if rng.random() < 0.1 else data
        path = world.case / "table" / "runs" / f"{number}{RUN}" / "state.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if rng.random() < 0.05:
            replace_place(path, rng, world)
    if rng.random() < 0.2:
        (world.case / "table" / "CURRENT").write_bytes(
            rng.choice([b"9" * 5000, b"-1", b"\xff", b"1\n2", b"99999999", b"x" * 10**6])
        )
    table = str(world.case / "table")
    return "state", [["status", table], ["status", table, "--metrics"], ["status", table, "--json"], ["gc", table, "--dry-run"]]


def bent_config(rng: random.Random, world: World) -> Case:
    """A job file with keys or values of a stranger's; the recipe beside it likewise."""
    job = {"recipe": "recipe.yaml", "input": [str(world.case / "nowhere")], "table": str(world.case / "table"), "chunk_size": 4}
    recipe = {"base_model": str(world.case / "base"), "adapters": [{"path": "one", "weight": 0.5}], "merge_method": "ties"}
    for name, found in (("job", job), ("recipe", recipe)):
        for _ in range(rng.choice([0, 1, 2])):
            key = rng.choice([*found, texts(rng, world), "resources", "gates", "merge_options", "retain"])
            found[key] = values(rng, world)
        try:
            text = yaml.safe_dump(found, allow_unicode=True).encode(errors="surrogatepass")
        except (yaml.YAMLError, RecursionError):
            text = b"{"
        text = bend_bytes(text, rng) if rng.random() < 0.3 else text
        text = (
            rng.choice([b"&a [*a]", b"a: &a [x]\nb: [*a, *a]", b"!!python/object/apply:os.system [id]", b"{" * 2000])
            if (rng.random() < 0.05)
            else text
        )
        text = text.replace(b"://127.", b":/127.").replace(b"hf://", b"hf:/")  # a host that is named is asked, for two minutes
        (world.case / f"{name}.yaml").write_bytes(text)
    path = str(world.case / "job.yaml")
    return "config", [
        ["status", path],
        ["plan", path],
        ["build", str(world.case / "recipe.yaml"), "--out", str(world.case / "e")],
    ]


KINDS_OF_CASES: dict[str, Callable[[random.Random, World], Case]] = {
    "index": bent_index,
    "state": bent_state,
    "config": bent_config,
}


def problems(name: str, command: list[str], code: int, said: str) -> list[str]:
    """What is wrong with what was printed and how it ended."""
    found = [] if code in (0, 1, 2) else [f"exit {code}"]
    found += ["a traceback"] if "Traceback (most recent call last)" in said else []
    found += ["control characters"] if CONTROL.search(said) else []
    found += ["a forged line"] if re.search(r"^end: done", said, re.M) else []
    if "--metrics" in command and code == 0:
        try:
            samples = [one for family in text_string_to_metric_families(said) for one in family.samples]
            names = {one.name for one in samples}
            found += ["forged metrics"] if any(not of.startswith("lora_embed_") for of in names) or len(samples) > 4 else []
        except ValueError as error:
            found.append(f"no metrics: {error}")
    return found


def campaign(seed: int, count: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Bend and run; how the commands ended, and everything that should not have been."""
    server, came = listen()
    world = make_world(folder, server.getsockname()[1])
    make_good(world)
    child, ended, wrong = Child(world), Counter[str](), []
    watches = {"config": Watch(world.quiet), "other": Watch([world.secrets, *world.quiet])}
    own = {process.pid for process in psutil.Process().children(recursive=True)}
    try:
        for number in range(count):
            rng = random.Random(f"{seed}-{number}")
            kind = rng.choice(sorted(KINDS_OF_CASES))
            shutil.rmtree(world.case, ignore_errors=True)
            shutil.copytree(world.folder / "good" / COMMITS[0], world.case)
            (world.case / "query.png").write_bytes(png(1))
            for watch in watches.values():
                watch.look()
            what, commands = KINDS_OF_CASES[kind](rng, world)
            for watch in watches.values():
                watch.look()
            command = rng.choice(commands)
            code, said = child.run(command)
            ended[f"{kind}, {command[0]}: {code}"] += 1
            happened = watches.get(kind, watches["other"]).look()
            happened += [] if kind == "config" else came  # a config names its hosts itself
            found = problems(kind, command, code, said) + happened
            if found:
                print(f"case {number}: {found}", file=sys.stderr)
                wrong.append(f"case {number} ({what}), {' '.join(command[:1] + command[2:])}: {found}\n{said[-1500:]}")
            came.clear()
    finally:
        child.end()
        server.close()
    left = {process.pid for process in psutil.Process().children(recursive=True)} - own
    return ended, wrong + [f"processes are left: {left}"] * bool(left)


if __name__ == "__main__":
    sys.exit(run_campaign(campaign, __doc__))
