"""Commands on a table that only the options of a job file reach: the environment holds no keys, and no endpoint."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import run_here, tiny_recipe, write_job, write_recipe, write_tars
from lora_embed import load_encoder, open_table
from lora_embed.cli.main import run_command
from lora_embed.cli.options import find_table, options_like
from lora_embed.cli.tables import TABLE_COMMANDS
from lora_embed.store.store import Store
from models import save_adapter, save_base
from s3 import S3Server
from samples import png
from tuning import write_labelled

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def job(tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job whose shards and table lie on the server, with version 1 published."""
    run_here(monkeypatch)
    name = tmp_path.name
    upload(server, write_tars(tmp_path / "shards", shards=2, images=3), f"{name}/shards")
    options = {"input_storage_options": server.options(), "table_storage_options": server.options()}
    places = {"input": f"s3://images/{name}/shards", "table": f"s3://images/{name}/table", "carry": ["label"]}
    path = write_job(tmp_path, tiny_recipe(tmp_path), tmp_path, **places | options)
    assert run_command(["run", str(path)]) == 0
    return path


def upload(server: S3Server, folder: Path, place: str) -> None:
    for file in folder.iterdir():
        Store(f"s3://images/{place}", server.options()).replace(file.name, file.read_bytes())


@pytest.fixture
def do(job: Path, server: S3Server, capfd: pytest.CaptureFixture[str]) -> Command:
    """A command with the job file in place of its table, its result; nothing that it says holds the secret."""
    capfd.readouterr()

    def run(name: str, *arguments: str, code: int = 0) -> Any:
        found = run_command([name, str(job), *arguments, "--json"])
        said = capfd.readouterr()
        assert server.options()["secret"] not in said.out + said.err
        assert found == code, said.err
        return json.loads(said.out) if code == 0 else said.err

    return run


def test_every_command_takes_the_job_in_place_of_the_table(job: Path, do: Command, server: S3Server, tmp_path: Path) -> None:
    table = yaml.safe_load(job.read_text())["table"]
    state = do("status")
    assert (state["table"], state["version"], state["counts"]["vectors"]) == (table, 1, 6)
    assert [run["status"] for run in state["runs"]] == ["published"]
    assert do("verify")["table"] == table
    explained = do("explain", "0001.tar/000004")
    assert (explained["shard"], explained["version"]) == ("0001.tar", 1)
    (tmp_path / "photo.png").write_bytes(png(4))
    found = do("search", str(tmp_path / "photo.png"), "-k", "2", "--page", str(tmp_path / "found.html"))
    assert (found["table"], found["hits"][0]["id"]) == (table, "0001.tar/000004")
    assert (tmp_path / "found.html").read_text().count("data:image/jpeg") == 3, (
        "the pictures of the hits are read as the job reads"
    )
    assert do("export", "--to", "faiss-flat", "--out", str(tmp_path / "index"))["table"] == table
    found = do("search", str(tmp_path / "photo.png"), "-k", "1", "--index", str(tmp_path / "index"))
    assert (found["method"], found["hits"][0]["id"]) == ("faiss-flat", "0001.tar/000004")
    upload(server, write_tars(tmp_path / "more", shards=3, images=3), f"{tmp_path.name}/shards")
    assert do("run")["version"] == 2
    rolled = do("rollback", "--to", "1", "--why", "worse")
    assert (rolled["table"], rolled["version"]) == (table, 3)
    assert do("forget", "0000.tar/000001", "--why", "asked")["version"] == 4
    assert do("gc", "--dry-run")["table"] == table
    opened = open_table(table, storage_options=server.options())
    assert "0000.tar/000001" not in opened.to_dataset().to_table(columns=["id"])["id"].to_pylist()
    assert load_encoder(f"{table}/encoders/{opened.space_id}", storage_options=server.options()).space_id == opened.space_id


def test_no_command_on_a_table_is_left_out() -> None:
    """A new one is to find its table by the same words."""
    for command in TABLE_COMMANDS:
        assert {"table", "set_"} <= set(command.__annotations__), command.__name__
        assert "find_table" in command.__code__.co_names


def test_overrides_are_those_of_a_run(job: Path, do: Command, server: S3Server, tmp_path: Path) -> None:
    other = f"s3://images/{tmp_path.name}/other"
    assert "is not a table: it has no versions, staged parts or encoders" in do("status", "--set", f"table={other}", code=2)
    assert do("status", "--set", "chunk_size=7")["version"] == 1
    said = do("status", "--set", "table_storage_options.secret=mistaken", code=2)
    assert "access denied" in said
    assert "mistaken" not in said
    assert "unknown key 'chunksize'" in do("status", "--set", "chunksize=7", code=2)


