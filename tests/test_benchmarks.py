"""The benchmarks: their arithmetic, what their meter counts, and that all contestants do the same work. Nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from compare import RunTimes, break_even, deviation_of, sort_vectors, times_of
from contestants import DAFT, OURS, SCRIPTS
from meter import Metered
from report import describe
from resume import Forwarder
from workloads import WORKLOADS

METER = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import meter
meter.adopt_orphans()
found = meter.run([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]), {}, float(sys.argv[3]), lambda: None)
print(json.dumps(asdict(found)))
"""
BURN = "import time; taken = b'x' * 50_000_000\nwhile time.process_time() < 0.5: pass"
LEAVES_A_CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BURN!r}]); {BURN}"


def times(fixed_s: float, rate: float, images: int = 1000) -> RunTimes:
    """A run whose whole takes `fixed_s` and `images` at `rate` images/s."""
    whole = fixed_s + images / rate
    return RunTimes(
        images=images, whole_s=whole, startup_s=fixed_s, end_s=0, steady_images_per_s=rate, cpu_s=0, peak_pss_bytes=0,
        peak_rss_bytes=0,
    )  # fmt: skip


def vectors(rows: dict[str, list[float]]) -> pa.Table:
    return pa.table({"id": list(rows), "embedding": list(rows.values())})


def meter(tmp_path: Path, code: str, limit_s: float) -> dict[str, Any]:
    command = [sys.executable, "-c", METER, code, str(tmp_path / "log"), str(limit_s)]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True, timeout=240)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_break_even_is_where_both_whole_runs_take_as_long() -> None:
    crossing = break_even(times(20, rate=400), times(5, rate=200))
    assert (crossing.is_ever, crossing.from_images, crossing.to_images) == (True, 6000, None)
    assert 20 + 6000 / 400 == 5 + 6000 / 200
    assert "6,000" in crossing.describe()


def test_break_even_where_the_lines_do_not_cross() -> None:
    assert not break_even(times(20, rate=200), times(5, rate=400)).is_ever
    assert break_even(times(5, rate=400), times(20, rate=200)).describe() == "always ahead"
    until = break_even(times(5, rate=200), times(20, rate=400))
    assert (until.from_images, until.to_images) == (0, 6000)


def test_steady_rate_leaves_out_the_first_vectors_and_the_phases_add_up() -> None:
    metered = Metered(exit_code=0, started=100.0, whole_s=30.0, cpu_s=1.0, peak_pss_bytes=1, peak_rss_bytes=2)
    run = times_of(metered, [(110.0, 64), (115.0, 64), (120.0, 22)], images=150)
    assert (run.startup_s, run.end_s) == (10.0, 10.0)
    assert run.steady_images_per_s == pytest.approx((150 - 64) / 10)


def test_deviation_is_found_by_id_whatever_the_order_and_type() -> None:
    reference = sort_vectors(vectors({"a": [3.0, 4.0], "b": [0.0, 2.0], "c": [1.0, 1.0]}))
    found = vectors({"c": [1.0, 1.0], "a": [3.0, 4.5], "d": [1.0, 1.0]})
    fixed = pa.FixedSizeListArray.from_arrays(found.column("embedding").combine_chunks().flatten().cast(pa.float32()), 2)
    deviation = deviation_of(sort_vectors(found.set_column(1, "embedding", fixed)), reference)
    assert (deviation.rows, deviation.missing, deviation.unexpected) == (3, 1, 1)
    assert deviation.largest == pytest.approx(0.1)
    assert not deviation.is_same
    assert deviation_of(reference, reference).is_same


def test_an_id_that_is_there_twice_is_no_table() -> None:
    table = pa.table({"id": ["a", "a"], "embedding": [[1.0], [1.0]]})
    with pytest.raises(ValueError, match="twice"):
        sort_vectors(table)


def test_the_meter_counts_what_a_command_leaves_behind(tmp_path: Path) -> None:
    found = meter(tmp_path, LEAVES_A_CHILD, 120)
    assert found["exit_code"] == 0
    assert found["cpu_s"] >= 1.0  # half a second of each
    assert found["peak_pss_bytes"] > 50_000_000


def test_the_meter_kills_what_runs_past_its_limit(tmp_path: Path) -> None:
    found = meter(tmp_path, "import time; time.sleep(600)", 2)
    assert found["exit_code"] is None
    assert found["whole_s"] < 200


def test_the_forwarder_counts_what_comes_back() -> None:
    import http.client
    import http.server
    import threading

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Forwarder(f"http://127.0.0.1:{server.server_port}") as forwarder:
        connection = http.client.HTTPConnection(forwarder.endpoint.removeprefix("http://"))
        connection.request("GET", "/pyproject.toml")
        body = connection.getresponse().read()
        assert body == (ROOT / "pyproject.toml").read_bytes()
        assert forwarder.received > len(body)
    server.shutdown()


def test_every_workload_has_lora_embed_and_only_known_contestants() -> None:
    for workload in WORKLOADS:
        for contestants in (workload.contestants, workload.short_contestants):
            assert "lora-embed" in contestants
            assert set(contestants) <= {*OURS, *SCRIPTS}


@pytest.mark.long
def test_all_contestants_do_the_same_work(tmp_path: Path, demo_cache: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench.py"), "--short", "--out", str(tmp_path)]
    command += ["--workload", "feeding", "--workload", "resume"]
    subprocess.run(command, check=True, timeout=1800)
    found = json.loads((tmp_path / "bench.json").read_text())
    feeding, resume = found["workloads"]["feeding"], found["workloads"]["resume"]["resume"]
    assert set(feeding["contestants"]) == {"lora-embed", *SCRIPTS}
    for name, of in feeding["contestants"].items():
        if name.startswith("daft") and not DAFT.is_dir():
            assert "No module named 'daft'" in of["failed"]
            continue
        deviation = of["deviation"]
        assert (deviation["rows"], deviation["missing"], deviation["unexpected"]) == (feeding["images"], 0, 0), name
        assert deviation["is_same"] or (name.startswith("daft") and deviation["largest"] < 0.1), name  # its own JPEG decoder
        assert ("break_even" in of) == (name != "lora-embed"), name
    assert np.isfinite(found["start"]["empty_ray_job_s"])
    assert 0 < resume["rest"][0]["bytes_read"] < resume["whole"]["bytes_read"]
    assert resume["whole"]["bytes_read"] >= resume["input_bytes"]
    assert (tmp_path / "bench.svg").read_text().startswith("<?xml")
    assert "### feeding" in describe(found)
