"""What is given is never taken for what is not: a 0, an empty text or list means what it says, or is refused."""

import socket
from pathlib import Path
from typing import Any

import pytest

from jobs import job_of, tiny_recipe
from lora_embed.chain import cluster
from lora_embed.cli.main import run_command
from lora_embed.config.models import load_job, load_recipe
from lora_embed.errors import ConfigError, StorageError
from lora_embed.evaluate.request import Request, check_request
from lora_embed.monitor.stages import Workers
from lora_embed.run.plan import reckon
from lora_embed.schema import ChunkHead
from lora_embed.store.store import RETRY_S, Store
from lora_embed.tune.goal import Budget, read_label
from lora_embed.tune.tune import tune
from tuning import tiny_search

JOB = "recipe: recipe.yaml\ninput: shards\ntable: table\n"
RECIPE = "base_model: ./base\nadapters: [{path: ./one}]\n"


def test_no_minutes_try_what_others_are_measured_by_and_nothing_more(tmp_path: Path) -> None:
    tuned = tune(tiny_search(tmp_path, budget=Budget(minutes=0.0)))
    assert [trial.number for trial in tuned.evaluation.trials] == [1, 2, 3]  # each adapter alone and equal weights
    assert tuned.recipe.merge_method == "weighted_sum"


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), -1.0])
def test_minutes_that_are_no_time_are_refused(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(ConfigError, match=r"--minutes is .*, expected a number of minutes, 0 or more"):
        tune(tiny_search(tmp_path, budget=Budget(minutes=minutes)))


def test_a_budget_is_spent_by_whichever_is_over_first() -> None:
    assert Budget(minutes=0.0).is_spent(0, 0.0)
    assert Budget(evaluations=0).is_spent(0, 0.0)
    assert Budget(evaluations=9, minutes=0.0).is_spent(1, 0.0)
    assert not Budget(evaluations=9).is_spent(8, 1e9)
    assert not Budget(minutes=1.0).is_spent(10**9, 59.9)


@pytest.mark.parametrize("text", ["=kind", "=kind:2", "kind:0", "kind:", "", ":", "=", "kind:nan", "kind:-0"])
def test_a_label_that_leaves_out_what_it_begins_to_say_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected FIELD, ADAPTER=FIELD or ADAPTER=FIELD:IMPORTANCE"):
        read_label(text)


@pytest.mark.parametrize("methods", ["", ",", " , "])
def test_methods_that_name_none_are_not_all(tmp_path: Path, methods: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_search(tmp_path)
    command = ["tune", str(tmp_path / "recipe.yaml"), "--data", str(tmp_path / "shards"), "--label", "colour"]
    assert run_command([*command, "--out", str(tmp_path / "tuned.yaml"), "--methods", methods]) == 2
    assert "which names no method. Name one or more, or omit the option for all." in capsys.readouterr().err


def test_a_group_without_a_name_is_refused_by_tune(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--group is empty"):
        tune(tiny_search(tmp_path, group=""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": ""}, "--group is empty"),
        ({"split": ""}, "--split is empty"),
        ({"reference": ""}, "--reference is empty"),
        ({"work": ""}, "--work is empty"),
        ({"labels": ("",)}, "--label is empty"),
        ({"inputs": ("a", "")}, "--data is empty"),
        ({"recipes": ("",)}, "--recipe is empty"),
        ({"splits": 0}, "--splits is 0, expected 2 or more"),
        ({"seed": -1}, "--seed is -1, expected 0 or more"),
    ],
)
def test_an_evaluation_is_asked_for_in_full(change: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"recipes": ("r.yaml",), "inputs": ("shards",), "labels": ("kind",)}
    with pytest.raises(ConfigError, match=message):
        check_request(Request(**asked | change))
    check_request(Request(**asked))


def test_an_empty_path_is_not_the_current_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evaluate", "--recipe", "r.yaml", "--data", "", "--label", "kind"]) == 2
    assert "--data is empty" in capsys.readouterr().err


REFUSED = [
    ("limit=0", "limit is 0, expected at least 1"),
    ("batch_size=0", "batch_size is 0, expected"),
    ("chunk_size=0", "chunk_size is 0, expected at least 1"),
    ("max_pixels=0", "max_pixels is 0, expected at least 1"),
    ("max_bytes=0", "max_bytes is 0, expected at least 1"),
    ("retain.runs=0", "retain.runs is 0, expected at least 1"),
    ("retain.versions=0", "retain.versions is 0, expected at least 2"),
    ("resources.actors.max=0", "resources.actors.max is 0, expected at least 1"),
    ("resources.actors.min=0", "resources.actors.min is 0, expected at least 1"),
    ("resources.cpus_per_decode=0", "resources.cpus_per_decode is 0, expected more than 0"),
    ("image_column=''", 'image_column is "", expected text that is not empty'),
    ("key_column=''", 'key_column is "", expected text that is not empty'),
    ("carry=''", 'carry[0].name is "", expected text that is not empty'),
    ("carry=['']", 'carry[0].name is "", expected text that is not empty'),
    ("carry=['label:']", 'carry[0].type is "", expected string, int64, float64 or bool'),
    ("carry=[':int64']", 'carry[0].name is "", expected text that is not empty'),
    ("input=[]", "input is [], expected at least one"),
    ("input=''", 'input[0] is "", expected text that is not empty'),
    ("table=''", 'table is "", expected text that is not empty'),
    ("recipe=''", 'recipe is "", expected text that is not empty'),
    ("precision=''", 'precision is "", expected auto'),
    ("gates=''", 'gates is "", expected keys'),
    ("resources=''", 'resources is "", expected keys'),
    ("input_storage_options=''", "input_storage_options is str, expected keys"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_what_a_job_cannot_mean_is_refused(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    with pytest.raises(ConfigError) as caught:
        load_job(tmp_path / "job.yaml", [override])
    assert message in str(caught.value)


def test_zeros_of_a_job_that_mean_something_stay(tmp_path: Path) -> None:
    zeros = ["resources.wait_s=0", "reembed.sample=0", "reembed.drift=0", "reembed.skip_overlap=0", "reembed.skip_gain=0"]
    zeros += ["max_rejects=0", "max_removed=0", "prices.cpu_hour=0", "gates.overlap=0", "input_storage_options.retry_s=0"]
    (tmp_path / "job.yaml").write_text(JOB)
    job = load_job(tmp_path / "job.yaml", zeros)
    assert (job.resources.wait_s, job.reembed.sample, job.reembed.drift) == (0, 0, 0)
    assert (job.reembed.skip_overlap, job.reembed.skip_gain, job.max_rejects, job.max_removed) == (0, 0, 0, 0)
    assert (job.prices.cpu_hour, job.prices.gpu_hour, job.gates) == (0, None, {"overlap": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: ''\nmerge_method: none\n", 'base_model is "", expected text'),
        ("base_model: ./base\nadapters: [{path: ''}]\n", 'adapters[0].path is "", expected text'),
        ("base_model: ./base\nadapters: []\n", "adapters is empty"),
        (RECIPE + "revision: ''\n", 'revision is "", expected text'),
        ("base_model: ./base\nadapters: [{path: ./one, revision: ''}]\n", 'adapters[0].revision is "", expected text'),
        (RECIPE + "merge_method: ''\n", 'merge_method is "", expected text'),
        (RECIPE + "image_size: 0\n", "image_size is 0, expected at least 8"),
        ("base_model: ./base\nadapters: [{path: ./one, weight: 0}]\n", "the weight of every adapter is 0"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prices", "cost"), [({}, None), ({"cpu_hour": 0}, 0.0), ({"gpu_hour": 0.0}, 0.0), ({"cpu_hour": 1}, 0.02)]
)
def test_a_price_of_nothing_is_a_price(tmp_path: Path, prices: dict[str, float], cost: float | None) -> None:
    job = job_of(tmp_path, tmp_path / "recipe.yaml", tmp_path, table=str(tmp_path.parent / "table"), prices=prices)
    chunk = ChunkHead(shard_id="a", shard_name="a", prefix="a", samples=10, seconds={"forward": 10.0})
    assert reckon(job, [chunk], 72, 0.0, Workers(actors=1)).cost == cost


@pytest.mark.parametrize("given", ["", "soon", None, -1, float("nan"), float("inf"), [1]])
def test_a_time_for_retries_that_is_none_is_refused(tmp_path: Path, given: object) -> None:
    with pytest.raises(StorageError, match=r"retry_s is .*, expected a number of seconds, 0 or more"):
        Store(str(tmp_path), {"retry_s": given}).check_reachable()
    assert Store(str(tmp_path), {"retry_s": 0}).retry_s == 0
    assert Store(str(tmp_path)).retry_s == RETRY_S


@pytest.mark.parametrize("command", [["rollback", "t", "--to", "1"], ["forget", "t", "a/b"]])
def test_a_reason_that_says_nothing_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for why in ("", "  "):
        assert run_command([*command, "--why", why]) == 2
        assert "--why is empty. Give the reason" in capsys.readouterr().err


def test_version_0_is_not_the_current_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(tmp_path)
    for command in (["verify", table], ["explain", table, "a"], ["search", table, "a.png"], ["export", table, "--to", "lance"]):
        more = ["--out", str(tmp_path / "out")] if command[0] == "export" else []
        assert run_command([*command, *more, "--version", "0"]) == 2
        assert "has no version 0" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--rank", "0"), ("--energy", "0"), ("--energy", "nan")])
def test_an_adapter_that_keeps_nothing_is_refused(tmp_path: Path, option: str, value: str) -> None:
    recipe = tiny_recipe(tmp_path)
    command = ["build", str(recipe), "--out", str(tmp_path / "out"), "--store", "adapter", option, value]
    assert run_command(command) == 2
    assert not (tmp_path / "out").exists()


def test_an_empty_address_is_no_cluster_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert cluster._address() == "local"
    assert not cluster._is_joined()


@pytest.mark.parametrize("port", ["²", "70000", "-1", "many", "99999999999999999999"])
def test_a_port_that_is_none_is_said_and_another_taken(
    monkeypatch: pytest.MonkeyPatch, port: str, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cluster.METRICS_PORT, port)
    assert cluster._metrics_port() is None
    assert f"LORA_EMBED_METRICS_PORT is {port}, which cannot be used" in capfd.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    monkeypatch.setenv(cluster.METRICS_PORT, str(free))
    assert cluster._metrics_port() == free
