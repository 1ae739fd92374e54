"""Recipes and jobs as they are read: paths, shorthands, overrides, and what is refused in which words."""

import re
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest

from lora_embed.config.models import OWN_COLUMNS, CarryField, JobConfig, Recipe, load_job, load_recipe
from lora_embed.config.values import VectorType
from lora_embed.errors import ConfigError
from lora_embed.images.decode import MAX_PIXELS
from lora_embed.schema import (
    CARRY_TYPES,
    MAX_BYTES,
    REJECT_SCHEMA,
    VECTOR_TYPES,
    Layout,
    data_schema,
    part_schema,
    sample_schema,
)

JOB = "recipe: recipe.yaml\ninput: shards\ntable: table\n"
RECIPE = "base_model: ./base\nadapters: [{path: ./one}]\n"
ADAPTER = "base_model: ./base\nadapters: [{{path: '{}'}}]\n"


def job_of(folder: Path, text: str, *overrides: str) -> JobConfig:
    (folder / "job.yaml").write_text(text)
    return load_job(folder / "job.yaml", list(overrides))


def recipe_of(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml")


def without(key: str) -> str:
    return "".join(line for line in JOB.splitlines(keepends=True) if not line.startswith(f"{key}:"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is not the file's."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_defaults_and_types_that_the_schema_has_too_are_the_same() -> None:
    defaults = {name: JobConfig.model_fields[name].default for name in ("chunk_size", "max_pixels", "max_bytes", "vector_type")}
    layout = Layout(precision="float32", batch_size=1)
    assert defaults == {name: getattr(layout, name) for name in defaults}
    assert (layout.max_pixels, layout.max_bytes) == (MAX_PIXELS, MAX_BYTES)
    assert set(VECTOR_TYPES) == set(get_args(VectorType))
    assert set(CARRY_TYPES) == set(get_args(CarryField.model_fields["type"].annotation))


def test_no_field_may_have_the_name_of_a_column() -> None:
    schemas = (data_schema(4, "float32", ()), part_schema(4, "float32", ()), sample_schema(()), REJECT_SCHEMA)
    assert set(OWN_COLUMNS) == {name for schema in schemas for name in schema.names}


def test_paths_in_a_job_count_from_its_file(tmp_path: Path, elsewhere: Path) -> None:
    job = job_of(tmp_path, "recipe: ../r.yaml\ninput: ['a/{0..3}.tar', /b/*.tar, s3://bucket/c]\ntable: ./t/../table\n")
    assert job.recipe == str(tmp_path.parent / "r.yaml")
    assert job.input == (f"{tmp_path}/a/{{0..3}}.tar", "/b/*.tar", "s3://bucket/c")
    assert job.table == f"{tmp_path}/table"


def test_paths_count_from_a_file_named_relatively(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert load_job("../job.yaml").table == f"{tmp_path}/table"


def test_paths_in_overrides_count_from_the_current_folder(tmp_path: Path, elsewhere: Path) -> None:
    job = job_of(tmp_path, JOB, "table=t", "recipe=../r.yaml", "input=[a, 's3://b/c']")
    assert (job.table, job.recipe) == (f"{elsewhere}/t", f"{tmp_path}/r.yaml")
    assert job.input == (f"{elsewhere}/a", "s3://b/c")
    assert job_of(tmp_path, JOB, "input=one.tar").input == (f"{elsewhere}/one.tar",)


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert job_of(tmp_path, JOB, "table=~/t").table == "/home/someone/t"
    assert recipe_of(tmp_path, "base_model: ~/base\nmerge_method: none\n").base_model == "/home/someone/base"
    assert job_of(tmp_path, JOB, "table=~nobody-of-that-name/t").table.endswith("~nobody-of-that-name/t")


@pytest.mark.parametrize(
    ("written", "base", "adapter"),
    [
        ("org/model", "org/model", None),  # a base of the hub; as an adapter refused
        ("model", "model", "{folder}/model"),
        ("here", "{folder}/here", "{folder}/here"),
        ("models/here", "{folder}/models/here", "{folder}/models/here"),
        ("models/gone", None, None),  # the folder `models` is there, so no repository was meant
        ("./org/model", "{folder}/org/model", "{folder}/org/model"),
        ("../model", "{parent}/model", "{parent}/model"),
        ("/models/one", "/models/one", "/models/one"),
        ("a/b/c", "{folder}/a/b/c", "{folder}/a/b/c"),  # no name of the hub has two slashes
        ("hf://org/model", "hf://org/model", "hf://org/model"),
        ("hf://org/model@v1", "hf://org/model@v1", "hf://org/model@v1"),
        ("s3://bucket/model", "s3://bucket/model", "s3://bucket/model"),
        ("memory://model", "memory://model", "memory://model"),
    ],
)
def test_an_adapter_is_a_path_and_a_base_may_be_a_name_of_the_hub(
    tmp_path: Path, elsewhere: Path, written: str, base: str | None, adapter: str | None
) -> None:
    for folder in ("here", "models/here"):
        (tmp_path / folder).mkdir(parents=True)
    texts = {"base_model": f"base_model: {written}\nmerge_method: none\n", "adapters[0].path": ADAPTER.format(written)}
    for (key, text), expected in zip(texts.items(), (base, adapter), strict=True):
        if expected is None:
            with pytest.raises(ConfigError) as refused:
                recipe_of(tmp_path, text)
            said = (
                f"recipe.yaml: {key} is {written}, but there is no directory {tmp_path / written}. Correct the path, or write"
            )
            assert said in str(refused.value)
            assert f" hf://{written} if you mean that repository of the Hugging Face hub." in str(refused.value)
        else:
            recipe = recipe_of(tmp_path, text)
            places = {"base_model": recipe.base_model} | {f"adapters[{n}].path": a.path for n, a in enumerate(recipe.adapters)}
            assert places[key] == expected.format(folder=tmp_path, parent=tmp_path.parent)


def test_defaults_and_shorthands(tmp_path: Path) -> None:
    job = job_of(tmp_path, JOB + "carry: [label, 'score:float64', {name: split}, {name: n, type: int64}]\n")
    assert job.input == (f"{tmp_path}/shards",)
    assert job.carry == (
        CarryField(name="label", type="string"),
        CarryField(name="score", type="float64"),
        CarryField(name="split", type="string"),
        CarryField(name="n", type="int64"),
    )
    assert (job.precision, job.chunk_size, job.batch_size, job.vector_type) == ("auto", 512, "auto", "float32")
    assert (job.max_rejects, job.max_removed, job.limit, job.resources.device) == (0.01, 0.05, None, "auto")
    recipe = recipe_of(tmp_path, RECIPE)
    assert (recipe.merge_method, recipe.pooling, recipe.normalize, recipe.image_size) == ("weighted_sum", "mean", False, None)
    assert recipe.adapters[0].weight == 1.0


def test_numbers_as_yaml_reads_them(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, "base_model: b\nadapters: [{path: a, weight: 1}, {path: b, weight: 1e-3}, {path: c, weight: -0.5}]\n"
    )
    assert [adapter.weight for adapter in recipe.adapters] == [1.0, 0.001, -0.5]
    shared = recipe_of(tmp_path, "base_model: b\nadapters: [&one {path: a, weight: 0.5}, {<<: *one, path: b}]\n")
    assert [(adapter.path, adapter.weight) for adapter in shared.adapters] == [(f"{tmp_path}/a", 0.5), (f"{tmp_path}/b", 0.5)]
    assert job_of(tmp_path, JOB + "max_rejects: 1\n").max_rejects == 1.0


def test_overrides_reach_into_sections(tmp_path: Path) -> None:
    text = JOB + "resources: {actors: {max: 4}, wait_s: 5}\n"
    job = job_of(tmp_path, text, "resources.actors.max=2", "resources.device=cpu", "chunk_size=7", "batch_size=16", "limit=3")
    assert (job.resources.actors.max, job.resources.device, job.resources.wait_s) == (2, "cpu", 5.0)
    assert (job.chunk_size, job.batch_size, job.limit) == (7, 16, 3)
    assert job_of(tmp_path, JOB, "resources.actors.min=3").resources.actors.min == 3
    assert job_of(tmp_path, JOB + "resources:\n", "resources.wait_s=0").resources.wait_s == 0.0
    job = job_of(tmp_path, JOB, "table_storage_options.config_kwargs.retries=1", "limit=1", "limit=null")
    assert (job.table_storage_options, job.limit) == ({"config_kwargs": {"retries": 1}}, None)


def test_what_was_read_cannot_be_changed(tmp_path: Path) -> None:
    job, recipe = job_of(tmp_path, JOB), recipe_of(tmp_path, RECIPE)
    for record, field in ((job, "table"), (job.resources, "device"), (recipe, "base_model"), (recipe.adapters[0], "weight")):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(record, field, "other")


REFUSED_JOBS = [
    ("chunksize: 1", "unknown key 'chunksize'. Did you mean 'chunk_size'?"),
    ("litral: 1", "unknown key 'litral'. Known keys: recipe, input, table, "),
    ("on: 1", "unknown key 'on'. Known keys: recipe, "),
    ("resources: {actors: {maxi: 1}}", "unknown key 'resources.actors.maxi'. Did you mean 'max'?"),
    ("carry: [{name: a, tpye: bool}]", "unknown key 'carry[0].tpye'. Did you mean 'type'?"),
    ("chunk_size: '512'", 'chunk_size is "512", expected a whole number'),
    ("chunk_size: 5.0", "chunk_size is 5.0, expected a whole number"),
    ("chunk_size: true", "chunk_size is true, expected a whole number"),
    ("chunk_size: 0", "chunk_size is 0, expected at least 1"),
    ("chunk_size: 65537", "chunk_size is 65537, expected at most 65536"),
    ("batch_size: 0", "batch_size is 0, expected auto or at least 1"),
    ("batch_size: many", 'batch_size is "many", expected auto or a whole number'),
    ("limit: 2024-12-25", "limit is 2024-12-25, expected a whole number"),
    ("precision: fp16", 'precision is "fp16", expected auto, float32, bfloat16 or float16'),
    ("vector_type: bfloat16", 'vector_type is "bfloat16", expected float32 or float16'),
    ("max_rejects: 2", "max_rejects is 2, expected at most 1"),
    ("max_removed: -0.1", "max_removed is -0.1, expected at least 0"),
    ("max_rejects: .nan", "max_rejects is NaN, expected a finite number"),
    ("max_rejects: yes", "max_rejects is true, expected a number"),
    ("max_rejects: few", 'max_rejects is "few", expected a number'),
    ("image_column: 5", "image_column is 5, expected text: put quotes around it"),
    ("carry: 5", "carry is 5, expected a list"),
    ("carry: [5]", "carry[0] is 5, expected keys with values: name, type"),
    ("carry: ['label:int']", 'carry[0].type is "int", expected string, int64, float64 or bool'),
    ("carry: ['']", 'carry[0].name is "", expected text that is not empty'),
    ("carry: [a, a]", "carry names 'a' 2 times. Name it once."),
    ("carry: [sha256]", "carry names 'sha256', but the table has its own column of that name."),
    ("resources: 5", "resources is 5, expected keys with values: device, actors, cpus_per_decode, wait_s"),
    ("resources:", "resources is empty, expected keys with values: device, "),
    ("resources: {device: tpu}", 'resources.device is "tpu", expected auto, gpu or cpu'),
    ("resources: {cpus_per_decode: 0}", "resources.cpus_per_decode is 0, expected more than 0"),
    ("resources: {wait_s: .inf}", "resources.wait_s is Infinity, expected a finite number"),
    ("resources: {actors: {min: 2, max: 1}}", "resources.actors: min is 2, but max is 1. Set min to max or less."),
    ("input_storage_options: secret", "input_storage_options is str, expected keys and values"),
]
REFUSED_KEYS = [
    ("table", "", "key 'table' is missing. Add it."),
    ("table", "table: ''", 'table is "", expected text that is not empty'),
    ("table", "table: 5", "table is 5, expected text: put quotes around it"),
    ("table", "table: shards/table", "table {folder}/shards/table lies in the input {folder}/shards, "),
    ("table", "table: shards", "table {folder}/shards lies in the input {folder}/shards, "),
    ("input", "input: []", "input is [], expected at least one"),
    ("input", "input: [5]", "input[0] is 5, expected text: put quotes around it"),
    ("input", "input: ['']", 'input[0] is "", expected text that is not empty'),
    ("recipe", "recipe:", "recipe is empty, expected text"),
    (
        "recipe",
        "recipe: &a [*a]",
        "an alias contains itself, or aliases stand for more than 1,000,000 values. Write the values out.",
    ),
]
REFUSED_RECIPES = [
    ("adapters: 5", "adapters is 5, expected a list"),
    ("adapters: one", 'adapters is "one", expected a list'),
    ("adapters: {path: a}", "adapters is {'path': 'a'}, expected a list"),
    ("adapters: [one]", 'adapters[0] is "one", expected keys with values: path, weight, revision'),
    ("adapters: [{weight: 1}]", "key 'adapters[0].path' is missing. Add it."),
    ("adapters: [{path: a, weight: .nan}]", "adapters[0].weight is NaN, expected a finite number"),
    ("adapters: [{path: a}, {path: b, weight: -.inf}]", "adapters[1].weight is -Infinity, expected a finite number"),
    ("adapters: [{path: a, weight: yes}]", "adapters[0].weight is true, expected a number"),
    ("adapters: [{path: a, weight: half}]", 'adapters[0].weight is "half", expected a number'),
    ("adapters: [{path: a, scale: 1}]", "unknown key 'adapters[0].scale'. Known keys: path, weight, revision."),
    ("", "adapters is empty. Name at least one, or set merge_method to none"),
    (
        "adapters: [{path: a}]\nmerge_method: none",
        "merge_method is none, which uses the base model alone, but adapters lists 1.",
    ),
    (
        "adapters: [{path: a, weight: 0}, {path: b, weight: 0.0}]",
        "the weight of every adapter is 0. To use the base model alone,",
    ),
    ("adapters: [{path: a, weight: 0.5}]\nmerge_method: concat", "merge_method concat uses every adapter at weight 1."),
    ("adapters: [{path: a}]\npooling: max", 'pooling is "max", expected mean, '),
    ("adapters: [{path: a}]\nnormalize: 1", "normalize is 1, expected true or false"),
    ("adapters: [{path: a}]\nimage_size: 7", "image_size is 7, expected at least 8"),
    ("adapters: [{path: a}]\nbase-model: x", "unknown key 'base-model'. Did you mean 'base_model'?"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED_JOBS, ids=[text for text, _ in REFUSED_JOBS])
def test_a_job_is_refused_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        job_of(tmp_path, f"{JOB}{text}\n")
    assert str(error.value).startswith(f"{tmp_path}/job.yaml: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "line", "message"), REFUSED_KEYS, ids=[f"{key}~{line}" for key, line, _ in REFUSED_KEYS])
def test_what_every_job_needs(tmp_path: Path, key: str, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        job_of(tmp_path, f"{without(key)}{line}\n")
    assert str(error.value).startswith(f"{tmp_path}/job.yaml: {message.format(folder=tmp_path)}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), REFUSED_RECIPES, ids=[text for text, _ in REFUSED_RECIPES])
def test_a_recipe_is_refused_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe_of(tmp_path, f"base_model: ./base\n{text}\n")
    assert str(error.value).startswith(f"{tmp_path}/recipe.yaml: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("table", ["table", "shardsandmore", "s3://bucket/shards/table"])
def test_a_table_beside_its_input_is_fine(tmp_path: Path, table: str) -> None:
    assert job_of(tmp_path, f"{without('table')}table: {table}\n").table.endswith(table)
    assert job_of(tmp_path, JOB, f"input={tmp_path}/*.tar", f"table={tmp_path}/table").table == f"{tmp_path}/table"
    with pytest.raises(ConfigError, match="lies in the input"):
        job_of(tmp_path, JOB, f"input=file://{tmp_path}/", f"table={tmp_path}/table")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chunk_size", "expected KEY=VALUE, for example --set chunk_size=256"),
        ("=5", "expected KEY=VALUE"),
        ("chunk_size=0", "chunk_size is 0, expected at least 1"),
        ("chunksize=1", "unknown key 'chunksize'. Did you mean 'chunk_size'?"),
        ("resources.actors.max=0", "resources.actors.max is 0, expected at least 1"),
        ("resources={actors: {max: 0}}", "resources.actors.max is 0, expected at least 1"),
        ("resources.device=tpu", 'resources.device is "tpu", expected auto, gpu or cpu'),
        ("table=", "table is empty, expected text"),
        ("table.path=5", "'table' is \"/"),
        ("input=[a", "the value is not valid YAML: line 1, column 3: "),
        ("limit=2024-13-45", "the value is not valid YAML: month must be in 1..12. Put quotes around it."),
    ],
)
def test_an_override_is_refused_by_its_own_name(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        job_of(tmp_path, JOB, "chunk_size=7", override)
    assert str(error.value).startswith(f"--set {override}: {message}")


def test_a_wrong_key_beside_an_override_is_named_by_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        job_of(tmp_path, JOB + "resources: {wait_s: -1, actors: {min: 0}}\n", "resources.device=cpu", "resources.actors.max=0")
    assert sorted(str(error.value).splitlines()) == [
        "--set resources.actors.max=0: resources.actors.max is 0, expected at least 1",
        f"{tmp_path}/job.yaml: resources.actors.min is 0, expected at least 1",
        f"{tmp_path}/job.yaml: resources.wait_s is -1, expected at least 0",
    ]


def test_a_pool_of_one_size_is_a_pool(tmp_path: Path) -> None:
    actors = job_of(tmp_path, JOB, "resources.actors.min=2", "resources.actors.max=2").resources.actors
    assert (actors.min, actors.max) == (2, 2)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        job_of(tmp_path, JOB + "chunksize: 1\nbatch_size: 0\n", "limit=0")
    assert sorted(str(error.value).splitlines()) == [
        "--set limit=0: limit is 0, expected at least 1",
        f"{tmp_path}/job.yaml: batch_size is 0, expected auto or at least 1",
        f"{tmp_path}/job.yaml: unknown key 'chunksize'. Did you mean 'chunk_size'?",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, expected one `key: value` on each line"),
        (b"just words", 'is "just words", expected one `key: value` on each line'),
        (b"- a", "is ['a'], expected one `key: value` on each line"),
        (b"a: [1\n", "is not valid YAML: line 2, column 1: expected ',' or ']'"),
        (b"a: 1\n\tb: 2\n", "is not valid YAML: line 2, column 1: found character '\\t'"),
        (b"a: {b: 1, c: 2, b: 3}\n", "is not valid YAML: line 1, column 17: key 'b' is given twice"),
        (b"a: 2024-13-45\n", "is not valid YAML: month must be in 1..12"),
        (b"a: !!python/object:os.system x\n", "is not valid YAML: line 1, column 4: could not determine a constructor"),
        (b"\xff\xfe\x00", "cannot be read as a text file: it is not UTF-8"),
        (b"a: \x07", "is not valid YAML: unacceptable character"),
    ],
)
def test_a_file_that_holds_no_keys_and_values(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    for load in (load_job, load_recipe):
        with pytest.raises(ConfigError) as error:
            load(path)
        assert str(error.value).startswith(f"{path}: {message}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path / "none.yaml", "no such file, expected a recipe (YAML). Correct the path."),
        (tmp_path, "cannot be read as a text file: Is a directory. Name a file in UTF-8 that this user may read."),
        (
            tmp_path / "file" / "recipe.yaml",
            "cannot be read as a text file: Not a directory. Name a file in UTF-8 that this user may read.",
        ),
        (
            tmp_path / ("a" * 300),
            "cannot be read as a text file: File name too long. Name a file in UTF-8 that this user may read.",
        ),
    ]:
        with pytest.raises(ConfigError) as error:
            load_recipe(path)
        assert str(error.value) == f"{path}: {message}"


def test_members_of_tars_that_are_images(tmp_path: Path) -> None:
    def members(value: Any) -> tuple[str, ...]:
        return JobConfig(recipe="r", input=("i",), table="t", image_member=value).image_member

    assert members(()) == ()
    assert members(".JPG") == ("jpg",)
    assert members(["left.png", "right.PNG"]) == ("left.png", "right.png")
    assert members("jpg; jpeg;.png") == ("jpg;jpeg;png",)
    for wrong in (["jpg", "JPG"], "", "jpg;", ["jpg", 3]):
        with pytest.raises(ValueError, match="image_member"):
            members(wrong)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("merge_method: dare_tie", "Did you mean 'dare_ties'?"),
        ("merge_method: TIES", "Did you mean 'ties'?"),
        ("merge_method: ties-svd", "Did you mean 'ties'?"),
        ("merge_method: cat", "What PEFT calls cat is weighted_sum here."),
        ("pooling: Patch-Mean", "Did you mean 'patch_mean'?"),
        ("POOLING: mean", "unknown key 'POOLING'. Did you mean 'pooling'?"),
        ("merge_method: svd\nmerge_options: {rnak: 3}", "merge_options of svd: unknown key 'rnak'. Did you mean 'rank'?"),
        ("merge_method: svd\nmerge_options: {x: 3}", "unknown key 'x'. Known keys: rank, energy."),
        ("merge_method: linear\nmerge_options: {rank: 3}", "merge_method 'linear' takes no options. Remove them."),
        ("recipe: r\ninput: i\ntable: t", None),
    ],
)
def test_typing_errors_of_a_recipe_are_met_with_what_was_meant(tmp_path: Path, text: str, says: str | None) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/recipe.yaml: ")) as caught:
        recipe_of(tmp_path, f"{RECIPE}{text}\n" if says else f"{text}\n")
    assert (says or "is a job, expected a recipe") in str(caught.value)


@pytest.mark.parametrize("value", ["!!timestamp tomorrow", "!!int x", "!!int ''", "!!float ''", "!!set [a]", "[" * 9999])
def test_a_value_that_belies_its_tag_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"job.yaml: (is not valid YAML|its values are nested too deeply)"):
        job_of(tmp_path, f"{JOB}limit: {value}\n")
    with pytest.raises(ConfigError, match=r"--set limit=.*not valid YAML"):
        job_of(tmp_path, JOB, f"limit={value}")


@pytest.mark.parametrize("key", ["recipe", "table", "input", "reference_roots", "leave_out"])
@pytest.mark.parametrize(
    ("value", "says"),
    [("a\0b", "holds a NUL"), ("http://[", "is no URL (Invalid IPv6 URL)"), ("https:///x.tar", "is no URL (has no host)")],
)
def test_a_place_that_can_be_none_is_refused_with_its_key(tmp_path: Path, key: str, value: str, says: str) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    with pytest.raises(ConfigError, match=f"^--set: {key}: ") as caught:
        load_job(tmp_path / "job.yaml", [f'{key}="{value}"'.replace("\0", "\\0")])
    assert says in str(caught.value)
