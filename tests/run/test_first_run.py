"""A whole short run on a real Ray, as a person sees it on a terminal, and what its record says of its time."""

import json
import re
import sys
from pathlib import Path

import pytest

from jobs import ROOT, tiny_recipe, write_job, write_tars
from lora_embed.config.foreign import parse_record
from lora_embed.monitor.record import RunRecord, bins_of, starting_s, workers_of
from terminal import run_on_terminal


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_a_short_run_shows_its_own_lines_alone(tmp_path: Path, width: int) -> None:
    """One shard for several actors, so that Ray Data would warn, and actors that Ray's core would remark on."""
    source = write_tars(tmp_path / "shards", shards=1, images=40)
    job = write_job(tmp_path, tiny_recipe(tmp_path), source, chunk_size=8, resources={})
    command = [sys.executable, str(ROOT / "jobs" / "embed.py"), "--config", str(job)]
    shown = run_on_terminal(command, width=width, folder=tmp_path)
    assert shown.code == 0, shown.last
    for screen in shown.screens:
        text = "\n".join(screen)
        for foreign in ("core_worker", "override_num_blocks", "UserWarning", "object store and max_restarts"):
            assert foreign not in text
        assert len(re.findall(r"^waiting for the first chunk of images … ", text, re.M)) <= 1
    text = "".join(line.ljust(width) for line in shown.last)
    assert re.search(r" 40 embedded in \d:\d\d ", text)
    assert re.search(r"40 samples · [\d.]+ images/s · 1/1 shard · 0 rejects · \d:\d\d elapsed", text)
    assert all(int(share) <= 100 for share in re.findall(r"(\d+)%", text))
    (path,) = (tmp_path / "table" / "runs").glob("*/record.json")
    record = parse_record(RunRecord, path.read_bytes())
    assert json.loads(path.read_text())["readings"][-1]["samples"] == 40
    assert 1 < starting_s(record) < record.readings[-1].elapsed_s < record.seconds
    spent = sum(record.stages.values())
    assert workers_of(record).actors * (record.readings[-1].elapsed_s - starting_s(record)) >= 0.99 * spent
    assert all(sum(period.busy.values()) <= workers_of(record).total for period in bins_of(record))
