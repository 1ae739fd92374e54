"""Tables on file systems without hard links: committed in one step all the same, or refused for the true reason."""

import errno
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs import job_of, run_here, tiny_recipe, write_tars
from lora_embed.errors import StorageError
from lora_embed.run.job import run_job
from lora_embed.store.store import Store
from lora_embed.table.read import open_table
from lora_embed.table.verify import verify_table
from no_links import without_links


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted file system; its parameters are what it answers to a link, and whether its rename can spare what is there."""
    (tmp_path / "disk").mkdir()
    link_error, renames = request.param
    with ExitStack() as stack:
        try:
            stack.enter_context(without_links(tmp_path / "disk", link_error, renames=renames))
        except OSError as error:
            pytest.skip(str(error))
        yield tmp_path / "disk"


ANSWERS = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS]  # vfat and exFAT, SMB, FUSE


@pytest.mark.parametrize("disk", [(code, True) for code in ANSWERS], ids=map(errno.errorcode.get, ANSWERS), indirect=True)
def test_the_first_of_many_commits_and_readers_see_all_or_nothing(disk: Path) -> None:
    store = Store(str(disk / "table"))
    contents = [bytes([number]) * 300_000 for number in range(8)]
    seen: set[bytes | None] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(store.read("versions/one"))

    made: list[int] = []
    watcher = threading.Thread(target=look)
    writers = [
        threading.Thread(target=lambda n=n: made.append(n) if store.create("versions/one", contents[n]) else None)  # type: ignore[misc]
        for n in range(8)
    ]
    watcher.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    watcher.join()
    assert len(made) == 1
    assert seen <= {None, contents[made[0]]}
    assert store.read("versions/one") == contents[made[0]]
    assert not list((disk / "table" / "_tmp").iterdir())
    assert store.claim("table.json", b"{}").exclusive


@pytest.mark.slow
@pytest.mark.parametrize("disk", [(errno.EPERM, True)], ids=["EPERM"], indirect=True)
def test_a_run_publishes_there(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=2, images=3)
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, table=str(disk / "table"))
    assert run_job(job).version == 1
    verify_table(open_table(job.table))
    assert run_job(job).embedded == 0


@pytest.mark.parametrize("disk", [(code, False) for code in ANSWERS], ids=map(errno.errorcode.get, ANSWERS), indirect=True)
def test_one_that_can_do_neither_is_refused_with_the_reason(disk: Path) -> None:
    store = Store(str(disk / "table"))
    with pytest.raises(
        StorageError, match=r"table/table.json: its file system has neither hard links nor a rename .* another disk"
    ):
        store.create("table.json", b"{}")
    assert store.list_files() == []
    assert not list((disk / "table" / "_tmp").iterdir())
