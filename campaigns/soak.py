"""Night after night on a real S3 server and a Ray that lives on: what grows?

`python campaigns/soak.py --minutes 60 --out FILE`.

A night is a process of its own that joins the cluster, as a schedule starts it; or it runs in one process that lives as
long as the soak does, as within a scheduler; or, now and then, it starts a Ray of its own on this machine. Shards come, go
and change, the adapter is trained again, images are forgotten, versions rolled back; after each night all versions are read
by plain pyarrow and held against a model of what was done. Ends with exit code 1 where something is wrong or grows.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

import psutil

from census import MARK, count_copies, count_files, count_objects, count_processes, daemons_of, marked
from growth import Trend, describe, find_trend
from jobs import ROOT, tiny_recipe, write_job
from lora_embed.config.models import load_job
from month_world import DAY, KEEP, Content, Month
from s3 import S3Server, free_ports, s3_server
from samples import png

GRACE_S = 20.0
MOST_SHARDS = 12
NIGHT_S = 900.0  # a night that takes longer hangs
SETTLED_S, DAEMONS_S = 1.5, 10.0  # for workers to end after a night; for Ray's daemons to be there
WARM_UP = 0.25  # of the time
FORMS = {"process": 4, "resident": 6, "own ray": 1}  # who spends a night → how often
HELD = ("a rollback holds it back", "not embedded anew", "not published, the version before stays")
# Most that a figure may grow an hour, by how its name begins; the first that fits. None: told, not judged, since it is of
# the S3 server, or of Ray itself: its daemons keep something of each job, and logs of workers that ended are never removed.
LIMITS: dict[str, float | None] = {
    **{f"{what} of {who}": None for who in ("server", "gcs_server", "ray daemons") for what in ("memory", "handles")},
    "threads of server": None,
    "files: ray": None,
    "MB of files: ray": None,
    "memory of raylet": None,
    "threads of gcs_server": None,
    "memory of": 8.0,
    # These go up and down with shards and encoders. What of it should be gone is judged: orphans.
    **dict.fromkeys(("objects:", "MB of objects", "files: cache", "MB of files: cache")),
    "seconds": None,  # other work beside
    "": 1.0,
}
# MB that Ray Data keeps in its driver of each pipeline: a bare `map_batches` by one actor, 60 times in one process, without
# this package: 269.4 after 15, 275.0 after 55.
RAY_KEEPS = 0.14
NEVER = ("orphan objects", "orphan copies", "unfinished uploads")  # none after any night


@dataclass
class Resident:
    """One process that runs the jobs and commands it is given, one after the other."""

    process: "subprocess.Popen[str]"

    def run(self, arguments: list[str]) -> tuple[int, str]:
        """Exit code and all that was printed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        said: list[str] = []
        for line in self.process.stdout:
            if line.startswith("\0"):
                return int(line[1:]), "".join(said)
            said.append(line)
        raise AssertionError(f"the resident process died:\n{''.join(said)}")


