"""The fault campaign: a small job on a real S3 server, a fault in each run, and the same command again after it.

    python campaigns/campaign.py --seed 0 --runs 200 --out .cache/faults/results.jsonl

Runs that stand in the file already are skipped. Each must end whole, or stop with exit code 1 and an error that names the
cause; then the same command, undisturbed, ends whole. Exit code 1 if one did not.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

import pyarrow as pa
import pyarrow.compute as pc

from faults import KINDS, NETWORK, Fault, Trap, draw, transient
from jobs import ROOT
from lora_embed.schema import Part
from lora_embed.table import versions
from scene import LIMIT_S, Scene, World, left_over, rows_of, scene, world_at
from strikes import strike

PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- written by campaigns/campaign.py --report -->", "<!-- end -->"
NOT_CLEARED = "staged parts could not be removed"  # said by a run that has published; the next one does it
NOT_STARTED = "timed out during startup"
PATIENCE_S = 60.0  # for what a killed driver leaves behind to end by itself


@dataclass
class Result:
    """What became of a run."""

    run: int
    seed: int
    kind: str
    form: str
    fault: str
    struck: str = ""
    code: int | None = None
    outcome: str = ""  # whole, stopped or killed
    message: str = ""  # the last line of an error, or what else was said
    again: int | None = None  # exit code of the same command, undisturbed
    requests: int = 0
    failed: int = 0  # of them
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)


def run_one(world: World, seed: int, number: int) -> Result:
    """A run and its fault, and the same command again; checks both."""
    fault = draw(seed, number)
    result = Result(run=number, seed=seed, kind=fault.kind.name, form=fault.form, fault=str(fault))
    began = time.monotonic()
    with scene(world, f"run-{seed}-{number:04d}", fault) as here:
        codes = disturbed(here, result)
        before = committed(here)
        here.heal()
        check_end(here, result, codes)
        if any(codes) or fault.kind.name in ("shard replaced", "recipe changed") or NOT_CLEARED in here.said(0):
            resume(here, result, before)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def disturbed(here: Scene, result: Result) -> list[int | None]:
    """The run with its fault, two of them where it is started twice; their exit codes, None for one that does not end."""
    fault = here.fault
    trap = Trap(fault, lambda: strike(here))
    if fault.beside:
        here.break_network(transient(fault.beside, fault.seed))
    if fault.phase == "start":
        trap.struck = strike(here)
    else:
        here.watch(after=trap) if fault.is_done else here.watch(before=trap)
    for _ in range(2 if fault.kind.name == "started twice" else 1):
        here.start(disturbed=True)
    codes = [here.wait(process) for process in here.processes]
    with trap.lock:  # a run may be over before its killer has seen that it is
        result.struck, result.code = trap.struck, codes[0]
    requests = here.requests
    result.requests, result.failed = len(requests), sum(1 for request in requests if request.fault)
    if not trap.struck:
        result.violations.append("the fault never struck")
    return codes


def committed(here: Scene) -> dict[str, str]:
    """Parts that are there now, with their marks."""
    return {entry.path: entry.etag for entry in here.store.list_files("staging")}


def check_end(here: Scene, result: Result, codes: list[int | None]) -> None:
    """Did the run end in one of the two ways?"""
    for number, code in enumerate(codes):
        said = here.said(number)
        errors = [line for line in said.splitlines() if line.startswith(("error: ", "stopped by", "interrupted"))]
        result.message = result.message or " | ".join(errors)[:1000]
        if "Traceback (most recent call last)" in said:
            result.violations.append(f"a traceback: {said[said.index('Traceback') :][:1500]}")
        if code == 1:
            check_message(here.fault, said, errors, result)
        elif code is None:
            result.violations.append(f"no end after {LIMIT_S:g} s: {said[-1500:]}")
        elif code not in (0, *killed_by(here.fault)):
            result.violations.append(f"exit code {code}: {said[-1500:]}")
    result.outcome = {0: "whole", 1: "stopped", None: "endless"}.get(codes[0], "killed" if (codes[0] or 0) < 0 else "refused")
    if 0 in codes:
        check_table(here, result)
    check_processes(here, result)


def killed_by(fault: Fault) -> tuple[int, ...]:
    """Exit codes that are the fault's own doing."""
    is_kill = fault.kind.name in ("driver killed", "all processes killed") or fault.form == "one killed"
    return (-9,) if is_kill else ()


def check_message(fault: Fault, said: str, errors: list[str], result: Result) -> None:
    cause = "|".join(filter(None, [fault.kind.cause, NETWORK if fault.beside else ""]))
    whole = said[said.index(errors[0]) :] if errors else ""
    if len(errors) != 1:
        result.violations.append(f"{len(errors)} error lines, expected one: {said[-1500:]}")
    elif not re.search(cause, whole):
        result.violations.append(f"the error does not name the cause ({cause}): {whole[:1500]}")


def check_processes(here: Scene, result: Result) -> None:
    """Nothing that the run started goes on, but a cluster's nodes."""
    end = time.monotonic() + PATIENCE_S
    while here.fault.kind.name != "node lost" and (left := left_over(here)):
        if time.monotonic() > end:
            names = [" ".join(process.cmdline())[:120] for process in left if process.is_running()]
            result.violations.append(f"processes left behind: {names}")
            return
        time.sleep(0.2)


