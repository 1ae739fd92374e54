"""What a soak counts after each night: processes and what they hold, files left on disk, objects on storage."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil

from month_world import DAY, Month

MARK = "LORA_EMBED_SOAK"  # a variable that all processes of a soak inherit, those included that lost their parent
MB = 2**20
KEPT_DAYS = 8.0  # of a copy, one more than it is
CLOCK_S = 5.0  # between a listing and the publication before it


def marked(mark: str) -> list[psutil.Process]:
    """Processes of this soak, but for the one that asks."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def count_processes(mark: str, known: dict[int, str]) -> dict[str, float]:
    """Processes by role, and what the long-lived ones hold: private memory, open files, threads.

    Private memory (USS), since a share of what is shared changes with the number of processes beside.
    """
    figures: dict[str, float] = Counter()
    for process in marked(mark):
        with contextlib.suppress(psutil.Error):
            role = known.get(process.pid) or role_of(process)
            figures[f"processes: {role}"] += 1
            if role in ("worker", "other"):
                continue
            figures[f"memory of {role}, MB"] += process.memory_full_info().uss / MB
            figures[f"handles of {role}"] += process.num_fds()
            figures[f"threads of {role}"] += process.num_threads()
    return dict(figures)


def role_of(process: psutil.Process) -> str:
    """Of one that came after the beginning: the cluster's workers come and go, anything else should be gone by now."""
    words = process.cmdline()
    return "worker" if any("default_worker.py" in word or word.startswith("ray::") for word in words) else "other"


def daemons_of(mark: str) -> dict[int, str]:
    """All processes that are there now, by process id; to be asked before the first night."""
    own = ("gcs_server", "raylet")
    return {process.pid: process.name() if process.name() in own else "ray daemons" for process in marked(mark)}


def count_files(folders: dict[str, Path]) -> dict[str, float]:
    """Files and their bytes, by what the folder is for; sockets and empty folders count as files."""
    figures: dict[str, float] = {}
    for name, folder in folders.items():
        sizes = list(_sizes(folder))
        figures |= {f"files: {name}": len(sizes), f"MB of files: {name}": sum(sizes) / MB}
    return figures


def count_copies(cache: Path) -> dict[str, float]:
    """Copies of encoders that should be gone: when the newest one was made, nobody had asked for them for over a week."""
    copies = [path for path in (cache / "fetched").glob("*") if path.is_dir()]
    newest = max((path.stat().st_mtime for path in copies), default=0.0)
    asked = [path.with_suffix(".lock").stat().st_mtime if path.with_suffix(".lock").exists() else 0.0 for path in copies]
    return {"orphan copies": sum(when < newest - KEPT_DAYS * DAY for when in asked)}


def _sizes(folder: Path) -> Iterator[int]:
    for root, folders, files in os.walk(folder):
        yield from [0] * (not folders and not files and Path(root) != folder)
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                yield os.lstat(os.path.join(root, file)).st_size


def count_objects(month: Month, *, published: bool) -> dict[str, float]:
    """Objects of the table by their first folder, those that should be gone, and uploads that were never finished.

    Orphans are looked for where a night has just `published`, since that is when they are removed.
    """
    fs, root = fsspec.core.url_to_fs(month.job.table, use_listings_cache=False)
    listed = {path.removeprefix(f"{root}/"): info for path, info in fs.find(root, detail=True).items()}
    figures: dict[str, float] = Counter(f"objects: {path.split('/')[0]}" for path in listed if "/" in path)
    figures["MB of objects"] = sum(info["size"] for info in listed.values()) / MB
    if published:
        figures["orphan objects"] = len(orphans(month, {p: info["LastModified"].timestamp() for p, info in listed.items()}))
    uploads = fs.call_s3("list_multipart_uploads", Bucket=root.split("/")[0]).get("Uploads", [])
    figures["unfinished uploads"] = len(uploads)
    return dict(figures)


def orphans(month: Month, modified: dict[str, float]) -> list[str]:
    """Objects that no manifest leads to, and that were older than the grace period when the newest version was published.

    Told by the manifests and the store's clock alone, not by the package.
    """
    listed, tombs = month.manifests(), month.manifests("retired")
    oldest = modified["CURRENT"] - month.job.retain.grace_days * 86400 - CLOCK_S
    manifests: list[dict[str, Any]] = [*listed.values(), *tombs.values()]
    kept = {entry["path"] for m in manifests for entry in (*m["files"], *m["rejects"])}
    spaces = {m["space_id"] for m in manifests}
    wanted = {shard["id"] for entry in listed[max(listed)]["files"] for shard in entry["shards"]}
    recipes = {path for path in modified if path.startswith("recipes/")}
    space_of = {path: json.loads(month.files.cat_file(path))["space_id"] for path in recipes}
    staged_at: dict[str, float] = {}  # by space: when something was staged last
    for path, when in modified.items():
        if path.startswith("staging/"):
            staged_at[path.split("/")[1]] = max(when, staged_at.get(path.split("/")[1], 0.0))

    def is_needed(path: str) -> bool:
        first, _, rest = path.partition("/")
        space, _, rest = rest.partition("/")
        if first in ("CURRENT", "table.json", "versions", "runs"):
            return True
        if first == "staging" and rest.endswith(".parquet"):  # of a pass that goes on
            return staged_at[space] >= oldest and rest.split("/")[-1].split("-")[0] in wanted
        if first in ("encoders", "staging"):
            return space in spaces or staged_at.get(space, 0.0) >= oldest
        return path in kept or space_of.get(path) in spaces

    return [path for path, when in modified.items() if when < oldest and not is_needed(path)]