@dataclass
class Soak:
    """A table, the world around it, and the processes that live on."""

    month: Month
    environment: dict[str, str]
    resident: Resident
    known: dict[int, str]  # process id → what it is
    folders: dict[str, Path]
    objects: float = 0.0

    def command(self, form: str, arguments: list[str]) -> tuple[int, str]:
        """Exit code and output of `lora-embed` or, for `nightly`, of jobs/reembed_nightly.py."""
        if form == "resident":
            return self.resident.run(arguments)
        nightly, command = [str(ROOT / "jobs" / "reembed_nightly.py")], ["-c", "from lora_embed.cli.main import main; main()"]
        whole = [sys.executable, *(nightly + arguments[1:] if arguments[0] == "nightly" else command + arguments)]
        environment = {k: v for k, v in self.environment.items() if form != "own ray" or k != "RAY_ADDRESS"}
        ended = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=NIGHT_S, check=False)
        return ended.returncode, ended.stdout + ended.stderr

    def spend_night(self, form: str) -> list[str]:
        """Everything of one cycle; returns what happened."""
        month, rng = self.month, self.month.rng
        happened = []
        if rng.random() < 0.12:
            happened.append(self.forget(form))
        if rng.random() < 0.08:
            happened.append(self.roll_back(form))
        month.go_on(changes_adapter=0.15)
        month.mirror()
        what = self.run(form)
        if what == "held back":
            month.retrain()
            happened.append(what)
            what = self.run(form)
        happened.append(what)
        self.read()
        self.age_cache()
        return [one for one in happened if one]

    def run(self, form: str) -> str:
        code, said = self.command(form, ["nightly", "--config", str(self.month.folder / "job.yaml"), "--json"])
        before = len(self.month.published)
        self.month.note(self.month.today)
        self.month.check_listed(self.month.manifests())
        if code == 0:
            return "published" if len(self.month.published) > before else "nothing stale"
        assert code == 1, said
        assert any(words in said for words in HELD), said
        return "held back"

    def forget(self, form: str) -> str:
        month = self.month
        ids = sorted(month.newest.rows)
        ids = month.rng.sample(ids, min(len(ids), month.rng.randint(1, 2)))
        if not ids:
            return ""
        code, said = self.command(form, ["forget", month.job.table, *ids, "--why", "the soak"])
        assert code == 0, said
        month.gone |= set(ids)
        self.expect(lambda number, _: month.published[number - 1].without(frozenset(ids)))
        return "forgotten"

    def roll_back(self, form: str) -> str:
        """To a version from which nothing was forgotten since."""
        month = self.month
        older = [n for n in sorted(month.manifests())[:-1] if month.published[n].forgotten == month.newest.forgotten]
        if not older:
            return ""
        to = month.rng.choice(older)
        code, said = self.command(form, ["rollback", month.job.table, "--to", str(to), "--why", "the soak"])
        assert code == 0, said
        self.expect(lambda *_: month.published[to])
        return "rolled back"

    def expect(self, made: Callable[[int, str], Content]) -> None:
        self.month.note(made)
        self.month.check_listed(self.month.manifests())

    def read(self) -> None:
        """The table as its users look at it, in the process that lives on."""
        table = self.month.job.table
        for arguments in (["status", table], ["verify", table], ["search", table, str(self.month.folder / "query.png")]):
            if arguments[0] == "search" and not self.month.newest.rows:
                continue
            code, said = self.resident.run(arguments)
            assert code == 0, said

    def age_cache(self) -> None:
        """A night stands for a day: what lies on the disk of a machine grows older by as much."""
        for path in self.folders["cache"].rglob("*"):
            when = path.stat().st_mtime - DAY
            os.utime(path, (when, when))

    def take_census(self, *, published: bool) -> dict[str, float]:
        time.sleep(SETTLED_S)
        assert len(self.month.manifests()) <= KEEP or not published
        figures = count_processes(self.environment[MARK], self.known) | count_files(self.folders)
        figures |= count_copies(self.folders["cache"])
        return figures | count_objects(self.month, published=published)


