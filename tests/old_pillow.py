"""How Pillow 12 and older resized: its arithmetic by the installed one, and real wheels of other releases."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from jobs import ROOT
from lora_embed.store.fetch import cache_root

_resize = Image.Image.resize


def resize_columns_first(
    image: Image.Image, size: tuple[int, int], resample: int, box: Any = None, reducing_gap: Any = None
) -> Image.Image:
    """`Image.resize` as it was up to Pillow 12.3: always the columns' number first, whatever that costs."""
    left, top, right, bottom = box or (0, 0, *image.size)
    narrow = _resize(image, (size[0], image.height), resample, (left, 0, right, image.height))
    return _resize(narrow, size, resample, (0, top, size[0], bottom))


def install(package: str, version: str) -> Path:
    """A folder that has this release of a package alone, to stand before others in PYTHONPATH."""
    folder = cache_root() / "packages" / f"{package}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            aside = folder.with_name(f"{folder.name}-{os.getpid()}")
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                str(aside),
                f"{package}=={version}",
            ]
            subprocess.run(command, check=True, timeout=300)
            aside.rename(folder)
    return folder


def path_with(*folders: Path) -> str:
    """PYTHONPATH for a process that finds these first, and this source tree."""
    return os.pathsep.join([*map(str, folders), str(ROOT / "src"), str(ROOT / "tests")])
