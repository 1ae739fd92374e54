"""The GPU benchmark's arithmetic, and the whole of it on the CPU, where no line of it passes for a figure of a GPU."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from jobs import ROOT
from lora_embed.model.encoder import load_encoder

sys.path.append(str(ROOT / "benchmarks"))

import gpu
from gpu import NOT_A_GPU, climb, hidden_share, steady_rate, time_by_clock
from workloads import build_model

FIGURES = ("images/s", "GB/s", "golden", "hidden", "CPUs that decode", "GPUs busy", "best forward")


def ramp(rates: dict[int, float]) -> list[int]:
    """Batch sizes that are measured where they give these rates; 0: the memory ends."""

    def measure_one(batch_size: int) -> dict[str, Any]:
        if not rates[batch_size]:
            raise torch.OutOfMemoryError
        return {"images_per_s": rates[batch_size], "spread": 0.0}

    return [row["batch_size"] for row in climb(tuple(rates), measure_one)]


def test_the_ramp_ends_where_the_memory_does_or_nothing_is_gained_twice() -> None:
    assert ramp({32: 10, 64: 20, 128: 30}) == [32, 64, 128]
    assert ramp({32: 10, 64: 20, 128: 0, 256: 40}) == [32, 64, 128]
    assert ramp({32: 10, 64: 10.1, 128: 12, 256: 12.1, 512: 12.2, 1024: 24}) == [32, 64, 128, 256, 512]


def test_a_steady_rate_leaves_the_first_wave_out() -> None:
    """Four workers commit a chunk of 10 each second, after one that took 7 s to start."""
    commits = [100 + 7 + wave + worker / 100 for wave in range(5) for worker in range(4)]
    rate, since = steady_rate(commits, 10, workers=4)
    assert rate == pytest.approx(16 * 10 / 4)
    assert since == commits[3]
    assert steady_rate([1.0, 2.0], 10, workers=8) == (10, 1.0)


def test_what_is_hidden_is_a_share_of_the_shorter() -> None:
    assert hidden_share(1.0, 4.0, both=4.0) == 1
    assert hidden_share(1.0, 4.0, both=5.0) == 0
    assert hidden_share(1.0, 4.0, both=5.5) == -0.5


def test_times_are_of_calls_that_come_after_warming_up() -> None:
    called = []

    def work() -> None:
        called.append(0)
        time.sleep(0.2 if len(called) <= gpu.WARM_UP else 0.001)

    seconds = time_by_clock(work, torch.device("cpu"), repeats=5)
    assert len(seconds) == 5
    assert len(called) == gpu.WARM_UP + 5
    assert sorted(seconds)[2] < 0.2


def test_forward_of_pixels_on_the_device_is_what_the_encoder_embeds(tmp_path: Path) -> None:
    encoder = load_encoder(build_model("tiny", tmp_path), batch_size=4)
    pixels = gpu.noise(encoder, 4)
    assert gpu.forward(encoder, torch.from_numpy(pixels)).numpy().tobytes() == encoder.embed_pixels(pixels).tobytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "result.json")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("torch finds no CUDA device here")
    assert not list(tmp_path.iterdir())


def measure_on_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], *only: str) -> dict[str, Any]:
    """The result of these parts; every line printed that would be read as a figure of a GPU says that it is none."""
    out = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--encoder", "tiny", "--images", "32", "--out", str(out), "--only", *only]
    assert gpu.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    unmarked = [line for line in lines if any(figure in line for figure in FIGURES) and not line.endswith(NOT_A_GPU)]
    assert [line.split()[0] for line in unmarked] == ["decode"] * ("decode" in only)  # cores decode, here as anywhere
    result: dict[str, Any] = json.loads(out.read_text())
    assert set(result) == {"about", *only}
    assert (result["about"]["measured_on_gpu"], result["about"]["torch"]) == (False, torch.__version__)
    return result


def test_on_the_cpu_its_parts_run_and_say_that_it_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measure_on_cpu(tmp_path, capsys, "forward", "copy", "decode")
    assert list(result["forward"]) == list(gpu.PRECISIONS)
    for found in result["forward"].values():
        assert found["golden"]["error"] is None
        assert found["ceiling"] == max(row["images_per_s"] for row in found["ramp"])
        assert found["host_to_host"]["images_per_s"] > 0
    assert result["forward"]["float32"]["golden"]["difference"] <= 1e-5
    assert set(result["copy"]["ways"]) == {"pageable", "pinned", "staged"}
    assert result["decode"]["per_core"]["images_per_s"] > 0


@pytest.mark.long
def test_on_the_cpu_the_whole_job_runs_with_a_declared_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ray.shutdown()
    job = measure_on_cpu(tmp_path, capsys, "job")["job"]
    assert (job["images"], job["gpus"], job["cpus"], job["gpu_busy"]) == (32, 1, 2, None)
    assert 0 < job["first_part_s"] < job["whole_s"]
    assert job["steady_images_per_s"] > 0
    assert set(job["stages_s"]) == {"read", "decode", "forward", "write"}