@contextmanager
def soaking(folder: Path, seed: int) -> Iterator[Soak]:
    """A server, a Ray head and a resident process, ended at the end with all that they have started."""
    folders = {"ray of the cluster": folder / "ray", "temporary": folder / "tmp", "cache": folder / "cache"}
    for path in (*folders.values(), folder / "shards"):
        path.mkdir()
    mark = os.environ[MARK] = f"{os.getpid()}-{time.time_ns()}"
    with ExitStack() as stack:
        server: S3Server = stack.enter_context(s3_server(folder / "server"))
        server.make_bucket("soak")
        stack.callback(end_all, mark)
        gcs, *others = free_ports(4)
        own = {MARK: mark, "TMPDIR": str(folders["temporary"]), "LORA_EMBED_CACHE": str(folders["cache"])}
        own |= {"RAY_ADDRESS": f"127.0.0.1:{gcs}", "PYTHONPATH": str(ROOT / "src")} | server.environment()
        (folder / "token").write_text(os.urandom(32).hex())
        own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))} | own
        os.environ.update(own)  # this process reads the table too
        start_head(gcs, others, folders["ray of the cluster"], environment, folder / "head.log")
        time.sleep(DAEMONS_S)
        daemons = daemons_of(mark)
        command = [sys.executable, str(Path(__file__)), "--resident"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        resident = Resident(subprocess.Popen(command, env=environment, **pipes))
        (folder / "query.png").write_bytes(png(1))
        retain = {"versions": KEEP, "grace_days": GRACE_S / 86400}
        options = {"chunk_size": 4, "max_rejects": 1.0, "max_removed": 1.0, "retain": retain}
        places = {"input": ["s3://soak/shards"], "table": "s3://soak/table"}
        job = load_job(write_job(folder, tiny_recipe(folder), folder, **options, **places))
        month = Month(folder, job, random.Random(seed), most_shards=MOST_SHARDS)
        known = daemons | {resident.process.pid: "resident", server.pid: "server"}
        yield Soak(month, environment, resident, known, folders)


def start_head(gcs: int, others: list[int], folder: Path, environment: dict[str, str], log: Path) -> None:
    """A Ray head that lives on, with its dashboard."""
    dashboard, agent, client = others
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--temp-dir={folder}", f"--port={gcs}", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    alone = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=alone, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def end_all(mark: str) -> None:
    """SIGTERM, then SIGKILL, to what carries this mark."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        processes = marked(mark)
        for process in processes:
            try:
                end(process)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=10)


def reside() -> None:
    """The resident process: run what stdin says."""
    from lora_embed.cli.main import nightly_job, run_command

    for line in sys.stdin:
        name, *rest = json.loads(line)
        code = nightly_job(rest) if name == "nightly" else run_command([name, *rest])
        sys.stderr.flush()
        print(f"\0{code}", flush=True)


def soak(minutes: float, seed: int, out: Path, say: Callable[[str], None] = print) -> list[Trend]:
    """Cycle for so long, a line of JSON each into `out`; the trends after the warm-up."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    with (
        tempfile.TemporaryDirectory(prefix="soak", dir="/tmp", ignore_cleanup_errors=True) as folder,
        soaking(Path(folder), seed) as soaked,
    ):
        started = time.monotonic()
        lines: list[dict[str, Any]] = []
        while (begun := time.monotonic() - started) < minutes * 60:
            form = soaked.month.rng.choices(list(FORMS), list(FORMS.values()))[0]
            happened = soaked.spend_night(form)
            seconds = time.monotonic() - started - begun
            census = soaked.take_census(published=happened[-1] == "published")
            figures = census | {f"seconds: {form}": seconds}
            lines.append({"hours": begun / 3600, "form": form, "happened": happened, "figures": figures})
            with out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            say(f"{begun / 60:5.1f} min, night {len(lines)}: {form}, {', '.join(happened)}, {seconds:.1f} s")
    return trends_of(lines, minutes)


def trends_of(lines: list[dict[str, Any]], minutes: float) -> list[Trend]:
    """The trend of each figure after the warm-up. What was counted once and is absent later is zero there."""
    warm = [line for line in lines if line["hours"] * 60 >= WARM_UP * minutes]
    names = sorted({name for line in warm for name in line["figures"]})
    trends = []
    for name in names:
        is_sparse = name.startswith("seconds") or name == "orphan objects"  # not of each night
        points = [(line["hours"], line["figures"].get(name)) for line in warm]
        found = [(hours, 0.0 if value is None else value) for hours, value in points if value is not None or not is_sparse]
        if len(found) >= 4:
            limit = next(limit for begin, limit in LIMITS.items() if name.startswith(begin))
            if name.startswith("memory of resident") and limit is not None:
                nights = sum(line["form"] == "resident" for line in warm)
                limit += RAY_KEEPS * nights / (warm[-1]["hours"] - warm[0]["hours"])
            trends.append(find_trend(name, [hours for hours, _ in found], [value for _, value in found], limit))
    return trends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("soak.jsonl"), help="a line of JSON for each night is added to it")
    parser.add_argument("--resident", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resident:
        reside()
        return 0
    trends = soak(arguments.minutes, arguments.seed, arguments.out, lambda text: print(text, flush=True))
    print(describe(trends))
    growing = [trend.name for trend in trends if trend.grows or (trend.name in NEVER and trend.most > 0)]
    print(f"grows: {', '.join(growing)}" if growing else "nothing grows")
    return 1 if growing else 0


if __name__ == "__main__":
    sys.exit(main())