def resume(here: Scene, result: Result, before: dict[str, str]) -> None:
    """The same command, undisturbed: whole, and nothing that was committed is written again."""
    seen = Counter(r.path for r in here.requests if r.method == "PUT" and r.status == 200)
    result.again = here.wait(here.start(disturbed=False))
    said = here.said(len(here.processes) - 1)
    if result.again != 0 or "Traceback (most recent call last)" in said:
        result.violations.append(f"the same command again: exit code {result.again}: {said[-1500:]}")
        return
    puts = Counter(r.path for r in here.requests if r.method == "PUT" and r.status == 200)
    written = {path.partition(f"/{here.name}/")[2] for path in puts - seen}
    if twice := sorted(written & set(before)):
        result.violations.append(f"written again, though committed: {twice[:3]}")
    check_table(here, result, is_last=True)
    check_processes(here, result)


def check_table(here: Scene, result: Result, *, is_last: bool = False) -> None:
    """Equal to an undisturbed table bit by bit, with no part left of what it holds."""
    rows = rows_of(here.store.uri, here.store.options)
    if not any(rows.equals(table) for table in expected(here, is_last=is_last)):
        result.violations.append(
            f"the table differs from an undisturbed one: {difference(rows, expected(here, is_last=True)[0])}"
        )
    manifest = versions.read_manifest(here.store)
    assert manifest is not None
    parts = [Part.parse(entry.path.rsplit("/", 1)[-1]) for entry in here.store.list_files(f"staging/{manifest.space_id}")]
    left = [part.name for part in parts if part is not None and part.shard_id in manifest.shards]
    if left and (is_last or NOT_CLEARED not in here.said(0)):
        result.violations.append(f"parts left of what version {manifest.version} holds: {left[:3]}")


def expected(here: Scene, *, is_last: bool) -> list[pa.Table]:
    """The table of the shards as they are; before the last run, of one that was replaced also as it was."""
    was, other = here.world.expected
    if here.fault.kind.name != "shard replaced":
        return [was]
    mine = pa.array([here.replaced])
    kept = was.filter(pc.invert(pc.is_in(was["shard"].cast(pa.string()), mine)))
    now = pa.concat_tables([kept, other.filter(pc.is_in(other["shard"].cast(pa.string()), mine))]).unify_dictionaries()
    return [now.sort_by("id")] if is_last else [now.sort_by("id"), was]


def difference(rows: pa.Table, wanted: pa.Table) -> str:
    """Where two tables part."""
    if rows.schema != wanted.schema:
        return f"columns {rows.schema.names}, expected {wanted.schema.names}"
    ids, ours = set(wanted["id"].to_pylist()), set(rows["id"].to_pylist())
    if rows.num_rows != wanted.num_rows or ids != ours:
        return (
            f"{rows.num_rows} rows, expected {wanted.num_rows}; missing {sorted(ids - ours)[:3]}, more {sorted(ours - ids)[:3]}"
        )
    return f"values of {[name for name in rows.schema.names if not rows[name].equals(wanted[name])]}"


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table_of(rows: list[dict[str, Any]]) -> str:
    """Fault × outcome, as Markdown."""
    lines = [
        "| fault | runs | ended whole | stopped, cause named | killed | the same command again: whole | promises broken |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in [*(kind.name for kind in KINDS), ""]:
        some = [row for row in rows if name in (row["kind"], "")]
        ends = Counter(row["outcome"] for row in some)
        again = [row["again"] for row in some if row["again"] is not None]
        broken = sum(1 for row in some if row["violations"])
        figures = [len(some), *(ends[end] for end in ("whole", "stopped", "killed"))]
        cells = [name or "**all**", *figures, f"{again.count(0)} of {len(again)}" if again else "–", broken]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    requests, failed = (sum(row[key] for row in rows) for key in ("requests", "failed"))
    seeds = sorted({row["seed"] for row in rows})
    return "\n".join(lines) + (
        f"\n\n{len(rows)} runs, seed {', '.join(map(str, seeds))}; {failed:,} of {requests:,} requests to the store failed."
    )


def write_report(rows: list[dict[str, Any]]) -> None:
    """Put the table between its marks in the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table_of(rows)}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    arguments = parse()
    out: Path = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["seed"], row["run"]) for row in read_results(out)}
    wanted = arguments.only or range(arguments.runs)
    todo = [number for number in wanted if (arguments.seed, number) not in done][: arguments.most]
    if todo:
        with world_at(out.parent / "world") as world:
            for number in todo:
                result = run_one(world, arguments.seed, number)
                if NOT_STARTED in f"{result.message} {result.violations}":  # too much else to do: it is left for another time
                    print(f"{number}: Ray did not start in the 30 s that it has", flush=True)
                    continue
                with out.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
                print(
                    f"{number}: {result.fault}: {result.outcome}, {result.seconds} s {' '.join(result.violations)}", flush=True
                )
    rows = read_results(out)
    if arguments.report:
        write_report(rows)
    broken = [row for row in rows if row["violations"]]
    print(f"{len(rows)} runs in {out}, {len(broken)} of them broke a promise: {[row['run'] for row in broken]}")
    return 1 if broken else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=200, help="in all, those of the file counted")
    parser.add_argument("--only", type=int, nargs="+", help="these alone, by number")
    parser.add_argument("--most", type=int, default=None, help="runs before this command ends")
    parser.add_argument("--report", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--out", type=Path, default=Path(".cache/faults/results.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
