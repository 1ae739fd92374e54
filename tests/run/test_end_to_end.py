"""Whole runs on a real Ray cluster: from recipe and images to a published table, read back by plain pyarrow."""

import contextlib
import io
import pickle
import random
import shutil
import signal
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from guide import embed_by_hand, merge_by_hand
from jobs import (
    job_of,
    kill_all,
    read_rejects,
    read_rows,
    run_here,
    snapshot,
    start_job,
    tiny_recipe,
    vectors_by_id,
    write_job,
    write_recipe,
    write_tars,
)
from lora_embed import load_encoder, open_table
from lora_embed.chain import cluster
from lora_embed.config.models import JobConfig, load_job, load_recipe
from lora_embed.demo.parts import LabelledImage, write_shards
from lora_embed.errors import EncoderError, GateFailed, IncompleteRun
from lora_embed.model.build import build_encoder
from lora_embed.model.fold import Limit
from lora_embed.model.golden import relative_difference
from lora_embed.model.ingredients import gather
from lora_embed.run.job import run_job
from lora_embed.run.plan import plan_job
from lora_embed.table.verify import verify_table
from samples import encoded, noise, png, poisoned, tar_of


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain in this process, where a cluster would add nothing but seconds."""
    run_here(monkeypatch)


@pytest.mark.parametrize(
    ("combination_type", "method", "weights", "runs_on"),
    [
        ("linear", "linear", [0.7, 0.3], "cluster"),
        ("cat", "weighted_sum", [0.5, 0.5], "here"),
        pytest.param("linear", "linear", [0.5, 0.5], "here", marks=pytest.mark.slow),
        pytest.param("cat", "weighted_sum", [0.7, 0.3], "here", marks=pytest.mark.slow),
    ],
)
def test_published_vectors_are_the_guides(
    tmp_path: Path,
    base_model: Path,
    real_adapters: dict[str, Path],
    real_images: list[LabelledImage],
    combination_type: str,
    method: str,
    weights: list[float],
    runs_on: str,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue(runs_on)
    images = real_images[::80]
    write_shards(images, tmp_path / "shards", per_shard=20)
    folders = dict(zip(real_adapters.values(), [10, 27], strict=True))
    recipe = write_recipe(tmp_path, base_model, dict(zip(folders, weights, strict=True)), merge_method=method, image_size=56)
    run_job(job_of(tmp_path, recipe, tmp_path / "shards", carry=["category:int64"]))

    rows = read_rows(tmp_path / "table")
    by_key = {row["key"]: row for row in rows.to_pylist()}
    found = np.array([by_key[image.key]["embedding"] for image in images], np.float32)
    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    by_hand = merge_by_hand(base_model, folders, weights, combination_type)
    expected = embed_by_hand(by_hand, base_model, [Image.open(image.path) for image in images], **sizes)
    assert len(rows) == len(images)
    difference = relative_difference(found, expected)
    print(f"\n{method}, PEFT's {combination_type}, {weights}: {difference:.2e} over {len(images)} images")
    assert difference < 1e-5
    assert [by_key[image.key]["category"] for image in images] == [image.category for image in images]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny recipe."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder)
    return folder


@pytest.mark.usefixtures("here")
def test_every_kind_of_input_gives_the_same_vectors(tmp_path: Path, tiny: Path) -> None:
    images = {f"{number:03d}": png(number) for number in range(30)}
    for kind in ("tars", "parquet", "loose/deep"):
        (tmp_path / kind).mkdir(parents=True)
    (tmp_path / "tars" / "a.tar").write_bytes(tar_of([(f"{key}.png", data) for key, data in images.items()]))
    columns = {"image": list(images.values()), "key": list(images)}
    pq.write_table(pa.table(columns), tmp_path / "parquet" / "a.parquet", row_group_size=7)
    for key, data in images.items():
        (tmp_path / "loose" / "deep" / f"{key}.png").write_bytes(data)
    inputs = [tmp_path / "tars", tmp_path / "parquet", tmp_path / "loose"]
    result = run_job(job_of(tmp_path, tiny / "recipe.yaml", inputs, chunk_size=8))
    vectors = vectors_by_id(read_rows(tmp_path / "table"))
    assert result.counts == {"shards": 3, "samples": 90, "vectors": 90, "rejects": 0}
    for key in images:
        assert vectors[f"a.tar/{key}"] == vectors[f"a.parquet/{key}"] == vectors[f"deep/{key}.png"]


@pytest.mark.usefixtures("here")
def test_an_encoder_kept_as_an_adapter_makes_a_table(tmp_path: Path, tiny: Path) -> None:
    encoder = tmp_path / "encoder"
    build_encoder(gather(load_recipe(tiny / "recipe.yaml")), encoder, lambda message: None, Limit())
    write_tars(tmp_path / "shards", shards=1, images=9)
    result = run_job(job_of(tmp_path, encoder, tmp_path / "shards"))
    table = open_table(str(tmp_path / "table"))
    assert table.space_id == result.space_id == load_encoder(encoder).space_id
    assert not list((tmp_path / "table" / "encoders").rglob("model.safetensors"))
    expected = table.encoder().embed([Image.open(io.BytesIO(png(number))) for number in range(9)])
    assert np.array_equal(np.array(read_rows(tmp_path / "table").column("embedding").to_pylist(), np.float32), expected)


@pytest.mark.usefixtures("here")
def test_a_device_that_computes_something_else_stops_the_job(tmp_path: Path, tiny: Path) -> None:
    encoder = tmp_path / "encoder"
    build_encoder(gather(load_recipe(tiny / "recipe.yaml")), encoder, lambda message: None)
    stored = np.load(encoder / "golden" / "vectors.npy")
    np.save(encoder / "golden" / "vectors.npy", stored * np.float32(1.01))  # as if made where sums come out otherwise
    write_tars(tmp_path / "shards", shards=1, images=3)
    with pytest.raises(EncoderError, match=r"golden vectors: cpu in float32 differs by 9\.9.e-03 .*at most 1e-05 is allowed"):
        run_job(job_of(tmp_path, encoder, tmp_path / "shards"))
    assert not (tmp_path / "table" / "versions").exists()
    assert not list((tmp_path / "table" / "staging").rglob("*.parquet"))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def hostile_samples() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Good images of awkward kinds, and bad ones by the reason they are rejected for, as `reason~name`."""
    image = noise(60, 40)
    jpeg = encoded(image, "JPEG")
    grey16 = Image.fromarray((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60))
    bomb = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + png_chunk(b"IDAT", zlib.compress(b"0"))
    good = {
        "grey.png": encoded(image.convert("L")),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "palette.png": encoded(image.convert("P")),
        "rgba.png": encoded(image.convert("RGBA")),
        "grey16.png": encoded(grey16),
        "webp.webp": encoded(image, "WEBP"),
        "CAPITALS.JPG": jpeg,
    }
    bad = {
        "corrupt_image~truncated.jpg": jpeg[: len(jpeg) // 2],
        "not_an_image~text.jpg": b"this is no image",
        "empty~empty.jpg": b"",
        "too_many_pixels~bomb.png": b"\x89PNG\r\n\x1a\n" + bomb,
        "not_an_image~pickle.jpg": pickle.dumps({"harmless": True}),
    }
    return good, bad


@pytest.mark.usefixtures("cluster")
def test_hostile_samples_are_each_one_vector_or_one_reject(tmp_path: Path, tiny: Path) -> None:
    good, bad = hostile_samples()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(tar_of([*good.items(), *bad.items()]))
    (tmp_path / "shards" / "empty.tar").write_bytes(tar_of([]))
    job = job_of(tmp_path, tiny / "recipe.yaml", tmp_path / "shards", chunk_size=5)
    with pytest.raises(
        GateFailed, match=r"rejects: 5 of 12 new samples cannot be embedded: 2 not_an_image, .*\(0\.4167, at most 0\.01\)"
    ):
        run_job(job)
    assert not (tmp_path / "table" / "versions").exists()

    result = run_job(job.model_copy(update={"max_rejects": 0.5}))
    assert result.embedded == 0
    assert result.counts == {"shards": 2, "samples": 12, "vectors": 7, "rejects": 5}
    rows = read_rows(tmp_path / "table")
    assert {name.split(".")[0] for name in good} == set(rows.column("key").to_pylist())
    assert np.isfinite(np.array(rows.column("embedding").to_pylist())).all()
    expected = {f"a.tar/{name.split('.')[0]}": name.split("~")[0] for name in bad}
    assert read_rejects(tmp_path / "table") == expected
    verify_table(open_table(str(tmp_path / "table")))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_cut_tars_are_incomplete_and_never_published_as_short(tmp_path: Path, tiny: Path) -> None:
    """In the middle of a member, at a member's boundary, and inside a header."""
    source = write_tars(tmp_path / "shards", shards=4, images=10)
    whole = {path: path.read_bytes() for path in sorted(source.iterdir())}
    for (path, data), beyond in zip(list(whole.items())[1:], (700, 0, 100), strict=True):
        boundary = data.index(f"{int(path.stem) * 10 + 5:06d}.png".encode())  # a name stands where its header begins
        assert boundary % 512 == 0
        path.write_bytes(data[: boundary + beyond])
    job = job_of(tmp_path, tiny / "recipe.yaml", source, chunk_size=4)
    with pytest.raises(IncompleteRun, match="3 of 4 shards are not complete") as failed:
        run_job(job)
    assert str(failed.value).count(": incomplete") == 3
    assert not (tmp_path / "table" / "versions").exists()
    for path, data in whole.items():
        if path.stem != "0000":
            path.write_bytes(data)
    result = run_job(job)
    assert (result.embedded, result.counts["vectors"], result.counts["shards"]) == (30, 40, 4)


def table_but_runs(folder: Path) -> dict[str, tuple[int, int]]:
    return {path: state for path, state in snapshot(folder / "table").items() if not path.startswith("runs/")}


@pytest.mark.usefixtures("here")
def test_a_second_run_embeds_nothing_and_changes_nothing(tmp_path: Path, tiny: Path) -> None:
    source = write_tars(tmp_path / "shards", shards=3, images=10)
    job = job_of(tmp_path, tiny / "recipe.yaml", source)
    kept = run_job(job, publishes=False)
    staged = {path: path.read_bytes() for path in (tmp_path / "table" / "staging").rglob("*.parquet")}
    first = run_job(job)
    before = table_but_runs(tmp_path)
    for path, data in staged.items():  # as left by a run that died just after its version was committed
        path.write_bytes(data)
    second = run_job(job)
    assert (kept.embedded, kept.version, len(staged)) == (30, None, 3)
    assert (first.embedded, first.published, second.embedded, second.published) == (0, True, 0, False)
    assert second.version == first.version == 1
    assert table_but_runs(tmp_path) == before
    assert not list((tmp_path / "table" / "staging").rglob("*.parquet"))
    outlook = plan_job(job)
    assert (outlook.done, outlook.to_embed, outlook.version) == (3, 0, 1)


@pytest.mark.usefixtures("here")
def test_changed_new_and_removed_shards_make_the_next_version(tmp_path: Path, tiny: Path) -> None:
    source = write_tars(tmp_path / "shards", shards=4, images=10)
    job = job_of(tmp_path, tiny / "recipe.yaml", source)
    run_job(job)
    before = vectors_by_id(read_rows(tmp_path / "table"))
    (source / "0003.tar").unlink()
    with pytest.raises(
        GateFailed,
        match=r"removed: 1 of 4 shards and \d+ of \d+ images of the version before are missing \(0\.25, at most 0\.05\)",
    ):
        run_job(job)
    assert open_table(str(tmp_path / "table")).version == 1
    job = job.model_copy(update={"max_removed": 0.5})
    (source / "0001.tar").write_bytes(tar_of([("new.png", png(900))]))
    (source / "0009.tar").write_bytes(tar_of([("newer.png", png(901))]))
    result = run_job(job)
    after = vectors_by_id(read_rows(tmp_path / "table"))
    assert (result.version, result.embedded) == (2, 2)
    kept = {key: bits for key, bits in before.items() if key.startswith(("0000", "0002"))}
    assert {key: bits for key, bits in after.items() if key in kept} == kept
    assert set(after) - set(kept) == {"0001.tar/new", "0009.tar/newer"}
    assert open_table(str(tmp_path / "table"), version=1).count == 40
    verify_table(open_table(str(tmp_path / "table"), version=1))
    verify_table(open_table(str(tmp_path / "table")))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_trial_run_takes_the_first_samples_and_publishes_nothing(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tars(tmp_path / "shards", shards=3, images=10)
    result = run_job(job_of(tmp_path, tiny / "recipe.yaml", source, limit=13))
    assert (result.embedded, result.version) == (13, None)
    assert "3 shards: 2 to embed\n" in capsys.readouterr().err  # the third is not done, but not asked for
    assert not (tmp_path / "table" / "versions").exists()


@pytest.mark.usefixtures("here")
def test_an_opened_table_answers_with_its_own_encoder(tmp_path: Path, tiny: Path) -> None:
    source = write_tars(tmp_path / "shards", shards=2, images=20)
    run_job(job_of(tmp_path, tiny / "recipe.yaml", source, carry=["label:int64"]))
    table = open_table(str(tmp_path / "table"))
    rows = table.to_dataset().to_table(columns=["id", "embedding", "label"])
    assert (table.version, table.count, table.dimension, len(rows)) == (1, 40, 32, 40)
    encoder = table.encoder()
    assert encoder.space_id == table.space_id
    query = encoder.embed([Image.open(io.BytesIO(png(17)))])[0]
    distances = np.linalg.norm(np.array(rows.column("embedding").to_pylist(), np.float32) - query, axis=1)
    nearest = rows.slice(int(distances.argmin()), 1).to_pylist()[0]
    assert (nearest["id"], nearest["label"], float(distances.min())) == ("0000.tar/000017", 17 % 7, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("cpus", "gpus"), [pytest.param(4, 0, marks=pytest.mark.long), (1, 1)])
def test_both_topologies_end_with_the_same_vectors(tmp_path: Path, tiny: Path, cpus: int, gpus: int) -> None:
    """A declared GPU puts decoding, embedding and writing into processes of their own; the actor computes on the CPU."""
    source = write_tars(tmp_path / "shards", shards=5, images=12)
    job = job_of(tmp_path, tiny / "recipe.yaml", source, chunk_size=5, resources={})
    ray.shutdown()
    cluster.connect(num_cpus=cpus, num_gpus=gpus)
    topology = cluster.choose_topology(job.resources)
    assert (topology.decode is not None, topology.device.get("num_gpus", 0)) == (gpus == 1, gpus)
    result = run_job(job)
    ray.shutdown()
    assert result.counts == {"shards": 5, "samples": 60, "vectors": 60, "rejects": 0}
    encoder = open_table(str(tmp_path / "table")).encoder()
    images = [Image.open(io.BytesIO(png(number))) for number in range(60)]
    expected = {f"{n // 12:04d}.tar/{n:06d}": encoder.embed([image])[0].tobytes() for n, image in enumerate(images)}
    assert vectors_by_id(read_rows(tmp_path / "table")) == expected


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [pytest.param(0, marks=pytest.mark.long), 1])
def test_an_image_that_kills_its_decoder_is_one_reject(
    tmp_path: Path, tiny: Path, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that tests have poisoned stands in for a real image that crashes Pillow: none is known."""
    source = write_tars(tmp_path / "shards", shards=4, images=10)
    poison = {"0001.tar/000013": png(13), "0003.tar/000039": png(39)}
    poisoned(monkeypatch, segfault=list(poison.values()))
    job = job_of(tmp_path, tiny / "recipe.yaml", source, chunk_size=4, max_rejects=0.1)
    ray.shutdown()
    cluster.connect(num_cpus=2, num_gpus=gpus)
    assert run_job(job).counts == {"shards": 4, "samples": 40, "vectors": 38, "rejects": 2}
    ray.shutdown()
    assert read_rejects(tmp_path / "table") == dict.fromkeys(poison, "decoder_crashed")
    details = open_table(str(tmp_path / "table")).rejects().column("detail").to_pylist()
    assert details == ["the decoder was killed by signal 11 (SIGSEGV), 2 tries"] * 2


@pytest.mark.parametrize(
    "ends", [(signal.SIGKILL,), pytest.param((signal.SIGTERM, signal.SIGKILL), marks=pytest.mark.slow)], ids=["once", "twice"]
)
@pytest.mark.usefixtures("cluster")
def test_killed_runs_resume_to_the_same_table(tmp_path: Path, tiny: Path, ends: tuple[signal.Signals, ...]) -> None:
    """Kills on an S3 server are in test_kills.py."""
    source = write_tars(tmp_path / "shards", shards=10 * len(ends), images=40)
    for name in ("killed", "undisturbed", "other"):
        (tmp_path / name).mkdir()
    job = write_job(tmp_path / "killed", tiny / "recipe.yaml", source, chunk_size=8)
    staging = tmp_path / "killed" / "table" / "staging"
    seen: dict[str, tuple[int, int]] = {}
    rng = random.Random(20)
    for attempt, end in enumerate(ends):
        wanted = len(seen) + rng.randint(5, 20)
        process = start_job(job, tmp_path / f"log{attempt}")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(staging.rglob("*.parquet"))) >= wanted:
                break
            time.sleep(0.005)
        assert process.poll() is None, (tmp_path / f"log{attempt}").read_text()
        if end == signal.SIGKILL:
            kill_all(process)
        else:
            process.terminate()
            assert process.wait(30) == 1, (tmp_path / f"log{attempt}").read_text()
            assert "stopped by a signal. What is committed stays" in (tmp_path / f"log{attempt}").read_text()
        now = {name: state for name, state in snapshot(staging).items() if name.endswith(".parquet")}
        assert len(now) >= wanted
        assert {name: now[name] for name in seen} == seen, "a committed part was written again"
        seen = now
    assert not (tmp_path / "killed" / "table" / "versions").exists()

    resumed_elsewhere = shutil.copytree(tmp_path / "killed" / "table", tmp_path / "other" / "table")
    assert run_job(load_job(job)).embedded == 400 * len(ends) - 8 * len(seen)
    run_job(job_of(tmp_path / "undisturbed", tiny / "recipe.yaml", source, chunk_size=8))
    expected = read_rows(tmp_path / "undisturbed" / "table")
    assert read_rows(tmp_path / "killed" / "table").equals(expected)
    assert not list(staging.rglob("*.parquet"))

    run_job(job_of(tmp_path / "other", tiny / "recipe.yaml", source, chunk_size=7, table=str(resumed_elsewhere)))
    assert read_rows(tmp_path / "other" / "table").equals(expected)


def private_memory() -> int:
    """Bytes that this process, the driver, and all of Ray's hold for themselves alone."""
    total = 0
    for one in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_full_info().uss
    return total


def peak_memory(job: JobConfig) -> int:
    """The most that is held while a job runs."""
    peaks = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            peaks[0] = max(peaks[0], private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_job(job)
    finally:
        ended.set()
        watcher.join()
    return peaks[0]


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path, tiny: Path) -> None:
    peaks = {}
    for shards in (10, 40):
        folder = tmp_path / str(shards)
        source = write_tars(folder / "shards", shards=shards, images=100)
        peaks[shards] = peak_memory(job_of(folder, tiny / "recipe.yaml", source, chunk_size=50))
    print("\npeak private memory, MB:", {shards: round(peak / 1e6) for shards, peak in peaks.items()})
    assert peaks[40] <= 1.1 * peaks[10] + 50e6
