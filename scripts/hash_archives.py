"""Write deploy/hashes.txt: the archives that pip chooses for the image, by constraints.txt, with their SHA-256.

To be run by Python 3.11 on Linux and x86-64, as in the image, with the package index that the image is built from.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# The archives of the image, for pip's --require-hashes. `make hashes` writes it, by Python 3.11 on x86-64 Linux.
# Run it again with the index that the image is built from: torch and what belongs to it are other archives for each kind
# of device. If a `<…>` remains, write the hash of that archive there.
"""


def requirements() -> list[str]:
    """What pyproject.toml asks for, and what builds the package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [*project["project"]["dependencies"], *project["build-system"]["requires"]]


def report() -> list[dict[str, dict[str, str]]]:
    """What pip would install, each with its archive."""
    how = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", "-"]
    command = [sys.executable, "-m", "pip", "install", *how, "-c", str(ROOT / "constraints.txt"), *requirements()]
    return list(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["install"])


def line(chosen: dict[str, dict[str, str]]) -> str:
    """An archive that was built for one kind of device has a local version, which the image's index need not have."""
    name, version = chosen["metadata"]["name"], chosen["metadata"]["version"]
    public, is_local, _ = version.partition("+")
    archive: dict[str, dict[str, str]] = chosen["download_info"]["archive_info"]  # type: ignore[assignment]
    return f"{name}=={public} --hash=sha256:{'<…>' if is_local else archive['hashes']['sha256']}"


if __name__ == "__main__":
    lines = sorted(map(line, report()), key=str.lower)
    (ROOT / "deploy" / "hashes.txt").write_text(HEAD + "\n".join(lines) + "\n")
