"""What a table no longer needs is removed by every night and by `gc`, and nothing that a live run needs."""

import io
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import job_of, run_here, snapshot, tiny_recipe, vectors_by_id, write_tars
from lora_embed.cli.main import run_command
from lora_embed.config.models import JobConfig, Retain
from lora_embed.errors import GateFailed, IncompleteRun, TableError
from lora_embed.gates.reembed import Decision
from lora_embed.monitor import heartbeat, runs
from lora_embed.monitor.record import RunState
from lora_embed.monitor.runs import announced, find_live, read_runs, state_path
from lora_embed.run.job import publish_job, run_job
from lora_embed.store.store import Store
from lora_embed.table.lineage import forget
from lora_embed.table.read import open_table
from lora_embed.table.retention import Needs, collect, collect_garbage, retain_of
from lora_embed.table.verify import verify_table
from lora_embed.table.versions import highest_version, listed_versions, read_manifest, roll_back
from models import edit_tensors
from s3 import Faults, Proxy, S3Server, s3_server
from samples import png, tar_of

DAY = 86400.0
AT_ONCE = Retain(grace_days=0.0)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """Three shards of four images, published twice."""
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=3, images=4)
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, chunk_size=3, max_removed=1.0, reembed={"drift": 4})
    run_job(job)
    (source / "0003.tar").write_bytes(tar_of([("new.png", png(99)), ("newer.png", png(98))]))
    run_job(job)
    return job


def age(job: JobConfig, days: float) -> None:
    """Time goes by, for the whole table."""
    for path in Path(job.table).rglob("*"):
        if path.is_file():
            when = path.stat().st_mtime - days * DAY
            os.utime(path, (when, when))


def retrain(job: JobConfig) -> None:
    edit_tensors(Path(job.recipe).parent / "ten", lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})


def an_image(job: JobConfig, version: int | None = None) -> tuple[str, bytes]:
    """Its id, and the bits of its vector."""
    vectors = vectors_by_id(open_table(job.table, version, job.table_storage_options).to_dataset().to_table())
    return min(vectors.items())


def objects_with(store: Store, vector: bytes) -> list[str]:
    """Objects of a table that hold these bits, as a row of Parquet or anywhere in their bytes."""
    found, fs, root = [], store.filesystem, store.full_path("")
    for path in fs.find(root):
        data = fs.cat_file(path)
        if data[:4] == b"PAR1" and "embedding" in (rows := pq.read_table(io.BytesIO(data))).column_names:
            held = {np.array(row, np.float32).tobytes() for row in rows.column("embedding").to_pylist() if row is not None}
        else:
            held = set()
        if vector in held or vector in data:
            found.append(path.removeprefix(f"{root}/"))
    return found


def fails_by_a_gate(job: JobConfig) -> JobConfig:
    shard = Path(job.input[0]) / "9999.tar"
    shard.write_bytes(tar_of([("text.png", b"no image")]))
    return job.model_copy(update={"max_rejects": 0.0})


def is_cut(job: JobConfig) -> JobConfig:
    shard = Path(job.input[0]) / "9999.tar"
    shard.write_bytes(tar_of([("cut.png", png(5))])[:700])
    return job


def is_skipped(job: JobConfig) -> JobConfig:
    retrain(job)
    return job


NIGHTS: dict[str, tuple[Callable[[JobConfig], JobConfig], type[Exception] | None]] = {
    "nothing is stale": (lambda job: job, None),
    "a gate fails": (fails_by_a_gate, GateFailed),
    "a shard is cut short": (is_cut, IncompleteRun),
    "a new encoder changes too little": (is_skipped, None),
}


