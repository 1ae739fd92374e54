"""Makes `tests/data/tables.tar.xz` again: small tables, each written by the code of an older commit of this repository.

`python tests/old_table.py` checks the commits out beside, and lets their own jobs write with the libraries that are
installed now. `tests/table/test_upgrades.py` opens what they wrote.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from jobs import ROOT, write_job, write_recipe
from models import save_adapter, save_base
from samples import encoded, noise, tar_of

TABLES = ROOT / "tests" / "data" / "tables.tar.xz"
COMMITS: dict[str, dict[str, str]] = {
    "b0781d5": {},  # the first that published a table
    "ccc375e": {"vector_type": "float16"},  # gates, forgotten images; the last but five to split the bytes of float16
}
TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "image_size": 8,
    "patch_size": 4,
}
DATED = 1_700_000_000  # of the shards, whose times are part of their ids


def write_shard(path: Path, first: int, images: int) -> None:
    """Labelled images, and one that is none."""
    members = [("bad.png", b"no image")]
    for number in range(first, first + images):
        members += [(f"{number:03d}.png", encoded(noise(6, 5, seed=number)))]
        members += [(f"{number:03d}.json", b'{"label": %d}' % (number % 2))]
    path.write_bytes(tar_of(members))
    os.utime(path, (DATED, DATED))


def run(checkout: Path, folder: Path, *arguments: str) -> None:
    """A script of the older release, in that folder."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True)


def write_table(checkout: Path, folder: Path, options: dict[str, str]) -> None:
    """Two shards published, of one an image forgotten where that was known, a third staged; all paths are relative."""
    base = save_base(folder / "base", "vit", **TINY)
    adapter = save_adapter(folder / "adapter", base, 10, r=1, target_modules=["q_proj"])
    write_recipe(folder, base, {adapter: 1.0}, image_size=8)
    for name in ("recipe.yaml", "adapter/adapter_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(str(base), "base").replace(str(adapter), "adapter"))
    (folder / "adapter" / "README.md").unlink()
    (folder / "shards").mkdir()
    for number, name in enumerate(("a", "b")):
        write_shard(folder / "shards" / f"{name}.tar", 10 * number, 5)
    job = {"chunk_size": 4, "carry": ["label"], "max_rejects": 1.0, "resources": {}}
    write_job(folder, Path("recipe.yaml"), Path("shards"), **job, **options)
    embed = (str(checkout / "jobs" / "embed.py"), "--config", "job.yaml")
    run(checkout, folder, *embed)
    if (checkout / "src" / "lora_embed" / "lineage.py").exists():
        command = "from lora_embed.cli.main import main; main()"
        run(checkout, folder, "-c", command, "forget", "table", "a.tar/001", "--why", "its owner asked")
    write_shard(folder / "shards" / "c.tar", 20, 6)
    run(checkout, folder, *embed, "--no-publish")


def pack(folder: Path, out: Path) -> None:
    """All files below a folder, dated alike."""
    with tarfile.open(out, "w:xz", preset=9) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            member, data = tarfile.TarInfo(path.relative_to(folder).as_posix()), path.read_bytes()
            member.size, member.mtime = len(data), DATED
            tar.addfile(member, io.BytesIO(data))


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for commit, options in COMMITS.items():
            checkout, folder = Path(place) / "checkout" / commit, Path(place) / "tables" / commit
            folder.mkdir(parents=True)
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "--detach", str(checkout), commit], check=True)
            try:
                write_table(checkout, folder, options)
            finally:
                subprocess.run([*git, "remove", "--force", str(checkout)], check=True)
        TABLES.parent.mkdir(exist_ok=True)
        pack(Path(place) / "tables", TABLES)
    print(f"{TABLES}: {TABLES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
