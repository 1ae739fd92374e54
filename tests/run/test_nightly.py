"""The nightly run, night after night: what is stale is embedded, what was rolled back stays away."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs import read_rejects, read_rows, run_here, tiny_recipe, vectors_by_id, write_job, write_recipe, write_tars
from lora_embed import load_encoder, open_table
from lora_embed.chain import cluster
from lora_embed.cli.main import nightly_job, run_command
from lora_embed.demo.parts import LabelledImage, write_shards
from lora_embed.table.verify import verify_table
from lora_embed.table.versions import listed_versions
from models import edit_tensors
from samples import png, tar_of


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_tars(tmp_path / "shards", shards=4, images=3)
    return write_job(tmp_path, tiny_recipe(tmp_path), tmp_path / "shards", max_removed=0.5)


def tonight(job: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """What the nightly run says as JSON; it must end well."""
    capfd.readouterr()
    code = nightly_job(["--config", str(job), "--json", *arguments])
    output, errors = capfd.readouterr()
    assert code == 0, errors
    said: dict[str, object] = json.loads(output.splitlines()[-1])
    return said


QUIET = """
import sys
from lora_embed.cli.main import nightly_job
code = nightly_job(["--config", sys.argv[1], "--json"])
print(code, sorted({"torch", "transformers", "peft"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("method", "imports"), [("linear", []), pytest.param("ties", ["peft", "torch", "transformers"], marks=pytest.mark.slow)]
)
def test_a_night_with_nothing_to_do_needs_no_torch(
    job: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str, imports: list[str]
) -> None:
    """Only the options of a method that has some are completed by code that needs torch."""
    recipe = job.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"merge_method": method}))
    run_here(monkeypatch)
    assert tonight(job, capfd)["published"]
    command = [sys.executable, "-c", QUIET, str(job)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    assert json.loads(said[0])["published"] is False
    assert said[1] == f"0 {imports}"


@pytest.mark.usefixtures("cluster")
def test_a_week(job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table, shards = tmp_path / "table", tmp_path / "shards"

    first = tonight(job, capfd)
    assert (first["version"], first["embedded"], first["published"]) == (1, 12, True)

    run_here(monkeypatch)  # the first night ran on Ray; what the others decide is the same without it
    with monkeypatch.context() as patch:  # nothing is stale
        patch.setattr(cluster, "connect", lambda: pytest.fail("a cluster was started for nothing"))
        second = tonight(job, capfd)
    assert (second["version"], second["embedded"], second["published"]) == (1, 0, False)

    (shards / "0000.tar").write_bytes(tar_of([("new.png", png(99)), ("newer.png", png(98))]))
    (shards / "0001.tar").unlink()
    (shards / "0004.tar").write_bytes(tar_of([("added.png", png(97))]))
    unchanged = {id_: bits for id_, bits in vectors_by_id(read_rows(table)).items() if id_[:4] in ("0002", "0003")}
    third = tonight(job, capfd)
    assert (third["version"], third["embedded"]) == (2, 3)
    rows = vectors_by_id(read_rows(table))
    assert set(rows) - set(unchanged) == {"0000.tar/new", "0000.tar/newer", "0004.tar/added"}
    assert {id_: rows[id_] for id_ in unchanged} == unchanged

    shutil.copytree(tmp_path / "ten", tmp_path / "ten-before")
    edit_tensors(tmp_path / "ten", lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})
    assert run_command(["run", str(job)]) == 2  # only the nightly run replaces a space
    assert listed_versions(open_table(str(table)).store) == [1, 2]
    retrained = tonight(job, capfd)
    assert (retrained["version"], retrained["embedded"]) == (3, 9)
    assert retrained["space_id"] != third["space_id"]
    expected = load_encoder(table / "encoders" / str(retrained["space_id"])).embed([Image.open(io.BytesIO(png(99)))])
    assert np.array_equal(np.frombuffer(vectors_by_id(read_rows(table))["0000.tar/new"], np.float32), expected[0])
    assert open_table(str(table), version=2).space_id == third["space_id"]

    assert run_command(["rollback", str(table), "--to", "2", "--why", "search got worse"]) == 0
    assert vectors_by_id(read_rows(table)) == rows
    capfd.readouterr()
    assert nightly_job(["--config", str(job)]) == 1
    error = f"space {retrained['space_id']} is not published, because a rollback holds it back (search got worse)"
    assert error in capfd.readouterr().err
    assert open_table(str(table)).version == 4

    shutil.rmtree(tmp_path / "ten")
    shutil.copytree(tmp_path / "ten-before", tmp_path / "ten")
    (shards / "0005.tar").write_bytes(tar_of([("more.png", png(96))]))
    back = tonight(job, capfd)
    assert (back["version"], back["embedded"], back["space_id"]) == (5, 1, third["space_id"])

    back_ids = list(vectors_by_id(read_rows(table)))
    edit_tensors(tmp_path / "ten", lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})
    released = tonight(job, capfd, "--release")
    assert (released["version"], released["space_id"]) == (6, retrained["space_id"])
    assert released["embedded"] == 1  # the others' rows are in version 3
    for version in listed_versions(open_table(str(table)).store):
        verify_table(open_table(str(table), version))
    assert not list((table / "staging").rglob("*.parquet"))

    capfd.readouterr()
    assert run_command(["explain", str(table), "0000.tar/new", "--json"]) == 0
    explained = json.loads(capfd.readouterr().out)
    assert (explained["shard"], explained["space_id"]) == ("0000.tar", released["space_id"])
    assert explained["image_sha256"] == hashlib.sha256(png(99)).hexdigest()
    assert explained["first_version"] == 3
    assert [Path(adapter["uri"]).name for adapter in explained["adapters"]] == ["ten", "more"]

    assert run_command(["forget", str(table), "0000.tar/new", "--why", "its owner asked"]) == 0
    assert listed_versions(open_table(str(table)).store) == [1, 7]  # version 1 had another 0000.tar
    assert set(vectors_by_id(read_rows(table))) == set(back_ids) - {"0000.tar/new"}
    assert read_rejects(table) == {"0000.tar/new": "forgotten"}
    edit_tensors(tmp_path / "ten", lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})
    anew = tonight(job, capfd)
    assert (anew["version"], anew["embedded"]) == (8, 10)
    assert read_rejects(table) == {"0000.tar/new": "forgotten"}
    verify_table(open_table(str(table)))
    capfd.readouterr()
    assert run_command(["forget", str(table), "0000.tar/nobody", "--why", "typo"]) == 2
    assert "no retained version holds '0000.tar/nobody'" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_bad_updates_are_stopped_and_the_version_before_stays(
    tmp_path: Path,
    base_model: Path,
    real_adapters: dict[str, Path],
    real_images: list[LabelledImage],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Real weights and images: one adapter at weight 20, a collapsed encoder, another processor; and two good updates."""
    write_shards(real_images[:: len(real_images) // 300][:300], tmp_path / "shards", per_shard=75)
    ten, more = real_adapters.values()

    def night(weights: tuple[float, float], base: Path = base_model, code: int = 0) -> str:
        recipe = write_recipe(tmp_path, base, {ten: weights[0], more: weights[1]}, image_size=56)
        job = write_job(tmp_path, recipe, tmp_path / "shards", carry=["category:int64"])
        capfd.readouterr()
        assert nightly_job(["--config", str(job)]) == code, capfd.readouterr().err
        return capfd.readouterr().err

    collapsed = shutil.copytree(base_model, tmp_path / "collapsed")
    weights = load_file(collapsed / "model.safetensors")
    late = [name for name in weights if re.search(r"layer\.(8|9|10|11)\.layer_scale", name)]
    assert late
    save_file(weights | {name: weights[name] * 30 for name in late}, collapsed / "model.safetensors", metadata={"format": "pt"})
    other_pixels = shutil.copytree(base_model, tmp_path / "other-pixels")
    settings = json.loads((other_pixels / "preprocessor_config.json").read_text())
    settings |= {"image_mean": settings["image_std"], "image_std": settings["image_mean"]}
    (other_pixels / "preprocessor_config.json").write_text(json.dumps(settings))

    night((0.5, 0.5))
    assert "neighbours" in night((20.0, 0.5), code=1)
    assert re.search("collapsed|spread|neighbours", night((0.5, 0.5), collapsed, code=1))
    assert "processor: images are prepared in another way: " in night((0.5, 0.5), other_pixels, code=1)
    table = open_table(str(tmp_path / "table"))
    assert (table.version, table.count) == (1, 300)
    assert "the change is below your threshold" in night((0.5001, 0.5))
    assert open_table(str(tmp_path / "table")).version == 1
    night((0.6, 0.4))
    accepted = ["publish", str(tmp_path / "job.yaml"), "--accept", "processor", "--why", "the new camera"]
    night((0.6, 0.4), other_pixels, code=1)
    assert run_command(accepted) == 0
    manifest = open_table(str(tmp_path / "table")).manifest
    assert (manifest.version, manifest.gates["processor"]["accepted"]) == (3, "the new camera")
    assert manifest.gates["neighbours"]["holds"]
    print({name: round(gate["value"], 3) for name, gate in manifest.gates.items()})