@pytest.mark.parametrize("night", NIGHTS)
def test_what_was_forgotten_is_gone_after_nights_that_publish_nothing(
    job: JobConfig, night: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (id_, vector) = Store(job.table), an_image(job)
    forgotten = forget(store, [id_], "its owner asked")
    assert (forgotten.version, forgotten.held_by) == (3, (1, 2))
    before, error = NIGHTS[night]
    tonight = before(job)
    skipped = Decision(action="skip", says="the change is below your threshold")
    monkeypatch.setattr("lora_embed.gates.reembed.re_embed_decision", lambda *_, **__: skipped)
    for day in range(9):
        if error is None:
            assert not run_job(tonight, replaces=True).published
        else:
            with pytest.raises(error):
                run_job(tonight, replaces=True)
        age(job, 1)
        if day == 5:
            assert objects_with(store, vector) != [], "it is in its grace period"
    assert objects_with(store, vector) == []
    assert (listed_versions(store), store.list_files("retired")) == ([3], [])
    verify_table(open_table(job.table))


def test_what_a_failed_night_has_staged_stays_for_the_next(job: JobConfig) -> None:
    """Also without a grace period: the message says that it is kept."""
    tonight = fails_by_a_gate(job).model_copy(update={"retain": AT_ONCE})
    for _ in range(3):
        with pytest.raises(GateFailed, match="what was embedded is kept"):
            run_job(tonight)
        age(job, 1)
        assert len([e for e in Store(job.table).list_files("staging") if "-last" in e.path]) >= 1
    assert run_job(tonight.model_copy(update={"max_rejects": 1.0})).embedded == 0


def test_what_was_forgotten_before_stays_so_when_more_is_forgotten(job: JobConfig) -> None:
    """Also in a shard that is embedded anew."""
    store, shard = Store(job.table), Path(job.input[0]) / "0000.tar"
    first, second = sorted(vectors_by_id(open_table(job.table).to_dataset().to_table()))[:2]
    assert first.startswith(shard.name)
    for id_ in (first, second):
        forget(store, [id_], "its owner asked")
    assert open_table(job.table).manifest.forgotten == (first, second)
    os.utime(shard, (1, 1))  # another version of the file, with the same images
    result = run_job(job)
    assert result.embedded == 2  # those that were forgotten, whose vectors no version has
    assert result.taken >= 2
    opened = open_table(job.table)
    assert opened.manifest.forgotten == (first, second)
    assert not {first, second} & vectors_by_id(opened.to_dataset().to_table()).keys()


def test_forget_says_until_when_the_files_stay_and_gc_shows_it(job: JobConfig, capsys: pytest.CaptureFixture[str]) -> None:
    job = job.model_copy(update={"retain": Retain(grace_days=2.0)})
    (Path(job.input[0]) / "0004.tar").write_bytes(tar_of([("last.png", png(7))]))
    run_job(job)
    id_, vector = an_image(job)
    capsys.readouterr()
    assert run_command(["forget", job.table, id_, "--why", "its owner asked", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    until = datetime.fromisoformat(said["files_stay_until"]).timestamp()
    assert said["grace_days"] == 2.0
    assert 0 <= until - (time.time() + 2 * DAY) + 30 < 32
    before = snapshot(Path(job.table))
    assert run_command(["gc", job.table, "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert snapshot(Path(job.table)) == before, "a dry run writes nothing"
    assert dry["is_dry_run"]
    assert dry["kept"] == [4]
    assert set(dry["retired"]) == {"1", "2", "3"}
    assert abs(datetime.fromisoformat(dry["retired"]["3"]).timestamp() - until) <= 2
    age(job, 1.9)
    assert run_command(["gc", job.table]) == 0
    assert "nothing removed" in capsys.readouterr().out
    assert objects_with(Store(job.table), vector) != []
    age(job, 0.2)
    assert run_command(["gc", job.table, "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert run_command(["gc", job.table, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["objects"], done["bytes"]) == (dry["objects"], dry["bytes"])
    assert done["by_folder"] == dry["by_folder"] == {"data": 1, "retired": 3}
    assert objects_with(Store(job.table), vector) == []
    assert run_command(["gc", job.table]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"table     {job.table}: keeps 10 versions, and other files for 2 days more",
        "versions  4",
        "nothing removed",
    ]


@pytest.mark.slow
def test_gc_on_s3_leaves_no_byte_of_what_was_forgotten(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch)
    options = {"table": "s3://images/forgotten", "table_storage_options": server.options(), "retain": {"grace_days": 3 / DAY}}
    job = job_of(tmp_path, tiny_recipe(tmp_path), write_tars(tmp_path / "shards", shards=2, images=3), **options)
    run_job(job)
    store, (id_, vector) = Store(job.table, server.options()), an_image(job)
    forget(store, [id_], "its owner asked")
    assert objects_with(store, vector) != []
    assert collect_garbage(job.table, server.options()).objects == 0
    time.sleep(4.1)
    assert collect_garbage(job.table, server.options(), is_dry_run=True).objects == 2
    assert collect_garbage(job.table, server.options()).by_folder == {"data": 1, "retired": 1}
    assert objects_with(store, vector) == []
    verify_table(open_table(job.table, storage_options=server.options()))


def test_a_forgetting_that_was_interrupted_is_finished_by_the_next_night(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies between its version and the retirement of those before: nothing else would retire them for ten versions."""

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    store, (id_, vector) = Store(job.table), an_image(job)
    with monkeypatch.context() as patch:
        patch.setattr("lora_embed.table.versions.move_aside", dies)
        with pytest.raises(KeyboardInterrupt):
            forget(store, [id_], "its owner asked")
    assert listed_versions(store) == [1, 2, 3]
    run_job(job)
    assert listed_versions(store) == [3]
    age(job, 8)
    run_job(job)
    assert objects_with(store, vector) == []


def test_gc_keeps_what_the_table_was_published_with_or_the_job_says(
    job: JobConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(job.table)
    assert retain_of(read_manifest(store)) == Retain()
    (Path(job.input[0]) / "0000.tar").unlink()
    run_job(job.model_copy(update={"retain": Retain(versions=5, grace_days=3.5)}))
    roll_back(store, 2, "as it was")
    forget(store, [an_image(job)[0]], "its owner asked")
    assert retain_of(read_manifest(store)) == Retain(versions=5, grace_days=3.5), "not as it was at version 2"
    settings = {"versions": 2, "grace_days": 0.5}
    text = (tmp_path / "job.yaml").read_text()
    (tmp_path / "job.yaml").write_text(f"{text}retain: {json.dumps(settings)}\n")
    capsys.readouterr()
    assert run_command(["gc", str(tmp_path / "job.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["retain"] == settings
    with pytest.raises(TableError, match="has no published version"):
        collect_garbage(str(tmp_path / "nowhere"), {})
    assert not (tmp_path / "nowhere").exists()


def test_gc_lists_each_folder_and_reads_each_manifest_once(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(job.table)
    for number in range(3, 12):
        roll_back(store, number - 2, "back and forth")
    counted: Counter[str] = Counter()
    for name in ("list_files", "read"):
        right = getattr(Store, name)

        def counting(self: Store, path: str = "", right: Callable[..., Any] = right, name: str = name) -> Any:
            counted[f"{name} {path}"] += 1
            return right(self, path)

        monkeypatch.setattr(Store, name, counting)
    done = collect(store, Retain(versions=4, grace_days=1.0))
    assert (done.kept, len(done.retired)) == ((8, 9, 10, 11), 7)
    assert {path: times for path, times in counted.items() if times > 1 and "CURRENT" not in path} == {
        "list_files versions": 3  # for CURRENT, for what is retired, and whether both agree
    }
    assert sum(path.startswith("read versions/") for path in counted) == 11


# What live runs need


def others_at_each_write(
    table: Path, others: Callable[[], None], does: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Do it; before and after each of its writes, once it has told of itself, the others act. Its heartbeat is not counted."""
    running, told, thread = [False], [False], threading.get_ident()

    def watched(right: Callable[..., None]) -> Callable[..., None]:
        def write(*arguments: Any) -> None:
            is_ours = not running[0] and threading.get_ident() == thread and str(arguments[-1]).startswith(str(table))
            if is_ours and told[0]:
                interrupt()
            right(*arguments)
            told[0] = told[0] or (is_ours and str(arguments[-1]).endswith("state.json"))
            if is_ours and told[0]:
                interrupt()

        return write

    def interrupt() -> None:
        running[0] = True
        others()
        running[0] = False

    with monkeypatch.context() as patch:
        patch.setattr(heartbeat, "EVERY_S", 3600.0)
        for name in ("link", "replace"):
            patch.setattr(os, name, watched(getattr(os, name)))
        return does()


@pytest.mark.parametrize("retain", [AT_ONCE, Retain(grace_days=0.0001)], ids=["none", "8 s"])
@pytest.mark.parametrize("kind", ["run", "publish", "rollback", "forget"])
def test_what_a_live_run_needs_is_safe_from_another_that_keeps_nothing(
    job: JobConfig, kind: str, retain: Retain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its encoder, recipe and parts are old, and no version refers to them; its data files lie there before their version."""
    store = Store(job.table)
    (Path(job.input[0]) / "0000.tar").unlink()
    retrain(job)
    tonight = job.model_copy(update={"reembed": job.reembed.model_copy(update={"sample": 0})})
    if kind in ("run", "publish"):
        run_job(tonight, publishes=False, replaces=True)
    if kind == "run":
        (Path(job.input[0]) / "0005.tar").write_bytes(tar_of([("added.png", png(31))]))
    age(job, 30)
    acts: dict[str, Callable[[], Any]] = {
        "run": lambda: run_job(tonight, replaces=True).version,
        "publish": lambda: publish_job(tonight).version,
        "rollback": lambda: roll_back(store, 1, "as it was").version,
        "forget": lambda: forget(store, [an_image(job)[0]], "its owner asked").version,
    }
    highest = max(listed_versions(store))
    collected: list[int] = []

    def others() -> None:
        collected.append(collect(store, retain, Needs(shards=frozenset())).objects)

    made = others_at_each_write(Path(job.table), others, acts[kind], monkeypatch)
    assert made == highest + 1
    assert len(collected) >= 3
    verify_table(open_table(job.table))


def test_what_a_run_has_needed_goes_once_it_has_ended_or_was_silent_for_an_hour(job: JobConfig) -> None:
    store, began = Store(job.table), time.time()
    lost = "data/0ther/lost.parquet"

    def told(outcome: Any, heard_s: float, seconds: float) -> None:
        state = RunState(run_id="r", host="h", started="", seconds=seconds, outcome=outcome, space_id="0ther")
        store.replace(state_path("r"), state.to_json())
        os.utime(Path(job.table, state_path("r")), (began - heard_s, began - heard_s))

    for outcome, heard_s, seconds, stays in (
        ("running", 0, 7200, True),
        ("running", 3500, 7200, True),
        ("running", 3700, 7200, False),
        ("failed", 0, 7200, False),
        ("running", 0, 600, False),  # it began after that was written
    ):
        for path in (lost, "encoders/0ther/encoder.json", "staging/0ther/layout/aa-00000000.parquet"):
            store.create(path, b"{}")
            os.utime(Path(job.table, path), (began - 3600, began - 3600))
        told(outcome, heard_s, seconds)
        done = collect(store, AT_ONCE)
        assert (store.info(lost) is not None) == stays, (outcome, heard_s, seconds)
        is_live = outcome == "running" and heard_s < 3600
        assert (store.info("encoders/0ther/encoder.json") is not None) == is_live
        assert (store.info("staging/0ther/layout/aa-00000000.parquet") is not None) == is_live
        assert done.going_on == (("r",) if is_live else ())


def test_a_command_tells_of_itself_only_while_it_goes_on(job: JobConfig) -> None:
    store = Store(job.table)
    before = [run.state.run_id for run in read_runs(store)]
    with announced(store, "forgetting"):
        first = read_runs(store)[0]
        assert (first.status, first.state.doing) == ("running", "forgetting")
        assert [run.state.doing for run in find_live(store, store.now())] == ["forgetting"]
    assert [run.state.run_id for run in read_runs(store)] == before
    with pytest.raises(TableError):
        roll_back(store, 77, "nowhere")
    with pytest.raises(TableError):
        roll_back(Store(f"{job.table}-that-is-not-there"), 1, "nowhere")
    assert not Path(f"{job.table}-that-is-not-there").exists()


def test_what_auto_was_resolved_to_stays_for_as_long_as_a_pass_goes_on(job: JobConfig) -> None:
    """Else a pass of more than the grace period could come to another precision, and begin anew."""
    store = Store(job.table)
    store.create("staging/0ther/resolved.json", b"{}")
    age(job, 8)
    store.create("staging/0ther/layout/aa-00000000.parquet", b"{}")
    collect(store, Retain(), Needs(shards=frozenset({"aa"})))
    assert store.info("staging/0ther/resolved.json") is not None


# Spaces that are held back


def test_a_space_that_is_held_back_is_not_published_alone_either(job: JobConfig) -> None:
    """The rollback may come between a run without publishing and its publication."""
    retrain(job)
    assert run_job(job, replaces=True).version == 3
    roll_back(Store(job.table), 2, "search got worse")
    with pytest.raises(GateFailed, match=r"because a rollback holds it back \(search got worse\)"):
        publish_job(job)
    assert highest_version(Store(job.table)) == 4
    assert publish_job(job, releases=True).version == 5


# Clocks


@pytest.mark.parametrize("ahead_s", [-600.0, 600.0, 86400.0])
def test_ages_are_by_the_clock_of_the_store_alone(
    job: JobConfig, server: S3Server, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + ahead_s)
    for store in (Store(job.table), Store(f"s3://images/clock{ahead_s:.0f}", server.options())):
        assert abs(store.now() - right()) < 3
        with announced(store, "forgetting"):
            run = read_runs(store)[0]
            assert (run.status, run.silent_s < 30) == ("running", True)
            assert right() - 30 < run.heard < right() + 5
            assert len(find_live(store, store.now())) == 1
    text = runs.to_prometheus(job.table, 2, read_runs(Store(job.table)))
    [success] = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("lora_embed_last_success")]
    assert abs(success - right()) < 300
    store = Store(job.table)
    store.create("data/0ther/lost.parquet", b"{}")
    os.utime(Path(job.table, "data/0ther/lost.parquet"), (right() - 3600, right() - 3600))
    assert collect(store, Retain(grace_days=2 / 24)).objects == 0
    assert collect(store, Retain(grace_days=0.5 / 24)).objects == 1


def test_runs_are_kept_in_the_order_of_the_stores_clock(job: JobConfig) -> None:
    """A run's name has the time of its own machine, which may be years behind."""
    store, now = Store(job.table), time.time()
    for number, run_id in enumerate(("20300101T000000Z-a", "20200101T000000Z-b", "20250101T000000Z-c"), start=1):
        store.create(state_path(run_id), b"{}")
        os.utime(Path(job.table, state_path(run_id)), (now - DAY + number, now - DAY + number))
    runs.prune_runs(store, keep=4)
    assert {entry.path.split("/")[1] for entry in store.list_files("runs")} >= {"20200101T000000Z-b", "20250101T000000Z-c"}
    assert store.info(state_path("20300101T000000Z-a")) is None


# Conditional PUT


@pytest.mark.slow
def test_every_command_that_writes_says_when_the_store_ignores_conditional_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch)
    with s3_server(tmp_path / "server", anonymous=True) as server:
        server.make_bucket("images")
        with Proxy(server.endpoint, Faults(strip=("if-none-match",))) as proxy:
            said = {name: warned_by(tmp_path / name, server.options(endpoint), capfd) for name, endpoint in (
                ("ignoring", proxy.endpoint), ("honouring", server.endpoint)
            )}  # fmt: skip
    commands = ("run", "publish", "rollback", "forget", "gc")
    assert said == {"ignoring": dict.fromkeys(commands, 1), "honouring": dict.fromkeys(commands, 0)}


def warned_by(folder: Path, options: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> dict[str, int]:
    """How often each command warned of the store, on a table of its own."""
    folder.mkdir()
    source = write_tars(folder / "shards", shards=2, images=3)
    uri = f"s3://images/{folder.name}"
    job = job_of(folder, tiny_recipe(folder), source, table=uri, table_storage_options=options, max_removed=1.0)
    store = Store(uri, options)
    run_job(job)
    (source / "0000.tar").unlink()
    acts: dict[str, Callable[[], Any]] = {
        "run": lambda: run_job(job, publishes=False),
        "publish": lambda: publish_job(job),
        "rollback": lambda: roll_back(store, 1, "as it was"),
        "forget": lambda: forget(store, ["0001.tar/000003"], "its owner asked"),
        "gc": lambda: collect(store, Retain()),
    }
    said = {}
    for name, act in acts.items():
        capfd.readouterr()
        act()
        said[name] = capfd.readouterr().err.count("this store ignores conditional PUT. Never run two jobs on this table")
    assert highest_version(store) == 4
    return said
