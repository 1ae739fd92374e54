"""Forty mistakes of the first hour, each made with the real command in a process of its own: message, exit code, CPU seconds.

    python campaigns/mistakes.py --write     # into docs/mistakes.md; make mistakes

The mistakes are cases of tests/test_errors.py and tests/model/test_refusals.py. Exit code 1 if one ends otherwise than its
case says, or takes more than three seconds of CPU although no weights have to be read for it.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

import ray

from jobs import ROOT
from refused import PAGE as REFUSALS
from test_errors import PAGE as ERRORS
from test_errors import make_good, publish
from user_errors import Case, Setup, as_documented

PAGE = ROOT / "docs" / "mistakes.md"
BEGIN, END = "<!-- written by campaigns/mistakes.py --write -->", "<!-- end -->"
MOST_CPU_S = 3.0
MAIN = "from lora_embed.cli.main import main; main()"
FORTY = (
    # files that are not there, or cannot be read
    "no job file", "no recipe", "no such input", "no such base", "no such base on the hub", "no such adapter",
    "an adapter that is neither here nor said to be on the hub", "a pattern that matches no file", "no table there",
    "no such image", "a job whose table is not there yet",
    # typing errors
    "broken YAML", "a key twice", "an unknown key in the recipe", "an unknown key in the job", "a missing key",
    "a number out of its bounds", "a merge method with a typing error", "an option that the method does not have",
    "a word of a list with a typing error", "`--set` without a value", "`--set` with a wrong value",
    "a storage option that is not known", "an unknown kind of index",
    # one thing in the place of another
    "a recipe in place of a job", "a job in place of a recipe", "an adapter in place of a job", "a table in place of a job",
    "a recipe in place of a table", "a folder of images in place of a table", "image and table swapped",
    "a table in place of an index", "a base in place of the job's table", "a job in place of a recipe to evaluate",
    # what does not fit
    "a dataset of the hub where HF_HUB_OFFLINE is set", "a folder of adapters", "an adapter of another base",
    "a table in its own input", "nothing to publish", "an encoder's directory that is not empty",
)  # fmt: skip
READ_WEIGHTS = ("an adapter of another base",)  # what is wrong shows only in their names and shapes, so torch is imported


@dataclass(frozen=True)
class Outcome:
    """How a mistake ended."""

    case: Case
    message: str
    code: int
    cpu_s: float

    @property
    def problem(self) -> str:
        """What is not as promised; empty if all is."""
        if "Traceback" in self.message or self.message.count("error: ") != 1:
            return f"no single message: {self.message[-800:]}"
        if self.code != self.case.code:
            return f"exit code {self.code}, expected {self.case.code}"
        if missing := [part for part in self.case.says if part not in self.message]:
            return f"the message lacks {missing}"
        if self.cpu_s > MOST_CPU_S and self.case.what not in READ_WEIGHTS:
            return f"{self.cpu_s:.1f} s of CPU, expected at most {MOST_CPU_S:g}"
        return ""

    @property
    def row(self) -> str:
        """A row of the page's table."""
        command = f"lora-embed {shlex.join(self.case.arguments)}"
        message = as_documented(self.message.partition("error: ")[2].partition("\nend: ")[0])
        return f"| {self.case.what} | `{command}` | {message} | {self.code} | {self.cpu_s:.1f} |"


def make(case: Case, good: Path, published: Path, scratch: Path) -> Outcome:
    """Make a mistake in a fresh copy of a good job, and measure the command's process."""
    folder = scratch / "products"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(published if case.published else good, folder)
    case.breaks(Setup(folder))
    with (scratch / "said").open("w+") as said:
        command = [sys.executable, "-c", MAIN, *case.arguments]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=said, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return Outcome(case, said.read(), process.returncode, usage.ru_utime + usage.ru_stime)


def write_page(outcomes: list[Outcome]) -> None:
    """Put the table between its marks in the page."""
    head = "| mistake | command | message, after `error: ` | exit code | CPU seconds |\n| --- | --- | --- | ---: | ---: |"
    slowest = max(outcome.cpu_s for outcome in outcomes)
    table = "\n".join([head, *(outcome.row for outcome in outcomes)])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    counted = f"{len(outcomes)} mistakes; the slowest command took {slowest:.1f} s of CPU, imports of Python included."
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n\n{counted}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    by_name = {case.what: case for page in (ERRORS, REFUSALS) for case in page.cases}
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        good = make_good(scratch / "good")
        published = publish(good, scratch / "published" / "good")
        ray.shutdown()
        for name in FORTY:
            outcomes.append(make(by_name[name], good, published, scratch))
            said = re.sub(r"\s+", " ", outcomes[-1].message)[:150]
            print(
                f"{name}: exit {outcomes[-1].code}, {outcomes[-1].cpu_s:.2f} s of CPU: {said} {outcomes[-1].problem}",
                flush=True,
            )
    if arguments.write:
        write_page(outcomes)
    broken = [outcome.case.what for outcome in outcomes if outcome.problem]
    print(f"{len(outcomes)} mistakes, {len(broken)} of them otherwise than promised: {broken}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
