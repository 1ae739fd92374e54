"""From nothing to the first search result on one's own images, as a new user: `make first-search`.

Runs the commands of docs/first-table.md literally, in an empty folder with an empty home: from a clone of this repository, and
from a wheel. It prints the seconds of each command, the size of the environment and that of the table. What a user brings is
made before the clock starts: a folder of 498 drawings in three classes, a base and two adapters, all of the demo. pip downloads
from the index that it knows; its settings in the environment apply.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lora_embed import demo
from lora_embed.demo import parts
from lora_embed.store.fetch import cache_root

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first-table.md"
WAYS = {"source": "One machine", "wheel": "From a wheel"}  # way → section of the page with its commands
ADDRESS = "<address of this repository>"
CLASSES = {"food": "Food & Drink", "animals": "Animals & Nature", "travel": "Travel & Places"}  # folder → category of emoji
MB = 1e6


def commands_of(section: str) -> list[str]:
    """The commands of a section, in order; a file that a command writes from the following lines belongs to it."""
    text = re.split(r"^#+ ", PAGE.read_text(), flags=re.MULTILINE)
    [found] = [part for part in text if part.partition("\n")[0] == section]
    lines = "".join(re.findall(r"^```\n(.*?)^```", found, flags=re.MULTILINE | re.DOTALL))
    return re.findall(r"^[^\n]*<<END\n.*?^END\n|^[^\n]+\n", lines, flags=re.MULTILINE | re.DOTALL)


def commands_by(way: str) -> list[str]:
    """All commands of a way: those from a wheel differ in how they install."""
    source = commands_of(WAYS["source"])
    if way == "source":
        return source
    install = next(number for number, command in enumerate(source) if command.startswith("pip install"))
    return [*commands_of(WAYS["wheel"]), *source[install + 1 :]]


def bring(folder: Path, way: str) -> None:
    """What a user has at the beginning: images in folders of classes, a base, adapters; and a wheel if that is the way."""
    shutil.copytree(parts.fetch_base_model(cache_root(), print), folder / "base")
    shutil.copytree(Path(demo.__file__).parent / "adapters", folder / "adapters")
    pictures = next(image.path.parent for image in parts.fetch_images(cache_root(), print) if image.key.startswith("google"))
    records = json.loads((pictures / "emoji.json").read_text())
    for name, category in CLASSES.items():
        (folder / "photos" / name).mkdir(parents=True)
        for record in records:
            if record["category"] == category and record["has_img_google"]:
                shutil.copy(pictures / record["image"], folder / "photos" / name / f"{record['short_name']}.png")
    if way == "wheel":
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "source")], check=True)
        subprocess.run([*pip, str(folder / "source")], check=True)
        shutil.copy(folder / "source" / "constraints.txt", folder)
        shutil.rmtree(folder / "source")


@dataclass(frozen=True)
class Timed:
    """One command, as its first line, and how long it took."""

    command: str
    seconds: float


def run(commands: list[str], folder: Path, home: Path) -> list[Timed]:
    """Run commands in one shell. Raises CalledProcessError if one fails; its output goes to this process's."""
    script, times = "set -e\n", folder.parent / "times.txt"
    for command in commands:
        script += f"echo $EPOCHREALTIME >> {times}\n{command.replace(ADDRESS, str(ROOT))}"
    script += f"echo $EPOCHREALTIME >> {times}\n"
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    inherited = {name: value for name, value in inherited.items() if not name.startswith("LORA_EMBED")}
    subprocess.run(["bash", "-c", script], cwd=folder, env=inherited | {"HOME": str(home)}, check=True)
    moments = [float(line) for line in times.read_text().split()]
    pairs = zip(commands, moments, moments[1:], strict=False)
    return [Timed(command.partition("\n")[0], end - start) for command, start, end in pairs]


def disk_of(folder: Path) -> float:
    """Megabytes that a folder takes on the disk."""
    return (
        int(subprocess.run(["du", "-s", "-B1", str(folder)], capture_output=True, text=True, check=True).stdout.split()[0]) / MB
    )


def walk(way: str, scratch: Path) -> None:
    """Take one way in an empty folder, and print what it took."""
    folder, home = scratch / "first", scratch / "home"
    folder.mkdir()
    home.mkdir()
    bring(folder, way)
    load = os.getloadavg()[0]
    steps = run(commands_by(way), folder, home)
    print(f"== {way}: {len(steps)} commands, {sum(step.seconds for step in steps) / 60:.1f} minutes")
    for step in steps:
        print(f"{step.seconds:8.1f} s  {step.command}")
    images = sum(path.is_file() for path in (folder / "photos").rglob("*"))
    print(f"environment {disk_of(folder / '.venv'):,.0f} MB, table of {images} images {disk_of(folder / 'table'):.1f} MB")
    print(f"load of the machine {load:.1f} before and {os.getloadavg()[0]:.1f} after, {os.cpu_count()} cores", flush=True)


def main() -> int:
    """Walk the ways that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", default=list(WAYS), metavar="WAY", help=f"one of {', '.join(WAYS)}; both by default")
    ways = parser.parse_args().ways
    if unknown := sorted(set(ways) - set(WAYS)):
        parser.error(f"{unknown[0]!r} is none of {', '.join(WAYS)}")
    for way in ways:
        with tempfile.TemporaryDirectory(prefix="first-search-") as scratch:
            walk(way, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