def test_an_image_beside_the_table_is_read_as_the_input_is(do: Command, server: S3Server, tmp_path: Path) -> None:
    Store(f"s3://images/{tmp_path.name}", server.options()).replace("photo.png", png(2))
    found = do("search", f"s3://images/{tmp_path.name}/photo.png", "-k", "1")
    assert found["hits"][0]["id"] == "0000.tar/000002"
    assert options_like("https://elsewhere/photo.png", ("s3://images/shards",), {"secret": "s"}) == {}
    assert options_like("photo.png", ("s3://images/shards", "here"), {"secret": "s"}) == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["status", "gone.yaml"], "gone.yaml: no such file, expected a job file (YAML)"),
        (["status", "recipe.yaml"], "recipe.yaml: is a recipe, expected a job file"),
        (
            ["verify", "table", "--set", "chunk_size=7"],
            "--set chunk_size=…: changes a key of a job file, but table is not a job file. Name the job",
        ),
        (
            ["evaluate", "--recipe", "recipe.yaml", "--label", "label", "--data", "job.yaml", "--data", "shards"],
            "--data names the job file job.yaml and 1 other input. Name only the job file.",
        ),
    ],
)
def test_what_is_no_job_file_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("base_model: base\n")
    assert run_command(arguments) == 2
    assert says in capfd.readouterr().err


def test_a_table_itself_may_be_named_as_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "table.yaml").mkdir()
    assert find_table(str(tmp_path / "table.yaml"), None).job is None
    assert find_table("memory://job.yaml", None).job is None


@pytest.fixture
def labelled(tmp_path: Path, server: S3Server) -> Path:
    """A job file for labelled shards on the server, and a recipe for them."""
    base = save_base(tmp_path / "base")
    adapters = {save_adapter(tmp_path / name, base, 3, seed=seed): 0.5 for seed, name in ((1, "one"), (2, "two"))}
    recipe = write_recipe(tmp_path, base, adapters)
    upload(server, write_labelled(tmp_path / "shards", images=60), f"{tmp_path.name}/labelled")
    options = {"input_storage_options": server.options(), "table_storage_options": server.options()}
    places = {"input": f"s3://images/{tmp_path.name}/labelled", "table": f"s3://images/{tmp_path.name}/table"}
    return write_job(tmp_path, recipe, tmp_path, **places | options)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_evaluate_reads_labelled_images_and_keeps_its_work_by_the_options_of_a_job(
    labelled: Path, tmp_path: Path, server: S3Server, capfd: pytest.CaptureFixture[str]
) -> None:
    work = f"s3://images/{tmp_path.name}/work"
    arguments = [
        "--recipe",
        str(tmp_path / "recipe.yaml"),
        "--data",
        str(labelled),
        "--label",
        "colour",
        "--work",
        work,
        "--json",
    ]
    assert run_command(["evaluate", *arguments]) == 0
    said = capfd.readouterr()
    evaluation = json.loads(said.out)
    assert (evaluation["samples"], evaluation["inputs"]) == (64, [f"s3://images/{tmp_path.name}/labelled"])
    assert Store(work, server.options()).list_files("evaluated")
    assert server.options()["secret"] not in said.out + said.err


def test_tune_reads_labelled_images_by_the_options_of_a_job(
    labelled: Path, tmp_path: Path, server: S3Server, capfd: pytest.CaptureFixture[str]
) -> None:
    where = ["--data", str(labelled), "--label", "one=colour", "--label", "stripes", "--out", str(tmp_path / "tuned.yaml")]
    how = ["--evaluations", "4", "--methods", "weighted_sum", "--group", "pair", "--json"]
    assert run_command(["tune", str(tmp_path / "recipe.yaml"), *where, *how]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["samples"] == 64
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != labelled]
    assert not any(server.options()["secret"].encode() in text for text in [*kept, said.out.encode(), said.err.encode()])


def test_columns_of_parquet_are_those_of_the_job(tmp_path: Path, server: S3Server) -> None:
    """What `--data` reads is what a run would read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lora_embed.evaluate.request import LabelledInput
    from lora_embed.images.preprocess import Preprocessing
    from lora_embed.tune.labelled import Wanted, read_labelled

    columns = {"photo": [png(n) for n in range(8)], "name": [f"n{n}" for n in range(8)], "kind": ["a", "b"] * 4}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    shape = Preprocessing(resize=8, resample=3, crop=(8, 8), multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))
    wanted = Wanted(fields=("kind",), group=None, most=8, seed=0)
    data = LabelledInput(inputs=(str(tmp_path / "rows.parquet"),), image_column="photo", key_column="name")
    found = read_labelled(data, wanted, shape, tmp_path / "work")
    assert set(found.ids) == {f"rows.parquet/n{n}" for n in range(8)}
